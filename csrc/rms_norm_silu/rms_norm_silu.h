#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

// A work item is a block of pixels of one sample, with all their channels.
struct RmsNorm {
    Shape shape;
    int64_t block, per_sample;  // pixels of a block, blocks of a sample
    Image x, y, dy, dx;
    Values weight, scale, shift;  // [C] or [B, C]
    float eps;
    bool activation;
    double* sums;     // backward: [items, 2, C], of da and of da n
    int64_t scratch;  // floats that a call needs
};

FASTDDPM_DECLARE(rms_norm_forward, const RmsNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(rms_norm_backward, const RmsNorm& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
