// loss = mean_b (weight_b mean (pred - target)^2 + vlb_weight_b L_b) and its gradient, in one pass over the prediction:
// see fastddpm/ops/diffusion_loss/interface.py.
//
// A work item is a tile of one sample. The target is made again from the images and the counter of the noise. Bytes an
// element, float32: 4 read, 4 written. What limits it is the drawing of the noise; with a target, memory. In NCHW order
// the noise is drawn in pieces, each used at once: so memory is fetched while the next is computed.

#include "diffusion_loss/diffusion_loss.h"

#include <math.h>

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t PIECE = 256;  // elements, divisible by 4
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

double x_phi(double x) { return __builtin_isinf(x) ? 0.0 : x * ::exp(-0.5 * x * x) * (M_2_SQRTPI * M_SQRT1_2 / 2); }

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
    return float(-::log(p < LEAST_PROBABILITY ? LEAST_PROBABILITY : p) / M_LN2);
}

// A tile as floats. ``wanted`` is a target, or noise; what is not given is nullptr, but gradients that nobody asked for
// have room as well.
struct Floats {
    const float *pred, *wanted, *x0, *variance;
    float *gradient, *variance_gradient;
};

// What is the same for all elements of a sample.
struct Row {
    float weight, slope_scale, signal, sigma, pixel_scale, pixel_shift, vlb_weight, vlb_scale, vlb[4];
    bool first;  // t = 0
    int64_t levels;
};

// The sum of the terms of elements begin .. end - 1; their gradients are written. ``Kind`` is eps where pred is compared
// with ``wanted`` as it is.
template <Objective Kind, bool Vlb>
INLINE VF compare(const Floats& in, const Row& q, int64_t begin, int64_t end) {
    VF total{};
    for_vectors(end - begin, [&](int64_t j, int64_t n) {
        const int64_t i = begin + j;
        VF clean{}, wanted{};
        if (Vlb || Kind != Objective::eps) clean = load(in.x0 + i, n) * q.pixel_scale + q.pixel_shift;
        if (Kind != Objective::x0) wanted = load(in.wanted + i, n);
        if (Kind == Objective::x0) wanted = clean;
        if (Kind == Objective::v) wanted = wanted * q.signal - clean * q.sigma;
        const VF difference = load(in.pred + i, n) - wanted;
        VF term = difference * difference * q.weight;
        store(in.gradient + i, difference * q.slope_scale, n);
        if (Vlb) {
            VF v = load(in.variance + i, n), mean_error = difference * q.vlb[0], bits{}, slope{};
            if (q.first) {
                for (int64_t k = 0; k < n; ++k) {
                    float of_one;
                    bits[k] = decoder_bits(v[k], mean_error[k], clean[k], q.vlb, q.levels, of_one);
                    slope[k] = of_one;
                }
            } else {
                bits = kl_bits(v, mean_error, q.vlb, slope);
            }
            term += bits * q.vlb_weight;
            store(in.variance_gradient + i, slope * q.vlb_scale, n);
        }
        total += n == W ? term : first_lanes(term, n);
    });
    return total;
}

template <bool Vlb>
INLINE VF compare(Objective kind, const Floats& in, const Row& q, int64_t begin, int64_t end) {
    switch (kind) {
        case Objective::x0: return compare<Objective::x0, Vlb>(in, q, begin, end);
        case Objective::v: return compare<Objective::v, Vlb>(in, q, begin, end);
        default: return compare<Objective::eps, Vlb>(in, q, begin, end);
    }
}

}  // namespace

void diffusion_loss(const DiffusionLoss& a, int64_t begin, int64_t end, float* scratch) {
    auto buffer = [&](int i) { return scratch + i * a.buffer; };
    float* rows = buffer(6);
    const Objective kind = a.target.data ? Objective::eps : a.objective;
    const bool drawn = !a.target.data && kind != Objective::x0;
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        const int64_t b = t.sample;
        Row q{};
        q.weight = a.weight.data ? read(a.weight.dtype, a.weight.data, b) : 1.0f;
        q.slope_scale = 2 * q.weight * a.gradient_scale;
        q.pixel_scale = a.pixel_scale, q.pixel_shift = a.pixel_shift;
        if (kind == Objective::v) {
            q.signal = read(a.table.dtype, a.table.data, 2 * a.t[b]);
            q.sigma = read(a.table.dtype, a.table.data, 2 * a.t[b] + 1);
        }
        if (a.vlb.data) {
            for (int i = 0; i < 4; ++i) q.vlb[i] = read(a.vlb.dtype, a.vlb.data, 4 * a.t[b] + i);
            q.vlb_weight = read(a.vlb_weight.dtype, a.vlb_weight.data, b * a.vlb_weight.row_stride);
            q.vlb_scale = q.vlb_weight * a.gradient_scale;
            q.first = a.t[b] == 0, q.levels = a.levels;
        }

        Floats in{};
        in.pred = load_apart(a.pred, a.shape, t, buffer(0));
        if (a.x0.data) in.x0 = load(a.x0, a.shape, t, a.index ? a.index[b] : b, a.flip && a.flip[b], buffer(1));
        if (a.target.data) in.wanted = load_apart(a.target, a.shape, t, buffer(2));
        if (a.variance.data) in.variance = load_apart(a.variance, a.shape, t, buffer(3));
        in.gradient = a.gradient.data ? target(a.gradient, t, buffer(4)) : buffer(4);
        in.variance_gradient = a.variance_gradient.data ? target(a.variance_gradient, t, buffer(5)) : buffer(5);
        if (drawn) in.wanted = buffer(2);
        if (drawn && a.shape.nhwc) draw<Normals>(a.draw, a.shape, t, buffer(2), rows);

        VF total{};  // of sums of pieces: fewer roundings than of all terms in turn
        for (int64_t i = 0; i < t.size; i += PIECE) {
            const int64_t stop = t.size - i < PIECE ? t.size : i + PIECE;
            if (drawn && !a.shape.nhwc)
                Normals::fill(stream(a.draw, b), static_cast<uint32_t>((t.begin + i) / 4), stop - i, buffer(2) + i);
            total += a.vlb.data ? compare<true>(kind, in, q, i, stop) : compare<false>(kind, in, q, i, stop);
        }
        a.sums[item] = sum(total);
        if (a.gradient.data) commit_apart(a.gradient, a.shape, t, in.gradient);
        if (a.variance_gradient.data) commit_apart(a.variance_gradient, a.shape, t, in.variance_gradient);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
