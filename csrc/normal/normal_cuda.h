#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

struct Normal {
    Shape shape;  // [B, 1, 1, elements of a sample]
    Image out;
    Source source;
};

struct PhiloxWords {
    int64_t batch, size;
    Source source;
    int64_t* out;  // [batch, size]
};

[[nodiscard]] cudaError_t normal(const Normal& a, cudaStream_t stream);
[[nodiscard]] cudaError_t philox_words(const PhiloxWords& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
