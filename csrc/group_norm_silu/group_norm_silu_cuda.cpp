// fastddpm::group_norm_silu and its backward on CUDA: host code. Schemas: group_norm_silu.cpp.

#include "group_norm_silu/group_norm_silu_cuda.h"

#include <cmath>

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

GroupNorm arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                    const MaybeTensor& channel_bias, const MaybeTensor& scale, const MaybeTensor& shift,
                    const MaybeTensor& residual, const MaybeTensor& x2, double dropout, int64_t seed,
                    const MaybeTensor& seed_tensor, const MaybeTensor& sample, int64_t step,
                    const MaybeTensor& step_tensor, int64_t layer, bool activation) {
    GroupNorm a{};
    a.shape = shape(x);
    a.channels1 = a.shape.channels;
    a.x = image(x, a.shape);
    if (x2) {
        a.shape.channels += x2->size(1);
        a.x2 = image(*x2, a.shape);
    }
    a.residual = image(residual, a.shape);
    a.groups = groups;
    a.weight = values(weight, 0), a.bias = values(bias, 0);
    if (channel_bias) a.channel_bias = values(*channel_bias, channel_bias->dim() == 2 ? a.shape.channels : 0);
    a.scale = values(scale, a.shape.channels), a.shift = values(shift, a.shape.channels);
    a.eps = static_cast<float>(eps);
    a.activation = activation;
    if (dropout > 0) {
        a.draw = source(seed, seed_tensor, sample, step, step_tensor, DROPOUT + static_cast<uint32_t>(layer));
        const double below = std::nearbyint(dropout * 4294967296.0);
        const bool all = below >= 4294967296.0;  // dropout so near 1 that no word is kept: nor is that last one
        a.drop_below = all ? 0xffffffffu : static_cast<uint32_t>(below);
        a.keep_scale = all ? 0.0f : static_cast<float>(1 / (1 - dropout));
    }
    return a;
}

// Where the blocks of a cooperative kernel meet.
MaybeTensor counters(const Tensor& x, GroupNorm& a) {
    if (!a.plan.cooperative) return std::nullopt;
    const int64_t sizes[] = {MOST_TEAMS, COUNTER};
    Tensor memory = new_tensor(x, {sizes, 2}, ScalarType::Int);
    a.counters = static_cast<unsigned*>(memory.data_ptr());
    return memory;
}

// y, mean and rstd [B, G], the mean in double; with a residual h, too.
std::vector<Tensor> group_norm_silu_op(
    const Tensor x, const Tensor weight, const Tensor bias, int64_t groups, double eps, const MaybeTensor channel_bias,
    const MaybeTensor scale, const MaybeTensor shift, const MaybeTensor residual, const MaybeTensor x2, double dropout,
    int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step, const MaybeTensor step_tensor,
    int64_t layer, bool activation) {
    const OnDevice on(x);
    GroupNorm a = arguments(x, weight, bias, groups, eps, channel_bias, scale, shift, residual, x2, dropout, seed,
                            seed_tensor, sample, step, step_tensor, layer, activation);
    const int64_t of_groups[] = {a.shape.batch, groups};
    std::vector<Tensor> outputs{new_image(x, a.shape, x.scalar_type())};
    outputs.push_back(new_tensor(x, {of_groups, 2}, ScalarType::Double));
    outputs.push_back(new_tensor(x, {of_groups, 2}, ScalarType::Float));
    if (residual) outputs.push_back(new_image(x, a.shape, x.scalar_type()));
    a.y = image(outputs[0], a.shape);
    a.mean = static_cast<double*>(outputs[1].data_ptr()), a.rstd = static_cast<float*>(outputs[2].data_ptr());
    if (residual) a.h = image(outputs[3], a.shape);
    check(plan(a, residual ? 2 : 1, a.plan), "group_norm_silu");
    MaybeTensor entries;
    if (!a.plan.one_read) {
        const int64_t sizes[] = {a.shape.batch, a.plan.parts, a.shape.channels, 4};
        entries = new_tensor(x, {sizes, 4}, ScalarType::Float);
        a.entries = static_cast<Entry*>(entries->data_ptr());
    }
    const MaybeTensor meeting = counters(x, a);
    check(group_norm_silu(a, on.stream), "group_norm_silu");
    return outputs;
}

// A gradient of a small tensor, which has its shape and dtype.
Tensor gradient_of(const Tensor& p, Image& written) {
    Tensor gradient = new_tensor(p, p.sizes(), p.scalar_type());
    written.data = gradient.data_ptr(), written.dtype = dtype(p);
    written.sample_stride = p.dim() == 2 ? p.size(1) : 0;
    return gradient;
}

// Gradients of x, weight and bias, and of those of channel_bias, scale, shift, residual and x2 that are given, in order.
std::vector<Tensor> group_norm_silu_backward_op(
    const Tensor dy, const MaybeTensor dh, const Tensor mean, const Tensor rstd, const Tensor x, const Tensor weight,
    const Tensor bias, int64_t groups, const MaybeTensor channel_bias, const MaybeTensor scale, const MaybeTensor shift,
    const MaybeTensor residual, const MaybeTensor x2, double dropout, int64_t seed, const MaybeTensor seed_tensor,
    const MaybeTensor sample, int64_t step, const MaybeTensor step_tensor, int64_t layer, bool activation) {
    const OnDevice on(x);
    GroupNorm a = arguments(x, weight, bias, groups, 1.0, channel_bias, scale, shift, residual, x2, dropout, seed,
                            seed_tensor, sample, step, step_tensor, layer, activation);
    a.dy = image(dy, a.shape), a.dh = image(dh, a.shape);
    a.mean = static_cast<double*>(mean.data_ptr()), a.rstd = static_cast<float*>(rstd.data_ptr());

    const auto image_like = [&](const Tensor& t, Image& written) {
        const Shape s = shape(t);
        Tensor gradient = new_image(t, s, t.scalar_type());
        written = image(gradient, s);
        return gradient;
    };
    std::vector<Tensor> gradients{image_like(x, a.dx), gradient_of(weight, a.dweight), gradient_of(bias, a.dbias)};
    if (channel_bias) gradients.push_back(gradient_of(*channel_bias, a.dchannel_bias));
    if (scale) gradients.push_back(gradient_of(*scale, a.dscale));
    if (shift) gradients.push_back(gradient_of(*shift, a.dshift));
    if (residual) gradients.push_back(image_like(*residual, a.dresidual));
    if (x2) gradients.push_back(image_like(*x2, a.dx2));

    check(plan(a, residual ? 3 : 2, a.plan), "group_norm_silu");
    const int64_t of_small[] = {3, a.shape.batch, a.shape.channels};
    const Tensor small = new_tensor(x, {of_small, 3}, ScalarType::Float);
    a.small = static_cast<float*>(small.data_ptr());
    MaybeTensor entries, means;
    if (!a.plan.one_read) {
        const int64_t sizes[] = {a.shape.batch, a.plan.parts, a.shape.channels, 4}, of_means[] = {a.shape.batch, groups, 2};
        entries = new_tensor(x, {sizes, 4}, ScalarType::Float);
        means = new_tensor(x, {of_means, 3}, ScalarType::Float);
        a.entries = static_cast<Entry*>(entries->data_ptr()), a.means = static_cast<float*>(means->data_ptr());
    }
    const MaybeTensor meeting = counters(x, a);
    check(group_norm_silu_backward(a, on.stream), "group_norm_silu");
    return gradients;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("group_norm_silu", TORCH_BOX(&fastddpm::cuda::group_norm_silu_op));
    m.impl("group_norm_silu_backward", TORCH_BOX(&fastddpm::cuda::group_norm_silu_backward_op));
}
