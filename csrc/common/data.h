// Plain data that host code hands to kernels. No functions: this file is compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace fastddpm {

enum class DType { f32, f64, bf16, f16, u8 };

// [B, C, H, W] and the order of its elements in memory: C, H, W or, with nhwc, H, W, C.
struct Shape {
    int64_t batch, channels, height, width;
    bool nhwc;
};

// A tensor read or written as such an image; strides in elements. A mask may repeat a sample or a channel: stride 0.
struct Image {
    void* data;  // nullptr: not given
    DType dtype;
    int64_t sample_stride, channel_stride, pixel_stride;
    bool in_order;  // its elements lie in the order of the Shape that it is used with
};

// A vector or small matrix of any float dtype.
struct Values {
    const void* data;  // nullptr: not given
    DType dtype;
    int64_t row_stride;  // 0 where all samples share one row
};

// Where noise is drawn: key = seed, counter = (element / 4, sample[b], step, stream).
struct Draw {
    uint64_t seed;
    const int64_t* sample;  // nullptr: nothing is drawn
    uint32_t step, stream;
};

// Streams, as in fastddpm/ops/philox.py.
enum : uint32_t { X_T, TRAINING_NOISE, SAMPLER_NOISE, T, FLIP, DROPOUT };

// A part of one sample: elements begin .. begin + size - 1 in the order of the Shape.
// In NHWC order whole pixels, in NCHW order a begin divisible by 4.
struct Tile {
    int64_t sample, begin, size;
};

// Samples cut into tiles of equal size (the last of a sample may be shorter); work item i is one of them.
struct Tiling {
    int64_t size, per_sample;
};

}  // namespace fastddpm
