#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

struct SolverStep {
    Shape shape;
    Image x, out, variance, uncond, pred_prev, noise, mask, known, known_noise, next, pred;
    Values table, known_table;   // [N, 9] and [N, 2], float32 or float64
    const int64_t* step_tensor;  // the row, or nullptr:
    int64_t step;
    Values guidance;  // [], or not given:
    float guidance_scale;
    Values clamp;  // [B], or not given:
    float bound;   // infinite: none
    Source source, known_source;  // without a step: it is the row
};

[[nodiscard]] cudaError_t solver_step(const SolverStep& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
