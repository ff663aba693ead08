// Reading and writing a tile of an image as floats, whatever its dtype and memory order. Included by kernels alone.
#pragma once

#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

INLINE Tile tile(const Shape& s, const Tiling& tiling, int64_t item) {
    int64_t begin = item % tiling.per_sample * tiling.size, rest = s.channels * s.height * s.width - begin;
    return {item / tiling.per_sample, begin, rest < tiling.size ? rest : tiling.size};
}

// Call f(i, channel, pixel, n, step): elements i .. i + n - 1 of the tile lie in one image row (of W pixels) of one
// channel, or in one pixel; ``step`` is 1 where they are neighbouring pixels, 0 where they are neighbouring channels.
template <class F>
INLINE void for_runs(const Shape& s, const Tile& t, F f) {
    const int64_t pixels = s.height * s.width;
    if (s.nhwc) {
        int64_t pixel = t.begin / s.channels;
        for (int64_t i = 0; i < t.size; i += s.channels) f(i, int64_t(0), pixel++, s.channels, 0);
        return;
    }
    for (int64_t i = 0; i < t.size;) {
        int64_t element = t.begin + i, left_of_row = s.width - element % s.width;
        int64_t n = left_of_row < t.size - i ? left_of_row : t.size - i;
        f(i, element / pixels, element % pixels, n, 1);
        i += n;
    }
}

// Elements of a row of the source (a sample) that neither lie in the order of the tile nor start where it does.
template <class T>
INLINE void gather(const T* source, const Image& a, const Shape& s, const Tile& t, bool flip, float* out) {
    for_runs(s, t, [&](int64_t i, int64_t channel, int64_t pixel, int64_t n, int64_t along_pixels) {
        int64_t step = along_pixels ? a.pixel_stride : a.channel_stride;
        if (flip) {
            int64_t column = pixel % s.width;
            pixel += s.width - 1 - 2 * column;
            if (along_pixels) step = -step;
        }
        const T* p = source + channel * a.channel_stride + pixel * a.pixel_stride;
        for (int64_t j = 0; j < n; ++j) out[i + j] = load(p + j * step, 1)[0];
    });
}

// The tile of row ``row`` of an image, as floats: where they lie, or in ``buffer``. flip mirrors it left to right.
INLINE const float* load(const Image& a, const Shape& s, const Tile& t, int64_t row, bool flip, float* buffer) {
    int64_t offset = row * a.sample_stride;
    if (a.in_order && !flip && a.dtype == DType::f32) return static_cast<const float*>(a.data) + offset + t.begin;
    with_type(a.dtype, a.data, [&](const auto* p) {
        p += offset;
        if (a.in_order && !flip)
            for_vectors(t.size, [&](int64_t i, int64_t n) { store(buffer + i, load(p + t.begin + i, n)); });
        else
            gather(p, a, s, t, flip, buffer);
    });
    return buffer;
}
INLINE const float* load(const Image& a, const Shape& s, const Tile& t, float* buffer) {
    return load(a, s, t, t.sample, false, buffer);
}

// Where to compute the tile of an output that lies in the order of the Shape: in it, or in ``buffer``.
INLINE float* target(const Image& a, const Tile& t, float* buffer) {
    bool direct = a.dtype == DType::f32 && a.in_order;
    return direct ? static_cast<float*>(a.data) + t.sample * a.sample_stride + t.begin : buffer;
}

// Round a tile computed in ``buffer`` (see target) into its place.
INLINE void commit(const Image& a, const Shape& s, const Tile& t, const float* buffer) {
    if (a.dtype == DType::f32 && a.in_order) return;
    with_output_type(a.dtype, a.data, [&](auto* p) {
        p += t.sample * a.sample_stride;
        if (a.in_order) {
            for_vectors(t.size, [&](int64_t i, int64_t n) { store(p + t.begin + i, load(buffer + i, n), n); });
            return;
        }
        for_runs(s, t, [&](int64_t i, int64_t channel, int64_t pixel, int64_t n, int64_t along_pixels) {
            int64_t step = along_pixels ? a.pixel_stride : a.channel_stride;
            auto* to = p + channel * a.channel_stride + pixel * a.pixel_stride;
            for (int64_t j = 0; j < n; ++j) store(to + j * step, splat(buffer[i + j]), 1);
        });
    });
}

// f(Channels) as a constant, for the few channels that images have; returns false for any other number.
template <class F>
INLINE bool with_channels(int64_t channels, F f) {
    switch (channels) {
        case 1: f.template operator()<1>(); return true;
        case 2: f.template operator()<2>(); return true;
        case 3: f.template operator()<3>(); return true;
        case 4: f.template operator()<4>(); return true;
        default: return false;
    }
}

// As load, and fast where pixels lie apart or channels are repeated: half of [B, 2C, H, W] in NHWC order, or a mask.
INLINE const float* load_apart(const Image& a, const Shape& s, const Tile& t, float* buffer) {
    if (a.in_order) return load(a, s, t, buffer);
    const int64_t pixels = s.height * s.width, offset = t.sample * a.sample_stride;
    if (s.nhwc) {
        const int64_t first = t.begin / s.channels, count = t.size / s.channels;
        if (with_channels(s.channels, [&]<int Channels>() {
                with_type(a.dtype, a.data, [&](const auto* p) {
                    p += offset + first * a.pixel_stride;
                    for (int64_t i = 0; i < count; ++i)
                        for (int c = 0; c < Channels; ++c)
                            buffer[i * Channels + c] = load(p + i * a.pixel_stride + c * a.channel_stride, 1)[0];
                });
            }))
            return buffer;
    } else if (a.pixel_stride == 1) {
        with_type(a.dtype, a.data, [&](const auto* p) {
            for (int64_t i = 0; i < t.size;) {
                const int64_t channel = (t.begin + i) / pixels, pixel = (t.begin + i) % pixels;
                const int64_t n = pixels - pixel < t.size - i ? pixels - pixel : t.size - i;
                const auto* row = p + offset + channel * a.channel_stride + pixel;
                for_vectors(n, [&](int64_t j, int64_t k) { store(buffer + i + j, load(row + j, k), k); });
                i += n;
            }
        });
        return buffer;
    }
    return load(a, s, t, buffer);
}

// As commit, and fast where pixels lie apart.
INLINE void commit_apart(const Image& a, const Shape& s, const Tile& t, const float* buffer) {
    const int64_t first = t.begin / s.channels, count = t.size / s.channels;
    const bool written = !a.in_order && s.nhwc && with_channels(s.channels, [&]<int Channels>() {
        with_output_type(a.dtype, a.data, [&](auto* p) {
            p += t.sample * a.sample_stride + first * a.pixel_stride;
            for (int64_t i = 0; i < count; ++i)
                for (int c = 0; c < Channels; ++c)
                    store(p + i * a.pixel_stride + c * a.channel_stride, splat(buffer[i * Channels + c]), 1);
        });
    });
    if (!written) commit(a, s, t, buffer);
}

}  // namespace
}  // namespace fastddpm::FASTDDPM_ISA
