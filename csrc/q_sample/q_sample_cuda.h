#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

enum class QSampleReturns : int64_t { x_t, noise, x0, v };

struct QSample {
    Shape shape;  // of x_t
    Image x0, noise, x_t, second;
    const int64_t *index, *t;  // index may be nullptr
    const bool* flip;          // may be nullptr
    Values table;              // [T, 2]
    float pixel_scale, pixel_shift;
    Source source;
    QSampleReturns returns;
};

[[nodiscard]] cudaError_t q_sample(const QSample& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
