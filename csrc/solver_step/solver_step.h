#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

struct SolverStep {
    Shape shape;
    Tiling tiling;
    Image x, out, variance, uncond, pred_prev, noise, mask, known, known_noise, next, pred;
    Values table, known_table;  // at the row of this step: [9] and [2]
    float guidance_scale;
    Values clamp;  // [B], or one number for all; not given: none
    Draw draw, draw_known;
    int64_t buffer;  // floats of a tile; scratch holds eleven of them, and what drawing takes
};

FASTDDPM_DECLARE(solver_step, const SolverStep& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
