// y = x * w: 3x3, stride 1, a border of zeros, by minimal filtering F(MxM, 3x3) (Winograd 1980; Lavin and Gray 2016):
//
//     Y = A^T [ (G g G^T) . (B^T d B) ] A,   d a tile of M + 2 by M + 2 pixels of x, g the filter, Y M by M pixels of y
//
// summed over the channels between the brackets: for M = 2, 16 products in place of 36, with a rounding error 1.6 times
// that of the direct sum; for M = 4, 36 in place of 144, with 6 times its error, which half precision does not show.
// Backward in x is the same with turned filters; in w it is G^T [ (B^T d B) . (A dY A^T) ] G.
//
// The products of a block of tiles are a matrix product for each frequency (tiles x channels by channels x 32), from the
// second cache: their registers hold ROWS tiles by 32 channels. What limits it is multiply-add, of which the transforms
// are a tenth, and where there are few tiles, reading the transformed weights. Where these are many, all of a wave of tiles
// is transformed first, and a matrix product takes one frequency of all its tiles. Weights that are kept for many calls with
// few tiles are read as they are, 9 numbers in place of 16 or 36, in their dtype, and transformed on the way to the product.
// Weights that change, those of a training, are transformed a row of frequencies of a panel at a time, to the second cache,
// and multiplied with that row of a wave at once; the products are summed along the row there. So what weights are
// transformed to, more than all else in a training, is neither written to memory nor read there.

#include "conv3x3/conv3x3.h"

#include "common/products.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// a b + c d, of which c d is rounded wherever it is compiled.
INLINE VF sum_of_products(float a, VF b, float c, VF d) { return fused(splat(a), b, c * d); }

template <int M>
constexpr int SIDE = M + 2;  // of a tile of x, and of its frequencies
template <int M>
constexpr int FREQUENCIES = SIDE<M> * SIDE<M>;

// Along one axis: the transforms of F(2, 3), which come of the points 0, 1, -1 and infinity ..
INLINE void input(const VF (&d)[4], VF (&v)[4]) {  // B^T d
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}
INLINE void output(const VF (&m)[4], VF (&y)[2]) {  // A^T m
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
}
INLINE void output_transposed(const VF (&y)[2], VF (&m)[4]) {  // A y
    m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = -y[1];
}
INLINE void filter(const VF (&g)[3], VF (&u)[4]) {  // G g
    const VF ends = 0.5f * (g[0] + g[2]);
    u[0] = g[0], u[1] = ends + 0.5f * g[1], u[2] = ends - 0.5f * g[1], u[3] = g[2];
}
INLINE void filter_transposed(const VF (&u)[4], VF (&g)[3]) {  // G^T u
    const VF both = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + both, g[1] = 0.5f * (u[1] - u[2]), g[2] = both + u[3];
}

// .. and those of F(4, 3), of the points 0, P, -P, Q, -Q and infinity. Measured against float64 over 256 channels of
// normal numbers, the error is 1.5e-6 of the result in the 2-norm and 3.3e-6 in the maximum; with the usual points 1 and 2
// 3.2e-6 and 1.0e-5, with 5/8 and 3/2 1.4e-6 and 3.3e-6, with sqrt(1/2) and sqrt(2) 1.5e-6 and 2.7e-6, and that of the
// direct sum is 2.9e-7 and 3.8e-7. In the gradient of the weights these have the smallest maximum where tiles are few.
constexpr double P = 3. / 4, Q = 3. / 2, P2 = P * P, Q2 = Q * Q;
constexpr float AT_0 = 1 / (P2 * Q2), AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));  // of G

INLINE void input(const VF (&d)[6], VF (&v)[6]) {
    const VF even_p = d[4] - float(Q2) * d[2], odd_p = float(P) * (d[3] - float(Q2) * d[1]);
    const VF even_q = d[4] - float(P2) * d[2], odd_q = float(Q) * (d[3] - float(P2) * d[1]);
    v[0] = sum_of_products(float(P2 * Q2), d[0], float(-P2 - Q2), d[2]) + d[4];
    v[1] = even_p + odd_p, v[2] = even_p - odd_p, v[3] = even_q + odd_q, v[4] = even_q - odd_q;
    v[5] = sum_of_products(float(P2 * Q2), d[1], float(-P2 - Q2), d[3]) + d[5];
}
INLINE void output(const VF (&m)[6], VF (&y)[4]) {
    const VF even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    y[0] = m[0] + even_p + even_q, y[1] = sum_of_products(P, odd_p, Q, odd_q);
    y[2] = sum_of_products(P2, even_p, Q2, even_q), y[3] = sum_of_products(P2 * P, odd_p, Q2 * Q, odd_q) + m[5];
}
INLINE void output_transposed(const VF (&y)[4], VF (&m)[6]) {
    const VF even_p = y[0] + float(P2) * y[2], odd_p = float(P) * y[1] + float(P2 * P) * y[3];
    const VF even_q = y[0] + float(Q2) * y[2], odd_q = float(Q) * y[1] + float(Q2 * Q) * y[3];
    m[0] = y[0], m[1] = even_p + odd_p, m[2] = even_p - odd_p, m[3] = even_q + odd_q, m[4] = even_q - odd_q, m[5] = y[3];
}
INLINE void filter(const VF (&g)[3], VF (&u)[6]) {
    const VF even_p = sum_of_products(AT_P, g[0], AT_P * P2, g[2]), even_q = sum_of_products(AT_Q, g[0], AT_Q * Q2, g[2]);
    u[0] = AT_0 * g[0], u[1] = even_p + float(AT_P * P) * g[1], u[2] = even_p - float(AT_P * P) * g[1];
    u[3] = even_q + float(AT_Q * Q) * g[1], u[4] = even_q - float(AT_Q * Q) * g[1], u[5] = g[2];
}
INLINE void filter_transposed(const VF (&u)[6], VF (&g)[3]) {
    const VF even_p = AT_P * (u[1] + u[2]), odd_p = AT_P * (u[1] - u[2]);
    const VF even_q = AT_Q * (u[3] + u[4]), odd_q = AT_Q * (u[3] - u[4]);
    g[0] = AT_0 * u[0] + even_p + even_q, g[1] = float(P) * odd_p + float(Q) * odd_q;
    g[2] = float(P2) * even_p + float(Q2) * even_q + u[5];
}

// A transform along the columns of what ``get`` gives, I by I, then along the rows of that, which go to ``put``, O by O.
// One after the other: registers do not hold 36 vectors.
template <int I, int O, void (&TRANSFORM)(const VF (&)[I], VF (&)[O]), class Get, class Put>
INLINE void along_both(Get get, Put put) {
    VF half[O][I], from[I], to[O];
#pragma GCC unroll 8
    for (int j = 0; j < I; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) from[i] = get(i, j);
        TRANSFORM(from, to);
#pragma GCC unroll 8
        for (int i = 0; i < O; ++i) half[i][j] = to[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < O; ++i) {
        TRANSFORM(half[i], to);
#pragma GCC unroll 8
        for (int j = 0; j < O; ++j) put(i, j, to[j]);
    }
}

// Row R of what along_both gives.
template <int R, int I, int O, void (&TRANSFORM)(const VF (&)[I], VF (&)[O]), class Get, class Put>
INLINE void along_row(Get get, Put put) {
    VF half[I], from[I], to[O];
#pragma GCC unroll 8
    for (int j = 0; j < I; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) from[i] = get(i, j);
        TRANSFORM(from, to);
        half[j] = to[R];
    }
    TRANSFORM(half, to);
#pragma GCC unroll 8
    for (int j = 0; j < O; ++j) put(j, to[j]);
}

// f(row) with the row as a constant, of S.
template <int S, class F>
INLINE void with_row(int64_t row, F f) {
    switch (row) {
        case 0: f.template operator()<0>(); break;
        case 1: f.template operator()<1>(); break;
        case 2: f.template operator()<2>(); break;
        case 3: f.template operator()<3>(); break;
        case 4: if constexpr (S > 4) f.template operator()<4>(); break;
        case 5: if constexpr (S > 4) f.template operator()<5>(); break;
    }
}

// The place of a tile: its sample, the first row and column of its MxM pixels of the output, and how many are inside.
struct Place {
    int64_t sample, row, column, rows, columns;
};
template <int M>
INLINE Place place(const Conv3x3& a, int64_t tile) {
    const int64_t of_sample = tile % (a.down * a.across), row = M * (of_sample / a.across);
    const int64_t column = M * (of_sample % a.across), rows = a.shape.height - row, columns = a.shape.width - column;
    return {tile / (a.down * a.across), row, column, rows < M ? rows : M, columns < M ? columns : M};
}

// n channels of a pixel: a vector in NHWC order, gathered in NCHW order.
template <class T>
NOINLINE VF gather(const T* p, int64_t stride, int64_t n) {
    VF v{};
    for (int64_t i = 0; i < n; ++i) v[i] = load(p + i * stride, 1)[0];
    return v;
}
template <class T>
NOINLINE void scatter(T* p, int64_t stride, VF v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(p + i * stride, splat(v[i]), 1);
}
template <class T>
INLINE VF load_along(const T* p, int64_t stride, int64_t n) { return stride == 1 ? load(p, n) : gather(p, stride, n); }
template <class T>
INLINE void store_along(T* p, int64_t stride, VF v, int64_t n) { stride == 1 ? store(p, v, n) : scatter(p, stride, v, n); }

// Blocks are of as many groups of BLOCK tiles as they can be alike, so that threads have alike to do.
INLINE int64_t first_of_block(const Conv3x3& a, int64_t block) {
    const int64_t groups = (a.tiles + BLOCK - 1) / BLOCK, first = block * groups / a.blocks * BLOCK;
    return first < a.tiles ? first : a.tiles;
}

// A transform of the channels first .. first + count - 1 of I by I pixels from (row, column) on, to the rows of each
// frequency (i, j), i * row + j * apart. Pixels outside the map are read from ``zeros``.
template <int I, int O, void (&TRANSFORM)(const VF (&)[I], VF (&)[O]), class T>
NOINLINE void read_pixels(const Shape& s, const Image& image, int64_t sample, int64_t row, int64_t column, int64_t first,
                          int64_t count, const T* zeros, float* v, int64_t row_apart, int64_t apart) {
    const int64_t stride = image.channel_stride;
    const T* data = static_cast<const T*>(image.data) + sample * image.sample_stride + first * stride;
    const T* from[I][I];
    for (int64_t i = 0; i < I; ++i)
        for (int64_t j = 0; j < I; ++j) {
            const bool inside = row + i >= 0 && row + i < s.height && column + j >= 0 && column + j < s.width;
            from[i][j] = inside ? data + ((row + i) * s.width + column + j) * image.pixel_stride : zeros;
        }
    for_vectors(count, [&](int64_t c, int64_t n) {
        const auto put = [&](int i, int j, VF value) { store(v + i * row_apart + j * apart + c, value, n); };
        if (stride == 1)
            along_both<I, O, TRANSFORM>([&](int i, int j) { return load(from[i][j] + c, n); }, put);
        else
            along_both<I, O, TRANSFORM>(
                [&](int i, int j) {
                    return from[i][j] == zeros ? VF{} : load_along(from[i][j] + c * stride, stride, n);
                },
                put);
    });
}

// B^T d B of a tile.
template <int M, class T>
INLINE void read_tile(const Conv3x3& a, int64_t tile, int64_t first, int64_t count, const T* zeros, float* v,
                      int64_t apart) {
    const Place p = place<M>(a, tile);
    read_pixels<SIDE<M>, SIDE<M>, input>(a.shape, a.x, p.sample, p.row - 1, p.column - 1, first, count, zeros, v,
                                         SIDE<M> * apart, apart);
}

// A dY A^T of a tile.
template <int M, class T>
INLINE void read_gradient(const Conv3x3& a, int64_t tile, int64_t first, int64_t count, const T* zeros, float* d,
                          int64_t apart) {
    const Place p = place<M>(a, tile);
    read_pixels<M, SIDE<M>, output_transposed>(a.shape, a.y, p.sample, p.row, p.column, first, count, zeros, d,
                                               SIDE<M> * apart, apart);
}

// A^T m A of the 32 channels of a panel, and the bias, to the pixels of a tile.
template <int M, class T>
NOINLINE void write_tile(const Conv3x3& a, T* y, int64_t tile, int64_t first, const float* m, int64_t apart,
                         const float* bias, int64_t most = PANEL) {
    constexpr int S = SIDE<M>;
    const Place p = place<M>(a, tile);
    const int64_t count = a.outputs - first < most ? a.outputs - first : most;
    const int64_t stride = a.y.channel_stride, pixel = p.row * a.shape.width + p.column;
    T* to = y + p.sample * a.y.sample_stride + pixel * a.y.pixel_stride + first * stride;
    for_vectors(count, [&](int64_t c, int64_t n) {
        const VF b = load(bias + c);
        along_both<S, M, output>(
            [&](int j, int i) { return load(m + (S * i + j) * apart + c); },
            [&](int j, int i, VF value) {
                if (i < p.rows && j < p.columns)
                    store_along(to + (i * a.shape.width + j) * a.y.pixel_stride + c * stride, stride, value + b, n);
            });
    });
}

// Of HIGH channels from ``first`` on, the sums of pixels begin .. end - 1 of all samples: floats of 16, those in double.
template <class T>
INLINE void sum_pixels(const Conv3x3& a, const T* dy, int64_t begin, int64_t end, int64_t first, int64_t count,
                       float* sums) {
    const int64_t stride = a.y.channel_stride, pixels = a.shape.height * a.shape.width;
    double total[HIGH] = {};
    for (int64_t pixel = begin; pixel < end; pixel += 16) {
        float some[HIGH] = {};
        for (int64_t i = pixel; i < end && i < pixel + 16; ++i) {
            const T* from = dy + i / pixels * a.y.sample_stride + i % pixels * a.y.pixel_stride + first * stride;
            for_vectors(count, [&](int64_t c, int64_t n) {
                store(some + c, load(some + c) + load_along(from + c * stride, stride, n));
            });
        }
        for (int64_t c = 0; c < count; ++c) total[c] += some[c];
    }
    for (int64_t c = 0; c < count; ++c) sums[c] = static_cast<float>(total[c]);
}

template <int M, class T>
void forward(const Conv3x3& a, T* y, int64_t begin, int64_t end, float* scratch) {
    constexpr int F = FREQUENCIES<M>;
    const int64_t channels = a.shape.channels, panels = panels_of(a.outputs);
    const int64_t v_apart = a.block * channels + APART, m_apart = a.block * PANEL + APART;
    float *v = scratch, *m = v + F * v_apart, *bias = m + F * m_apart, *zeros = bias + PANEL;
    memset(zeros, 0, 4 * channels);
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t block = item / panels, panel = item % panels, tile = first_of_block(a, block);
        const int64_t count = first_of_block(a, block + 1) - tile;
        const int64_t rows = (count + REST - 1) / REST * REST;
        if (block != last) {
            for (int64_t t = 0; t < count; ++t)
                read_tile<M>(a, tile + t, 0, channels, reinterpret_cast<T*>(zeros), v + t * channels, v_apart);
            for (int64_t i = 0; i < F; ++i)
                memset(v + i * v_apart + count * channels, 0, 4 * (rows - count) * channels);
        }
        last = block;
        for (int64_t i = 0; i < F; ++i) {
            const float* u = a.weights + (panel * F + i) * channels * PANEL;
            multiply_rows(v + i * v_apart, rows, channels, u, m + i * m_apart, u + channels * PANEL);
        }
        const int64_t first = panel * PANEL;
        read_bias(a.bias, first, a.outputs - first < PANEL ? a.outputs - first : PANEL, bias);
        for (int64_t t = 0; t < count; ++t) write_tile<M>(a, y, tile + t, first, m + t * PANEL, m_apart, bias);
    }
}

template <int M, class T>
void wave_input(const Conv3x3Wave& w, const T* zeros, int64_t begin, int64_t end) {
    const int64_t channels = w.of.shape.channels;
    for (int64_t t = begin; t < end; ++t)
        read_tile<M>(w.of, w.first + t, 0, channels, zeros, w.v + t * channels, w.v_apart);
}

template <int M, class T>
void wave_output(const Conv3x3Wave& w, T* y, int64_t begin, int64_t end) {
    float bias[PANEL];
    for (int64_t first = 0; first < w.of.outputs; first += PANEL) {
        read_bias(w.of.bias, first, w.of.outputs - first < PANEL ? w.of.outputs - first : PANEL, bias);
        const float* m = w.m + first * w.rows;
        for (int64_t t = begin; t < end; ++t)
            write_tile<M>(w.of, y, w.first + t, first, m + t * PANEL, w.m_apart, bias);
    }
}

// Of packed filters: a row of v is those of TERMS channels of a tile, of each frequency. Whoever writes a row stays on few
// pages of memory, of which processors know the addresses of few that are written to.
template <int F>
constexpr int64_t V_ROW = F * TERMS + APART;

// Rows of frequencies are taken in pairs, the first with the last, and those of which each is the sum and the difference of
// the same: transformed filters of TERMS channels are read from the first cache where they can be, or are near it.
template <int M, int PAIR>
constexpr int ROW_OF_PAIR[2] = {PAIR == 0 ? 0 : 2 * PAIR - 1, PAIR == 0 ? SIDE<M> - 1 : 2 * PAIR};

// Two rows of G g G^T, of ``count`` channels of a pack.
template <int M, int PAIR, class T>
INLINE void transform_packed(const T* filters, int64_t count, float* u) {
    constexpr int S = SIDE<M>;
    for (int64_t k = 0; k < count; ++k, filters += 9 * PACK, u += 2 * S * PACK)
        for (int64_t n = 0; n < PACK; n += W) {
            for (int i = 0; i < 2 * S; ++i) __builtin_prefetch(u + (4 * S + i) * PACK + n, 1);  // to be written soon
            VF half[2][3], from[3], to[S];
#pragma GCC unroll 8
            for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 8
                for (int i = 0; i < 3; ++i) from[i] = load(filters + (3 * i + j) * PACK + n);
                filter(from, to);
                for (int i = 0; i < 2; ++i) half[i][j] = to[ROW_OF_PAIR<M, PAIR>[i]];
            }
#pragma GCC unroll 8
            for (int i = 0; i < 2; ++i) {
                filter(half[i], to);
#pragma GCC unroll 8
                for (int j = 0; j < S; ++j) store(u + (S * i + j) * PACK + n, to[j]);
            }
        }
}

// out[R, PACK] = v[R, count] u[count, PACK] for D frequencies side by side, as one of few rows alone would wait for its
// own sums; added to what was there but for the ``first``. Of what is ``next`` some lines are asked for on the way.
template <int M, int R, int D>
INLINE void multiply_packed(const float* v, int64_t count, const float* u, float* out, int64_t apart, bool first,
                            const char* next, int64_t lines) {
    constexpr int P = PACK / W;
    VF total[D][R][P]{};
    for (int64_t k = 0; k < count; ++k, u += 2 * SIDE<M> * PACK) {
        if (k < lines) __builtin_prefetch(next + LINE * k, 0, 2);
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) {
            VF b[P];
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) b[p] = load(u + d * PACK + p * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const VF one = spread(v[r * V_ROW<FREQUENCIES<M>> + d * TERMS + k]);
#pragma GCC unroll 16
                for (int p = 0; p < P; ++p) total[d][r][p] += one * b[p];
            }
        }
    }
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) {
                float* to = out + d * apart + r * PACK + p * W;
                store(to, first ? total[d][r][p] : load(to) + total[d][r][p]);
            }
}

// The same of all rows, a multiple of FEW, and of a pair of rows of frequencies. What is ``next`` has so many lines.
template <int M, int PAIR>
INLINE void multiply_pair(const float* v, int64_t rows, int64_t count, const float* u, float* out, int64_t apart,
                          bool first, const char* next, int64_t lines) {
    constexpr int S = SIDE<M>, F = FREQUENCIES<M>, R = W == 16 ? 16 : W == 8 ? 4 : 2, D = S == 6 ? 3 : 4;
    const int64_t calls = R == 16 ? rows / 16 * S + rows % 16 / 8 * S / 2 + rows % 8 / 4 * S / D : rows / R * S;
    const int64_t a_call = (lines + 2 * calls - 1) / (2 * calls);
    const auto multiply = [&]<int R, int D>(int i, int j, int64_t t) __attribute__((always_inline)) {
        const int frequency = S * ROW_OF_PAIR<M, PAIR>[i] + j;
        multiply_packed<M, R, D>(v + t * V_ROW<F> + frequency * TERMS, count, u + (S * i + j) * PACK,
                                 out + frequency * apart + t * PACK, apart, first, next, a_call);
        next += LINE * a_call;
    };
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < S; ++j)
            for (int64_t t = 0; t + R <= rows; t += R) multiply.template operator()<R, 1>(i, j, t);
        if constexpr (R == 16) {
            if (rows % 16 >= 8)
                for (int j = 0; j < S; j += 2) multiply.template operator()<8, 2>(i, j, rows / 16 * 16);
            if (rows % 8 >= 4)
                for (int j = 0; j < S; j += D) multiply.template operator()<4, D>(i, j, rows / 8 * 8);
        }
    }
}

// A pair transformed, then multiplied. Each asks for its share of the filters that follow these.
template <int M, int PAIR, class T>
INLINE void add_pair(const T* filters, const float* v, int64_t rows, int64_t count, float* u, float* out,
                     int64_t apart, bool first) {
    constexpr int64_t PAIRS = SIDE<M> / 2, LINES = TERMS * 9 * PACK * sizeof(T) / LINE / PAIRS;
    transform_packed<M, PAIR>(filters, count, u);
    const char* next = reinterpret_cast<const char*>(filters + count * 9 * PACK) + PAIR * LINES * LINE;
    multiply_pair<M, PAIR>(v, rows, count, u, out, apart, first, next, LINES);
}

template <int M, class T>
void forward_packed(const Conv3x3& a, T* y, int64_t begin, int64_t end, float* scratch) {
    constexpr int F = FREQUENCIES<M>;
    const int64_t channels = a.shape.channels, packs = (a.outputs + PACK - 1) / PACK, parts = a.block / FEW;
    const int64_t v_apart = a.block * V_ROW<F>, m_apart = a.block * PACK + APART;
    float *m = scratch, *u = m + F * m_apart, *bias = u + TERMS * 2 * SIDE<M> * PACK, *zeros = bias + PANEL;
    float* v = zeros + TERMS;
    memset(zeros, 0, 4 * TERMS);
    for (int64_t item = begin, together, last = -1; item < end; item += together) {
        const int64_t block = item / (packs * parts), first = item / parts % packs * PACK, few = item % parts;
        together = parts - few < end - item ? parts - few : end - item;  // items of one pack
        const int64_t tile = block * a.block, count = a.tiles - tile < a.block ? a.tiles - tile : a.block;
        const int64_t from = few * FEW, rows = together * FEW, to = count < from + rows ? count : from + rows;
        if (from >= to) continue;
        int64_t k = 0;
        do {
            const int64_t of_k = channels - k < TERMS ? channels - k : TERMS;
            float* of_v = v + k / TERMS * v_apart;
            if (block != last) {
                for (int64_t t = item + together < end ? 0 : from; t < (item + together < end ? count : to); ++t)
                    read_tile<M>(a, tile + t, k, of_k, reinterpret_cast<T*>(zeros), of_v + t * V_ROW<F>, TERMS);
                memset(of_v + count * V_ROW<F>, 0, 4 * (a.block - count) * V_ROW<F>);
            }
            with_output_type(a.packed.dtype, const_cast<void*>(a.packed.data), [&](const auto* filters) {
                filters += (first * channels + k * PACK) * 9;
                const float* of_rows = of_v + from * V_ROW<F>;
                float* to_rows = m + from * PACK;
                add_pair<M, 0>(filters, of_rows, rows, of_k, u, to_rows, m_apart, k == 0);
                add_pair<M, 1>(filters, of_rows, rows, of_k, u, to_rows, m_apart, k == 0);
                if constexpr (M == 4) add_pair<M, 2>(filters, of_rows, rows, of_k, u, to_rows, m_apart, k == 0);
            });
            k += TERMS;
        } while (k < channels);
        last = block;
        read_bias(a.bias, first, a.outputs - first < PACK ? a.outputs - first : PACK, bias);
        for (int64_t t = from; t < to; ++t) write_tile<M>(a, y, tile + t, first, m + t * PACK, m_apart, bias, PACK);
    }
}

// Row ROW of G g G^T of the channels of a pack: u[j][k][PANEL].
template <int M, int ROW, class T>
void filter_row(const T* filters, int64_t count, float* u, int64_t apart) {
    constexpr int S = SIDE<M>;
    for (int64_t k = 0; k < count; ++k, filters += 9 * PACK, u += PANEL)
        for (int64_t n = 0; n < PACK; n += W)
            along_row<ROW, 3, S, filter>([&](int i, int j) { return load(filters + (3 * i + j) * PACK + n); },
                                         [&](int j, VF value) { store(u + j * apart + n, value); });
}

// The products of R tiles, v[R][S][channels], with u[S][channels][32], and their sums along a row: m[R][M][32].
template <int M, int R>
INLINE void multiply_row(const float* v, int64_t v_row, int64_t channels, const float* u, int64_t u_apart, float* m,
                         const char* next, int64_t next_row) {
    constexpr int S = SIDE<M>;
    float products[S][R * PANEL];
    for (int64_t j = 0; j < S; ++j)
        multiply<R>(v + j * (channels + APART), v_row, channels, u + j * u_apart, products[j],
                    next + j * channels * next_row, next_row);
    for (int64_t c = 0; c < R * PANEL; c += W) {
        VF from[S], to[M];
#pragma GCC unroll 8
        for (int j = 0; j < S; ++j) from[j] = load(products[j] + c);
        output(from, to);
        float* at = m + c / PANEL * (M * PANEL) + c % PANEL;
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) store(at + j * PANEL, to[j]);
    }
}

// B^T d B of all tiles of a wave.
template <int M, class T>
void rows_of_input(const Conv3x3Rows& w, const T* zeros, int64_t begin, int64_t end) {
    constexpr int S = SIDE<M>;
    const int64_t channels = w.of.shape.channels, apart = channels + APART;
    for (int64_t t = begin; t < end; ++t) {
        const Place p = place<M>(w.of, w.first + t);
        read_pixels<S, S, input>(w.of.shape, w.of.x, p.sample, p.row - 1, p.column - 1, 0, channels, zeros,
                                 w.v + t * S * apart, w.v_apart, apart);
    }
}

// Items that follow one another are ``deep`` rows of a panel, whose weights come from the second cache again, and then the
// next panel of the same rows of tiles. The weights of the next panel are asked for in the first calls of the product.
template <int M>
void rows_of_products(const Conv3x3Rows& w, int64_t begin, int64_t end, float* u) {
    constexpr int S = SIDE<M>;
    constexpr int64_t TWO = PANEL / PACK;
    const Conv3x3& a = w.of;
    const int64_t channels = a.shape.channels, panels = panels_of(a.outputs);
    const int64_t packs = (a.outputs + PACK - 1) / PACK, groups = (w.count + BLOCK - 1) / BLOCK;
    const int64_t v_row = S * (channels + APART), u_apart = channels * PANEL + APART, of_pack = channels * 9 * PACK;
    const auto panel_of = [&](int64_t item) { return item / w.deep % panels; };
    const auto first_of = [&](int64_t block) {
        const int64_t first = block * groups / w.blocks * BLOCK;
        return first < w.count ? first : w.count;
    };
    for (int64_t item = begin; item < end; ++item) {
        const int64_t panel = panel_of(item), part = item / w.deep / panels, block = part % w.blocks;
        const int64_t row = part / w.blocks * w.deep + item % w.deep;
        const int64_t tile = first_of(block), rows = (first_of(block + 1) - tile + REST - 1) / REST * REST;
        const int64_t other = item + 1 < end ? panel_of(item + 1) : panel;
        const char* next = nullptr;
        int64_t line = 0;
        with_output_type(a.packed.dtype, const_cast<void*>(a.packed.data), [&](const auto* filters) {
            for (int64_t p = 0; p < TWO && panel * TWO + p < packs; ++p)
                with_row<S>(row, [&]<int ROW>() {
                    filter_row<M, ROW>(filters + (panel * TWO + p) * of_pack, channels, u + p * PACK, u_apart);
                });
            next = reinterpret_cast<const char*>(filters + other * TWO * of_pack);
            line = PACK * sizeof *filters;
        });
        const float* v = w.v + row * w.v_apart + tile * v_row;
        float* m = w.m + ((panel * S + row) * w.rows + tile) * M * PANEL;
        int64_t t = 0, asked = other == panel ? 9 * TWO : 0;  // of as many lines for each channel
        const auto multiply = [&]<int R>() __attribute__((always_inline)) {
            const bool ask = asked < 9 * TWO;
            multiply_row<M, R>(v + t * v_row, v_row, channels, u, u_apart, m + t * M * PANEL,
                               ask ? next + asked * channels * line : reinterpret_cast<const char*>(u), ask ? line : 0);
            asked += S, t += R;
        };
        while (t + ROWS <= rows) multiply.template operator()<ROWS>();
        if constexpr (ROWS == 12)
            if (t + 8 <= rows) multiply.template operator()<8>();
        while (t < rows) multiply.template operator()<REST>();
    }
}

template <int M, class T>
void rows_of_output(const Conv3x3Rows& w, T* y, int64_t begin, int64_t end) {
    constexpr int S = SIDE<M>;
    const Conv3x3& a = w.of;
    const int64_t apart = w.rows * M * PANEL, stride = a.y.channel_stride;
    for (int64_t t = begin; t < end; ++t) {
        const Place p = place<M>(a, w.first + t);
        T* pixels = y + p.sample * a.y.sample_stride + (p.row * a.shape.width + p.column) * a.y.pixel_stride;
        for (int64_t first = 0; first < a.outputs; first += PANEL) {
            const int64_t count = a.outputs - first < PANEL ? a.outputs - first : PANEL;
            const float* m = w.m + first / PANEL * S * apart + t * M * PANEL;
            T* to = pixels + first * stride;
            float bias[PANEL];
            read_bias(a.bias, first, count, bias);
            for_vectors(count, [&](int64_t c, int64_t n) {
                const VF b = load(bias + c);
#pragma GCC unroll 8
                for (int j = 0; j < M; ++j) {
                    VF from[S], sums[M];
#pragma GCC unroll 8
                    for (int i = 0; i < S; ++i) from[i] = load(m + i * apart + j * PANEL + c);
                    output(from, sums);
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i)
                        if (i < p.rows && j < p.columns)
                            store_along(to + (i * a.shape.width + j) * a.y.pixel_stride + c * stride, stride, sums[i] + b, n);
                }
            });
        }
    }
}

// What weights are packed as: half precision as it is, and all else as float32.
template <class T>
INLINE auto packed(T x) {
    if constexpr (sizeof(T) == 2) return x;
    else return static_cast<float>(x);
}

// To of[k][9][PACK], of a pack of which so many outputs are there, ``count`` channels.
template <class T, class O>
INLINE void pack_filters(const Conv3x3Weights& a, const T* from, int64_t outputs, int64_t count, O* to) {
    for (int64_t i = 0; i < 9; ++i, to += PACK) {
        const int64_t at = a.turned ? 8 - i : i;
        const T* g = from + at / 3 * a.row_stride + at % 3 * a.column_stride;
        for (int64_t n = 0; n < PACK; n += W) {
            const int64_t of_n = outputs - n < 0 ? 0 : outputs - n < W ? outputs - n : W;
            if (a.output_stride == 1) {
                for (int64_t k = 0; k < count; ++k) store(to + k * 9 * PACK + n, load(g + n + k * a.channel_stride, of_n));
                continue;
            }
            for_vectors(count, [&](int64_t k, int64_t lanes) {
                float block[W][W];
                for (int64_t l = 0; l < W; ++l) {
                    const T* line = g + (n + l) * a.output_stride + k * a.channel_stride;
                    store(block[l], l < of_n ? load_along(line, a.channel_stride, lanes) : VF{});
                }
                transpose(block);
                for (int64_t l = 0; l < lanes; ++l) store(to + (k + l) * 9 * PACK + n, load(block[l]));
            });
        }
    }
}

template <int M, class T>
void gradient(const Conv3x3Gradient& g, const T* dy, int64_t begin, int64_t end, float* scratch) {
    constexpr int F = FREQUENCIES<M>, S = SIDE<M>;
    constexpr int64_t WIDE = GRADIENT_WIDE(M);
    const Conv3x3& a = g.of;
    const int64_t channels = a.shape.channels, v_apart = g.kept * WIDE + APART;
    const int64_t wide = (channels + WIDE - 1) / WIDE, high = (a.outputs + HIGH - 1) / HIGH;
    constexpr int64_t D_APART = CHUNK * HIGH + APART, U_APART = HIGH * WIDE + APART;
    static_assert(F * (WIDE * CHUNK + APART + D_APART + U_APART) + WIDE == GRADIENT_SCRATCH(M, CHUNK) && WIDE >= HIGH);
    float *v = scratch, *d = v + F * v_apart, *u = d + F * D_APART, *zeros = u + F * U_APART;
    memset(zeros, 0, 4 * WIDE);
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t slice = item / (wide * high), k = item / high % wide * WIDE, n = item % high * HIGH;
        const int64_t of_k = channels - k < WIDE ? channels - k : WIDE;
        const int64_t of_n = a.outputs - n < HIGH ? a.outputs - n : HIGH;
        const int64_t from = slice * a.tiles / g.slices, to = (slice + 1) * a.tiles / g.slices;
        const bool all = to - from <= g.kept, same = all && item / high == last;  // x of the item before
        last = item / high;
        if (from == to) memset(u, 0, 4 * F * U_APART);
        if (of_k < WIDE && !same) memset(v, 0, 4 * F * v_apart);  // channels beyond the last
        if (of_n < HIGH) memset(d, 0, 4 * F * D_APART);
        const int64_t chunks = (to - from + CHUNK - 1) / CHUNK;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t tile = from + chunk * (to - from) / chunks;
            const int64_t count = from + (chunk + 1) * (to - from) / chunks - tile;
            float* of_v = v + (all ? (tile - from) * WIDE : 0);
            for (int64_t t = 0; t < count; ++t) {
                if (!same) read_tile<M>(a, tile + t, k, of_k, reinterpret_cast<const T*>(zeros), of_v + t * WIDE, v_apart);
                read_gradient<M>(a, tile + t, n, of_n, reinterpret_cast<const T*>(zeros), d + t * HIGH, D_APART);
            }
            for (int64_t i = 0; i < F; ++i)
                for (int64_t r = 0; r < of_n; r += GRADIENT_ROWS)
                    for (int64_t c = 0; c < of_k; c += PANEL)
                        accumulate<WIDE, HIGH>(d + i * D_APART + r, of_v + i * v_apart + c, count, chunk == 0,
                                         u + i * U_APART + place_of_sum<WIDE>(r, c));
        }
        const auto transform = [&](int64_t r, int64_t c, int64_t lanes) {
            float* sums = g.sums + (slice * a.outputs + n + r) * 9 * channels + k + c;
            along_both<S, 3, filter_transposed>(
                [&](int i, int j) { return load(u + (S * i + j) * U_APART + place_of_sum<WIDE>(r, c)); },
                [&](int i, int j, VF value) { store(sums + (3 * i + j) * channels, value, lanes); });
        };
        for (int64_t rows = 0; rows < of_n; rows += GRADIENT_ROWS)  // in the order that they lie in
            for (int64_t first = 0; first < of_k; first += PANEL)
                for (int64_t r = rows; r < rows + GRADIENT_ROWS && r < of_n; ++r)
                    for_vectors(of_k - first < PANEL ? of_k - first : PANEL,
                                [&](int64_t c, int64_t lanes) { transform(r, first + c, lanes); });
        if (g.bias && k == 0) {
            const int64_t pixels = a.shape.batch * a.shape.height * a.shape.width;
            sum_pixels(a, dy, slice * pixels / g.slices, (slice + 1) * pixels / g.slices, n, of_n,
                       g.bias + slice * a.outputs + n);
        }
    }
}

template <int M, class T>
void weights(const Conv3x3Weights& a, const T* from, int64_t begin, int64_t end) {
    constexpr int F = FREQUENCIES<M>, S = SIDE<M>;
    const int64_t blocks = (a.channels + TOGETHER - 1) / TOGETHER;
    float block[TOGETHER][9][W];  // [channel][place in the filter][output channel]
    for (int64_t item = begin; item < end; ++item) {
        const int64_t panel = item / blocks, k = item % blocks * TOGETHER;
        const int64_t of_k = a.channels - k < TOGETHER ? a.channels - k : TOGETHER;
        for (int64_t n = panel * PANEL; n < (panel + 1) * PANEL; n += W) {
            const int64_t of_n = a.outputs - n < 0 ? 0 : a.outputs - n < W ? a.outputs - n : W;
            if (of_n < W) memset(block, 0, sizeof block);
            for (int64_t i = 0; i < 9; ++i) {
                const int64_t at = a.turned ? 8 - i : i;
                const T* g = from + n * a.output_stride + k * a.channel_stride + at / 3 * a.row_stride +
                             at % 3 * a.column_stride;
                if (a.output_stride == 1)
                    for (int64_t c = 0; c < of_k; ++c) store(block[c][i], load(g + c * a.channel_stride, of_n));
                else
                    for (int64_t lane = 0; lane < of_n; ++lane)
                        for_vectors(of_k, [&](int64_t c, int64_t count) {
                            const VF some = load_along(g + lane * a.output_stride + c * a.channel_stride,
                                                       a.channel_stride, count);
                            for (int64_t l = 0; l < count; ++l) block[c + l][i][lane] = some[l];
                        });
            }
            float* to = static_cast<float*>(a.to) + (panel * F * a.channels + k) * PANEL + n % PANEL;
            for (int64_t c = 0; c < of_k; ++c, to += PANEL)
                along_both<3, S, filter>(
                    [&](int i, int j) { return load(block[c][3 * i + j]); },
                    [&](int i, int j, VF value) { store(to + (S * i + j) * a.channels * PANEL, value); });
        }
    }
}

}  // namespace

void conv3x3_forward(const Conv3x3& a, int64_t begin, int64_t end, float* scratch) {
    with_output_type(a.y.dtype, a.y.data, [&](auto* y) {
        a.tile == 4 ? forward<4>(a, y, begin, end, scratch) : forward<2>(a, y, begin, end, scratch);
    });
}

// A work item is a tile ..
void conv3x3_input(const Conv3x3Wave& w, int64_t begin, int64_t end) {
    with_output_type(w.of.y.dtype, w.of.x.data, [&](auto* x) {
        const auto* zeros = reinterpret_cast<decltype(x)>(const_cast<float*>(w.zeros));
        w.of.tile == 4 ? wave_input<4>(w, zeros, begin, end) : wave_input<2>(w, zeros, begin, end);
    });
}

// .. a panel of a frequency ..
void conv3x3_products(const Conv3x3Wave& w, int64_t begin, int64_t end) {
    const int64_t channels = w.of.shape.channels, panels = panels_of(w.of.outputs);
    const int64_t frequencies = (w.of.tile + 2) * (w.of.tile + 2), rows = (w.count + REST - 1) / REST * REST;
    const auto weights = [&](int64_t item) {
        return w.of.weights + (item % panels * frequencies + item / panels) * channels * PANEL;
    };
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / panels, panel = item % panels;
        multiply_rows(w.v + i * w.v_apart, rows, channels, weights(item),
                      w.m + i * w.m_apart + panel * w.rows * PANEL, weights(item + 1 < end ? item + 1 : item));
    }
}

// .. and again a tile.
void conv3x3_output(const Conv3x3Wave& w, int64_t begin, int64_t end) {
    with_output_type(w.of.y.dtype, w.of.y.data, [&](auto* y) {
        w.of.tile == 4 ? wave_output<4>(w, y, begin, end) : wave_output<2>(w, y, begin, end);
    });
}

// A work item is a pack, and the channels whose weights lie together or ALONG the axis.
void conv3x3_pack(const Conv3x3Weights& a, int64_t begin, int64_t end) {
    const int64_t along = a.output_stride == 1 ? PACK : ALONG, blocks = (a.channels + along - 1) / along;
    with_type(a.from.dtype, a.from.data, [&](const auto* from) {
        auto* to = static_cast<decltype(packed(*from))*>(a.to);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t pack = item / blocks, k = item % blocks * along;
            const int64_t count = a.channels - k < along ? a.channels - k : along;
            pack_filters(a, from + pack * PACK * a.output_stride + k * a.channel_stride, a.outputs - pack * PACK, count,
                         to + (pack * a.channels + k) * 9 * PACK);
        }
    });
}

// A work item is a tile ..
void conv3x3_rows_input(const Conv3x3Rows& w, int64_t begin, int64_t end) {
    with_output_type(w.of.y.dtype, w.of.x.data, [&](auto* x) {
        const auto* zeros = reinterpret_cast<decltype(x)>(const_cast<float*>(w.zeros));
        w.of.tile == 4 ? rows_of_input<4>(w, zeros, begin, end) : rows_of_input<2>(w, zeros, begin, end);
    });
}

// .. a row of frequencies of a block and a panel ..
void conv3x3_rows(const Conv3x3Rows& w, int64_t begin, int64_t end, float* scratch) {
    w.of.tile == 4 ? rows_of_products<4>(w, begin, end, scratch) : rows_of_products<2>(w, begin, end, scratch);
}

// .. and again a tile.
void conv3x3_rows_output(const Conv3x3Rows& w, int64_t begin, int64_t end) {
    with_output_type(w.of.y.dtype, w.of.y.data, [&](auto* y) {
        w.of.tile == 4 ? rows_of_output<4>(w, y, begin, end) : rows_of_output<2>(w, y, begin, end);
    });
}

// A work item is a pack of output channels of FEW tiles, so that threads have alike to do; those of a block that one thread
// has are taken together. Their filters are transformed a pair of rows of frequencies of TERMS channels at a time, and
// multiplied with all tiles of theirs.
void conv3x3_packed(const Conv3x3& a, int64_t begin, int64_t end, float* scratch) {
    with_output_type(a.y.dtype, a.y.data, [&](auto* y) {
        a.tile == 4 ? forward_packed<4>(a, y, begin, end, scratch) : forward_packed<2>(a, y, begin, end, scratch);
    });
}

void conv3x3_gradient(const Conv3x3Gradient& g, int64_t begin, int64_t end, float* scratch) {
    with_output_type(g.of.y.dtype, g.of.y.data, [&](auto* dy) {
        g.of.tile == 4 ? gradient<4>(g, dy, begin, end, scratch) : gradient<2>(g, dy, begin, end, scratch);
    });
}

// A work item is TOGETHER channels of one panel: weights that lie together are read together.
void conv3x3_weights(const Conv3x3Weights& a, int64_t begin, int64_t end) {
    with_type(a.from.dtype, a.from.data, [&](const auto* from) {
        a.tile == 4 ? weights<4>(a, from, begin, end) : weights<2>(a, from, begin, end);
    });
}

// The slices one after the other. A work item is an output channel.
void conv3x3_sum(const Conv3x3Gradient& g, int64_t begin, int64_t end) {
    const int64_t size = 9 * g.of.shape.channels, all = g.of.outputs * size;
    with_output_type(g.gradient.dtype, g.gradient.data, [&](auto* to) {
        for (int64_t n = begin; n < end; ++n)
            for_vectors(size, [&](int64_t i, int64_t lanes) {
                VF total = load(g.sums + n * size + i, lanes);
                for (int64_t s = 1; s < g.slices; ++s) total += load(g.sums + s * all + n * size + i, lanes);
                store(to + n * size + i, total, lanes);
            });
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
