// fastddpm::adam_ema_ on CUDA: host code. Schema: adam_ema.cpp.

#include "adam_ema/adam_ema_cuda.h"

#include <cmath>

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

// Written over: params, exp_avg, exp_avg_sq, step, ema, mirror, found_inf. Returns the norm of the gradients.
Tensor adam_ema_op(const std::vector<Tensor> params, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avg,
                   const std::vector<Tensor> exp_avg_sq, Tensor step, double lr, const MaybeTensor lr_tensor,
                   double beta1, double beta2, double eps, double weight_decay, std::optional<double> max_grad_norm,
                   const std::vector<Tensor> ema, double ema_decay, const MaybeTensor ema_decay_tensor,
                   const std::vector<Tensor> mirror, const MaybeTensor grad_scale, const MaybeTensor found_inf) {
    const OnDevice on(params[0]);
    const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    std::vector<AdamTensor> tensors;
    tensors.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        AdamTensor t{floats(params[i]), floats(exp_avg[i]), floats(exp_avg_sq[i]), nullptr, grads[i].data_ptr(), nullptr,
                     dtype(grads[i]), DType::f32, params[i].numel()};
        if (!ema.empty()) t.ema = floats(ema[i]);
        if (!mirror.empty()) t.mirror = mirror[i].data_ptr(), t.mirror_type = dtype(mirror[i]);
        tensors.push_back(t);
    }
    Tensor norm = new_tensor(params[0], {}, ScalarType::Float);
    const int64_t numbers[] = {workspace_size(tensors.data(), static_cast<int64_t>(tensors.size()))};
    Tensor workspace = new_tensor(params[0], {numbers, 1}, ScalarType::Double);

    AdamEma a{};
    a.tensors = tensors.data(), a.count = static_cast<int64_t>(tensors.size());
    a.step = static_cast<int64_t*>(step.data_ptr()), a.norm = floats(norm);
    if (found_inf) a.found_inf = floats(*found_inf);
    a.lr = values(lr_tensor, 0), a.ema_decay = values(ema_decay_tensor, 0), a.grad_scale = values(grad_scale, 0);
    a.lr_number = lr, a.ema_decay_number = ema_decay;
    a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay;
    a.max_grad_norm = max_grad_norm.value_or(INFINITY);
    a.workspace = static_cast<double*>(workspace.data_ptr());
    check(adam_ema(a, on.stream), "adam_ema");
    return norm;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) { m.impl("adam_ema_", TORCH_BOX(&fastddpm::cuda::adam_ema_op)); }
