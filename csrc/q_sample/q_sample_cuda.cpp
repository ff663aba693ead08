// fastddpm::q_sample on CUDA: host code. Schema: q_sample.cpp.

#include "q_sample/q_sample_cuda.h"

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

std::vector<Tensor> q_sample_op(const Tensor x0, const Tensor t, const Tensor table, const MaybeTensor index,
                                const MaybeTensor flip, double pixel_scale, double pixel_shift, const MaybeTensor noise,
                                int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step,
                                const MaybeTensor step_tensor, int64_t returns, ScalarType type) {
    const OnDevice on(x0);
    QSample a{};
    a.shape = shape(x0);
    if (index) a.shape.batch = index->size(0);
    a.returns = static_cast<QSampleReturns>(returns);
    std::vector<Tensor> outputs{new_image(x0, a.shape, type)};
    if (a.returns != QSampleReturns::x_t) outputs.push_back(new_image(x0, a.shape, type));
    a.x_t = image(outputs[0], a.shape);
    if (outputs.size() == 2) a.second = image(outputs[1], a.shape);
    a.x0 = image(x0, a.shape);
    a.x0.sample_stride = a.shape.channels * a.shape.height * a.shape.width;  // a single image is not repeated
    a.noise = image(noise, a.shape);
    a.t = static_cast<const int64_t*>(t.data_ptr());
    a.index = pointer(index);
    a.flip = flip ? static_cast<const bool*>(flip->data_ptr()) : nullptr;
    a.table = values(table, 2);
    a.pixel_scale = static_cast<float>(pixel_scale);
    a.pixel_shift = static_cast<float>(pixel_shift);
    a.source = source(seed, seed_tensor, sample, step, step_tensor, TRAINING_NOISE);
    check(q_sample(a, on.stream), "q_sample");
    return outputs;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("q_sample", TORCH_BOX(&fastddpm::cuda::q_sample_op));
}
