// fastddpm::q_sample: schema and host code. What it computes: fastddpm/ops/q_sample/reference.py.

#include "q_sample/q_sample.h"

#include "common/host.h"

namespace fastddpm {
namespace {

std::vector<Tensor> q_sample(const Tensor x0, const Tensor t, const Tensor table, const MaybeTensor index,
                             const MaybeTensor flip, double pixel_scale, double pixel_shift, const MaybeTensor noise,
                             int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step,
                             const MaybeTensor step_tensor, int64_t returns, ScalarType type) {
    QSample a{};
    a.shape = shape(x0);
    if (index) a.shape.batch = index->size(0);
    a.tiling = tiling(a.shape);
    a.returns = static_cast<QSampleReturns>(returns);
    std::vector<Tensor> outputs{new_image(a.shape, type)};
    if (a.returns != QSampleReturns::x_t) outputs.push_back(new_image(a.shape, type));
    a.x_t = image(outputs[0], a.shape);
    if (outputs.size() == 2) a.second = image(outputs[1], a.shape);
    a.x0 = image(x0, a.shape);
    a.x0.sample_stride = a.shape.channels * a.shape.height * a.shape.width;  // a single image is not repeated
    a.noise = image(noise, a.shape);
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.index = index ? static_cast<const int64_t*>(index->data_ptr()) : nullptr;
    a.flip = flip ? static_cast<const bool*>(flip->data_ptr()) : nullptr;
    a.table = values(table, 2);
    a.pixel_scale = static_cast<float>(pixel_scale);
    a.pixel_shift = static_cast<float>(pixel_shift);
    a.draw = drawing(seed, seed_tensor, sample, step, step_tensor, TRAINING_NOISE);
    a.buffer = tile_buffer(a.tiling);
    const int64_t floats = 4 * a.buffer + draw_scratch(a.shape, a.tiling);
    const auto kernel = FASTDDPM_KERNEL(q_sample);
    parallel(a.shape.batch * a.tiling.per_sample, a.tiling.size,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch(floats)); });
    return outputs;
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "q_sample(Tensor x0, Tensor t, Tensor table, Tensor? index, Tensor? flip, float pixel_scale, float pixel_shift, "
        "Tensor? noise, int seed, Tensor? seed_tensor, Tensor? sample, int step, Tensor? step_tensor, int returns, "
        "ScalarType dtype) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) { m.impl("q_sample", TORCH_BOX(&fastddpm::q_sample)); }
