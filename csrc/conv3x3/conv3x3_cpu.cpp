// y = x * w: 3x3, stride 1, a border of zeros, by minimal filtering F(2x2, 3x3) (Winograd 1980; Lavin and Gray 2016):
//
//     Y = A^T [ (G g G^T) . (B^T d B) ] A,   d a tile of 4x4 pixels of x, g the filter, Y 2x2 pixels of y
//
// summed over the channels between the brackets: 16 products in place of 36. Of the known such forms it is the one whose
// rounding is that of the direct sum (1.6 times it); F(4x4, 3x3) has 2.25 times fewer products still, and ten times the
// error. Backward in x is the same with turned filters; in w it is G^T [ (B^T d B) . (A dY A^T) ] G.
//
// The 16 products of a block of tiles are 16 matrix products (tiles x channels by channels x 32), from the second cache:
// their registers hold ROWS tiles by 32 channels. What limits it is multiply-add, of which the transforms are a tenth.

#include "conv3x3/conv3x3.h"

#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int N = PANEL / W;                         // vectors of a panel
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 3 : 1;  // of a matrix product in registers; each divides BLOCK
constexpr int CHUNK = 32;                            // tiles at a time of the gradient
constexpr int GRADIENT_ROWS = W == 16 ? 8 : W == 8 ? 2 : 1;

INLINE VF spread(float x) { return x - VF{}; }

// What is at i, j of 4x4 pixels or frequencies.
using Tile4 = VF[4][4];

INLINE void input_transform(Tile4& d) {  // B^T d B
    for (int j = 0; j < 4; ++j) {
        const VF a = d[0][j], b = d[1][j], c = d[2][j], e = d[3][j];
        d[0][j] = a - c, d[1][j] = b + c, d[2][j] = c - b, d[3][j] = b - e;
    }
    for (int i = 0; i < 4; ++i) {
        const VF a = d[i][0], b = d[i][1], c = d[i][2], e = d[i][3];
        d[i][0] = a - c, d[i][1] = b + c, d[i][2] = c - b, d[i][3] = b - e;
    }
}

INLINE void output_transform(const Tile4& m, VF (&y)[2][2]) {  // A^T m A
    VF t[2][4];
    for (int j = 0; j < 4; ++j) {
        t[0][j] = m[0][j] + m[1][j] + m[2][j];
        t[1][j] = m[1][j] - m[2][j] - m[3][j];
    }
    for (int i = 0; i < 2; ++i) {
        y[i][0] = t[i][0] + t[i][1] + t[i][2];
        y[i][1] = t[i][1] - t[i][2] - t[i][3];
    }
}

INLINE void output_transposed(const VF (&y)[2][2], Tile4& m) {  // A y A^T
    VF t[4][2];
    for (int j = 0; j < 2; ++j) {
        t[0][j] = y[0][j], t[1][j] = y[0][j] + y[1][j];
        t[2][j] = y[0][j] - y[1][j], t[3][j] = -y[1][j];
    }
    for (int i = 0; i < 4; ++i) {
        m[i][0] = t[i][0], m[i][1] = t[i][0] + t[i][1];
        m[i][2] = t[i][0] - t[i][1], m[i][3] = -t[i][1];
    }
}

INLINE void filter_transform(const VF (&g)[3][3], Tile4& u) {  // G g G^T
    VF t[4][3];
    for (int j = 0; j < 3; ++j) {
        const VF ends = g[0][j] + g[2][j];
        t[0][j] = g[0][j], t[1][j] = 0.5f * (ends + g[1][j]);
        t[2][j] = 0.5f * (ends - g[1][j]), t[3][j] = g[2][j];
    }
    for (int i = 0; i < 4; ++i) {
        const VF ends = t[i][0] + t[i][2];
        u[i][0] = t[i][0], u[i][1] = 0.5f * (ends + t[i][1]);
        u[i][2] = 0.5f * (ends - t[i][1]), u[i][3] = t[i][2];
    }
}

INLINE void filter_transposed(const Tile4& u, VF (&g)[3][3]) {  // G^T u G
    VF t[3][4];
    for (int j = 0; j < 4; ++j) {
        const VF both = 0.5f * (u[1][j] + u[2][j]);
        t[0][j] = u[0][j] + both, t[1][j] = 0.5f * (u[1][j] - u[2][j]), t[2][j] = both + u[3][j];
    }
    for (int i = 0; i < 3; ++i) {
        const VF both = 0.5f * (t[i][1] + t[i][2]);
        g[i][0] = t[i][0] + both, g[i][1] = 0.5f * (t[i][1] - t[i][2]), g[i][2] = both + t[i][3];
    }
}

// The place of a tile: its sample, and the first row and column of its 2x2 pixels.
struct Place {
    int64_t sample, row, column;
};
INLINE Place place(const Conv3x3& a, int64_t tile) {
    const int64_t of_sample = tile % (a.down * a.across);
    return {tile / (a.down * a.across), 2 * (of_sample / a.across), 2 * (of_sample % a.across)};
}

// n channels of a pixel: a vector in NHWC order, gathered in NCHW order.
template <class T>
INLINE VF load_along(const T* p, int64_t stride, int64_t n) {
    if (stride == 1) return load(p, n);
    VF v{};
    for (int64_t i = 0; i < n; ++i) v[i] = load(p + i * stride, 1)[0];
    return v;
}
template <class T>
INLINE void store_along(T* p, int64_t stride, VF v, int64_t n) {
    if (stride == 1) return store(p, v, n);
    for (int64_t i = 0; i < n; ++i) store(p + i * stride, splat(v[i]), 1);
}

// Blocks are of as many groups of BLOCK tiles as they can be alike, so that threads have alike to do.
INLINE int64_t first_of_block(const Conv3x3& a, int64_t block) {
    const int64_t groups = (a.tiles + BLOCK - 1) / BLOCK, first = block * groups / a.blocks * BLOCK;
    return first < a.tiles ? first : a.tiles;
}

// B^T d B of the channels first .. first + count - 1 of a tile, to 16 rows that lie ``apart``. Pixels of the border are
// read from ``zeros``.
template <class T>
INLINE void read_tile(const Conv3x3& a, const T* x, int64_t tile, int64_t first, int64_t count, const T* zeros, float* v,
                      int64_t apart) {
    const Place p = place(a, tile);
    const T* from[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int64_t row = p.row + i - 1, column = p.column + j - 1;
            const bool inside = row >= 0 && row < a.shape.height && column >= 0 && column < a.shape.width;
            const int64_t at = (row * a.shape.width + column) * a.x.pixel_stride + first * a.x.channel_stride;
            from[i][j] = inside ? x + p.sample * a.x.sample_stride + at : zeros;
        }
    const int64_t stride = a.x.channel_stride;
    for_vectors(count, [&](int64_t c, int64_t n) {
        Tile4 d;
        if (stride == 1)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) d[i][j] = load(from[i][j] + c, n);
        else
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    d[i][j] = from[i][j] == zeros ? VF{} : load_along(from[i][j] + c * stride, stride, n);
        input_transform(d);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) store(v + (4 * i + j) * apart + c, d[i][j], n);
    });
}

// out[ROWS, 32] = v[ROWS, channels] u[channels, 32].
INLINE void multiply(const float* v, int64_t channels, const float* u, float* out) {
    VF total[ROWS][N]{};
    for (int64_t k = 0; k < channels; ++k, u += PANEL) {
        VF b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = load(u + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const VF one = spread(v[r * channels + k]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) total[r][n] += one * b[n];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(out + r * PANEL + n * W, total[r][n]);
}

// out[GRADIENT_ROWS, 32] += d[count, GRADIENT_ROWS]^T v[count, 32]; rows of d are HIGH floats, of v and out WIDE.
INLINE void accumulate(const float* d, const float* v, int64_t count, float* out) {
    VF total[GRADIENT_ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < GRADIENT_ROWS; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total[r][n] = load(out + r * WIDE + n * W);
    for (int64_t t = 0; t < count; ++t, d += HIGH, v += WIDE) {
        VF b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = load(v + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < GRADIENT_ROWS; ++r) {
            const VF one = spread(d[r]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) total[r][n] += one * b[n];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < GRADIENT_ROWS; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(out + r * WIDE + n * W, total[r][n]);
}

// A^T m A of the 32 channels of a panel, and the bias, to the pixels of a tile.
template <class T>
INLINE void write_tile(const Conv3x3& a, T* y, int64_t tile, int64_t first, const float* m, int64_t apart,
                       const float* bias) {
    const Place p = place(a, tile);
    const int64_t count = a.outputs - first < PANEL ? a.outputs - first : PANEL;
    const int64_t stride = a.y.channel_stride, pixel = p.row * a.shape.width + p.column;
    T* to = y + p.sample * a.y.sample_stride + pixel * a.y.pixel_stride + first * stride;
    const int64_t rows = p.row + 1 < a.shape.height ? 2 : 1, columns = p.column + 1 < a.shape.width ? 2 : 1;
    for_vectors(count, [&](int64_t c, int64_t n) {
        Tile4 d;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) d[i][j] = load(m + (4 * i + j) * apart + c);
        VF out[2][2];
        output_transform(d, out);
        const VF b = load(bias + c);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                store_along(to + (i * a.shape.width + j) * a.y.pixel_stride + c * stride, stride, out[i][j] + b, n);
    });
}

// A dY A^T of the channels first .. first + count - 1 of a tile, to 16 rows that lie ``apart``.
template <class T>
INLINE void read_gradient(const Conv3x3& a, const T* dy, int64_t tile, int64_t first, int64_t count, float* d,
                          int64_t apart) {
    const Place p = place(a, tile);
    const int64_t rows = p.row + 1 < a.shape.height ? 2 : 1, columns = p.column + 1 < a.shape.width ? 2 : 1;
    const int64_t stride = a.y.channel_stride, pixel = p.row * a.shape.width + p.column;
    const T* from = dy + p.sample * a.y.sample_stride + pixel * a.y.pixel_stride + first * stride;
    for_vectors(count, [&](int64_t c, int64_t n) {
        VF y[2][2]{};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
                y[i][j] = load_along(from + (i * a.shape.width + j) * a.y.pixel_stride + c * stride, stride, n);
        Tile4 m;
        output_transposed(y, m);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) store(d + (4 * i + j) * apart + c, m[i][j], n);
    });
}

INLINE void read_bias(const Values& v, int64_t first, int64_t count, float* out) {
    memset(out, 0, 4 * PANEL);
    if (v.data)
        with_type(v.dtype, v.data, [&](const auto* p) {
            for_vectors(count, [&](int64_t i, int64_t n) { store(out + i, load(p + first + i, n), n); });
        });
}

}  // namespace

void conv3x3_forward(const Conv3x3& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels, panels = (a.outputs + PANEL - 1) / PANEL;
    const int64_t v_apart = a.block * channels + APART, m_apart = a.block * PANEL + APART;
    float *v = scratch, *m = v + 16 * v_apart, *bias = m + 16 * m_apart, *zeros = bias + PANEL;
    memset(zeros, 0, 4 * channels);
    with_output_type(a.x.dtype, a.x.data, [&](auto* x) {
        using T = decltype(x);
        const T y = static_cast<T>(a.y.data);
        for (int64_t item = begin, last = -1; item < end; ++item) {
            const int64_t block = item / panels, panel = item % panels, tile = first_of_block(a, block);
            const int64_t count = first_of_block(a, block + 1) - tile;
            const int64_t rows = (count + ROWS - 1) / ROWS * ROWS;
            if (block != last) {
                for (int64_t t = 0; t < count; ++t)
                    read_tile(a, x, tile + t, 0, channels, reinterpret_cast<T>(zeros), v + t * channels, v_apart);
                for (int64_t i = 0; i < 16; ++i)
                    memset(v + i * v_apart + count * channels, 0, 4 * (rows - count) * channels);
            }
            last = block;
            const float* u = a.weights + panel * 16 * channels * PANEL;
            for (int64_t i = 0; i < 16; ++i)
                for (int64_t t = 0; t < rows; t += ROWS)
                    multiply(v + i * v_apart + t * channels, channels, u + i * channels * PANEL,
                             m + i * m_apart + t * PANEL);
            const int64_t first = panel * PANEL;
            read_bias(a.bias, first, a.outputs - first < PANEL ? a.outputs - first : PANEL, bias);
            for (int64_t t = 0; t < count; ++t) write_tile(a, y, tile + t, first, m + t * PANEL, m_apart, bias);
        }
    });
}

// A work item is TOGETHER channels of one panel: weights that lie together are read together.
void conv3x3_weights(const Conv3x3Weights& a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.channels + TOGETHER - 1) / TOGETHER;
    with_type(a.from.dtype, a.from.data, [&](const auto* from) {
        float block[TOGETHER][9][W];  // [channel][place in the filter][output channel]
        for (int64_t item = begin; item < end; ++item) {
            const int64_t panel = item / blocks, k = item % blocks * TOGETHER;
            const int64_t of_k = a.channels - k < TOGETHER ? a.channels - k : TOGETHER;
            for (int64_t n = panel * PANEL; n < (panel + 1) * PANEL; n += W) {
                const int64_t of_n = a.outputs - n < 0 ? 0 : a.outputs - n < W ? a.outputs - n : W;
                if (of_n < W) memset(block, 0, sizeof block);
                for (int64_t lane = 0; lane < of_n; ++lane)
                    for (int64_t i = 0; i < 9; ++i) {
                        const int64_t at = a.turned ? 8 - i : i;
                        const auto* g = from + (n + lane) * a.output_stride + k * a.channel_stride +
                                        at / 3 * a.row_stride + at % 3 * a.column_stride;
                        for (int64_t c = 0; c < of_k; ++c) block[c][i][lane] = load(g + c * a.channel_stride, 1)[0];
                    }
                float* to = a.to + (panel * 16 * a.channels + k) * PANEL + n % PANEL;
                for (int64_t c = 0; c < of_k; ++c, to += PANEL) {
                    VF g[3][3];
                    for (int i = 0; i < 9; ++i) g[i / 3][i % 3] = load(block[c][i]);
                    Tile4 u;
                    filter_transform(g, u);
                    for (int i = 0; i < 16; ++i) store(to + i * a.channels * PANEL, u[i / 4][i % 4]);
                }
            }
        }
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

void conv3x3_gradient(const Conv3x3Gradient& g, int64_t begin, int64_t end, float* scratch) {
    const Conv3x3& a = g.of;
    const int64_t channels = a.shape.channels;
    const int64_t wide = (channels + WIDE - 1) / WIDE, high = (a.outputs + HIGH - 1) / HIGH;
    constexpr int64_t V_APART = CHUNK * WIDE + APART, D_APART = CHUNK * HIGH + APART, U_APART = HIGH * WIDE + APART;
    static_assert(16 * (V_APART + D_APART + U_APART) + WIDE <= GRADIENT_SCRATCH);
    float *v = scratch, *d = v + 16 * V_APART, *u = d + 16 * D_APART, *zeros = u + 16 * U_APART;
    memset(zeros, 0, 4 * WIDE);
    with_output_type(a.x.dtype, a.x.data, [&](auto* x) {
        using T = decltype(x);
        const T dy = static_cast<T>(a.y.data);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t slice = item / (wide * high), k = item % wide * WIDE, n = item / wide % high * HIGH;
            const int64_t of_k = channels - k < WIDE ? channels - k : WIDE;
            const int64_t of_n = a.outputs - n < HIGH ? a.outputs - n : HIGH;
            const int64_t from = slice * a.tiles / g.slices, to = (slice + 1) * a.tiles / g.slices;
            double of_bias[HIGH] = {};
            memset(u, 0, 4 * 16 * U_APART);
            memset(v, 0, 4 * 16 * (V_APART + D_APART));  // v and d: channels beyond the last
            for (int64_t tile = from; tile < to; tile += CHUNK) {
                const int64_t count = to - tile < CHUNK ? to - tile : CHUNK;
                for (int64_t t = 0; t < count; ++t) {
                    read_tile(a, x, tile + t, k, of_k, reinterpret_cast<T>(zeros), v + t * WIDE, V_APART);
                    read_gradient(a, dy, tile + t, n, of_n, d + t * HIGH, D_APART);
                }
                if (g.bias && k == 0)  // frequency (1, 1) is the sum of the 2x2 pixels
                    for (int64_t c = 0; c < of_n; ++c) {
                        float total = 0;
                        for (int64_t t = 0; t < count; ++t) total += d[5 * D_APART + t * HIGH + c];
                        of_bias[c] += total;
                    }
                for (int64_t i = 0; i < 16; ++i)
                    for (int64_t r = 0; r < HIGH; r += GRADIENT_ROWS) {
                        if (r >= of_n) break;
                        for (int64_t c = 0; c < of_k; c += PANEL)
                            accumulate(d + i * D_APART + r, v + i * V_APART + c, count, u + i * U_APART + r * WIDE + c);
                    }
            }
            for (int64_t r = 0; r < of_n; ++r)
                for_vectors(of_k, [&](int64_t c, int64_t lanes) {
                    Tile4 all;
                    for (int i = 0; i < 4; ++i)
                        for (int j = 0; j < 4; ++j) all[i][j] = load(u + (4 * i + j) * U_APART + r * WIDE + c);
                    VF w[3][3];
                    filter_transposed(all, w);
                    for (int i = 0; i < 3; ++i)
                        for (int j = 0; j < 3; ++j)
                            store(g.sums + ((slice * a.outputs + n + r) * 9 + 3 * i + j) * channels + k + c, w[i][j], lanes);
                });
            if (g.bias && k == 0)
                for (int64_t c = 0; c < of_n; ++c) g.bias[slice * a.outputs + n + c] = static_cast<float>(of_bias[c]);
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
