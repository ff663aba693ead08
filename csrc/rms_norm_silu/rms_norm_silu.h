#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

// A work item is a block of pixels of one sample, with all their channels: pixels k P / per_sample up to
// (k + 1) P / per_sample of the P pixels.
struct RmsNorm {
    Shape shape;
    bool nhwc;                  // the order that is worked in: one pixel lies in both
    int64_t per_sample, block;  // blocks of a sample, pixels of the largest
    Image x, y, dy, dx;
    Values weight, scale, shift;  // [C] or [B, C]
    float eps;
    bool activation;
    float* sums;      // backward: [items, 2, C], of da and of da n
    int64_t scratch;  // floats that a call needs
};

FASTDDPM_DECLARE(rms_norm_forward, const RmsNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(rms_norm_backward, const RmsNorm& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
