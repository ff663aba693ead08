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

INLINE VF spread(float x) { return x - VF{}; }

// What registers hold of R rows of a product: total[r] += one(r) u[32] ..
template <int R, class One>
INLINE void add_products(VF (&total)[R][N], const float* u, One one) {
    VF b[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) b[n] = load(u + n * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const VF a = spread(one(r));
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total[r][n] += a * b[n];
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
template <int R>
INLINE void multiply(const float* v, int64_t v_row, int64_t channels, const float* u, float* out, const char* next,
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
void multiply_rows(const float* v, int64_t rows, int64_t channels, const float* u, float* out, const float* next) {
    int64_t t = 0;
    const char* of_next = reinterpret_cast<const char*>(next);
    for (; t + ROWS <= rows; t += ROWS)
        multiply<ROWS>(v + t * channels, channels, channels, u, out + t * PANEL, of_next + t / ROWS % 2 * LINE, 2 * LINE);
    for (; t < rows; t += REST) multiply<REST>(v + t * channels, channels, channels, u, out + t * PANEL, of_next, 2 * LINE);
}

// out[GRADIENT_ROWS, 32] += d[count, GRADIENT_ROWS]^T v[count, 32], or = if it is the ``first``. Rows of d are TALL
// floats, of v WIDE.
template <int64_t WIDE, int64_t TALL>
INLINE void accumulate(const float* d, const float* v, int64_t count, bool first, float* out) {
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

}  // namespace
}  // namespace fastddpm::FASTDDPM_ISA
