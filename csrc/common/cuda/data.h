// Plain data that the host code of CUDA ops hands to their launchers, beside that of common/data.h.
#pragma once

#include <cuda_runtime_api.h>

#include "common/data.h"

namespace fastddpm::cuda {

// Where noise is drawn; seed and step may lie on the device, and take the place of the numbers.
struct Source {
    uint64_t seed;
    const int64_t *seed_tensor, *step_tensor;  // or nullptr
    const int64_t* sample;                     // nullptr: nothing is drawn
    uint32_t step, stream;
};

}  // namespace fastddpm::cuda
