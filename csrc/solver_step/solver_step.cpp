// fastddpm::solver_step and, in place, solver_step_: schemas and host code. What they compute:
// fastddpm/ops/solver_step/reference.py.

#include "solver_step/solver_step.h"

#include "common/host.h"

namespace fastddpm {
namespace {

// ``next`` may be x, and ``pred`` pred_prev.
void run(const Tensor& x, const Tensor& out, const Tensor& table, int64_t step, const MaybeTensor& step_tensor,
         const MaybeTensor& pred_prev, const MaybeTensor& out_uncond, double guidance_scale,
         const MaybeTensor& guidance_tensor, std::optional<double> clamp, const MaybeTensor& clamp_tensor,
         const MaybeTensor& noise, int64_t seed, const MaybeTensor& seed_tensor, const MaybeTensor& sample,
         const MaybeTensor& mask, const MaybeTensor& known, const MaybeTensor& known_table,
         const MaybeTensor& known_noise, const Tensor& next, const Tensor& pred) {
    SolverStep a{};
    const int64_t row = integer(step, step_tensor);
    a.shape = shape(x);
    a.tiling = tiling(a.shape);
    const bool learned = out.size(1) == 2 * a.shape.channels;
    a.x = image(x, a.shape);
    a.out = learned ? half(out, a.shape, 0) : image(out, a.shape);
    if (learned) a.variance = half(out, a.shape, 1);
    if (out_uncond) a.uncond = learned ? half(*out_uncond, a.shape, 0) : image(*out_uncond, a.shape);
    a.pred_prev = image(pred_prev, a.shape), a.noise = image(noise, a.shape), a.mask = image(mask, a.shape);
    a.known = image(known, a.shape), a.known_noise = image(known_noise, a.shape);
    a.next = image(next, a.shape), a.pred = image(pred, a.shape);
    const auto at_row = [&](const Tensor& t, int64_t columns) {
        const int64_t offset = row * columns * static_cast<int64_t>(t.element_size());
        return Values{static_cast<char*>(t.data_ptr()) + offset, dtype(t), 0};
    };
    a.table = at_row(table, 9);
    if (known_table) a.known_table = at_row(*known_table, 2);
    a.guidance_scale = static_cast<float>(guidance_scale);
    if (guidance_tensor) a.guidance_scale = static_cast<float>(number(*guidance_tensor));
    const float bound = static_cast<float>(clamp.value_or(0));
    if (clamp) a.clamp = {&bound, DType::f32, 0};
    if (clamp_tensor) a.clamp = values(*clamp_tensor, 1);
    if (!noise) a.draw = drawing(seed, seed_tensor, sample, step, step_tensor, SAMPLER_NOISE);
    if (!known_noise) a.draw_known = drawing(seed, seed_tensor, sample, step, step_tensor, TRAINING_NOISE);
    a.buffer = tile_buffer(a.tiling);
    const int64_t floats = 11 * a.buffer + draw_scratch(a.shape, a.tiling);
    const auto kernel = FASTDDPM_KERNEL(solver_step);
    parallel(a.shape.batch * a.tiling.per_sample, a.tiling.size,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch(floats)); });
}

std::vector<Tensor> solver_step(const Tensor x, const Tensor out, const Tensor table, int64_t step,
                                const MaybeTensor step_tensor, const MaybeTensor pred_prev,
                                const MaybeTensor out_uncond, double guidance_scale, const MaybeTensor guidance_tensor,
                                std::optional<double> clamp, const MaybeTensor clamp_tensor, const MaybeTensor noise,
                                int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample,
                                const MaybeTensor mask, const MaybeTensor known, const MaybeTensor known_table,
                                const MaybeTensor known_noise) {
    Tensor next = new_image(shape(x), x.scalar_type()), pred = new_image(shape(x), x.scalar_type());
    run(x, out, table, step, step_tensor, pred_prev, out_uncond, guidance_scale, guidance_tensor, clamp, clamp_tensor,
        noise, seed, seed_tensor, sample, mask, known, known_table, known_noise, next, pred);
    return {next, pred};
}

// Writes x' over x, and pred over ``pred``, which holds pred_prev where there is one.
void solver_step_(Tensor x, Tensor pred, bool has_prev, const Tensor out, const Tensor table, int64_t step,
                  const MaybeTensor step_tensor, const MaybeTensor out_uncond, double guidance_scale,
                  const MaybeTensor guidance_tensor, std::optional<double> clamp, const MaybeTensor clamp_tensor,
                  const MaybeTensor noise, int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample,
                  const MaybeTensor mask, const MaybeTensor known, const MaybeTensor known_table,
                  const MaybeTensor known_noise) {
    const MaybeTensor pred_prev = has_prev ? MaybeTensor(pred) : std::nullopt;
    run(x, out, table, step, step_tensor, pred_prev, out_uncond, guidance_scale, guidance_tensor, clamp, clamp_tensor,
        noise, seed, seed_tensor, sample, mask, known, known_table, known_noise, x, pred);
}

}  // namespace
}  // namespace fastddpm

#define OPTIONS                                                                                                    \
    "Tensor? out_uncond, float guidance_scale, Tensor? guidance_tensor, float? clamp, Tensor? clamp_tensor, "       \
    "Tensor? noise, int seed, Tensor? seed_tensor, Tensor? sample, Tensor? mask, Tensor? known, Tensor? known_table, " \
    "Tensor? known_noise)"

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "solver_step(Tensor x, Tensor out, Tensor table, int step, Tensor? step_tensor, Tensor? pred_prev, " OPTIONS
        " -> Tensor[]");
    m.def(
        "solver_step_(Tensor(a!) x, Tensor(b!) pred, bool has_prev, Tensor out, Tensor table, int step, "
        "Tensor? step_tensor, " OPTIONS " -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("solver_step", TORCH_BOX(&fastddpm::solver_step));
    m.impl("solver_step_", TORCH_BOX(&fastddpm::solver_step_));
}
