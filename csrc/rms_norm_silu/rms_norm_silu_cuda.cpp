// fastddpm::rms_norm_silu and its backward on CUDA: host code. Schemas: rms_norm_silu.cpp.

#include "rms_norm_silu/rms_norm_silu_cuda.h"

#include <cmath>

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

RmsNorm arguments(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift, double eps,
                  bool activation) {
    RmsNorm a{};
    a.shape = shape(x);
    a.x = image(x, a.shape);
    const int64_t channels = a.shape.channels;
    a.weight = values(weight, 0), a.scale = values(scale, channels), a.shift = values(shift, channels);
    a.eps = static_cast<float>(eps);
    a.root = std::sqrt(static_cast<float>(channels)), a.inverse = 1.0f / static_cast<float>(channels);
    a.activation = activation;
    return a;
}

Tensor forward_op(const Tensor x, const Tensor weight, const MaybeTensor scale, const MaybeTensor shift, double eps,
                  bool activation) {
    const OnDevice on(x);
    RmsNorm a = arguments(x, weight, scale, shift, eps, activation);
    Tensor y = new_image(x, a.shape, x.scalar_type());
    a.y = image(y, a.shape);
    check(rms_norm_forward(a, on.stream), "rms_norm_silu");
    return y;
}

// Gradients of x and weight, and of those of scale and shift that are given, in order.
std::vector<Tensor> backward_op(const Tensor dy, const Tensor x, const Tensor weight, const MaybeTensor scale,
                                const MaybeTensor shift, double eps, bool activation) {
    const OnDevice on(x);
    RmsNorm a = arguments(x, weight, scale, shift, eps, activation);
    const int64_t batch = a.shape.batch, channels = a.shape.channels;
    std::vector<Tensor> gradients{new_image(x, a.shape, x.scalar_type())};
    a.dy = image(dy, a.shape), a.dx = image(gradients[0], a.shape);

    const auto gradient_of = [&](const Tensor& p) {
        const int64_t sizes[] = {batch, channels};
        const bool of_samples = p.dim() == 2;
        gradients.push_back(new_tensor(x, {sizes + !of_samples, of_samples ? 2u : 1u}, p.scalar_type()));
        return Gradient{gradients.back().data_ptr(), dtype(p)};
    };
    a.dweight = gradient_of(weight);
    if (scale) a.dscale = gradient_of(*scale);
    if (shift) a.dshift = gradient_of(*shift);
    const int64_t rows[] = {rms_norm_sums(a), 2, channels};
    const Tensor sums = new_tensor(x, {rows, 3}, ScalarType::Float);
    a.sums = static_cast<float*>(sums.data_ptr());
    check(rms_norm_backward(a, on.stream), "rms_norm_silu_backward");
    return gradients;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("rms_norm_silu", TORCH_BOX(&fastddpm::cuda::forward_op));
    m.impl("rms_norm_silu_backward", TORCH_BOX(&fastddpm::cuda::backward_op));
}
