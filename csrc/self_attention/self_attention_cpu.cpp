// Attention of the tokens of an image to each other, and its gradient: two matrix products and four. The scores of QUERIES
// tokens lie in the second cache from the product that gives them to the one that takes them; in training the weights that
// they come to are kept. Products of what is bfloat16 in memory, which give the scores and the gradient of the weights, are
// taken in pairs where that is faster. What is computed between two products stays float32: rounded to bfloat16 it would
// cost y, or the gradient of qkv, as much as their own rounding does.

#include "self_attention/self_attention.h"

#include "common/products.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// Where the rows of a head of a sample begin, of q, k or v.
template <class T>
INLINE T* rows_of(const SelfAttention& a, T* qkv, int64_t of, int64_t which) {
    const int64_t all = a.heads * a.width;
    return qkv + of / a.heads * a.tokens * 3 * all + which * all + of % a.heads * a.width;
}
template <class T>
INLINE T* rows_of(const SelfAttention& a, T* y, int64_t of) {
    const int64_t all = a.heads * a.width;
    return y + of / a.heads * a.tokens * all + of % a.heads * a.width;
}

// Work items: QUERIES tokens of a head of a sample.
struct Queries {
    int64_t of, first, count, rows;  // rows: as many as the products take
};
INLINE Queries queries(const SelfAttention& a, int64_t item) {
    const int64_t blocks = (a.tokens + QUERIES - 1) / QUERIES, block = item % blocks;
    const int64_t groups = (a.tokens + ROWS - 1) / ROWS;  // blocks are of as many groups of ROWS as they can be alike
    const int64_t first = block * groups / blocks * ROWS, end = (block + 1) * groups / blocks * ROWS;
    const int64_t count = (end < a.tokens ? end : a.tokens) - first;
    return {item / blocks, first, count, (count + REST - 1) / REST * REST};
}

// The scratch of an item.
template <class E>
struct Memory {
    E* rows;         // [QUERIES, d]: of q, or dy
    float* scores;   // [panels of tokens, QUERIES, 32]
    float* factors;  // [QUERIES, tokens]: of the second product
    float* product;  // [QUERIES, 32]
    Memory(const SelfAttention& a, float* scratch) {
        rows = reinterpret_cast<E*>(scratch), scratch += QUERIES * elements_of<E>(a.width) + APART;
        scores = scratch, scratch += QUERIES * panels_of(a.tokens) * PANEL + APART;
        factors = scratch, scratch += QUERIES * a.tokens + APART;
        product = scratch;
    }
};

// scores = rows of ``from`` times panels of tokens.
template <class E, class T>
INLINE void score(const SelfAttention& a, const Queries& q, const T* from, int64_t row, const E* panels, Memory<E>& m) {
    const int64_t terms = elements_of<E>(a.width);
    to_rows(from + q.first * row, row, q.count, a.width, m.rows, terms);
    memset(m.rows + q.count * terms, 0, sizeof(E) * (q.rows - q.count) * terms);
    for (int64_t p = 0; p < panels_of(a.tokens); ++p) {
        const E* u = panels + p * terms * PANEL;
        multiply_rows(m.rows, q.rows, terms, u, m.scores + p * QUERIES * PANEL, u + terms * PANEL * (p + 1 < panels_of(a.tokens)));
    }
}

// to = factors times panels of d.
template <class E, class T>
INLINE void weigh(const SelfAttention& a, const Queries& q, const float* panels, Memory<E>& m, T* to, int64_t row) {
    memset(m.factors + q.count * a.tokens, 0, 4 * (q.rows - q.count) * a.tokens);
    for (int64_t first = 0; first < a.width; first += PANEL) {
        const float* u = panels + first * a.tokens;
        multiply_rows(m.factors, q.rows, a.tokens, u, m.product, u + a.tokens * PANEL * (first + PANEL < a.width));
        for (int64_t t = 0; t < q.count; ++t)
            for_vectors(a.width - first < PANEL ? a.width - first : PANEL, [&](int64_t i, int64_t n) {
                store(to + (q.first + t) * row + first + i, load(m.product + t * PANEL + i), n);
            });
    }
}

// f(vector of the scores of a query, its first token, how many) of all tokens.
template <class F>
INLINE void along_scores(float* scores, int64_t tokens, F f) {
    for (int64_t first = 0; first < tokens; first += PANEL, scores += QUERIES * PANEL)
        for_vectors(tokens - first < PANEL ? tokens - first : PANEL,
                    [&](int64_t i, int64_t n) { f(scores + i, first + i, n); });
}

// The scores of a query to weights, in place.
INLINE void softmax(float* scores, int64_t tokens, float scale) {
    VF most = splat(-__builtin_inff());
    along_scores(scores, tokens, [&](float* s, int64_t, int64_t n) {
        VF v = load(s);
        if (n < W) for (int64_t i = n; i < W; ++i) v[i] = s[0];
        most = max(v, most);
    });
    float highest = most[0];
    for (int64_t i = 1; i < W; ++i) highest = most[i] > highest ? most[i] : highest;
    VF total{};
    along_scores(scores, tokens, [&](float* s, int64_t, int64_t n) {
        const VF e = first_lanes(exp(scale * (load(s) - highest)), n);
        store(s, e), total += e;
    });
    const VF all = splat(sum(total));
    along_scores(scores, tokens, [&](float* s, int64_t, int64_t) { store(s, load(s) / all); });
}

template <class E, class T>
void forward(const SelfAttention& a, T* y, int64_t begin, int64_t end, float* scratch) {
    Memory<E> m(a, scratch);
    const int64_t all = a.heads * a.width;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(a.width));
    for (int64_t item = begin; item < end; ++item) {
        const Queries q = queries(a, item);
        const E* keys = static_cast<const E*>(a.keys) + q.of * panels_of(a.tokens) * elements_of<E>(a.width) * PANEL;
        score(a, q, rows_of(a, static_cast<const T*>(a.qkv.data), q.of, 0), 3 * all, keys, m);
        for (int64_t t = 0; t < q.count; ++t) {
            float* scores = m.scores + t * PANEL;
            softmax(scores, a.tokens, scale);
            float* weights = m.factors + t * a.tokens;
            along_scores(scores, a.tokens, [&](float* s, int64_t at, int64_t n) { store(weights + at, load(s), n); });
            if (a.weights) memcpy(a.weights + (q.of * a.tokens + q.first + t) * a.tokens, weights, 4 * a.tokens);
        }
        const float* values = static_cast<const float*>(a.values) + q.of * panels_of(a.width) * a.tokens * PANEL;
        weigh(a, q, values, m, rows_of(a, y, q.of), all);
    }
}

template <class E, class T>
void scores(const AttentionGradient& g, T* gradient, int64_t begin, int64_t end, float* scratch) {
    const SelfAttention& a = g.of;
    Memory<E> m(a, scratch);
    const int64_t all = a.heads * a.width;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(a.width));
    for (int64_t item = begin; item < end; ++item) {
        const Queries q = queries(a, item);
        const E* values = static_cast<const E*>(a.values) + q.of * panels_of(a.tokens) * elements_of<E>(a.width) * PANEL;
        with_type(g.dy.dtype, g.dy.data, [&](const auto* dy) { score(a, q, rows_of(a, dy, q.of), all, values, m); });
        for (int64_t t = 0; t < q.count; ++t) {
            float* dw = m.scores + t * PANEL;
            const int64_t row = (q.of * a.tokens + q.first + t) * a.tokens;
            const float* w = a.weights + row;
            VF total{};
            along_scores(dw, a.tokens, [&](float* s, int64_t at, int64_t n) { total += load(s) * load(w + at, n); });
            const float mean = sum(total);
            along_scores(dw, a.tokens, [&](float* s, int64_t at, int64_t n) {
                const VF ds = scale * load(w + at, n) * (load(s) - mean);
                store(m.factors + t * a.tokens + at, ds, n), store(g.dscores + row + at, ds, n);
            });
        }
        const float* keys = static_cast<const float*>(a.keys) + q.of * panels_of(a.width) * a.tokens * PANEL;
        weigh(a, q, keys, m, rows_of(a, gradient, q.of, 0), 3 * all);
    }
}

// dk = ds^T q and dv = w^T dy.
template <class T>
void columns(const AttentionGradient& g, T* gradient, int64_t begin, int64_t end, float* scratch) {
    const SelfAttention& a = g.of;
    float* u = scratch + COLUMNS_SCRATCH;
    const int64_t all = a.heads * a.width, wide = (a.width + WIDE - 1) / WIDE, tall = (a.tokens + TALL - 1) / TALL;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t of = item / (2 * wide * tall), which = 1 + item / (wide * tall) % 2;
        const int64_t k = item / tall % wide * WIDE, n = item % tall * TALL;
        const int64_t of_k = a.width - k < WIDE ? a.width - k : WIDE, of_n = a.tokens - n < TALL ? a.tokens - n : TALL;
        const int64_t square = of * a.tokens * a.tokens + n;
        const auto multiply = [&](const float* weights, const auto* x, int64_t row) {
            multiply_columns<float>(weights + square, a.tokens, of_n, x + k, row, of_k, a.tokens, scratch, u);
        };
        if (which == 1) multiply(g.dscores, rows_of(a, static_cast<const T*>(a.qkv.data), of, 0), 3 * all);
        else with_type(g.dy.dtype, g.dy.data, [&](const auto* dy) { multiply(a.weights, rows_of(a, dy, of), all); });
        write_columns(u, of_n, of_k, rows_of(a, gradient, of, which) + n * 3 * all + k, 3 * all);
    }
}

}  // namespace

// A work item is a panel.
void self_attention_pack(const AttentionPanels& p, int64_t begin, int64_t end) {
    const SelfAttention& a = p.of;
    const int64_t outputs = p.of_tokens ? a.tokens : a.width, count = p.of_tokens ? a.width : a.tokens;
    const int64_t panels = panels_of(outputs), row = 3 * a.heads * a.width;
    const auto pack = [&]<class E>(E* to) {
        with_type(a.qkv.dtype, a.qkv.data, [&](const auto* qkv) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t of_output = p.of_tokens ? row : 1, first = item % panels * PANEL;
                to_panel(rows_of(a, qkv, item / panels, p.which) + first * of_output, of_output, p.of_tokens ? 1 : row,
                         outputs - first, count, to + item * elements_of<E>(count) * PANEL);
            }
        });
    };
    p.pairs ? pack(static_cast<Pair*>(p.to)) : pack(static_cast<float*>(p.to));
}

void self_attention_forward(const SelfAttention& a, int64_t begin, int64_t end, float* scratch) {
    with_output_type(a.dtype, a.y, [&](auto* y) {
        a.pairs ? forward<Pair>(a, y, begin, end, scratch) : forward<float>(a, y, begin, end, scratch);
    });
}

void self_attention_scores(const AttentionGradient& g, int64_t begin, int64_t end, float* scratch) {
    with_output_type(g.of.dtype, g.gradient, [&](auto* to) {
        g.of.pairs ? scores<Pair>(g, to, begin, end, scratch) : scores<float>(g, to, begin, end, scratch);
    });
}

// A work item is a block of dk or dv.
void self_attention_columns(const AttentionGradient& g, int64_t begin, int64_t end, float* scratch) {
    with_output_type(g.of.dtype, g.gradient, [&](auto* to) { columns(g, to, begin, end, scratch); });
}

}  // namespace fastddpm::FASTDDPM_ISA
