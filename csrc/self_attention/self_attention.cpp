// fastddpm::self_attention and its backward: schemas and host code. What they compute:
// fastddpm/ops/self_attention/reference.py.

#include "self_attention/self_attention.h"

#include "common/host.h"

namespace fastddpm {
namespace {

enum { OF_ITEM, OF_PANELS, OF_SCORES };  // uses of kept memory

SelfAttention arguments(const Tensor& qkv, int64_t heads) {
    SelfAttention a{};
    a.batch = qkv.size(0), a.heads = heads, a.tokens = qkv.size(1), a.width = qkv.size(2) / (3 * heads);
    a.qkv = values(qkv, 0), a.dtype = a.qkv.dtype;
    a.pairs = a.dtype == DType::bf16 && multiplies_pairs();
    return a;
}

// Keys (1) or values (2) as panels of tokens or of d, to memory of which so much is left.
void* pack(const SelfAttention& a, int64_t which, bool of_tokens, bool pairs, float*& to) {
    const int64_t columns = of_tokens ? a.tokens : a.width, terms = of_tokens ? a.width : a.tokens;
    const int64_t panels = a.batch * a.heads * ceil_div(columns, PANEL);
    const AttentionPanels p{a, which, of_tokens, pairs, to};
    parallel(panels, PANEL * terms, [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(self_attention_pack)(p, begin, end); });
    to += panels * terms * PANEL;
    return p.to;
}

// For both, of a sample.
int64_t floats_of_panels(const SelfAttention& a) {
    return a.heads * (ceil_div(a.tokens, PANEL) * a.width + ceil_div(a.width, PANEL) * a.tokens) * PANEL;
}
float* panels(const SelfAttention& a) { return scratch<OF_PANELS>(a.batch * floats_of_panels(a)); }

template <class F>
void by_queries(const SelfAttention& a, const F& kernel) {
    parallel(a.batch * a.heads * ceil_div(a.tokens, QUERIES), QUERIES * (a.tokens + a.width), [&](int64_t begin, int64_t end) {
        kernel(begin, end, scratch<OF_ITEM>(ATTENTION_SCRATCH(a.tokens, a.width)));
    });
}

// f(first sample, how many) of so many samples at a time that panels and scores lie in the caches of up to four threads.
template <class F>
void by_samples(const SelfAttention& a, const F& f) {
    const int64_t floats = (1 << 18) * caches();
    const int64_t batch = a.batch, of_sample = floats_of_panels(a) + a.heads * a.tokens * a.tokens;
    const int64_t most = std::max<int64_t>(1, floats / std::max<int64_t>(1, of_sample));
    for (int64_t first = 0; first < batch; first += most) f(first, std::min(most, batch - first));
}

// Where sample ``first`` of a tensor [batch, ..] begins.
void* from_sample(const Tensor& t, int64_t first) {
    return static_cast<char*>(t.data_ptr()) + first * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// y, and for ``training`` the weights.
std::vector<Tensor> self_attention(const Tensor qkv, int64_t heads, bool training) {
    SelfAttention a = arguments(qkv, heads);
    std::vector<Tensor> found{new_tensor({a.batch, a.tokens, a.heads * a.width}, qkv.scalar_type())};
    if (training) found.push_back(new_tensor({a.batch, a.heads, a.tokens, a.tokens}, ScalarType::Float));
    by_samples(a, [&](int64_t first, int64_t count) {
        a.batch = count, a.qkv.data = from_sample(qkv, first), a.y = from_sample(found[0], first);
        a.weights = training ? static_cast<float*>(from_sample(found[1], first)) : nullptr;
        float* memory = panels(a);
        a.keys = pack(a, 1, true, a.pairs, memory), a.values = pack(a, 2, false, false, memory);
        by_queries(a, [&](int64_t begin, int64_t end, float* scratch) {
            FASTDDPM_KERNEL(self_attention_forward)(a, begin, end, scratch);
        });
    });
    return found;
}

Tensor self_attention_backward(const Tensor dy, const Tensor qkv, const Tensor weights, int64_t heads) {
    AttentionGradient g{arguments(qkv, heads), values(dy, 0), nullptr, nullptr};
    SelfAttention& a = g.of;
    a.pairs = a.pairs && g.dy.dtype == DType::bf16;
    Tensor gradient = new_tensor({a.batch, a.tokens, 3 * a.heads * a.width}, qkv.scalar_type());
    by_samples(a, [&](int64_t first, int64_t count) {
        a.batch = count, a.qkv.data = from_sample(qkv, first), a.weights = static_cast<float*>(from_sample(weights, first));
        g.dy.data = from_sample(dy, first), g.gradient = from_sample(gradient, first);
        float* memory = panels(a);
        a.keys = pack(a, 1, false, false, memory), a.values = pack(a, 2, true, a.pairs, memory);
        g.dscores = scratch<OF_SCORES>(a.batch * a.heads * a.tokens * a.tokens);
        by_queries(a, [&](int64_t begin, int64_t end, float* scratch) {
            FASTDDPM_KERNEL(self_attention_scores)(g, begin, end, scratch);
        });
        parallel(a.batch * a.heads * 2 * ceil_div(a.width, WIDE) * ceil_div(a.tokens, TALL), a.tokens * WIDE,
                 [&](int64_t begin, int64_t end) {
                     FASTDDPM_KERNEL(self_attention_columns)(g, begin, end, scratch<OF_ITEM>(ATTENTION_COLUMNS_SCRATCH));
                 });
    });
    return gradient;
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def("self_attention(Tensor qkv, int heads, bool training) -> Tensor[]");
    m.def("self_attention_backward(Tensor dy, Tensor qkv, Tensor weights, int heads) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("self_attention", TORCH_BOX(&fastddpm::self_attention));
    m.impl("self_attention_backward", TORCH_BOX(&fastddpm::self_attention_backward));
}
