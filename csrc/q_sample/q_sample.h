#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

enum class QSampleReturns : int64_t { x_t, noise, x0, v };

struct QSample {
    Shape shape;  // of x_t
    Tiling tiling;
    Image x0, noise, x_t, second;
    const int64_t *index, *t;  // index may be nullptr
    const bool* flip;          // may be nullptr
    Values table;              // [T, 2]
    float pixel_scale, pixel_shift;
    Draw draw;
    QSampleReturns returns;
    int64_t buffer;  // floats of a tile; scratch holds four of them, and what drawing takes
};

FASTDDPM_DECLARE(q_sample, const QSample& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
