#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

// A work item: neighbouring elements of one parameter and of what belongs to it.
struct AdamChunk {
    float *param, *exp_avg, *exp_avg_sq, *ema;  // ema may be nullptr
    const void* gradient;
    void* mirror;  // may be nullptr
    DType gradient_type, mirror_type;
    int64_t size;
};

struct AdamEma {
    const AdamChunk* chunks;
    double* squares;  // of the gradients of each chunk
    float factor;     // by which gradients are multiplied: unscaling and clipping
    float weight1, weight2, rate, shrink, root, eps, ema_weight;
};

FASTDDPM_DECLARE(gradient_squares, const AdamEma& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(adam_ema, const AdamEma& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
