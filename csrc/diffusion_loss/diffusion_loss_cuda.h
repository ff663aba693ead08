#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

enum class Objective : int64_t { eps, x0, v };

struct DiffusionLoss {
    Shape shape;  // of what pred is compared with
    Image pred, variance, target, x0, gradient, variance_gradient;
    Objective objective;
    const int64_t *index, *t;  // index may be nullptr
    const bool* flip;          // may be nullptr
    Values table, weight, vlb, vlb_weight_tensor;
    float pixel_scale, pixel_shift;
    float vlb_weight;  // where no tensor is given
    int64_t levels;
    float gradient_scale;  // of the sum of the terms
    Source source;
    float* sums;  // of the terms, for each block: [B, blocks along a sample]
    float *loss, *per_sample;
};

// Blocks along a sample.
int64_t diffusion_loss_blocks(const DiffusionLoss& a);

[[nodiscard]] cudaError_t diffusion_loss(const DiffusionLoss& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
