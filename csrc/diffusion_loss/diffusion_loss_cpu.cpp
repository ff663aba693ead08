// loss = mean_b (weight_b mean (pred - target)^2 + vlb_weight_b L_b) and its gradient, in one pass over the prediction:
// see fastddpm/ops/diffusion_loss/interface.py.
//
// A work item is a tile of one sample. The target is made again from the images and the counter of the noise. Bytes an
// element, float32: 4 read, 4 written. What limits it is the drawing of the noise; with a target, memory.

#include "diffusion_loss/diffusion_loss.h"

#include <math.h>

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr float INVERSE_LN2 = 1.44269504f;
constexpr double LEAST_PROBABILITY = 1e-12;

// e^x - 1 - x without cancellation.
INLINE VF exp_minus_two_terms(VF x) {
    VF p = x * 2.7557319e-6f + 2.4801587e-5f;  // Taylor: 1/9! .. 1/2!
    p = p * x + 1.9841270e-4f;
    p = p * x + 1.3888889e-3f;
    p = p * x + 8.3333333e-3f;
    p = p * x + 4.1666667e-2f;
    p = p * x + 1.6666667e-1f;
    p = p * x + 0.5f;
    return select(abs(x) < 0.5f, p * x * x, (exp(x) - 1.0f) - x);
}

// KL(q || p) in bits for t > 0, and its derivative by v; mean_error = mu_theta - mu_q.
INLINE VF kl_bits(VF v, VF mean_error, const float* row, VF& slope) {
    const float least = row[1], most = row[2], of_q = row[3];
    VF f = (v + 1.0f) * 0.5f;
    VF logvar = f * most + (1.0f - f) * least;
    VF d = of_q - logvar, scaled = mean_error * mean_error * exp(-logvar);
    slope = (1.0f - exp(d) - scaled) * (0.25f * (most - least) * INVERSE_LN2);
    return (exp_minus_two_terms(d) + scaled) * (0.5f * INVERSE_LN2);
}

double normal_between(double lower, double upper) {  // both tails on the negative side
    double a = lower > 0 ? -upper : lower, b = lower > 0 ? -lower : upper;
    return 0.5 * (erfc(-b * M_SQRT1_2) - erfc(-a * M_SQRT1_2));
}

double x_phi(double x) { return isinf(x) ? 0.0 : x * ::exp(-0.5 * x * x) * (M_2_SQRTPI * M_SQRT1_2 / 2); }

// -log2 of the discretised decoder at t = 0, and its derivative by v. One sample in T comes here: not vectorised.
float decoder_bits(float v, float mean_error, float clean, const float* row, int64_t levels, float& slope) {
    const double least = row[1], most = row[2], f = (double(v) + 1) / 2, half_bin = 1.0 / double(levels - 1);
    const double inverse_std = ::exp(-0.5 * (f * most + (1 - f) * least));
    double upper = (half_bin - mean_error) * inverse_std, lower = (-half_bin - mean_error) * inverse_std;
    if (clean > float(1 - half_bin)) upper = HUGE_VAL;
    if (clean < float(-1 + half_bin)) lower = -HUGE_VAL;
    const double p = normal_between(lower, upper);
    const bool seen = p > LEAST_PROBABILITY;
    slope = seen ? float(0.5 * (x_phi(upper) - x_phi(lower)) / p * (most - least) / 2 / M_LN2) : 0.0f;
    if (p != p) slope = float(p);
    return float(-::log(p < LEAST_PROBABILITY ? LEAST_PROBABILITY : p) / M_LN2);
}

}  // namespace

void diffusion_loss(const DiffusionLoss& a, int64_t begin, int64_t end, float* scratch) {
    auto buffer = [&](int i) { return scratch + i * a.buffer; };
    float* rows = buffer(7);
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        const int64_t b = t.sample;
        const float weight = a.weight.data ? read(a.weight.dtype, a.weight.data, b) : 1.0f;
        float signal = 0, sigma = 0, vlb[4]{}, vlb_weight = 0;
        if (a.table.data && a.objective == Objective::v && !a.target.data) {
            signal = read(a.table.dtype, a.table.data, 2 * a.t[b]);
            sigma = read(a.table.dtype, a.table.data, 2 * a.t[b] + 1);
        }
        if (a.vlb.data) {
            for (int i = 0; i < 4; ++i) vlb[i] = read(a.vlb.dtype, a.vlb.data, 4 * a.t[b] + i);
            vlb_weight = read(a.vlb_weight.dtype, a.vlb_weight.data, b * a.vlb_weight.row_stride);
        }
        const float* pred = load(a.pred, a.shape, t, buffer(0));
        const float* x0 = nullptr;
        if (a.x0.data) x0 = load(a.x0, a.shape, t, a.index ? a.index[b] : b, a.flip && a.flip[b], buffer(1));
        const float* target_given = a.target.data ? load(a.target, a.shape, t, buffer(2)) : nullptr;
        const float* noise = nullptr;
        if (!target_given && a.objective != Objective::x0) noise = draw<Normals>(a.draw, a.shape, t, buffer(2), rows);
        const float* variance = a.variance.data ? load(a.variance, a.shape, t, buffer(3)) : nullptr;
        float* gradient = a.gradient.data ? target(a.gradient, t, buffer(4)) : nullptr;
        float* variance_gradient = a.variance_gradient.data ? target(a.variance_gradient, t, buffer(5)) : nullptr;

        const float slope_scale = 2 * weight * a.gradient_scale, vlb_scale = vlb_weight * a.gradient_scale;
        const bool first = a.vlb.data && a.t[b] == 0;
        VF total{};
        for_vectors(t.size, [&](int64_t i, int64_t n) {
            VF clean = x0 ? load(x0 + i, n) * a.pixel_scale + a.pixel_shift : VF{}, wanted;
            if (target_given) wanted = load(target_given + i, n);
            else if (a.objective == Objective::x0) wanted = clean;
            else if (a.objective == Objective::eps) wanted = load(noise + i, n);
            else wanted = load(noise + i, n) * signal - clean * sigma;
            VF difference = load(pred + i, n) - wanted;
            VF term = difference * difference * weight;
            if (gradient) store(gradient + i, difference * slope_scale, n);
            if (variance) {
                VF v = load(variance + i, n), mean_error = difference * vlb[0], bits{}, slope{};
                if (first) {
                    for (int64_t k = 0; k < n; ++k) {
                        float of_one;
                        bits[k] = decoder_bits(v[k], mean_error[k], clean[k], vlb, a.levels, of_one);
                        slope[k] = of_one;
                    }
                } else {
                    bits = kl_bits(v, mean_error, vlb, slope);
                }
                term += bits * vlb_weight;
                if (variance_gradient) store(variance_gradient + i, slope * vlb_scale, n);
            }
            total += n == W ? term : first_lanes(term, n);
        });
        a.sums[item] = sum(total);
        if (gradient) commit(a.gradient, a.shape, t, gradient);
        if (variance_gradient) commit(a.variance_gradient, a.shape, t, variance_gradient);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
