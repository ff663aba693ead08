// fastddpm::normal and fastddpm::philox_words: schema and host code. What they compute: fastddpm/ops/philox.py.

#include "normal/normal.h"

#include "common/host.h"

namespace fastddpm {
namespace {

Tensor normal(const std::vector<int64_t> sizes, int64_t seed, const MaybeTensor seed_tensor, const Tensor sample,
              int64_t step, const MaybeTensor step_tensor, int64_t stream, ScalarType type) {
    int64_t elements = 1;
    for (size_t i = 1; i < sizes.size(); ++i) elements *= sizes[i];
    Tensor out = torch::stable::empty({sizes.data(), sizes.size()}, type);
    Normal a{};
    a.shape = {sizes[0], 1, 1, elements, false};
    a.tiling = tiling(a.shape);
    a.out = {out.data_ptr(), dtype(out), elements, elements, 1, true};
    a.draw = drawing(seed, seed_tensor, sample, step, step_tensor, static_cast<uint32_t>(stream));
    a.buffer = tile_buffer(a.tiling);
    const auto kernel = FASTDDPM_KERNEL(normal);
    parallel(a.shape.batch * a.tiling.per_sample, a.tiling.size, [&](int64_t begin, int64_t end) {
        kernel(a, begin, end, scratch(a.buffer + draw_scratch(a.shape, a.tiling)));
    });
    return out;
}

Tensor philox_words(int64_t size, int64_t seed, const MaybeTensor seed_tensor, const Tensor sample, int64_t step,
                    const MaybeTensor step_tensor, int64_t stream) {
    Tensor out = new_tensor({sample.size(0), size}, ScalarType::Long);
    const PhiloxWords a{sample.size(0), size,
                        drawing(seed, seed_tensor, sample, step, step_tensor, static_cast<uint32_t>(stream)),
                        static_cast<int64_t*>(out.data_ptr())};
    const auto kernel = FASTDDPM_KERNEL(philox_words);
    parallel(a.batch, size, [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch(MOST_DRAWN)); });
    return out;
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "normal(int[] shape, int seed, Tensor? seed_tensor, Tensor sample, int step, Tensor? step_tensor, int stream, "
        "ScalarType dtype) -> Tensor");
    m.def(
        "philox_words(int size, int seed, Tensor? seed_tensor, Tensor sample, int step, Tensor? step_tensor, "
        "int stream) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("normal", TORCH_BOX(&fastddpm::normal));
    m.impl("philox_words", TORCH_BOX(&fastddpm::philox_words));
}
