// x_t = signal x_0 + sigma eps, x_0 = pixel_scale * flip(image[index]) + pixel_shift (Ho et al. 2020, eq. 4).
//
// A work item is a tile of one sample, which stays in the first cache: pixels and noise are brought there as floats,
// and x_t is written once. Bytes an element: 1 (uint8) + 4 (float32). What limits it is the drawing of the noise.

#include "q_sample/q_sample.h"

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {

void q_sample(const QSample& a, int64_t begin, int64_t end, float* scratch) {
    float *pixels = scratch, *drawn = pixels + a.buffer, *out = drawn + a.buffer, *second_out = out + a.buffer;
    float* rows = second_out + a.buffer;
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        const int64_t b = t.sample;
        const float signal = read(a.table.dtype, a.table.data, 2 * a.t[b]);
        const float sigma = read(a.table.dtype, a.table.data, 2 * a.t[b] + 1);
        const float* x = load(a.x0, a.shape, t, a.index ? a.index[b] : b, a.flip && a.flip[b], pixels);
        const float* noise =
            a.noise.data ? load(a.noise, a.shape, t, drawn) : draw<Normals>(a.draw, a.shape, t, drawn, rows);
        float* x_t = target(a.x_t, t, out);
        float* second = a.second.data ? target(a.second, t, second_out) : nullptr;
        for_vectors(t.size, [&](int64_t i, int64_t n) {
            const VF x0 = load(x + i, n) * a.pixel_scale + a.pixel_shift, eps = load(noise + i, n);
            store(x_t + i, x0 * signal + eps * sigma, n);
            if (!second) return;
            if (a.returns == QSampleReturns::noise) store(second + i, eps, n);
            if (a.returns == QSampleReturns::x0) store(second + i, x0, n);
            if (a.returns == QSampleReturns::v) store(second + i, eps * signal - x0 * sigma, n);
        });
        commit(a.x_t, a.shape, t, x_t);
        if (second) commit(a.second, a.shape, t, second);
    }
}

}  // namespace fastddpm::FASTDDPM_ISA
