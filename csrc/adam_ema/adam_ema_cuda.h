#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

// A parameter and what belongs to it.
struct AdamTensor {
    float *param, *exp_avg, *exp_avg_sq, *ema;  // ema may be nullptr
    const void* gradient;
    void* mirror;  // may be nullptr
    DType gradient_type, mirror_type;
    int64_t size;
};

struct AdamEma {
    const AdamTensor* tensors;  // in the memory of the host
    int64_t count;
    int64_t* step;
    float *found_inf, *norm;            // found_inf may be nullptr
    Values lr, ema_decay, grad_scale;   // [] in float32 or float64, or not given:
    double lr_number, ema_decay_number;  // (a scale that is not given is 1)
    double beta1, beta2, eps, weight_decay, max_grad_norm;  // the last infinite: no clipping
    double* workspace;                  // of workspace_size numbers
};

int64_t workspace_size(const AdamTensor* tensors, int64_t count);
[[nodiscard]] cudaError_t adam_ema(const AdamEma& a, cudaStream_t stream);

}  // namespace fastddpm::cuda
