// g = factor gradient;  m <- m + weight1 (g - m);  v <- v + weight2 (g^2 - v);
// p <- shrink p - rate m / (sqrt(v) / root + eps);  ema <- ema + ema_weight (p - ema);  mirror <- p, rounded
// (Loshchilov and Hutter 2019, algorithm 2). The numbers that all parameters share are made in double by the host.
//
// Two passes over chunks of all parameters: the squares of the gradients (4 bytes a parameter), then the update (38
// bytes with the average and a mirror of two bytes). What limits both is memory.

#include "adam_ema/adam_ema.h"

#include "common/vec.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t RUN = 1024;  // elements summed in float before they are added in double

// Of g scale, in units of g.
template <class T>
double squares_of(const T* g, int64_t size, float scale) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += RUN) {
        VF of_run[4]{};
        const int64_t n = size - begin < RUN ? size - begin : RUN;
        int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W)
            for (int k = 0; k < 4; ++k) {
                VF x = load(g + begin + i + k * W) * scale;
                of_run[k] += x * x;
            }
        for (; i < n; i += W) {
            VF x = load(g + begin + i, n - i < W ? n - i : W) * scale;
            of_run[0] += x * x;
        }
        total += double(sum((of_run[0] + of_run[1]) + (of_run[2] + of_run[3])));
    }
    return total / (double(scale) * scale);
}

// With fused() throughout: an element has the same bits wherever it lies, at the end of a tensor, too.
template <class G>
INLINE void update(const AdamEma& a, const AdamChunk& c, const G* gradient) {
    const VF weight1 = splat(a.weight1), weight2 = splat(a.weight2), ema_weight = splat(a.ema_weight);
    const VF inverse_root = splat(1.0f / a.root), eps = splat(a.eps), shrink = splat(a.shrink), factor = splat(a.factor);
    for_vectors(c.size, [&](int64_t i, int64_t n) {
        VF g = fused(load(gradient + i, n), factor, VF{});
        VF m = lerp(load(c.exp_avg + i, n), g, weight1);
        VF v = lerp(load(c.exp_avg_sq + i, n), fused(g, g, VF{}), weight2);
        VF step = m * a.rate / fused(sqrt(v), inverse_root, eps);
        VF p = fused(load(c.param + i, n), shrink, -step);
        store(c.exp_avg + i, m, n);
        store(c.exp_avg_sq + i, v, n);
        store(c.param + i, p, n);
        if (c.ema) store(c.ema + i, lerp(load(c.ema + i, n), p, ema_weight), n);
    });
}

}  // namespace

void gradient_squares(const AdamEma& a, int64_t begin, int64_t end, float*) {
    for (int64_t k = begin; k < end; ++k) {
        const AdamChunk& c = a.chunks[k];
        with_type(c.gradient_type, c.gradient, [&](const auto* g) {
            double squares = squares_of(g, c.size, 1.0f);
            if (squares < 1e-24) squares = squares_of(g, c.size, 0x1p100f);  // single squares are too small for a float
            if (!(squares < 1e36)) squares = squares_of(g, c.size, 0x1p-80f);  // or too large
            a.squares[k] = squares;
        });
    }
}

void adam_ema(const AdamEma& a, int64_t begin, int64_t end, float*) {
    for (int64_t k = begin; k < end; ++k) {
        const AdamChunk& c = a.chunks[k];
        with_type(c.gradient_type, c.gradient, [&](const auto* g) { update(a, c, g); });
        if (!c.mirror) continue;
        if (c.mirror_type == DType::f64) {
            for (int64_t i = 0; i < c.size; ++i) static_cast<double*>(c.mirror)[i] = c.param[i];
            continue;
        }
        with_output_type(c.mirror_type, c.mirror, [&](auto* to) {
            for_vectors(c.size, [&](int64_t i, int64_t n) { store(to + i, load(c.param + i, n), n); });
        });
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
