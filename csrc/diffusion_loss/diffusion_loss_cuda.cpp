// fastddpm::diffusion_loss on CUDA: host code. Schema: diffusion_loss.cpp.

#include "diffusion_loss/diffusion_loss_cuda.h"

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

// The loss [], that of each sample [B] and, with a gradient_scale, the gradient of gradient_scale loss.
std::vector<Tensor> diffusion_loss_op(const Tensor pred, const Tensor t, const MaybeTensor target, int64_t objective,
                                      const MaybeTensor table, const MaybeTensor x0, const MaybeTensor index,
                                      const MaybeTensor flip, double pixel_scale, double pixel_shift, int64_t seed,
                                      const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step,
                                      const MaybeTensor step_tensor, const MaybeTensor weight, const MaybeTensor vlb,
                                      double vlb_weight, const MaybeTensor vlb_weight_tensor, int64_t levels,
                                      std::optional<double> gradient_scale) {
    const OnDevice on(pred);
    DiffusionLoss a{};
    a.shape = shape(pred);
    if (vlb) a.shape.channels /= 2;
    const int64_t batch = a.shape.batch, elements = a.shape.channels * a.shape.height * a.shape.width;
    a.pred = vlb ? half(pred, a.shape, 0) : image(pred, a.shape);
    if (vlb) a.variance = half(pred, a.shape, 1);
    a.target = image(target, a.shape);
    a.objective = static_cast<Objective>(objective);
    if (x0 && (vlb || (!target && a.objective != Objective::eps))) {
        a.x0 = image(x0, a.shape);
        a.x0.sample_stride = elements;  // a single image is not repeated
        a.index = pointer(index);
        a.flip = flip ? static_cast<const bool*>(flip->data_ptr()) : nullptr;
    }
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.table = values(table, 2), a.weight = values(weight, 1), a.vlb = values(vlb, 4);
    a.vlb_weight = static_cast<float>(vlb_weight);
    if (vlb_weight_tensor) a.vlb_weight_tensor = values(*vlb_weight_tensor, vlb_weight_tensor->dim());
    a.pixel_scale = static_cast<float>(pixel_scale), a.pixel_shift = static_cast<float>(pixel_shift);
    a.levels = levels;
    a.source = source(seed, seed_tensor, sample, step, step_tensor, TRAINING_NOISE);
    std::vector<Tensor> outputs{new_tensor(pred, {&batch, size_t(0)}, ScalarType::Float),
                                new_tensor(pred, {&batch, size_t(1)}, ScalarType::Float)};
    a.loss = static_cast<float*>(outputs[0].data_ptr()), a.per_sample = static_cast<float*>(outputs[1].data_ptr());
    if (gradient_scale) {
        a.gradient_scale = static_cast<float>(*gradient_scale / std::max<int64_t>(1, batch * elements));
        outputs.push_back(new_image(pred, shape(pred), pred.scalar_type()));
        a.gradient = vlb ? half(outputs[2], a.shape, 0) : image(outputs[2], a.shape);
        if (vlb) a.variance_gradient = half(outputs[2], a.shape, 1);
    }
    const int64_t of_blocks[] = {batch, diffusion_loss_blocks(a)};
    const Tensor sums = new_tensor(pred, {of_blocks, 2}, ScalarType::Float);
    a.sums = static_cast<float*>(sums.data_ptr());
    check(diffusion_loss(a, on.stream), "diffusion_loss");
    return outputs;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("diffusion_loss", TORCH_BOX(&fastddpm::cuda::diffusion_loss_op));
}
