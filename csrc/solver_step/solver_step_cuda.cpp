// fastddpm::solver_step and solver_step_ on CUDA: host code. Schemas: solver_step.cpp.

#include "solver_step/solver_step_cuda.h"

#include <cmath>

#include "common/cuda/host.h"

namespace fastddpm::cuda {
namespace {

// ``next`` may be x, and ``pred`` pred_prev.
void run(const Tensor& x, const Tensor& out, const Tensor& table, int64_t step, const MaybeTensor& step_tensor,
         const MaybeTensor& pred_prev, const MaybeTensor& out_uncond, double guidance_scale,
         const MaybeTensor& guidance_tensor, std::optional<double> clamp, const MaybeTensor& clamp_tensor,
         const MaybeTensor& noise, int64_t seed, const MaybeTensor& seed_tensor, const MaybeTensor& sample,
         const MaybeTensor& mask, const MaybeTensor& known, const MaybeTensor& known_table,
         const MaybeTensor& known_noise, const Tensor& next, const Tensor& pred, cudaStream_t stream) {
    SolverStep a{};
    a.shape = shape(x);
    const bool learned = out.size(1) == 2 * a.shape.channels;
    a.x = image(x, a.shape);
    a.out = learned ? half(out, a.shape, 0) : image(out, a.shape);
    if (learned) a.variance = half(out, a.shape, 1);
    if (out_uncond) a.uncond = learned ? half(*out_uncond, a.shape, 0) : image(*out_uncond, a.shape);
    a.pred_prev = image(pred_prev, a.shape), a.noise = image(noise, a.shape), a.mask = image(mask, a.shape);
    a.known = image(known, a.shape), a.known_noise = image(known_noise, a.shape);
    a.next = image(next, a.shape), a.pred = image(pred, a.shape);
    a.table = values(table, 9), a.known_table = values(known_table, 2);
    a.step_tensor = pointer(step_tensor), a.step = step;
    a.guidance = values(guidance_tensor, 0), a.guidance_scale = static_cast<float>(guidance_scale);
    a.clamp = values(clamp_tensor, 1), a.bound = clamp ? static_cast<float>(*clamp) : INFINITY;
    if (!noise) a.source = source(seed, seed_tensor, sample, 0, std::nullopt, SAMPLER_NOISE);
    if (!known_noise) a.known_source = source(seed, seed_tensor, sample, 0, std::nullopt, TRAINING_NOISE);
    check(solver_step(a, stream), "solver_step");
}

std::vector<Tensor> solver_step_op(const Tensor x, const Tensor out, const Tensor table, int64_t step,
                                   const MaybeTensor step_tensor, const MaybeTensor pred_prev,
                                   const MaybeTensor out_uncond, double guidance_scale,
                                   const MaybeTensor guidance_tensor, std::optional<double> clamp,
                                   const MaybeTensor clamp_tensor, const MaybeTensor noise, int64_t seed,
                                   const MaybeTensor seed_tensor, const MaybeTensor sample, const MaybeTensor mask,
                                   const MaybeTensor known, const MaybeTensor known_table,
                                   const MaybeTensor known_noise) {
    const OnDevice on(x);
    Tensor next = new_image(x, shape(x), x.scalar_type()), pred = new_image(x, shape(x), x.scalar_type());
    run(x, out, table, step, step_tensor, pred_prev, out_uncond, guidance_scale, guidance_tensor, clamp, clamp_tensor,
        noise, seed, seed_tensor, sample, mask, known, known_table, known_noise, next, pred, on.stream);
    return {next, pred};
}

// Writes x' over x, and pred over ``pred``, which holds pred_prev where there is one.
void solver_step_in_place(Tensor x, Tensor pred, bool has_prev, const Tensor out, const Tensor table, int64_t step,
                          const MaybeTensor step_tensor, const MaybeTensor out_uncond, double guidance_scale,
                          const MaybeTensor guidance_tensor, std::optional<double> clamp,
                          const MaybeTensor clamp_tensor, const MaybeTensor noise, int64_t seed,
                          const MaybeTensor seed_tensor, const MaybeTensor sample, const MaybeTensor mask,
                          const MaybeTensor known, const MaybeTensor known_table, const MaybeTensor known_noise) {
    const OnDevice on(x);
    const MaybeTensor pred_prev = has_prev ? MaybeTensor(pred) : std::nullopt;
    run(x, out, table, step, step_tensor, pred_prev, out_uncond, guidance_scale, guidance_tensor, clamp, clamp_tensor,
        noise, seed, seed_tensor, sample, mask, known, known_table, known_noise, x, pred, on.stream);
}

}  // namespace
}  // namespace fastddpm::cuda

STABLE_TORCH_LIBRARY_IMPL(fastddpm, FASTDDPM_DEVICE_KEY, m) {
    m.impl("solver_step", TORCH_BOX(&fastddpm::cuda::solver_step_op));
    m.impl("solver_step_", TORCH_BOX(&fastddpm::cuda::solver_step_in_place));
}
