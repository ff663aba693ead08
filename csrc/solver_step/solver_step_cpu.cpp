// pred = clamp(k0 x + k1 o), x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 o; o with guidance, k5 with a learned variance,
// and then the blend with what is known: see fastddpm/ops/solver_step/interface.py.
//
// A work item is a tile of one sample, which stays in the first cache. Bytes an element, float32: 8 read, 8 written (x'
// and pred). What limits it with noise is the drawing of it, without noise memory.

#include "solver_step/solver_step.h"

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// The tensors of a tile, as floats; those that are not given are nullptr.
struct Inputs {
    const float *x, *out, *variance, *uncond, *pred_prev, *noise, *mask, *known, *known_noise;
};

struct Coefficients {
    float k[9], signal, sigma, guidance_scale, bound;
};

// Everything but x and out is an option; ``Plain`` has none but the noise and the clamp.
template <bool Plain>
INLINE void update(const Inputs& in, const Coefficients& q, int64_t size, float* next, float* pred_out) {
    for_vectors(size, [&](int64_t i, int64_t n) {
        VF x = load(in.x + i, n), o = load(in.out + i, n);
        if (!Plain && in.uncond) o = lerp(load(in.uncond + i, n), o, splat(q.guidance_scale));
        VF pred = x * q.k[0] + o * q.k[1];
        pred = select(pred < -q.bound, splat(-q.bound), pred);
        pred = select(pred > q.bound, splat(q.bound), pred);
        VF y = pred * q.k[2] + (x * q.k[3] + o * q.k[6]);
        if (!Plain && in.pred_prev) y += load(in.pred_prev + i, n) * q.k[4];
        if (in.noise) {
            VF deviation = splat(q.k[5]);
            if (!Plain && in.variance && q.k[5] != 0) {
                VF f = (load(in.variance + i, n) + 1.0f) * 0.5f;
                deviation = exp((f * q.k[8] + (1.0f - f) * q.k[7]) * 0.5f);
            }
            y += deviation * load(in.noise + i, n);
        }
        if (!Plain && in.mask) {
            VF known = load(in.known + i, n) * q.signal + load(in.known_noise + i, n) * q.sigma;
            y = lerp(y, known, load(in.mask + i, n));
        }
        store(next + i, y, n);
        store(pred_out + i, pred, n);
    });
}

}  // namespace

void solver_step(const SolverStep& a, int64_t begin, int64_t end, float* scratch) {
    float* rows = scratch + 11 * a.buffer;
    Coefficients q{};
    for (int i = 0; i < 9; ++i) q.k[i] = read(a.table.dtype, a.table.data, i);
    if (a.known_table.data) {
        q.signal = read(a.known_table.dtype, a.known_table.data, 0);
        q.sigma = read(a.known_table.dtype, a.known_table.data, 1);
    }
    q.guidance_scale = a.guidance_scale;
    q.bound = __builtin_inff();
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        float* next_buffer = scratch;
        auto get = [&](const Image& image) -> const float* {
            float* buffer = next_buffer;
            next_buffer += a.buffer;
            return image.data ? load(image, a.shape, t, buffer) : nullptr;
        };
        auto noise = [&](const Image& given, const Draw& d) -> const float* {
            if (given.data || !d.sample) return get(given);
            float* buffer = next_buffer;
            next_buffer += a.buffer;
            return draw<Normals>(d, a.shape, t, buffer, rows);
        };
        if (a.clamp.data) q.bound = read(a.clamp.dtype, a.clamp.data, t.sample * a.clamp.row_stride);
        Inputs in{get(a.x), get(a.out), get(a.variance), get(a.uncond), get(a.pred_prev), noise(a.noise, a.draw),
                  get(a.mask), get(a.known), nullptr};
        if (in.mask) in.known_noise = noise(a.known_noise, a.draw_known);
        float* next = target(a.next, t, scratch + 9 * a.buffer);
        float* pred = target(a.pred, t, scratch + 10 * a.buffer);
        if (in.variance || in.uncond || in.pred_prev || in.mask)
            update<false>(in, q, t.size, next, pred);
        else
            update<true>(in, q, t.size, next, pred);
        commit(a.next, a.shape, t, next);
        commit(a.pred, a.shape, t, pred);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
