// fastddpm::normal and fastddpm::philox_words on CUDA: host code. Schemas: normal.cpp.

#include "normal/normal_cuda.h"

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

Tensor normal_op(const std::vector<int64_t> sizes, int64_t seed, const MaybeTensor seed_tensor, const Tensor sample,
                 int64_t step, const MaybeTensor step_tensor, int64_t stream, ScalarType type) {
    const OnDevice on(sample);
    int64_t elements = 1;
    for (size_t i = 1; i < sizes.size(); ++i) elements *= sizes[i];
    Tensor out = new_tensor(sample, {sizes.data(), sizes.size()}, type);
    Normal a{};
    a.shape = {sizes[0], 1, 1, elements, false};
    a.out = {out.data_ptr(), dtype(out), elements, elements, 1, true};
    a.source = source(seed, seed_tensor, sample, step, step_tensor, static_cast<uint32_t>(stream));
    check(normal(a, on.stream), "normal");
    return out;
}

Tensor philox_words_op(int64_t size, int64_t seed, const MaybeTensor seed_tensor, const Tensor sample, int64_t step,
                       const MaybeTensor step_tensor, int64_t stream) {
    const OnDevice on(sample);
    const int64_t sizes[] = {sample.size(0), size};
    Tensor out = new_tensor(sample, {sizes, 2}, ScalarType::Long);
    const PhiloxWords a{sample.size(0), size,
                        source(seed, seed_tensor, sample, step, step_tensor, static_cast<uint32_t>(stream)),
                        static_cast<int64_t*>(out.data_ptr())};
    check(philox_words(a, on.stream), "philox_words");
    return out;
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("normal", TORCH_BOX(&fastddpm::cuda::normal_op));
    m.impl("philox_words", TORCH_BOX(&fastddpm::cuda::philox_words_op));
}
