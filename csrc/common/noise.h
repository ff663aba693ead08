// Counter-based noise: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller. Included by kernels alone.
//
// Key = seed; counter = (element / 4, sample, step, stream); element in C, H, W order whatever the memory order.
// See fastddpm/ops/philox.py, which says what every implementation must give.
#pragma once

#include "common/tile.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

struct Stream {
    uint64_t seed;
    uint32_t sample, step, stream;
};

INLINE Stream stream(const Draw& d, int64_t b) {
    return {d.seed, static_cast<uint32_t>(d.sample[b]), d.step, d.stream};
}

// The low words of each lane of a and b, multiplied: 64 bits.
INLINE VL multiply_words(VL a, VL b) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VL)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTDDPM_VECTOR_BYTES == 32
    return (VL)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (VL)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// Ten rounds on W / 2 counters, each word in the low half of its lane; what the high halves hold is of no account.
INLINE void philox(VL& c0, VL& c1, VL& c2, VL& c3, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        VL p0 = multiply_words(c0, VL{} + 0xD2511F53ull), p1 = multiply_words(c2, VL{} + 0xCD9E8D57ull);
        c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
        c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// Lane 2j = low word of a[j], lane 2j + 1 = low word of b[j].
INLINE VU zip_words(VL a, VL b) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VU)_mm512_mask_blend_epi32(0xaaaa, (__m512i)a, _mm512_slli_epi64((__m512i)b, 32));
#else
    return (VU)((a & 0xffffffffull) | (b << 32));
#endif
}

// In each quarter of 16 bytes, the 4 x 4 transposition of four vectors of floats.
INLINE void transpose_quarters(VF& a, VF& b, VF& c, VF& d) {
#if FASTDDPM_VECTOR_BYTES == 64
    __m512 p = _mm512_unpacklo_ps((__m512)a, (__m512)b), q = _mm512_unpacklo_ps((__m512)c, (__m512)d);
    __m512 r = _mm512_unpackhi_ps((__m512)a, (__m512)b), s = _mm512_unpackhi_ps((__m512)c, (__m512)d);
    a = (VF)_mm512_unpacklo_pd((__m512d)p, (__m512d)q), b = (VF)_mm512_unpackhi_pd((__m512d)p, (__m512d)q);
    c = (VF)_mm512_unpacklo_pd((__m512d)r, (__m512d)s), d = (VF)_mm512_unpackhi_pd((__m512d)r, (__m512d)s);
#elif FASTDDPM_VECTOR_BYTES == 32
    __m256 p = _mm256_unpacklo_ps((__m256)a, (__m256)b), q = _mm256_unpacklo_ps((__m256)c, (__m256)d);
    __m256 r = _mm256_unpackhi_ps((__m256)a, (__m256)b), s = _mm256_unpackhi_ps((__m256)c, (__m256)d);
    a = (VF)_mm256_unpacklo_pd((__m256d)p, (__m256d)q), b = (VF)_mm256_unpackhi_pd((__m256d)p, (__m256d)q);
    c = (VF)_mm256_unpacklo_pd((__m256d)r, (__m256d)s), d = (VF)_mm256_unpackhi_pd((__m256d)r, (__m256d)s);
#else
    float t[4][4], u[4][4];
    memcpy(t[0], &a, 16), memcpy(t[1], &b, 16), memcpy(t[2], &c, 16), memcpy(t[3], &d, 16);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) u[j][i] = t[i][j];
    memcpy(&a, u[0], 16), memcpy(&b, u[1], 16), memcpy(&c, u[2], 16), memcpy(&d, u[3], 16);
#endif
}

// Words of counters first .. first + W - 1, as f(four vectors), then 4 W results in the order of the elements.
// Lane 4 l + j is counter first + j W / 4 + l: so the transposition in quarters puts each vector in order.
template <class F>
INLINE void draw_block(const Stream& s, uint32_t first, float* out, F f) {
    VL even, odd;
    for (int64_t h = 0; h < W / 2; ++h) {
        int64_t a = 2 * h, b = 2 * h + 1;
        even[h] = a % 4 * (W / 4) + a / 4, odd[h] = b % 4 * (W / 4) + b / 4;
    }
    VL a0 = even + uint64_t(first), a1 = VL{} + uint64_t(s.sample), a2 = VL{} + uint64_t(s.step),
       a3 = VL{} + uint64_t(s.stream);
    VL b0 = odd + uint64_t(first), b1 = a1, b2 = a2, b3 = a3;
    philox(a0, a1, a2, a3, s.seed);
    philox(b0, b1, b2, b3, s.seed);
    VF z0, z1, z2, z3;
    f(zip_words(a0, b0), zip_words(a1, b1), zip_words(a2, b2), zip_words(a3, b3), z0, z1, z2, z3);
    transpose_quarters(z0, z1, z2, z3);
    store(out, z0), store(out + W, z1), store(out + 2 * W, z2), store(out + 3 * W, z3);
}

// u = (word + 1/2) 2^-32
INLINE VF unit(VU word) { return __builtin_convertvector(word, VF) * 0x1p-32f + 0x1p-33f; }

INLINE void box_muller(VU word0, VU word1, VF& z0, VF& z1) {
    VF radius = sqrt(log(unit(word0)) * -2.0f), sin, cos;
    sincos_turns(unit(word1), sin, cos);
    z0 = radius * cos, z1 = radius * sin;
}

// Standard normal numbers of elements 4 first .. 4 first + size - 1, and up to 4 W - 1 floats of no meaning behind.
struct Normals {
    INLINE void fill(const Stream& s, uint32_t first, int64_t size, float* out) {
        for (int64_t i = 0; i < size; i += 4 * W)
            draw_block(s, first + static_cast<uint32_t>(i / 4), out + i,
                       [](VU w0, VU w1, VU w2, VU w3, VF& z0, VF& z1, VF& z2, VF& z3) __attribute__((always_inline)) {
                           box_muller(w0, w1, z0, z1);
                           box_muller(w2, w3, z2, z3);
                       });
    }
};

// The words themselves, as the bits of floats; room behind as for Normals.
struct Words {
    INLINE void fill(const Stream& s, uint32_t first, int64_t size, float* out) {
        for (int64_t i = 0; i < size; i += 4 * W)
            draw_block(s, first + static_cast<uint32_t>(i / 4), out + i,
                       [](VU w0, VU w1, VU w2, VU w3, VF& z0, VF& z1, VF& z2, VF& z3) __attribute__((always_inline)) {
                           z0 = (VF)w0, z1 = (VF)w1, z2 = (VF)w2, z3 = (VF)w3;
                       });
    }
};

// Floats of scratch that draw needs beside its result.
INLINE int64_t draw_scratch(const Shape& s, const Tile& t) {
    return s.nhwc ? 4 * (t.size / s.channels + 8 * W) : 0;
}

template <int Channels>
INLINE void interleave(const float* const* rows, int64_t pixels, float* out, int64_t stride) {
    for (int64_t p = 0; p < pixels; ++p)
        for (int c = 0; c < Channels; ++c) out[p * stride + c] = rows[c][p];
}

// Noise of a tile in the order of its elements in memory. ``out`` has room for 4 W floats behind the tile; ``scratch``
// is 4 (pixels + 8 W) floats, needed for NHWC alone: there each channel is drawn in turn, and they are interleaved.
template <class Kind>
INLINE const float* draw(const Draw& d, const Shape& s, const Tile& t, float* out, float* scratch) {
    const Stream noise = stream(d, t.sample);
    if (!s.nhwc) {
        Kind::fill(noise, static_cast<uint32_t>(t.begin / 4), t.size, out);
        return out;
    }
    const int64_t first = t.begin / s.channels, pixels = t.size / s.channels, room = pixels + 8 * W;
    for (int64_t c = 0; c < s.channels; c += 4) {
        const float* rows[4];
        const int64_t together = s.channels - c < 4 ? s.channels - c : 4;
        for (int64_t k = 0; k < together; ++k) {
            int64_t element = (c + k) * s.height * s.width + first, before = element % 4;
            Kind::fill(noise, static_cast<uint32_t>(element / 4), before + pixels, scratch + k * room);
            rows[k] = scratch + k * room + before;
        }
        if (s.channels == 3) interleave<3>(rows, pixels, out, 3);
        else if (together == 4) interleave<4>(rows, pixels, out + c, s.channels);
        else
            for (int64_t k = 0; k < together; ++k) interleave<1>(rows + k, pixels, out + c + k, s.channels);
    }
    return out;
}

}  // namespace
}  // namespace fastddpm::FASTDDPM_ISA
