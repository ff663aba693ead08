#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

enum class Objective : int64_t { eps, x0, v };

struct DiffusionLoss {
    Shape shape;  // of what pred is compared with
    Tiling tiling;
    Image pred, variance, target, x0, gradient, variance_gradient;
    Objective objective;
    const int64_t *index, *t;  // index may be nullptr
    const bool* flip;          // may be nullptr
    Values table, weight, vlb, vlb_weight;
    float pixel_scale, pixel_shift;
    int64_t levels;
    float gradient_scale;  // of the sum of the terms
    Draw draw;
    double* sums;    // of the terms of each work item
    int64_t buffer;  // floats of a tile; scratch holds six of them, and what drawing takes
};

FASTDDPM_DECLARE(diffusion_loss, const DiffusionLoss& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
