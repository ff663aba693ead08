// h = [x, x2] + channel_bias + residual;  y = drop(silu((h - mean) rstd gain + offset)), gain = weight (1 + scale),
// offset = bias (1 + scale) + shift; mean and variance over each group of channels (Wu and He 2018, eq. 1-2).
//
// Forward: moments of each span, merged to those of the sample, then y. The moments of a block are taken about the mean
// of those before it, of the first about its own, and merged after Chan et al. (1983): nothing cancels.
// Backward: per channel the sums of da, da (h - mean) and (h - mean) over the pixels, which give every gradient but
// dx; then dx. da is kept from the first pass to the second, or made again where a sample is large: to the same bits, for
// whether it is kept depends on the number of threads. So what a compiler may contract or not is written as fused().
//
// Bytes an element, float32: 8 forward (x is read twice, the second time from the cache where a sample fits), 12
// backward. What limits it out of the cache is memory, in it the exponential: about 12 instructions a vector.

#include "group_norm_silu/group_norm_silu.h"

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// A block: ``rows`` rows of ``cols`` neighbouring elements, ``stride`` elements apart in x and dx, ``apart`` in what has all
// channels beside each other; first element (channel, pixel). In NHWC order a row is a pixel and a column a channel; in NCHW
// order a row is a channel and a column a pixel.
struct Block {
    int64_t sample, channel, pixel, rows, cols, stride, apart;
};

// The number that belongs to a channel, for each lane.
template <bool NHWC>
INLINE VF of_channel(const float* p, int64_t channel, int64_t n) {
    return NHWC ? load(p + channel, n) : splat(p[channel]);
}

template <bool NHWC>
INLINE void add_to_channel(float* p, int64_t channel, VF x, int64_t n) {
    if (NHWC)
        store(p + channel, load(p + channel, n) + x, n);
    else
        p[channel] += sum(first_lanes(x, n));
}

// R C vectors side by side: of C vectors of columns, R each.
template <int R, int C>
struct Strip {
    static constexpr int ROWS = R, COLS = C, K = R * C;
};
constexpr int MANY = W == 16 ? 8 : 4, HALF = MANY / 2;  // vectors side by side: AVX2 has registers for fewer

// Vector k of element i of a strip of C columns: at + i step + (k / C) gap + (k % C) W, in x or in what has all channels. From
// ``next`` on lie, in the order of memory, as many vectors of the rows that follow: to be asked for now.
struct Walk {
    int64_t at, gap, step, next;
};

// Cut a block in strips: call f(strip, channel, in x, in all, count, n) for vectors of n lanes, i < count. In NHWC order
// ``most`` rows are walked together, COLUMNS vectors of columns at a time where there are as many: what belongs to a channel
// is loaded once for all of these rows. In NCHW order a strip has one channel.
template <bool NHWC, int COLUMNS, class F>
INLINE void for_strips(const Block& b, int64_t most, F f) {
    if (NHWC) {
        for (int64_t r = 0, rows; r < b.rows; r += rows) {
            rows = b.rows - r < most ? b.rows - r : most;
            int64_t c = 0;
            const auto part = [&](auto strip, int64_t from, int64_t count, int64_t n) __attribute__((always_inline)) {
                constexpr int R = decltype(strip)::ROWS;
                const auto walk = [&](int64_t stride, int64_t first) {
                    return Walk{from * stride + c, stride, R * stride, (r + rows) * stride + (first + c) * rows - first};
                };
                f(strip, c, walk(b.stride, 0), walk(b.apart, b.channel), count, n);
            };
            const auto columns = [&](auto strip, int64_t n) __attribute__((always_inline)) {
                constexpr int R = decltype(strip)::ROWS, C = decltype(strip)::COLS;
                part(strip, r, rows / R, n);
                if (R > 1 && rows % R) part(Strip<1, C>{}, r + rows / R * R, rows % R, n);
                c += C * W;
            };
            if constexpr (COLUMNS == MANY) {
                while (c + MANY * W <= b.cols) columns(Strip<1, MANY>{}, W);
                if (c + HALF * W <= b.cols) columns(Strip<2, HALF>{}, W);
                while (c + W <= b.cols) columns(Strip<MANY, 1>{}, W);
                if (c < b.cols) columns(Strip<MANY, 1>{}, b.cols - c);
            } else {
                while (c + W <= b.cols) columns(Strip<4, 1>{}, W);
                if (c < b.cols) columns(Strip<4, 1>{}, b.cols - c);
            }
        }
        return;
    }
    for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t many = b.cols / (MANY * W), ones = b.cols / W - MANY * many, rest = b.cols % W;
        const auto walk = [&](auto strip, int64_t c, int64_t count, int64_t step, int64_t n) __attribute__((always_inline)) {
            f(strip, r, Walk{r * b.stride + c, W, step, 0}, Walk{r * b.apart + c, W, step, 0}, count, n);
        };
        if (many) walk(Strip<MANY, 1>{}, 0, many, MANY * W, W);
        if (ones) walk(Strip<1, 1>{}, MANY * W * many, ones, W, W);
        if (rest) walk(Strip<1, 1>{}, b.cols - rest, 1, 0, rest);
    }
}

// Rows walked together: of so many bytes, which leave room in the first cache for those that follow; 8 to 32.
template <class T>
INLINE int64_t rows_at_a_time(const Block& b, int64_t bytes) {
    const int64_t rows = bytes / (b.cols * static_cast<int64_t>(sizeof(T))) / 4 * 4;
    return rows < 8 ? 8 : rows > 32 ? 32 : rows;
}

// The sum of N vectors that lie ``apart``, in pairs.
template <int N, int APART = 1>
INLINE VF added(const VF* x) {
    if constexpr (N == 1) return x[0];
    else return added<N / 2, APART>(x) + added<N / 2, APART>(x + N / 2 * APART);
}

// Over the pixels of a block, of d = x - centre: the sum, and that of the squares, added to one float for each channel.
template <bool NHWC, class T>
INLINE void sum_centred(const Block& b, const T* x, const float* centre, float* out, float* out_squares) {
    const int64_t rows = rows_at_a_time<T>(b, 16384);
    for_strips<NHWC, MANY>(b, rows, [=](auto strip, int64_t c, Walk in, Walk, int64_t count, int64_t n)
                                        __attribute__((always_inline)) {
        constexpr int R = decltype(strip)::ROWS, C = decltype(strip)::COLS, K = R * C;
        VF total[K]{}, squares[K]{}, mid[C];
        side_by_side<C>([&](int k) { mid[k] = of_channel<NHWC>(centre, c + k * W, n); });
        const T *p = x + in.at, *next = x + in.next;
        for (int64_t i = 0; i < count; ++i, p += in.step, next += K * W)
            side_by_side<K>([&](int k) {
                const VF d = load(p + k / C * in.gap + k % C * W, n) - mid[k % C];
                if (NHWC) __builtin_prefetch(next + k * W);
                total[k] += d;
                squares[k] += d * d;
            });
        side_by_side<C>([&](int k) {
            add_to_channel<NHWC>(out, c + k * W, added<R, C>(total + k), n);
            add_to_channel<NHWC>(out_squares, c + k * W, added<R, C>(squares + k), n);
        });
    });
}

// The numbers of a sample from one channel on.
struct Numbers {
    const float *centre, *gain, *offset, *slope, *level;
    Numbers from(int64_t c) const { return {centre + c, gain + c, offset + c, slope + c, level + c}; }
};

// f(strip, offset in x, and in all, channel of k, n) over a block in the order of memory: vectors of n lanes, W apart.
// Where the two offsets are the SAME, it is known as the code is compiled: two would take instructions.
template <bool NHWC, bool SAME, int MOST, class F>
INLINE void walk_runs(const Block& b, F f) {
    for (int64_t r = 0; r < b.rows; ++r) {
        int64_t c = 0;
        const auto run = [&](auto strip, int64_t n) __attribute__((always_inline)) {
            const int64_t in = r * b.stride + c;
            f(strip, in, SAME ? in : r * b.apart + c, NHWC ? c : r, n);
        };
        for (; c + MOST * W <= b.cols; c += MOST * W) run(Strip<1, MOST>{}, W);
        if constexpr (MOST > HALF)
            for (; c + HALF * W <= b.cols; c += HALF * W) run(Strip<1, HALF>{}, W);
        for (; c + W <= b.cols; c += W) run(Strip<1, 1>{}, W);
        if (c < b.cols) run(Strip<1, 1>{}, b.cols - c);
    }
}
template <bool NHWC, int MOST = MANY, class F>
INLINE void for_runs(const Block& b, F f) {
    if (b.stride == b.apart) walk_runs<NHWC, true, MOST>(b, f);
    else walk_runs<NHWC, false, MOST>(b, f);
}

// Processors load what follows in a page of memory before it is asked for, but each page they begin anew, and arithmetic
// leaves them no room to look ahead over the gap. So the first lines of a page are asked for in the page before.
constexpr int64_t PAGE = 4096, LINE = 64;

template <class T>
INLINE bool starts_page(const T* p, int64_t size) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % PAGE) < size * static_cast<int64_t>(sizeof(T));
}

INLINE void prefetch_lines(const char* p) {
    for (int64_t at = 0; at < 4 * LINE; at += LINE) __builtin_prefetch(p + at, 1);
}

// Of the page after this one a line, where what is at p is written past the caches: not for the line, but so that the
// processor has found by then where that page lies, for which a write past the caches would wait.
template <class T>
INLINE void find_next_page(const T* p, int64_t size) {
    if (starts_page(p, size)) __builtin_prefetch(reinterpret_cast<const char*>(p) + PAGE);
}

// Whether a float32 tensor is written past the caches, which could not hold it: it need not be read first.
INLINE bool is_past_caches(const GroupNorm& a, const Image& t) {
    return t.dtype == DType::f32 && 4 * a.shape.batch * t.sample_stride >= a.past_caches;
}
template <class T>
INLINE bool can_stream(const T* rows, int64_t stride) {
    return sizeof(T) == 4 && stride % W == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(VF) == 0;
}
template <class T>
INLINE void put(T* p, VF x, int64_t n, bool past) {
    if constexpr (sizeof(T) == 4)
        if (past && n == W) return stream(p, x);
    store(p, x, n);
}

// With the activation, gain and offset are those of -a log2(e), which silus takes.
template <bool NHWC, class T>
INLINE void normalise(const Block& b, const T* x, const Numbers& p, bool activation, const float* factor, T* y,
                      bool past = false) {
    past = past && can_stream(y, b.apart);
    for_runs<NHWC>(b, [&](auto strip, int64_t in, int64_t at, int64_t channel, int64_t n) __attribute__((always_inline)) {
        constexpr int K = decltype(strip)::K;
        const auto of = [&](const float* q, int k) { return of_channel<NHWC>(q, NHWC ? channel + k * W : channel, n); };
        if (!past && starts_page(y + at, K * W)) prefetch_lines(reinterpret_cast<const char*>(y + at) + PAGE);
        if (past) {
            side_by_side<K>([&](int k) { __builtin_prefetch(reinterpret_cast<const char*>(x + in + k * W) + 2 * PAGE); });
            find_next_page(y + at, K * W);
        }
        VF a[K];
        side_by_side<K>([&](int k) {
            a[k] = (load(x + in + k * W, n) - of(p.centre, k)) * of(p.gain, k) + of(p.offset, k);
        });
        if (activation) silus<sizeof(T) == 2>(a);
        if (factor) side_by_side<K>([&](int k) { a[k] = a[k] * load(factor + at + k * W, n); });
        side_by_side<K>([&](int k) { put(y + at + k * W, a[k], n, past); });
    });
}

// What is summed in backward, one float for each channel of the block.
struct BlockSums {
    float *da, *da_centred, *centred, *dh;
    BlockSums from(int64_t c) const { return {da + c, da_centred + c, centred + c, dh + c}; }
};

// ``kept``, where it is given, takes da, in the rows of x.
template <bool NHWC, class T>
INLINE void sum_gradients(const Block& b, const T* x, const T* dy, const Numbers& p, bool activation,
                          const float* factor, const BlockSums& out, float* kept) {
    const int64_t rows = rows_at_a_time<T>(b, 8192);
    for_strips<NHWC, 1>(b, rows, [=](auto strip, int64_t c, Walk in, Walk all, int64_t count, int64_t n)
                                     __attribute__((always_inline)) {
        constexpr int K = decltype(strip)::K;
        VF da_sum{}, da_centred_sum{}, centred_sum{};
        const VF centre = of_channel<NHWC>(p.centre, c, n);
        const VF gain = of_channel<NHWC>(p.gain, c, n);
        const VF offset = of_channel<NHWC>(p.offset, c, n);
        // in variables, for what is stored below could lie anywhere else
        const int64_t gap = in.gap, gap_of_all = all.gap, step = in.step, step_of_all = all.step;
        const T *at = x + in.at, *of = dy + all.at, *next = x + in.next, *next_of = dy + all.next;
        const float* factors = factor ? factor + all.at : nullptr;
        float* keep = kept ? kept + all.at : nullptr;
        const bool through_activation = activation;
        for (int64_t i = 0; i < count; ++i) {
            VF centred[K], a[K], da[K];
            side_by_side<K>([&](int k) {
                centred[k] = load(at + k * gap, n) - centre, da[k] = load(of + k * gap_of_all, n);
                a[k] = fused(centred[k], gain, offset);
                if (NHWC) __builtin_prefetch(next + k * W), __builtin_prefetch(next_of + k * W);
            });
            if (factors) {
                side_by_side<K>([&](int k) { da[k] = da[k] * load(factors + k * gap_of_all, n); });
                factors += step_of_all;
            }
            if (through_activation) before_activation(da, a);
            if (keep) {
                side_by_side<K>([&](int k) { store(keep + k * gap_of_all, da[k], n); });
                keep += step_of_all;
            }
            da_sum += added<K>(da), centred_sum += added<K>(centred);
            side_by_side<K>([&](int k) { centred[k] = da[k] * centred[k]; });
            da_centred_sum += added<K>(centred);
            at += step, of += step_of_all, next += K * W, next_of += K * W;
        }
        add_to_channel<NHWC>(out.da, c, da_sum, n);
        add_to_channel<NHWC>(out.da_centred, c, da_centred_sum, n);
        add_to_channel<NHWC>(out.centred, c, centred_sum, n);
    });
}

// dx = da gain + (x - centre) slope + level + dh; da as kept, or made again from dy.
template <bool NHWC, class T>
INLINE void differentiate(const Block& b, const T* x, const T* dy, const T* dh, const Numbers& p, bool activation,
                          const float* factor, const float* kept, T* dx, bool past = false) {
    past = past && can_stream(dx, b.stride);
    // half as many side by side: where da is made again, twice as many would not fit in the registers
    for_runs<NHWC, HALF>(b, [&](auto strip, int64_t in, int64_t at, int64_t channel, int64_t n) __attribute__((always_inline)) {
        constexpr int K = decltype(strip)::K;
        const auto of = [&](const float* q, int k) { return of_channel<NHWC>(q, NHWC ? channel + k * W : channel, n); };
        if (past) find_next_page(dx + in, K * W);
        else side_by_side<K>([&](int k) { __builtin_prefetch(reinterpret_cast<const char*>(dx + in + k * W) + PAGE / 4, 1); });
        VF centred[K], a[K], da[K];
        side_by_side<K>([&](int k) {
            const int64_t e = at + k * W;
            centred[k] = load(x + in + k * W, n) - of(p.centre, k), da[k] = kept ? load(kept + e, n) : load(dy + e, n);
            if (factor && !kept) da[k] = da[k] * load(factor + e, n);
        });
        if (!kept) {
            side_by_side<K>([&](int k) { a[k] = fused(centred[k], of(p.gain, k), of(p.offset, k)); });
            if (activation) before_activation(da, a);
        }
        side_by_side<K>([&](int k) {
            VF d = fused(da[k], of(p.gain, k), fused(centred[k], of(p.slope, k), of(p.level, k)));
            if (dh) d += load(dh + in + k * W, n);
            put(dx + in + k * W, d, n, past);
        });
    });
}

template <bool NHWC>
INLINE void add_channels(const Block& b, const float* bias, float* x) {
    for_runs<NHWC>(b, [&](auto strip, int64_t in, int64_t, int64_t channel, int64_t n) __attribute__((always_inline)) {
        side_by_side<decltype(strip)::K>([&](int k) {
            const VF of = of_channel<NHWC>(bias, NHWC ? channel + k * W : channel, n);
            store(x + in + k * W, load(x + in + k * W, n) + of, n);
        });
    });
}

// Rows of a block and memory of any order and dtype.

// One row of a block in the tensor ``a``, whose first channel is number ``channel_0`` of the block's tensor.
struct Row {
    int64_t offset, step, n;
};
INLINE Row row_of(const GroupNorm& a, const Image& t, const Block& b, int64_t r, int64_t channel, int64_t n) {
    const int64_t pixel = a.shape.nhwc ? b.pixel + r : b.pixel;
    return {b.sample * t.sample_stride + channel * t.channel_stride + pixel * t.pixel_stride,
            a.shape.nhwc ? t.channel_stride : t.pixel_stride, n};
}

INLINE void read_row(const Image& t, const Row& row, bool add, float* out) {
    with_type(t.dtype, t.data, [&](const auto* p) {
        p += row.offset;
        if (row.step == 1)
            for_vectors(row.n, [&](int64_t i, int64_t n) {
                VF x = load(p + i, n);
                store(out + i, add ? load(out + i, n) + x : x, n);
            });
        else
            for (int64_t i = 0; i < row.n; ++i) out[i] = load(p + i * row.step, 1)[0] + (add ? out[i] : 0.0f);
    });
}

INLINE void write_row(const Image& t, const Row& row, const float* in) {
    with_output_type(t.dtype, t.data, [&](auto* p) {
        p += row.offset;
        if (row.step == 1)
            for_vectors(row.n, [&](int64_t i, int64_t n) { store(p + i, load(in + i, n), n); });
        else
            for (int64_t i = 0; i < row.n; ++i) store(p + i * row.step, splat(in[i]), 1);
    });
}

// f(tensor, row, column) for the rows of a block in a tensor that may be continued by a second one along the channels.
template <class F>
INLINE void for_rows(const GroupNorm& a, const Image& t, const Image& t2, int64_t channels, const Block& b, F f) {
    for (int64_t r = 0; r < b.rows; ++r) {
        if (a.shape.nhwc) {
            f(t, row_of(a, t, b, r, 0, channels), r * b.cols);
            if (t2.data) f(t2, row_of(a, t2, b, r, 0, b.cols - channels), r * b.cols + channels);
        } else {
            const int64_t c = b.channel + r;
            if (c < channels) f(t, row_of(a, t, b, r, c, b.cols), r * b.cols);
            else f(t2, row_of(a, t2, b, r, c - channels, b.cols), r * b.cols);
        }
    }
}

// The block as floats in ``out``, rows ``cols`` apart.
INLINE void gather_block(const GroupNorm& a, const Image& t, const Image& t2, int64_t channels, const Block& b,
                         bool add, float* out) {
    for_rows(a, t, t2, channels, b, [&](const Image& s, const Row& row, int64_t at) { read_row(s, row, add, out + at); });
}
INLINE void scatter_block(const GroupNorm& a, const Image& t, const Image& t2, int64_t channels, const Block& b,
                          const float* in) {
    for_rows(a, t, t2, channels, b, [&](const Image& s, const Row& row, int64_t at) { write_row(s, row, in + at); });
}

// Channels of x alone.
INLINE int64_t first_channels(const GroupNorm& a) {
    return a.x2.data ? a.shape.channels - a.channels2 : a.shape.channels;
}

// Whether a block is worked on where it lies in x, and in x2; otherwise it is gathered as floats, its rows side by side.
INLINE bool in_place(const GroupNorm& a) {
    if (a.residual.data) return false;
    return a.shape.nhwc ? !a.x2.data || a.x2.channel_stride == 1 : !a.x2.data && !a.draw.sample;
}

// 1 / (1 - p) where an element is kept, else 0, for each of a dense block.
INLINE void dropout_factors(const GroupNorm& a, const Block& b, float* out, float* scratch) {
    const int64_t pixels = a.shape.height * a.shape.width;
    if (a.shape.nhwc) {
        const Tile t{b.sample, b.pixel * b.cols, b.rows * b.cols};
        draw<Words>(a.draw, a.shape, t, out, scratch);
    } else {
        const Stream noise = stream(a.draw, b.sample);
        for (int64_t r = 0; r < b.rows; ++r) {
            const int64_t element = (b.channel + r) * pixels + b.pixel, before = element % 4;
            Words::fill(noise, static_cast<uint32_t>(element / 4), before + b.cols, scratch);
            memcpy(out + r * b.cols, scratch + before, 4 * b.cols);
        }
    }
    const bool none = a.drop_below > 0xffffffffull;
    const uint32_t threshold = static_cast<uint32_t>(a.drop_below);
    for_vectors(b.rows * b.cols, [&](int64_t i, int64_t n) {
        VI kept = (VI)((VU)load(out + i, n) >= (VU{} + threshold));
        store(out + i, none ? VF{} : select(kept, splat(a.keep_scale), VF{}), n);
    });
}

// Memory of one call, handed out in pieces.
struct Scratch {
    float* next;
    float* take(int64_t floats) {
        float* taken = next;
        next += (floats + 15) / 16 * 16;
        return taken;
    }
};

INLINE void channel_biases(const GroupNorm& a, int64_t sample, float* out) {
    if (a.channel_bias.data)
        read_channels(a.channel_bias, sample, a.shape.channels, out);
    else
        memset(out, 0, 4 * a.shape.channels);
}

// centre = mean - bias of each channel, rounded; ``rest`` is what the rounding took away (Knuth's exact sum).
INLINE void centre_channels(int64_t channels, const float* mean, const float* bias, float* centre, float* rest) {
    for_vectors(channels, [&](int64_t c, int64_t n) {
        const VF m = load(mean + c, n), b = load(bias + c, n), difference = m - b, taken = m - difference;
        store(centre + c, difference, n);
        store(rest + c, (m - (difference + taken)) + (taken - b), n);
    });
}

INLINE float* numbers_of(const GroupNorm& a, int64_t sample) { return a.numbers + sample * a.numbers_stride; }
INLINE Numbers numbers_from(const GroupNorm& a, int64_t sample, int64_t channel) {
    const float* p = numbers_of(a, sample) + channel;
    return {p + CENTRE * a.row, p + GAIN * a.row, p + OFFSET * a.row, p + SLOPE * a.row, p + LEVEL * a.row};
}

// centre = mean - channel_bias, gain = weight (1 + scale) rstd, offset = bias (1 + scale) + shift: a mean far from 0 costs no
// digits, for what the rounding of centre leaves is taken from the offset. ``factor``: a row.
INLINE void make_numbers(const GroupNorm& a, int64_t sample, float* factor) {
    const int64_t channels = a.shape.channels, of_group = channels / a.groups;
    float *p = numbers_of(a, sample), *centre = p + CENTRE * a.row, *gain = p + GAIN * a.row;
    float *offset = p + OFFSET * a.row, *rest = p + REST * a.row;
    channel_biases(a, sample, rest);
    read_channels(a.weight, sample, channels, gain);
    read_channels(a.bias, sample, channels, offset);
    if (a.scale.data) {
        read_channels(a.scale, sample, channels, factor);
        for (int64_t c = 0; c < channels; ++c) gain[c] *= 1 + factor[c], offset[c] *= 1 + factor[c];
    }
    if (a.shift.data) {
        read_channels(a.shift, sample, channels, factor);
        for (int64_t c = 0; c < channels; ++c) offset[c] += factor[c];
    }
    for (int64_t g = 0; g < a.groups; ++g) {
        const double exact = a.mean[sample * a.groups + g];
        const float mean = static_cast<float>(exact), left = static_cast<float>(exact - mean);
        const float rstd = a.rstd[sample * a.groups + g];
        for (int64_t c = g * of_group; c < (g + 1) * of_group; ++c) centre[c] = mean, factor[c] = left, gain[c] *= rstd;
    }
    centre_channels(channels, centre, rest, centre, rest);
    for_vectors(channels, [&](int64_t c, int64_t n) {
        const VF whole = load(rest + c, n) + load(factor + c, n);
        store(rest + c, whole, n);
        store(offset + c, load(offset + c, n) - whole * load(gain + c, n), n);
    });
}

// f(block) over a work item; with ``most`` pixels, each three times as large as all before it together.
template <bool NHWC, class F>
INLINE void for_blocks(const GroupNorm& a, int64_t item, F f, int64_t most = 0) {
    const int64_t pixels = a.shape.height * a.shape.width, of_group = a.shape.channels / a.groups;
    const int64_t sample = item / a.spans, span = item % a.spans;
    const int64_t first = NHWC ? span * a.span_pixels : 0;
    const int64_t end = NHWC && first + a.span_pixels < pixels ? first + a.span_pixels : pixels;
    for (int64_t p = first, n; p < end; p += n) {
        n = 3 * (p - first) < most ? 3 * (p - first) : most;
        n = n < a.block ? a.block : n;
        n = end - p < n ? end - p : n;
        if (NHWC) f(Block{sample, 0, p, n, a.shape.channels, a.shape.channels, a.shape.channels});
        else f(Block{sample, span * of_group, p, of_group, n, pixels, pixels});
    }
}

// Where a block starts in a tensor that lies in the order of x.
INLINE int64_t offset_of(const Image& t, const Block& b) {
    return b.sample * t.sample_stride + b.channel * t.channel_stride + b.pixel * t.pixel_stride;
}

INLINE Block dense(Block b) {
    b.stride = b.apart = b.cols;
    return b;
}

// f(part of a block, first channel, x or x2, dx or dx2) where it is worked on in place.
template <class F>
INLINE void for_parts(const GroupNorm& a, const Block& b, F f) {
    Block part = b;
    if (a.x2.data) part.cols = part.stride = first_channels(a);
    f(part, 0, a.x, a.dx);
    if (!a.x2.data) return;
    part.cols = part.stride = a.channels2, part.channel = b.cols - a.channels2;
    f(part, b.cols - a.channels2, a.x2, a.dx2);
}

// A gradient of an output, which nobody may have asked for.
INLINE void gather_gradient(const GroupNorm& a, const Image& t, const Block& b, float* out) {
    if (t.data) gather_block(a, t, Image{}, a.shape.channels, b, false, out);
    else memset(out, 0, 4 * b.rows * b.cols);
}

// [x, x2] + residual of a block, as floats.
INLINE void gather_input(const GroupNorm& a, const Block& b, float* out) {
    gather_block(a, a.x, a.x2, first_channels(a), b, false, out);
    if (a.residual.data) gather_block(a, a.residual, Image{}, a.shape.channels, b, true, out);
}

INLINE void merge(Moments& a, const Moments& b) {  // Chan, Golub and LeVeque 1983
    const double count = a.count + b.count, difference = b.mean - a.mean;
    if (count == 0) return;
    const double step = difference * (b.count / count);
    a.mean += step;
    a.squares += b.squares + difference * step * a.count;
    a.count = count;
}

// Moments of the groups of a block, merged to those of the blocks before; ``bias`` is added to each channel. They are
// taken about the mean so far, or, of the first block, about its own, for which it is swept twice. A block far from the
// mean so far costs no digits: its distance is in the deviation of the whole. ``parts(f)`` calls f(part of the block, first
// channel, x). ``scratch``: five rows of the channels.
template <bool NHWC, class P>
INLINE void block_moments(const Block& b, const P& parts, int64_t groups, int64_t of_group, const float* bias,
                          Scratch scratch, Moments* moments) {
    const int64_t pixels = NHWC ? b.rows : b.cols, channels = groups * of_group;
    const double count = double(of_group) * pixels, of_one = 1 / count;
    float *mean = scratch.take(channels), *centre = scratch.take(channels), *rest = scratch.take(channels);
    float *sums = scratch.take(channels), *squares = scratch.take(channels);
    const bool first_block = moments[0].count == 0;
    if (first_block) {
        memset(centre, 0, 4 * channels), memset(sums, 0, 4 * channels), memset(squares, 0, 4 * channels);
        parts([&](const Block& part, int64_t first, const auto* x) {
            sum_centred<NHWC>(part, x, centre + first, sums + first, squares + first);
        });
    }
    for (int64_t g = 0, c = 0; g < groups; ++g) {
        double total = 0;
        for (int64_t k = c; first_block && k < c + of_group; ++k) total += double(sums[k]) + double(bias[k]) * pixels;
        const float of_channel = float(first_block ? total * of_one : moments[g].mean);
        for (const int64_t end = c + of_group; c < end; ++c) mean[c] = of_channel;
    }
    centre_channels(channels, mean, bias, centre, rest);
    memset(sums, 0, 4 * channels), memset(squares, 0, 4 * channels);
    parts([&](const Block& part, int64_t first, const auto* x) {
        sum_centred<NHWC>(part, x, centre + first, sums + first, squares + first);
    });
    for_vectors(channels, [&](int64_t c, int64_t n) {  // of h - mean, which is less by the rest
        const VF sum = load(sums + c, n), r = load(rest + c, n), moved = sum - float(pixels) * r;
        store(sums + c, moved, n);
        store(squares + c, load(squares + c, n) - r * (sum + moved), n);
    });
    for (int64_t g = 0, c = 0; g < groups; ++g) {
        double first = 0, second = 0;
        const double about = mean[c];
        for (const int64_t end = c + of_group; c < end; ++c) first += sums[c], second += squares[c];
        const double step = first * of_one;
        merge(moments[g], {count, about + step, second - first * step});
    }
}

constexpr int64_t MOST_PIXELS = 1024;  // of which moments are summed in float32

template <bool NHWC>
void statistics(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels, of_group = channels / a.groups;
    const int64_t groups = NHWC ? a.groups : 1;  // of a span
    Scratch s{scratch};
    float* bias = s.take(channels);
    const Scratch rows{s.take(5 * (channels + 16))};
    float* buffer = s.next;
    for (int64_t item = begin; item < end; ++item) {
        Moments* moments = a.moments + item * groups;
        for (int64_t g = 0; g < groups; ++g) moments[g] = {};
        channel_biases(a, item / a.spans, bias);
        for_blocks<NHWC>(a, item, [&](const Block& b) {
            const float* of_block = bias + b.channel;
            if (in_place(a)) {
                const auto parts = [&](auto f) {
                    for_parts(a, b, [&](const Block& part, int64_t first, const Image& t, const Image&) {
                        with_output_type(t.dtype, t.data, [&](auto* x) { f(part, first, x + offset_of(t, b)); });
                    });
                };
                block_moments<NHWC>(b, parts, groups, of_group, of_block, rows, moments);
            } else {
                gather_input(a, b, buffer);
                const auto parts = [&](auto f) { f(dense(b), 0, buffer); };
                block_moments<NHWC>(b, parts, groups, of_group, of_block, rows, moments);
            }
        }, in_place(a) ? MOST_PIXELS : 0);
    }
}

template <bool NHWC>
void apply(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels, size = a.block * (NHWC ? channels : channels / a.groups);
    Scratch s{scratch};
    float* bias = s.take(channels);
    float *factors = a.draw.sample ? s.take(size + DRAWN) : nullptr, *words = s.take(a.draw_scratch);
    float *input = s.take(size), *out = s.take(size);
    const bool past = is_past_caches(a, a.y);
    for (int64_t item = end - 1, last = -1; item >= begin; --item) {  // what the pass before read last is nearest
        if (a.h.data && item / a.spans != last) channel_biases(a, item / a.spans, bias);
        last = item / a.spans;
        for_blocks<NHWC>(a, item, [&](const Block& b) {
            const Numbers p = numbers_from(a, b.sample, b.channel);
            if (factors) dropout_factors(a, dense(b), factors, words);
            if (in_place(a)) {
                for_parts(a, b, [&](const Block& part, int64_t first, const Image& t, const Image&) {
                    with_output_type(t.dtype, t.data, [&](auto* x) {
                        auto* y = static_cast<decltype(x)>(a.y.data) + offset_of(a.y, b) + first;  // in the dtype of x
                        normalise<NHWC>(part, x + offset_of(t, b), p.from(first), a.activation,
                                        factors ? factors + first : nullptr, y, past);
                    });
                });
                return;
            }
            gather_input(a, b, input);
            normalise<NHWC>(dense(b), input, p, a.activation, factors, out);
            scatter_block(a, a.y, Image{}, channels, b, out);
            if (!a.h.data) return;
            add_channels<NHWC>(dense(b), bias + b.channel, input);
            scatter_block(a, a.h, Image{}, channels, b, input);
        });
    }
    if (past) fence();
}

template <class T>
INLINE void add(const T* more, int64_t count, double* total) {
    for (int64_t i = 0; i < count; ++i) total[i] += more[i];
}

// Where da of a block is kept from the first pass of backward to the second, if it is: in the rows of x, or of a dense block
// where x is gathered.
INLINE float* kept_at(const GroupNorm& a, const Block& b) {
    if (!a.kept) return nullptr;
    const int64_t pixels = a.shape.height * a.shape.width;
    if (a.shape.nhwc) return a.kept + b.pixel * b.cols;
    return a.kept + b.channel * pixels + b.pixel * (in_place(a) ? 1 : b.rows);
}

template <bool NHWC>
void backward_sums(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels, size = a.block * (NHWC ? channels : channels / a.groups);
    Scratch s{scratch};
    float *sums = s.take(4 * channels), *zeros = s.take(channels), *squares = s.take(channels);
    float *factors = a.draw.sample ? s.take(size + DRAWN) : nullptr, *words = s.take(a.draw_scratch);
    float *input = s.take(size), *gradient = s.take(size);
    memset(zeros, 0, 4 * channels);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = NHWC ? 0 : item % a.spans * (channels / a.groups);
        const int64_t here = NHWC ? channels : channels / a.groups;
        double* total = a.sums + (NHWC ? item : item / a.spans) * SUMS * channels + first;
        for (int sum : {DA, DA_CENTRED, CENTRED, DH}) memset(total + sum * channels, 0, 8 * here);
        for_blocks<NHWC>(a, item, [&](const Block& b) {
            const Numbers p = numbers_from(a, b.sample, b.channel);
            const BlockSums of_block{sums + DA * here, sums + DA_CENTRED * here, sums + CENTRED * here, sums + DH * here};
            memset(sums, 0, 16 * here);
            if (factors) dropout_factors(a, dense(b), factors, words);
            if (in_place(a)) {
                float* kept = kept_at(a, b);
                for_parts(a, b, [&](const Block& part, int64_t first, const Image& t, const Image&) {
                    with_output_type(t.dtype, t.data, [&](auto* x) {
                        const auto* dy = static_cast<decltype(x)>(a.dy.data) + offset_of(a.dy, b) + first;
                        sum_gradients<NHWC>(part, x + offset_of(t, b), dy, p.from(first), a.activation,
                                            factors ? factors + first : nullptr, of_block.from(first),
                                            kept ? kept + first : nullptr);
                    });
                });
            } else {
                gather_input(a, b, input);
                gather_gradient(a, a.dy, b, gradient);
                sum_gradients<NHWC>(dense(b), input, gradient, p, a.activation, factors, of_block, kept_at(a, b));
                if (a.dh.data) {
                    gather_gradient(a, a.dh, b, gradient);
                    sum_centred<NHWC>(dense(b), gradient, zeros, of_block.dh, squares);
                }
            }
            for (int sum : {DA, DA_CENTRED, CENTRED, DH}) add(sums + sum * here, here, total + sum * channels);
        });
    }
}

template <bool NHWC>
void backward_apply(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels, size = a.block * (NHWC ? channels : channels / a.groups);
    Scratch s{scratch};
    float *factors = a.draw.sample ? s.take(size + DRAWN) : nullptr, *words = s.take(a.draw_scratch);
    float *input = s.take(size), *gradient = s.take(size), *of_sum = s.take(size), *out = s.take(size);
    for (int64_t item = end - 1; item >= begin; --item) {  // as in apply
        for_blocks<NHWC>(a, item, [&](const Block& b) {
            const Numbers p = numbers_from(a, b.sample, b.channel);
            const float* kept = kept_at(a, b);
            if (factors && !kept) dropout_factors(a, dense(b), factors, words);
            if (in_place(a)) {
                for_parts(a, b, [&](const Block& part, int64_t first, const Image& t, const Image& dt) {
                    with_output_type(t.dtype, t.data, [&](auto* x) {
                        using T = decltype(x);
                        const T dy = static_cast<T>(a.dy.data) + offset_of(a.dy, b) + first, none = nullptr;
                        differentiate<NHWC>(part, x + offset_of(t, b), dy, none, p.from(first), a.activation,
                                            factors ? factors + first : nullptr, kept ? kept + first : nullptr,
                                            static_cast<T>(dt.data) + offset_of(dt, b), is_past_caches(a, dt));
                    });
                });
                return;
            }
            gather_input(a, b, input);
            if (!kept) gather_gradient(a, a.dy, b, gradient);
            if (a.dh.data) gather_gradient(a, a.dh, b, of_sum);
            differentiate<NHWC>(dense(b), input, gradient, a.dh.data ? of_sum : nullptr, p, a.activation, factors, kept, out);
            scatter_block(a, a.dx, a.dx2, first_channels(a), b, out);
            if (a.dresidual.data) scatter_block(a, a.dresidual, Image{}, channels, b, out);
        });
    }
    if (is_past_caches(a, a.dx) || is_past_caches(a, a.dx2)) fence();
}

// Moments of the spans of samples begin .. end - 1, merged: mean and 1 / std of each group, and the numbers of apply.
template <bool NHWC>
void finish(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    for (int64_t i = begin * a.groups; i < end * a.groups; ++i) {
        const int64_t sample = i / a.groups, g = i % a.groups, spans = NHWC ? a.spans : 1;
        Moments all{};
        for (int64_t k = 0; k < spans; ++k) merge(all, a.moments[(sample * spans + k) * a.groups + g]);
        a.mean[i] = all.mean;
        a.rstd[i] = static_cast<float>(1 / __builtin_sqrt(all.squares / all.count + a.eps));
    }
    for (int64_t sample = begin; sample < end; ++sample) {
        make_numbers(a, sample, scratch);
        float *gain = numbers_of(a, sample) + GAIN * a.row, *offset = numbers_of(a, sample) + OFFSET * a.row;
        for (int64_t c = 0; a.activation && c < a.shape.channels; ++c) gain[c] *= MINUS_LOG2_E, offset[c] *= MINUS_LOG2_E;
    }
}

// Totals of the sums of samples begin .. end - 1 in span 0, and what dx is made with:
// dx = rstd (dn - mean(dn) - n mean(dn n)), dn = da gain, n = (h - mean) rstd, the means over the group.
template <bool NHWC>
void backward_finish(const GroupNorm& a, int64_t begin, int64_t end) {
    const int64_t channels = a.shape.channels, of_group = channels / a.groups, spans = NHWC ? a.spans : 1;
    const double pixels = double(a.shape.height) * a.shape.width, count = double(of_group) * pixels;
    for (int64_t sample = begin; sample < end; ++sample) {
        double* total = a.sums + sample * spans * SUMS * channels;
        for (int64_t k = 1; k < spans; ++k) add(total + k * SUMS * channels, (DH + 1) * channels, total);
        float *p = numbers_of(a, sample), *slope = p + SLOPE * a.row, *level = p + LEVEL * a.row;
        const float *gain = p + GAIN * a.row, *rest = p + REST * a.row;
        double *da = total + DA * channels, *da_centred = total + DA_CENTRED * channels, *dx = total + DX * channels;
        const double *centred = total + CENTRED * channels, *dh = total + DH * channels;
        for (int64_t c = 0; c < channels; ++c) da_centred[c] -= rest[c] * da[c];  // centred about the mean itself
        for (int64_t g = 0; g < a.groups; ++g) {
            const double rstd = a.rstd[sample * a.groups + g];
            double dn = 0, dn_centred = 0;  // rstd times their sums
            for (int64_t c = g * of_group; c < (g + 1) * of_group; ++c) {
                dn += gain[c] * da[c];
                dn_centred += gain[c] * da_centred[c];
            }
            const double mean = dn / count, inclination = rstd * rstd * dn_centred / count;
            for (int64_t c = g * of_group; c < (g + 1) * of_group; ++c) {
                slope[c] = static_cast<float>(-inclination);
                level[c] = static_cast<float>(-mean - double(slope[c]) * rest[c]);
            }
            for (int64_t c = g * of_group; a.channel_bias.data && c < (g + 1) * of_group; ++c)
                dx[c] = gain[c] * da[c] - mean * pixels - inclination * (centred[c] - rest[c] * pixels) + dh[c];
        }
    }
}

}  // namespace

#define FOR_ORDER(f) (a.shape.nhwc ? f<true> : f<false>)

void group_norm_statistics(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    FOR_ORDER(statistics)(a, begin, end, scratch);
}
void group_norm_finish(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    FOR_ORDER(finish)(a, begin, end, scratch);
}
void group_norm_apply(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    FOR_ORDER(apply)(a, begin, end, scratch);
}
void group_norm_backward_numbers(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    for (int64_t sample = begin; sample < end; ++sample) make_numbers(a, sample, scratch);
}
void group_norm_backward_sums(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    FOR_ORDER(backward_sums)(a, begin, end, scratch);
}
void group_norm_backward_finish(const GroupNorm& a, int64_t begin, int64_t end, float*) {
    FOR_ORDER(backward_finish)(a, begin, end);
}
void group_norm_backward_apply(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    FOR_ORDER(backward_apply)(a, begin, end, scratch);
}

}  // namespace fastddpm::FASTDDPM_ISA
