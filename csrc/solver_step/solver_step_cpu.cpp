// pred = clamp(k0 x + k1 o), x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 o; o with guidance, k5 with a learned variance,
// and then the blend with what is known: see fastddpm/ops/solver_step/interface.py.
//
// A work item is a tile of one sample, which stays in the first cache. Bytes an element, float32: 8 read, 8 written (x'
// and pred). What limits it with noise is the drawing of it, without noise memory. In NCHW order the noise is drawn in
// pieces, each used at once: so memory is fetched while the next is computed.

#include "solver_step/solver_step.h"

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t PIECE = 256;  // elements, divisible by 4

// The tensors of a tile, as floats; those that are not given are nullptr.
struct Inputs {
    const float *x, *out, *variance, *uncond, *pred_prev, *noise, *mask, *known, *known_noise;
};

struct Coefficients {
    float k[9], signal, sigma, guidance_scale, bound;
};

// Everything but x and out is an option; ``Plain`` has none but the noise and the clamp.
template <bool Plain>
INLINE void update(const Inputs& in, const Coefficients& q, int64_t begin, int64_t end, float* next, float* pred_out) {
    for_vectors(end - begin, [&](int64_t j, int64_t n) {
        const int64_t i = begin + j;
        VF x = load(in.x + i, n), o = load(in.out + i, n);
        if (!Plain && in.uncond) o = lerp(load(in.uncond + i, n), o, splat(q.guidance_scale));
        VF pred = x * q.k[0] + o * q.k[1];
        pred = select(pred < -q.bound, splat(-q.bound), pred);  // NaN stays NaN
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
    const float k0 = q.k[0];
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        float* free_buffer = scratch;
        auto next_buffer = [&] {
            float* buffer = free_buffer;
            free_buffer += a.buffer;
            return buffer;
        };
        auto get = [&](const Image& image) -> const float* {
            return image.data ? load_apart(image, a.shape, t, next_buffer()) : nullptr;
        };
        Inputs in{get(a.x), get(a.out), get(a.variance), get(a.uncond), get(a.pred_prev), get(a.noise), get(a.mask),
                  get(a.known), get(a.known_noise)};
        if (in.mask && !in.known_noise) in.known_noise = draw<Normals>(a.draw_known, a.shape, t, next_buffer(), rows);
        int64_t piece = t.size;
        float* drawn = nullptr;
        if (!in.noise && a.draw.sample && q.k[5] != 0) {  // numbers times 0 need not be drawn
            in.noise = drawn = next_buffer();
            if (a.shape.nhwc)
                draw<Normals>(a.draw, a.shape, t, drawn, rows);
            else
                piece = PIECE;
        }
        if (a.clamp.data) q.bound = read(a.clamp.dtype, a.clamp.data, t.sample * a.clamp.row_stride);
        q.k[0] = q.bound == q.bound ? k0 : q.bound;  // NaN as a bound makes all of the sample NaN
        float *next = target(a.next, t, next_buffer()), *pred = target(a.pred, t, next_buffer());

        for (int64_t i = 0; i < t.size; i += piece) {
            const int64_t stop = t.size - i < piece ? t.size : i + piece;
            if (drawn && !a.shape.nhwc)
                Normals::fill(stream(a.draw, t.sample), static_cast<uint32_t>((t.begin + i) / 4), stop - i, drawn + i);
            if (in.variance || in.uncond || in.pred_prev || in.mask)
                update<false>(in, q, i, stop, next, pred);
            else
                update<true>(in, q, i, stop, next, pred);
        }
        commit(a.next, a.shape, t, next);
        commit_apart(a.pred, a.shape, t, pred);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
