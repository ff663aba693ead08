// Standard normal numbers: Philox 4x32-10 and Box-Muller, the noise of every other kernel on its own.
//
// A work item is a tile of one sample. Bytes an element: 4 written. What limits it are the multiplications of Philox
// and the polynomials of log, sine and cosine: about 190 vector instructions for 64 numbers with AVX-512.

#include "normal/normal.h"

#include "common/noise.h"

namespace fastddpm::FASTDDPM_ISA {

void normal(const Normal& a, int64_t begin, int64_t end, float* scratch) {
    float* rows = scratch + a.buffer;
    for (int64_t item = begin; item < end; ++item) {
        const Tile t = tile(a.shape, a.tiling, item);
        // what is written behind a full tile of an output in float32 is overwritten by the next, or would leave the sample
        const bool direct = t.size == a.tiling.size && t.size % DRAWN == 0;
        float* drawn = direct ? target(a.out, t, scratch) : scratch;
        draw<Normals>(a.draw, a.shape, t, drawn, rows);
        if (drawn != scratch) continue;
        if (a.out.dtype == DType::f32)
            memcpy(static_cast<float*>(a.out.data) + t.sample * a.out.sample_stride + t.begin, drawn, 4 * t.size);
        else
            commit(a.out, a.shape, t, drawn);
    }
}

void philox_words(const PhiloxWords& a, int64_t begin, int64_t end, float* scratch) {
    for (int64_t b = begin; b < end; ++b)
        for (int64_t i = 0; i < a.size; i += DRAWN) {
            Words::fill(stream(a.draw, b), static_cast<uint32_t>(i / 4), DRAWN, scratch);
            for (int64_t j = 0; j < DRAWN && i + j < a.size; ++j) {
                uint32_t word;
                memcpy(&word, scratch + j, 4);
                a.out[b * a.size + i + j] = word;
            }
        }
}

}  // namespace fastddpm::FASTDDPM_ISA
