// y = silu(n gain + shift), n = sqrt(C) x / max(||x||, eps) over the channels of a pixel, gain = weight (1 + scale)
// (Zhang and Sennrich 2019, eq. 4).
//
// A work item is a block of pixels with all their channels, small enough for the first caches; x is read from memory
// once. In NHWC order a vector holds channels of one pixel, in NCHW order pixels of one channel; where a pixel has
// fewer channels, or a channel fewer pixels, than a vector has lanes, the block is turned into the other order first.
// Bytes an element, float32: 8 forward, 12 backward. What limits it is memory, and within the cache the exponential.

#include "rms_norm_silu/rms_norm_silu.h"

#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// f(i, n, old) for vectors of n lanes at i, which cover 0 .. size - 1. The last one lies W before the end: of its lanes
// the first ``old`` were in the one before. Stored again they are the same; sums leave them out. n < W if size < W.
template <class F>
INLINE void for_covering(int64_t size, F f) {
    if (size < W) {
        if (size > 0) f(int64_t(0), size, int64_t(0));
        return;
    }
    int64_t i = 0;
    for (; i + W <= size; i += W) f(i, W, int64_t(0));
    if (i < size) f(size - W, W, W - (size - i));
}

// 0 in the first ``old`` lanes.
INLINE VF new_lanes(VF x, int64_t old) {
    if (old == 0) return x;
    VI lane;
    for (int32_t i = 0; i < W; ++i) lane[i] = i;
    return select(lane < int32_t(old), VF{}, x);
}

// What a sample is scaled with.
struct Affine {
    const float *gain, *shift;
    Affine from(int64_t c) const { return {gain + c, shift + c}; }
};

// ``times`` as much.
void affine_of(const RmsNorm& a, int64_t sample, float times, float* gain, float* shift) {
    const int64_t channels = a.shape.channels;
    read_channels(a.weight, sample, channels, gain);
    if (a.scale.data) {
        read_channels(a.scale, sample, channels, shift);
        for (int64_t c = 0; c < channels; ++c) gain[c] *= 1 + shift[c];
    }
    if (a.shift.data) read_channels(a.shift, sample, channels, shift);
    else memset(shift, 0, 4 * channels);
    for (int64_t c = 0; c < channels; ++c) gain[c] *= times, shift[c] *= times;
}

template <class T>
INLINE float squares_of(const T* x, int64_t channels) {
    VF total[4]{};
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W)
        for (int k = 0; k < 4; ++k) {
            VF v = load(x + c + k * W);
            total[k] += v * v;
        }
    const int64_t done = c;
    const auto add = [&](int64_t i, int64_t n, int64_t old) {
        VF v = new_lanes(load(x + i, n), old);
        total[0] += v * v;
    };
    if (done == 0) for_covering(channels, add);
    else {
        for (; c + W <= channels; c += W) add(c, W, 0);
        if (c < channels) add(channels - W, W, W - (channels - c));
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// sqrt(C) / max(||x||, eps) of each of n <= W pixels, and 1 where the norm, 0 where eps counts. All roots and divisions at
// once: one by one the arithmetic of a pixel would wait for them.
template <class T>
INLINE void factors_nhwc(const RmsNorm& a, const T* x, int64_t n, float* factor, float* is_norm) {
    float squares[W]{};
    for (int64_t i = 0; i < n; ++i) squares[i] = squares_of(x + i * a.shape.channels, a.shape.channels);
    const VF norm = sqrt(load(squares)), root = splat(__builtin_sqrtf(float(a.shape.channels)));
    store(factor, root / select(norm < a.eps, splat(a.eps), norm));
    store(is_norm, select(norm > a.eps, splat(1.0f), VF{}));
}

// y of N vectors, W apart, of a pixel. With the activation, gain and shift are those of -a log2(e), which silus takes.
// What lies ``ahead`` of x will be read next.
template <int N, class T>
INLINE void normalise(const T* x, int64_t ahead, float factor, const Affine& p, bool activation, T* y, int64_t n = W) {
    side_by_side<N>([&](int k) { __builtin_prefetch(x + ahead + k * W); });
    VF v[N];
    side_by_side<N>([&](int k) { v[k] = load(x + k * W, n) * factor * load(p.gain + k * W, n) + load(p.shift + k * W, n); });
    if (activation) silus<sizeof(T) == 2>(v);
    side_by_side<N>([&](int k) { store(y + k * W, v[k], n); });
}

template <class T>
void forward_nhwc(const RmsNorm& a, const T* x, int64_t pixels, const Affine& p, T* y) {
    constexpr int MANY = W == 16 ? 8 : 4;
    const int64_t channels = a.shape.channels;
    const bool activation = a.activation;
    float factor[W], is_norm[W];
    for (int64_t i = 0; i < pixels; ++i, x += channels, y += channels) {
        if (i % W == 0) factors_nhwc(a, x, pixels - i < W ? pixels - i : W, factor, is_norm);
        const float f = factor[i % W];
        int64_t c = 0;
        for (; c + MANY * W <= channels; c += MANY * W) normalise<MANY>(x + c, W * channels, f, p.from(c), activation, y + c);
        for (; c + W <= channels; c += W) normalise<1>(x + c, W * channels, f, p.from(c), activation, y + c);
        if (c == channels) continue;
        const int64_t rest = channels < W ? 0 : channels - W;  // the last ones, and of those before as many as fill a vector
        normalise<1>(x + rest, W * channels, f, p.from(rest), activation, y + rest, channels < W ? channels : W);
    }
}

// Sums over the pixels of a block, for each channel.
struct Sums {
    float *da, *da_n;
};

// ``dn``: room for the channels.
template <class T>
void backward_nhwc(const RmsNorm& a, const T* x, const T* dy, int64_t pixels, const Affine& p, T* dx, const Sums& sums,
                   float* dn) {
    const int64_t channels = a.shape.channels;
    float factors[W], is_norm[W];
    for (int64_t i = 0; i < pixels; ++i, x += channels, dy += channels, dx += channels) {
        if (i % W == 0) factors_nhwc(a, x, pixels - i < W ? pixels - i : W, factors, is_norm);
        const float factor = factors[i % W];
        VF dot{};
        for_covering(channels, [&](int64_t c, int64_t n, int64_t old) {
            VF gain = load(p.gain + c, n), v = load(x + c, n) * factor;
            VF of_y[1] = {load(dy + c, n)}, inner[1] = {v * gain + load(p.shift + c, n)};
            if (a.activation) before_activation(of_y, inner);
            VF da = of_y[0];
            store(dn + c, da * gain, n);
            da = new_lanes(da, old);
            VF da_n = new_lanes(da * v, old);
            store(sums.da + c, load(sums.da + c, n) + da, n);
            store(sums.da_n + c, load(sums.da_n + c, n) + da_n, n);
            dot += da_n * gain;  // lanes beyond n hold v = 0
        });
        const float mean = is_norm[i % W] != 0 ? sum(dot) / channels : 0.0f;
        for_covering(channels, [&](int64_t c, int64_t n, int64_t) {
            VF v = load(x + c, n) * factor;
            store(dx + c, (load(dn + c, n) - v * mean) * factor, n);
        });
    }
}

// In NCHW order a row of a channel is ``stride`` elements from the next. Room for the pixels of a block:
struct Pixels {
    float *factor, *is_norm, *dot;
};

template <class T>
INLINE void factors_nchw(const RmsNorm& a, const T* x, int64_t pixels, int64_t stride, const Pixels& of) {
    const float root = __builtin_sqrtf(float(a.shape.channels));
    for_covering(pixels, [&](int64_t i, int64_t n, int64_t) {
        VF total{};
        for (int64_t c = 0; c < a.shape.channels; ++c) {
            VF v = load(x + c * stride + i, n);
            total += v * v;
        }
        VF norm = sqrt(total);
        store(of.factor + i, root / select(norm < a.eps, splat(a.eps), norm), n);
        store(of.is_norm + i, select(norm > a.eps, splat(1.0f), VF{}), n);
    });
}

template <class T>
void forward_nchw(const RmsNorm& a, const T* x, int64_t pixels, int64_t stride, const Affine& p, T* y,
                  const Pixels& of) {
    factors_nchw(a, x, pixels, stride, of);
    for (int64_t c = 0; c < a.shape.channels; ++c)
        for_covering(pixels, [&](int64_t i, int64_t n, int64_t) {
            VF v[1] = {load(x + c * stride + i, n) * load(of.factor + i, n) * p.gain[c] + p.shift[c]};
            if (a.activation) silus<sizeof(T) == 2>(v);
            store(y + c * stride + i, v[0], n);
        });
}

// ``dn``: room for the block.
template <class T>
void backward_nchw(const RmsNorm& a, const T* x, const T* dy, int64_t pixels, int64_t stride, const Affine& p, T* dx,
                   const Sums& sums, const Pixels& of, float* dn) {
    factors_nchw(a, x, pixels, stride, of);
    memset(of.dot, 0, 4 * pixels);
    for (int64_t c = 0; c < a.shape.channels; ++c) {
        VF of_da{}, of_da_n{};
        for_covering(pixels, [&](int64_t i, int64_t n, int64_t old) {
            VF v = load(x + c * stride + i, n) * load(of.factor + i, n);
            VF of_y[1] = {load(dy + c * stride + i, n)}, inner[1] = {v * p.gain[c] + p.shift[c]};
            if (a.activation) before_activation(of_y, inner);
            VF da = of_y[0];
            store(dn + c * a.block + i, da * p.gain[c], n);
            da = new_lanes(n == W ? da : first_lanes(da, n), old);
            VF da_n = new_lanes(da * v, old);
            of_da += da;
            of_da_n += da_n;
            store(of.dot + i, load(of.dot + i, n) + da_n * p.gain[c], n);
        });
        sums.da[c] = sum(of_da);
        sums.da_n[c] = sum(of_da_n);
    }
    for (int64_t c = 0; c < a.shape.channels; ++c)
        for_covering(pixels, [&](int64_t i, int64_t n, int64_t) {
            VF f = load(of.factor + i, n), v = load(x + c * stride + i, n) * f;
            VF mean = load(of.dot + i, n) * load(of.is_norm + i, n) * (1.0f / a.shape.channels);
            store(dx + c * stride + i, (load(dn + c * a.block + i, n) - v * mean) * f, n);
        });
}

// A block, in either order: its rows (pixels in NHWC order, channels in NCHW order), elements of each, and what lies
// between the first of one row and that of the next.
struct Rows {
    int64_t count, size, stride;
};

// Worth it where rows are short and there are enough of them.
INLINE bool is_turned(const Rows& r) { return r.size < W && r.count >= W; }

template <class T>
INLINE void turn(const T* from, const Rows& r, float* to) {
    for (int64_t j = 0; j < r.size; ++j)
        for (int64_t i = 0; i < r.count; ++i) to[j * r.count + i] = load(from + i * r.stride + j, 1)[0];
}

template <class T>
INLINE void turn_back(const float* from, const Rows& r, T* to) {
    for (int64_t i = 0; i < r.count; ++i)
        for (int64_t j = 0; j < r.size; ++j) store(to + i * r.stride + j, splat(from[j * r.count + i]), 1);
}

INLINE float* take(float*& next, int64_t floats) {
    float* taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
}

// Memory of one call.
struct Scratch {
    float *gain, *shift, *dn;
    Pixels of;
    float *x, *dy, *out;  // of a turned block
};
INLINE Scratch scratch_of(const RmsNorm& a, float* next) {
    const int64_t channels = a.shape.channels, block = channels * a.block;
    Scratch s;
    s.gain = take(next, channels), s.shift = take(next, channels);
    s.of = {take(next, a.block), take(next, a.block), take(next, a.block)};
    s.dn = take(next, block), s.x = take(next, block), s.dy = take(next, block), s.out = take(next, block);
    return s;
}

// f(item, sample, first pixel, pixels, rows) for each item, with the gain and shift of its sample, ``times`` as much, in ``s``.
template <class F>
INLINE void for_items(const RmsNorm& a, int64_t begin, int64_t end, float times, const Scratch& s, F f) {
    const int64_t channels = a.shape.channels, all = a.shape.height * a.shape.width;
    const bool of_samples = a.scale.data || a.shift.data;
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t sample = item / a.per_sample, k = item % a.per_sample;
        if (last < 0 || (sample != last && of_samples)) affine_of(a, sample, times, s.gain, s.shift);
        last = sample;
        const int64_t first = k * all / a.per_sample, pixels = (k + 1) * all / a.per_sample - first;
        f(item, sample, first, pixels, a.nhwc ? Rows{pixels, channels, channels} : Rows{channels, pixels, all});
    }
}

INLINE int64_t offset_of(const Image& t, int64_t sample, int64_t pixel) {
    return sample * t.sample_stride + pixel * t.pixel_stride;
}

template <class T>
INLINE void forward(const RmsNorm& a, bool nhwc, const T* x, int64_t pixels, int64_t stride, const Scratch& s, T* y) {
    const Affine p{s.gain, s.shift};
    if (nhwc) forward_nhwc(a, x, pixels, p, y);
    else forward_nchw(a, x, pixels, stride, p, y, s.of);
}

template <class T>
INLINE void backward(const RmsNorm& a, bool nhwc, const T* x, const T* dy, int64_t pixels, int64_t stride,
                     const Scratch& s, T* dx, const Sums& sums) {
    const Affine p{s.gain, s.shift};
    if (nhwc) backward_nhwc(a, x, dy, pixels, p, dx, sums, s.dn);
    else backward_nchw(a, x, dy, pixels, stride, p, dx, sums, s.of, s.dn);
}

}  // namespace

void rms_norm_forward(const RmsNorm& a, int64_t begin, int64_t end, float* scratch) {
    const Scratch s = scratch_of(a, scratch);
    with_output_type(a.x.dtype, a.x.data, [&](auto* x_data) {
        using T = decltype(x_data);
        const T y_data = static_cast<T>(a.y.data);
        const float times = a.activation ? MINUS_LOG2_E : 1.0f;
        for_items(a, begin, end, times, s, [&](int64_t, int64_t b, int64_t first, int64_t pixels, const Rows& r) {
            const T x = x_data + offset_of(a.x, b, first), y = y_data + offset_of(a.y, b, first);
            if (!is_turned(r)) return forward(a, a.nhwc, x, pixels, r.stride, s, y);
            turn(x, r, s.x);
            forward(a, !a.nhwc, s.x, pixels, pixels, s, s.out);
            turn_back(s.out, r, y);
        });
    });
}

void rms_norm_backward(const RmsNorm& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = a.shape.channels;
    const Scratch s = scratch_of(a, scratch);
    with_output_type(a.x.dtype, a.x.data, [&](auto* x_data) {
        using T = decltype(x_data);
        const T dy_data = static_cast<T>(a.dy.data), dx_data = static_cast<T>(a.dx.data);
        for_items(a, begin, end, 1.0f, s, [&](int64_t item, int64_t b, int64_t first, int64_t pixels, const Rows& r) {
            const Sums sums{a.sums + item * 2 * channels, a.sums + (item * 2 + 1) * channels};
            memset(sums.da, 0, 2 * 4 * channels);
            const T x = x_data + offset_of(a.x, b, first), dy = dy_data + offset_of(a.dy, b, first);
            const T dx = dx_data + offset_of(a.dx, b, first);
            if (!is_turned(r)) return backward(a, a.nhwc, x, dy, pixels, r.stride, s, dx, sums);
            turn(x, r, s.x), turn(dy, r, s.dy);
            backward(a, !a.nhwc, s.x, s.dy, pixels, pixels, s, s.out, sums);
            turn_back(s.out, r, dx);
        });
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
