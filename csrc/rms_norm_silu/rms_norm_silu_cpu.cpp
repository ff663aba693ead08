// y = silu(n gain + shift), n = sqrt(C) x / max(||x||, eps) over the channels of a pixel, gain = weight (1 + scale)
// (Zhang and Sennrich 2019, eq. 4).
//
// A work item is a block of pixels with all their channels, small enough for the first caches; x is read from memory
// once. In NHWC order a vector holds channels of one pixel, in NCHW order pixels of one channel. Bytes an element,
// float32: 8 forward, 12 backward. What limits it is memory, and within the cache the exponential.

#include "rms_norm_silu/rms_norm_silu.h"

#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// What a sample is scaled with.
struct Affine {
    const float *gain, *shift;
};

INLINE void read_channels(const Values& v, int64_t sample, int64_t channels, float* out) {
    with_type(v.dtype, v.data, [&](const auto* p) {
        p += sample * v.row_stride;
        for_vectors(channels, [&](int64_t i, int64_t n) { store(out + i, load(p + i, n), n); });
    });
}

INLINE void affine_of(const RmsNorm& a, int64_t sample, float* gain, float* shift) {
    const int64_t channels = a.shape.channels;
    read_channels(a.weight, sample, channels, gain);
    if (a.scale.data) {
        read_channels(a.scale, sample, channels, shift);
        for (int64_t c = 0; c < channels; ++c) gain[c] *= 1 + shift[c];
    }
    if (a.shift.data) read_channels(a.shift, sample, channels, shift);
    else memset(shift, 0, 4 * channels);
}

// sqrt(C) / max(||x||, eps), from ||x||^2.
INLINE float factor_of(float squares, float root, float eps, bool& is_norm) {
    const float norm = __builtin_sqrtf(squares);
    is_norm = norm > eps;
    return root / (norm < eps ? eps : norm);
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
    for (; c < channels; c += W) {
        VF v = load(x + c, channels - c < W ? channels - c : W);
        total[0] += v * v;
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

INLINE VF activated(VF a, bool activation, bool coarse) {
    if (!activation) return a;
    return a * (coarse ? coarse_sigmoid(a) : sigmoid(a));
}

INLINE VF before_activation(VF dy, VF a, bool activation) {
    if (!activation) return dy;
    VF s = sigmoid(a);
    return dy * (s * (1.0f + a * (1.0f - s)));
}

template <class T>
INLINE void forward_nhwc(const RmsNorm& a, const T* x, int64_t pixels, const Affine& p, T* y) {
    const int64_t channels = a.shape.channels;
    const float root = __builtin_sqrtf(float(channels));
    for (int64_t i = 0; i < pixels; ++i, x += channels, y += channels) {
        bool is_norm;
        const float factor = factor_of(squares_of(x, channels), root, a.eps, is_norm);
        for_vectors(channels, [&](int64_t c, int64_t n) {
            VF v = load(x + c, n) * factor * load(p.gain + c, n) + load(p.shift + c, n);
            store(y + c, activated(v, a.activation, sizeof(T) == 2), n);
        });
    }
}

// ``dn``: room for the channels.
template <class T>
INLINE void backward_nhwc(const RmsNorm& a, const T* x, const T* dy, int64_t pixels, const Affine& p, T* dx, float* sum_da,
                          float* sum_da_n, float* dn) {
    const int64_t channels = a.shape.channels;
    const float root = __builtin_sqrtf(float(channels));
    for (int64_t i = 0; i < pixels; ++i, x += channels, dy += channels, dx += channels) {
        bool is_norm;
        const float factor = factor_of(squares_of(x, channels), root, a.eps, is_norm);
        VF dot{};
        for_vectors(channels, [&](int64_t c, int64_t n) {
            VF gain = load(p.gain + c, n), v = load(x + c, n) * factor;
            VF da = before_activation(load(dy + c, n), v * gain + load(p.shift + c, n), a.activation);
            VF da_n = da * v;
            store(sum_da + c, load(sum_da + c, n) + da, n);
            store(sum_da_n + c, load(sum_da_n + c, n) + da_n, n);
            store(dn + c, da * gain, n);
            dot += da_n * gain;  // lanes beyond n hold v = 0
        });
        const float mean = is_norm ? sum(dot) / channels : 0.0f;
        for_vectors(channels, [&](int64_t c, int64_t n) {
            VF v = load(x + c, n) * factor;
            store(dx + c, (load(dn + c, n) - v * mean) * factor, n);
        });
    }
}

// In NCHW order a row of a channel is ``stride`` elements from the next. ``factor`` and ``is_norm``: room for the pixels.
template <class T>
INLINE void factors_nchw(const RmsNorm& a, const T* x, int64_t pixels, int64_t stride, float* factor, float* is_norm) {
    const float root = __builtin_sqrtf(float(a.shape.channels));
    for_vectors(pixels, [&](int64_t i, int64_t n) {
        VF total{};
        for (int64_t c = 0; c < a.shape.channels; ++c) {
            VF v = load(x + c * stride + i, n);
            total += v * v;
        }
        VF norm = sqrt(total);
        store(factor + i, root / select(norm < a.eps, splat(a.eps), norm), n);
        store(is_norm + i, select(norm > a.eps, splat(1.0f), VF{}), n);
    });
}

template <class T>
INLINE void forward_nchw(const RmsNorm& a, const T* x, int64_t pixels, int64_t stride, const Affine& p, T* y, float* rows) {
    float *factor = rows, *is_norm = rows + a.block + W;
    factors_nchw(a, x, pixels, stride, factor, is_norm);
    for (int64_t c = 0; c < a.shape.channels; ++c)
        for_vectors(pixels, [&](int64_t i, int64_t n) {
            VF v = load(x + c * stride + i, n) * load(factor + i, n) * p.gain[c] + p.shift[c];
            store(y + c * stride + i, activated(v, a.activation, sizeof(T) == 2), n);
        });
}

// ``dn``: room for the block.
template <class T>
INLINE void backward_nchw(const RmsNorm& a, const T* x, const T* dy, int64_t pixels, int64_t stride, const Affine& p, T* dx,
                          float* sum_da, float* sum_da_n, float* rows, float* dn) {
    float *factor = rows, *is_norm = rows + a.block + W, *dot = is_norm + a.block + W;
    factors_nchw(a, x, pixels, stride, factor, is_norm);
    memset(dot, 0, 4 * (a.block + W));
    for (int64_t c = 0; c < a.shape.channels; ++c) {
        VF of_da{}, of_da_n{};
        for_vectors(pixels, [&](int64_t i, int64_t n) {
            VF v = load(x + c * stride + i, n) * load(factor + i, n);
            VF da = before_activation(load(dy + c * stride + i, n), v * p.gain[c] + p.shift[c], a.activation);
            da = n == W ? da : first_lanes(da, n);
            of_da += da;
            of_da_n += da * v;
            store(dn + c * a.block + i, da * p.gain[c], n);
            store(dot + i, load(dot + i, n) + da * v * p.gain[c], n);
        });
        sum_da[c] += sum(of_da);
        sum_da_n[c] += sum(of_da_n);
    }
    for (int64_t c = 0; c < a.shape.channels; ++c)
        for_vectors(pixels, [&](int64_t i, int64_t n) {
            VF f = load(factor + i, n), v = load(x + c * stride + i, n) * f;
            VF mean = load(dot + i, n) * load(is_norm + i, n) * (1.0f / a.shape.channels);
            store(dx + c * stride + i, (load(dn + c * a.block + i, n) - v * mean) * f, n);
        });
}

INLINE int64_t offset_of(const Image& t, int64_t sample, int64_t pixel) {
    return sample * t.sample_stride + pixel * t.pixel_stride;
}

// f(sample, first pixel, pixels) for each item, and prepare(sample) before those of a sample.
template <class Prepare, class F>
INLINE void for_items(const RmsNorm& a, int64_t begin, int64_t end, Prepare prepare, F f) {
    const int64_t all = a.shape.height * a.shape.width;
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t sample = item / a.per_sample, first = item % a.per_sample * a.block;
        if (sample != last) prepare(sample);
        last = sample;
        f(item, sample, first, all - first < a.block ? all - first : a.block);
    }
}

INLINE float* take(float*& next, int64_t floats) {
    float* taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
}

}  // namespace

void rms_norm_forward(const RmsNorm& a, int64_t begin, int64_t end, float* next) {
    const int64_t channels = a.shape.channels, all = a.shape.height * a.shape.width;
    float *gain = take(next, channels), *shift = take(next, channels), *rows = take(next, 3 * (a.block + W));
    with_output_type(a.x.dtype, a.x.data, [&](auto* x_data) {
        auto* y_data = static_cast<decltype(x_data)>(a.y.data);
        for_items(a, begin, end, [&](int64_t b) { affine_of(a, b, gain, shift); },
                  [&](int64_t, int64_t b, int64_t first, int64_t pixels) {
                      const auto* x = x_data + offset_of(a.x, b, first);
                      auto* y = y_data + offset_of(a.y, b, first);
                      if (a.shape.nhwc) forward_nhwc(a, x, pixels, {gain, shift}, y);
                      else forward_nchw(a, x, pixels, all, {gain, shift}, y, rows);
                  });
    });
}

void rms_norm_backward(const RmsNorm& a, int64_t begin, int64_t end, float* next) {
    const int64_t channels = a.shape.channels, all = a.shape.height * a.shape.width;
    float *gain = take(next, channels), *shift = take(next, channels), *rows = take(next, 3 * (a.block + W));
    float *da = take(next, channels), *da_n = take(next, channels);
    float* dn = take(next, a.shape.nhwc ? channels : channels * a.block);
    with_output_type(a.x.dtype, a.x.data, [&](auto* x_data) {
        using T = decltype(x_data);
        const T dy_data = static_cast<T>(a.dy.data), dx_data = static_cast<T>(a.dx.data);
        for_items(a, begin, end, [&](int64_t b) { affine_of(a, b, gain, shift); },
                  [&](int64_t item, int64_t b, int64_t first, int64_t pixels) {
                      memset(da, 0, 4 * channels), memset(da_n, 0, 4 * channels);
                      const T x = x_data + offset_of(a.x, b, first), dy = dy_data + offset_of(a.dy, b, first);
                      const T dx = dx_data + offset_of(a.dx, b, first);
                      if (a.shape.nhwc) backward_nhwc(a, x, dy, pixels, {gain, shift}, dx, da, da_n, dn);
                      else backward_nchw(a, x, dy, pixels, all, {gain, shift}, dx, da, da_n, rows, dn);
                      double* sums = a.sums + item * 2 * channels;
                      for (int64_t c = 0; c < channels; ++c) sums[c] = da[c], sums[channels + c] = da_n[c];
                  });
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
