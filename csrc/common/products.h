// Products of matrices whose sums registers hold, for what lies in the caches. Included by kernels alone.
#pragma once

#include "common/panels.h"
#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int N = PANEL / W;                         // vectors of a panel
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 3 : 1;  // of a matrix product in registers
constexpr int REST = W == 16 ? 4 : 1;                // of those that are left
constexpr int GRADIENT_ROWS = W == 16 ? 8 : W == 8 ? 2 : 1;

// What is multiplied is numbers, or pairs of bfloat16 numbers that follow one another along the sum, the first in the low
// half: a product of pairs is the sum of two products, in float32, for which some processors have one instruction.
typedef uint32_t Pair;
template <class E>
constexpr int64_t TERMS_OF = 1;  // of a sum, that one element is
template <>
constexpr int64_t TERMS_OF<Pair> = 2;
template <class E>
INLINE int64_t elements_of(int64_t terms) { return (terms + TERMS_OF<E> - 1) / TERMS_OF<E>; }
INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

INLINE VF spread(float x) { return x - VF{}; }
INLINE VU spread(Pair x) { return x + VU{}; }
INLINE VF elements(const float* p) { return load(p); }
INLINE VU elements(const Pair* p) {
    VU v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE VF add_product(VF sum, VF a, VF b) { return sum + a * b; }
INLINE VF add_product(VF sum, VU a, VU b) {
#if defined(__AVX512BF16__)
    return (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (VF)(a & 0xffff0000u) * (VF)(b & 0xffff0000u);
    return sum + (VF)(a << 16) * (VF)(b << 16);
#endif
}

// What registers hold of R rows of a product: total[r] += one(r) u[32] ..
template <int R, class E, class One>
INLINE void add_products(VF (&total)[R][N], const E* u, One one) {
    decltype(elements(u)) b[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) b[n] = elements(u + n * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const auto a = spread(one(r));
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total[r][n] = add_product(total[r][n], a, b[n]);
    }
}

// .. and out[R, 32] += total, or = if it is the ``first``.
template <int R>
INLINE void add_to(float* out, const VF (&total)[R][N], bool first) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            float* to = out + r * PANEL + n * W;
            store(to, first ? total[r][n] : load(to) + total[r][n]);
        }
}

// out[R, 32] = v[R, channels] u[channels, 32], as a sum of sums of TERMS, which are rounded less than one of all. Of what
// will be ``next`` a line is asked for every so many bytes.
template <int R, class E>
INLINE void multiply(const E* v, int64_t v_row, int64_t channels, const E* u, float* out, const char* next,
                     int64_t apart) {
    int64_t k = 0;
    do {
        const int64_t first = k, end = channels - k < TERMS ? channels : k + TERMS;
        VF total[R][N]{};
        for (; k < end; ++k, u += PANEL) {
            __builtin_prefetch(next + k * apart, 0, 2);
            add_products<R>(total, u, [&](int r) __attribute__((always_inline)) { return v[r * v_row + k]; });
        }
        add_to<R>(out, total, first == 0);
    } while (k < channels);
}

// The same of any number of rows, a multiple of REST. What is ``next`` is asked for in two halves.
template <class E>
NOINLINE void multiply_rows(const E* v, int64_t rows, int64_t channels, const E* u, float* out, const E* next) {
    int64_t t = 0;
    const char* of_next = reinterpret_cast<const char*>(next);
    for (; t + ROWS <= rows; t += ROWS)
        multiply<ROWS>(v + t * channels, channels, channels, u, out + t * PANEL, of_next + t / ROWS % 2 * LINE, 2 * LINE);
    for (; t + 2 * REST <= rows; t += 2 * REST)
        multiply<2 * REST>(v + t * channels, channels, channels, u, out + t * PANEL, of_next, 2 * LINE);
    for (; t < rows; t += REST) multiply<REST>(v + t * channels, channels, channels, u, out + t * PANEL, of_next, 2 * LINE);
}

// out[GRADIENT_ROWS, 32] += d[count, GRADIENT_ROWS]^T v[count, 32], or = if it is the ``first``. Rows of d are TALL
// floats, of v WIDE.
template <int64_t WIDE, int64_t TALL, class E>
NOINLINE void accumulate(const E* d, const E* v, int64_t count, bool first, float* out) {
    VF total[GRADIENT_ROWS][N]{};
    for (int64_t t = 0; t < count; ++t, d += TALL, v += WIDE)
        add_products<GRADIENT_ROWS>(total, v, [&](int r) __attribute__((always_inline)) { return d[r]; });
    add_to<GRADIENT_ROWS>(out, total, first);
}

// Where the sums of output channel r and channel c lie, of a work item of a gradient: what registers hold at a time lies
// together, for the sums are read and written again and again, from the second cache.
template <int64_t WIDE>
INLINE int64_t place_of_sum(int64_t r, int64_t c) {
    const int64_t block = r / GRADIENT_ROWS * (WIDE / PANEL) + c / PANEL;
    return (block * GRADIENT_ROWS + r % GRADIENT_ROWS) * PANEL + c % PANEL;
}

INLINE VU zipped(VF a, VF b) {
    bf16 low[W], high[W];
    store(low, a), store(high, b);
    return widen(read_lanes<VH>(low, W)) | widen(read_lanes<VH>(high, W)) << 16;
}

// Rows of numbers to columns first .. of rows of elements, along which a sum goes. Of the last pair what is not there is 0.
template <class T>
NOINLINE void to_rows(const T* from, int64_t row, int64_t rows, int64_t count, float* to, int64_t to_row, int64_t first = 0) {
    for (int64_t t = 0; t < rows; ++t)
        for_vectors(count, [&](int64_t i, int64_t n) {
            store(to + t * to_row + first + i, load(from + t * row + i, n), n);
        });
}
template <class T>
NOINLINE void to_rows(const T* from, int64_t row, int64_t rows, int64_t count, Pair* to, int64_t to_row, int64_t first = 0) {
    for (int64_t t = 0; t < rows; ++t) {
        bf16* halves = reinterpret_cast<bf16*>(to + t * to_row) + first;
        for_vectors(count, [&](int64_t i, int64_t n) { store(halves + i, load(from + t * row + i, n), n); });
        if ((first + count) % 2) memset(halves + count, 0, sizeof *halves);
    }
}

// Rows of numbers to rows of elements, across which a sum goes: a row of pairs is two of them.
template <class T>
NOINLINE void across_rows(const T* from, int64_t row, int64_t rows, int64_t count, float* to, int64_t to_row) {
    to_rows(from, row, rows, count, to, to_row);
}
template <class T>
NOINLINE void across_rows(const T* from, int64_t row, int64_t rows, int64_t count, Pair* to, int64_t to_row) {
    for (int64_t t = 0; t < rows; t += 2, to += to_row)
        for_vectors(count, [&](int64_t i, int64_t n) {
            const T* at = from + t * row + i;
            write_lanes(reinterpret_cast<float*>(to) + i, n, zipped(load(at, n), t + 1 < rows ? load(at + row, n) : VF{}));
        });
}

// u[of_n, of_k] = d[rows, of_n]^T x[rows, of_k], at most TALL by WIDE: number (r, c) is at place_of_sum<WIDE>(r, c).
template <class E, class D, class X>
void multiply_columns(const D* d, int64_t d_row, int64_t of_n, const X* x, int64_t x_row, int64_t of_k, int64_t rows,
                      float* scratch, float* u) {
    E *v = reinterpret_cast<E*>(scratch), *w = v + TOKENS * WIDE + APART;
    constexpr int64_t TOGETHER = TOKENS * TERMS_OF<E>;
    if (of_k < WIDE) memset(v, 0, sizeof(E) * TOKENS * WIDE);
    if (of_n < TALL) memset(w, 0, sizeof(E) * TOKENS * TALL);
    if (rows == 0) memset(u, 0, 4 * WIDE * TALL);
    for (int64_t row = 0; row < rows; row += TOGETHER) {
        const int64_t count = rows - row < TOGETHER ? rows - row : TOGETHER;
        across_rows(x + row * x_row, x_row, count, of_k, v, WIDE);
        across_rows(d + row * d_row, d_row, count, of_n, w, TALL);
        for (int64_t r = 0; r < of_n; r += GRADIENT_ROWS)
            for (int64_t c = 0; c < of_k; c += PANEL)
                accumulate<WIDE, TALL>(w + r, v + c, elements_of<E>(count), row == 0, u + place_of_sum<WIDE>(r, c));
    }
}

// Those numbers, each where it belongs: to[of_n, of_k], rows apart.
template <class T>
INLINE void write_columns(const float* u, int64_t of_n, int64_t of_k, T* to, int64_t apart) {
    for (int64_t r = 0; r < of_n; ++r)
        for (int64_t first = 0; first < of_k; first += PANEL)
            for_vectors(of_k - first < PANEL ? of_k - first : PANEL, [&](int64_t i, int64_t lanes) {
                store(to + r * apart + first + i, load(u + place_of_sum<WIDE>(r, first + i)), lanes);
            });
}

INLINE void read_bias(const Values& v, int64_t first, int64_t count, float* out) {
    memset(out, 0, 4 * PANEL);
    if (v.data)
        with_type(v.dtype, v.data, [&](const auto* p) {
            for_vectors(count, [&](int64_t i, int64_t n) { store(out + i, load(p + first + i, n), n); });
        });
}

// Rows to columns, of as many vectors as lanes.
INLINE void transpose(float (&block)[W][W]) {
#if FASTDDPM_VECTOR_BYTES == 64
    VF rows[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) rows[r] = load(block[r]);
#pragma GCC unroll 4
    for (int h = W / 2; h > 0; h /= 2) {
        VI low, high;
        for (int l = 0; l < W; ++l) low[l] = l & h ? W + l - h : l, high[l] = l & h ? W + l : l + h;
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
            if (!(r & h)) {
                const __m512 a = (__m512)rows[r], b = (__m512)rows[r + h];
                rows[r] = (VF)_mm512_permutex2var_ps(a, (__m512i)low, b);
                rows[r + h] = (VF)_mm512_permutex2var_ps(a, (__m512i)high, b);
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) store(block[r], rows[r]);
#else
    for (int r = 0; r < W; ++r)
        for (int c = 0; c < r; ++c) {
            const float x = block[r][c];
            block[r][c] = block[c][r], block[c][r] = x;
        }
#endif
}

// A matrix [outputs, count] to one panel, [count, 32], of numbers ..
template <class T>
NOINLINE void to_panel(const T* from, int64_t output_stride, int64_t input_stride, int64_t outputs, int64_t count, float* to) {
    for (int64_t n = 0; n < PANEL; n += W) {
        const int64_t of_n = outputs - n < 0 ? 0 : outputs - n < W ? outputs - n : W;
        if (output_stride == 1) {
            for (int64_t k = 0; k < count; ++k) store(to + k * PANEL + n, load(from + n + k * input_stride, of_n));
            continue;
        }
        for_vectors(count, [&](int64_t k, int64_t lanes) {
            float block[W][W];
            for (int64_t l = 0; l < W; ++l)
                store(block[l], l < of_n ? load(from + (n + l) * output_stride + k, lanes) : VF{});
            transpose(block);
            for (int64_t l = 0; l < lanes; ++l) store(to + (k + l) * PANEL + n, load(block[l]));
        });
    }
}

// .. or of pairs along the inputs, [count / 2, 32], the last with 0 if it is alone. One of the strides is 1.
template <class T>
NOINLINE void to_panel(const T* from, int64_t output_stride, int64_t input_stride, int64_t outputs, int64_t count, Pair* to) {
    for (int64_t n = 0; n < PANEL; n += W) {
        const int64_t of_n = outputs - n < 0 ? 0 : outputs - n < W ? outputs - n : W;
        const auto lanes_at = [&](int64_t k) { return count - k < 0 ? 0 : count - k < W ? count - k : W; };
        if (output_stride == 1) {
            for (int64_t k = 0; k < count; k += 2) {
                const T* at = from + n + k * input_stride;
                const VU pairs = zipped(load(at, of_n), k + 1 < count ? load(at + input_stride, of_n) : VF{});
                memcpy(to + k / 2 * PANEL + n, &pairs, sizeof pairs);
            }
            continue;
        }
        for (int64_t k = 0; k < count; k += 2 * W) {
            float block[W][W];  // of pairs
            for (int64_t l = 0; l < W; ++l)
                for (int64_t i = 0; i < 2; ++i)
                    store(reinterpret_cast<bf16*>(block[l]) + i * W,
                          l < of_n ? load(from + (n + l) * output_stride + k + i * W, lanes_at(k + i * W)) : VF{});
            transpose(block);
            for (int64_t l = 0; l < W && k + 2 * l < count; ++l)
                memcpy(to + (k / 2 + l) * PANEL + n, block[l], sizeof block[l]);
        }
    }
}

}  // namespace
}  // namespace fastddpm::FASTDDPM_ISA
