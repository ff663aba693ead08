#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

// A gradient of a parameter, written in its dtype.
struct Gradient {
    void* data;  // nullptr: not wanted
    DType dtype;
};

struct RmsNorm {
    Shape shape;
    Image x, y, dy, dx;           // all in the order of the shape
    Values weight, scale, shift;  // [C], [B, C], [B, C]
    float eps, root, inverse;  // .., sqrt(C), 1 / C
    bool activation;
    float* sums;  // backward: [rms_norm_sums, 2, C], of da and of da n
    Gradient dweight, dscale, dshift;
};

// Rows of partial sums that backward needs room for.
int64_t rms_norm_sums(const RmsNorm& a);

[[nodiscard]] cudaError_t rms_norm_forward(const RmsNorm& a, cudaStream_t stream);
[[nodiscard]] cudaError_t rms_norm_backward(const RmsNorm& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
