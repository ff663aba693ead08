// fastddpm::diffusion_loss: schema and host code. What it computes: fastddpm/ops/diffusion_loss/reference.py.

#include "diffusion_loss/diffusion_loss.h"

#include "common/host.h"

namespace fastddpm {
namespace {

// The loss [], that of each sample [B] and, with a gradient_scale, the gradient of gradient_scale loss.
std::vector<Tensor> diffusion_loss(const Tensor pred, const Tensor t, const MaybeTensor target, int64_t objective,
                                   const MaybeTensor table, const MaybeTensor x0, const MaybeTensor index,
                                   const MaybeTensor flip, double pixel_scale, double pixel_shift, int64_t seed,
                                   const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step,
                                   const MaybeTensor step_tensor, const MaybeTensor weight, const MaybeTensor vlb,
                                   double vlb_weight, const MaybeTensor vlb_weight_tensor, int64_t levels,
                                   std::optional<double> gradient_scale) {
    DiffusionLoss a{};
    a.shape = shape(pred);
    if (vlb) a.shape.channels /= 2;
    const int64_t batch = a.shape.batch, elements = a.shape.channels * a.shape.height * a.shape.width;
    a.tiling = tiling(a.shape);
    a.pred = vlb ? half(pred, a.shape, 0) : image(pred, a.shape);
    if (vlb) a.variance = half(pred, a.shape, 1);
    a.target = image(target, a.shape);
    a.objective = static_cast<Objective>(objective);
    if (x0 && (vlb || (!target && a.objective != Objective::eps))) {
        a.x0 = image(x0, a.shape);
        a.x0.sample_stride = elements;  // a single image is not repeated
    }
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.index = index ? static_cast<const int64_t*>(index->data_ptr()) : nullptr;
    a.flip = flip ? static_cast<const bool*>(flip->data_ptr()) : nullptr;
    a.table = values(table, 2), a.weight = values(weight, 1), a.vlb = values(vlb, 4);
    const float number = static_cast<float>(vlb_weight);
    a.vlb_weight = {&number, DType::f32, 0};
    if (vlb_weight_tensor) a.vlb_weight = values(*vlb_weight_tensor, vlb_weight_tensor->dim());
    a.pixel_scale = static_cast<float>(pixel_scale), a.pixel_shift = static_cast<float>(pixel_shift);
    a.levels = levels;
    a.draw = drawing(seed, seed_tensor, sample, step, step_tensor, TRAINING_NOISE);
    std::vector<Tensor> outputs{new_tensor({}, ScalarType::Float), new_tensor({batch}, ScalarType::Float)};
    if (gradient_scale) {
        a.gradient_scale = static_cast<float>(*gradient_scale / std::max<int64_t>(1, batch * elements));
        outputs.push_back(new_image(shape(pred), pred.scalar_type()));
        a.gradient = vlb ? half(outputs[2], a.shape, 0) : image(outputs[2], a.shape);
        if (vlb) a.variance_gradient = half(outputs[2], a.shape, 1);
    }
    std::vector<double> sums(batch * a.tiling.per_sample);
    a.sums = sums.data();
    a.buffer = tile_buffer(a.tiling);
    const int64_t floats = 6 * a.buffer + draw_scratch(a.shape, a.tiling);
    const auto kernel = FASTDDPM_KERNEL(diffusion_loss);
    parallel(batch * a.tiling.per_sample, a.tiling.size,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch(floats)); });

    double total = 0;
    float* per_sample = static_cast<float*>(outputs[1].data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
        double of_sample = 0;
        for (int64_t i = 0; i < a.tiling.per_sample; ++i) of_sample += sums[b * a.tiling.per_sample + i];
        per_sample[b] = static_cast<float>(of_sample / elements);
        total += of_sample / elements;
    }
    *static_cast<float*>(outputs[0].data_ptr()) = static_cast<float>(total / batch);
    return outputs;
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "diffusion_loss(Tensor pred, Tensor t, Tensor? target, int objective, Tensor? table, Tensor? x0, Tensor? index, "
        "Tensor? flip, float pixel_scale, float pixel_shift, int seed, Tensor? seed_tensor, Tensor? sample, int step, "
        "Tensor? step_tensor, Tensor? weight, Tensor? vlb, float vlb_weight, Tensor? vlb_weight_tensor, int levels, "
        "float? gradient_scale) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) { m.impl("diffusion_loss", TORCH_BOX(&fastddpm::diffusion_loss)); }
