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

// The high half of each lane moved to the low one.
INLINE VL high_words(VL a) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VL)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);  // a shift would wait for the port of the products
#else
    return a >> 32;
#endif
}

// The keys of the ten rounds: in memory, for one vector instruction each to read them.
struct Keys {
    uint64_t k0[10], k1[10];
};
INLINE void set_keys(Keys& k, uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
        k.k0[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
        k.k1[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
    asm("" : "+m"(k));  // or a compiler makes them again and again
}

// Counters of W / 2 lanes, each word in the low half of its lane; what the high halves hold is of no account.
struct Counters {
    VL c0, c1, c2, c3;
};

// Ten rounds on N of them, side by side: a round is a chain of dependent instructions, and alone would wait for itself.
template <int N>
INLINE void philox(Counters (&c)[N], const Keys& key) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
        for (Counters& x : c) {
            const VL p0 = multiply_words(x.c0, VL{} + 0xD2511F53ull), p1 = multiply_words(x.c2, VL{} + 0xCD9E8D57ull);
            x = {high_words(p1) ^ x.c1 ^ key.k0[round], p1, high_words(p0) ^ x.c3 ^ key.k1[round], p0};
        }
    }
}

// Lane 2j = low word of a[j], lane 2j + 1 = low word of b[j].
INLINE VU zip_words(VL a, VL b) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VU)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CCAA);
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

constexpr int BLOCKS = 2;                  // of W counters, drawn side by side
constexpr int64_t DRAWN = 4 * BLOCKS * W;  // so many numbers at a time

// Words of the counters from ``first``, for each block as f(four vectors), then DRAWN results in the order of the elements.
// Lane 4 l + j of a block is its counter j W / 4 + l: so the transposition in quarters puts each vector in order.
template <class F>
INLINE void draw_blocks(const Stream& s, const Keys& keys, uint32_t first, float* out, F f) {
    VL even, odd;
    for (int64_t h = 0; h < W / 2; ++h) {
        int64_t a = 2 * h, b = 2 * h + 1;
        even[h] = a % 4 * (W / 4) + a / 4, odd[h] = b % 4 * (W / 4) + b / 4;
    }
    const VL sample = VL{} + uint64_t(s.sample), step = VL{} + uint64_t(s.step), number = VL{} + uint64_t(s.stream);
    Counters c[2 * BLOCKS];
#pragma GCC unroll 2
    for (uint32_t b = 0; b < BLOCKS; ++b) {
        c[2 * b] = {even + uint64_t(first + b * W), sample, step, number};
        c[2 * b + 1] = {odd + uint64_t(first + b * W), sample, step, number};
    }
    philox(c, keys);
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; ++b) {
        const Counters &l = c[2 * b], &h = c[2 * b + 1];
        VF z0, z1, z2, z3;
        f(zip_words(l.c0, h.c0), zip_words(l.c1, h.c1), zip_words(l.c2, h.c2), zip_words(l.c3, h.c3), z0, z1, z2, z3);
        transpose_quarters(z0, z1, z2, z3);
        float* to = out + 4 * W * b;
        store(to, z0), store(to + W, z1), store(to + 2 * W, z2), store(to + 3 * W, z3);
    }
}

// u = (word + 1/2) 2^-32
INLINE VF unit(VU word) { return __builtin_convertvector(word, VF) * 0x1p-32f + 0x1p-33f; }

// sqrt(-2 ln u) of a word.
INLINE VF radius(VU word) {
    const VF u = unit(word);
#if FASTDDPM_VECTOR_BYTES == 64
    // u = 2^e m, m in [1, 2); of its sixteenths i each has a point 1 / c[i], and m c[i] = 1 + r is near 1. At the ends
    // c is exact, so that -2 ln u = -2 e ln 2 + 2 ln c - 2 ln(1 + r) is too where u is near 1.
    const __m512 c = {1.0f,       0.9140625f, 0.86328125f, 0.8203125f,  0.78125f,    0.74609375f, 0.7109375f, 0.6796875f,
                      0.65234375f, 0.62890625f, 0.60546875f, 0.58203125f, 0.5625f,   0.54296875f, 0.5234375f, 0.5f};
    const __m512 twice_log_c = {
        0.0f,          -0.17971265f, -0.29402947f, -0.39613983f, -0.49372014f, -0.58580804f, -0.68234152f, -0.77224427f,
        -0.85436726f, -0.92754614f, -1.00350463f, -1.08246231f, -1.15072834f, -1.22140706f, -1.29467523f, -1.38629436f};
    const __m512i sixteenth = _mm512_srli_epi32((__m512i)u, 19);
    const VF e = (VF)_mm512_getexp_ps((__m512)u);
    const VF m = (VF)_mm512_getmant_ps((__m512)u, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const VF r = m * (VF)_mm512_permutexvar_ps(sixteenth, c) - 1.0f;
    VF p = r * 0.47278948f - 0.66684556f;
    p = p * r + 1.0000264f;
    p = p * r - 2.0f;
    return sqrt(p * r + (e * -1.38629436f + (VF)_mm512_permutexvar_ps(sixteenth, twice_log_c)));
#else
    return sqrt(log(u) * -2.0f);
#endif
}

// u_0 and u_1 of two words: sqrt(-2 ln u_0) times cosine and sine of 2 pi u_1.
INLINE void box_muller(VU word0, VU word1, VF& z0, VF& z1) {
    // The angle is some half turns, which may change the sign of both, and a rest of at most a quarter turn.
    const float unit_angle = 0x1.921fb6p-31f;  // 2 pi 2^-33
    const VF a = __builtin_convertvector((VI)(word1 << 1), VF) * unit_angle + unit_angle;
    const VF z = a * a;
    VF sine = z * 2.6000545e-6f - 1.98066151e-4f;
    sine = sine * z + 8.33301729e-3f;
    sine = sine * z - 1.66666571e-1f;
    sine = sine * (a * z) + a;
    VF cosine = z * 2.31943844e-5f - 1.38559271e-3f;
    cosine = cosine * z + 4.16639894e-2f;
    cosine = cosine * z - 4.99999323e-1f;
    cosine = cosine * z + 1.0f;
    const VF signed_radius = (VF)((VU)radius(word0) ^ ((word1 ^ (word1 << 1)) & 0x80000000u));
    z0 = signed_radius * cosine, z1 = signed_radius * sine;
}

// Standard normal numbers of elements 4 first .. 4 first + size - 1, and up to DRAWN - 1 floats of no meaning behind.
struct Normals {
    INLINE void fill(const Stream& s, uint32_t first, int64_t size, float* out) {
        Keys keys;
        set_keys(keys, s.seed);
        for (int64_t i = 0; i < size; i += DRAWN)
            draw_blocks(s, keys, first + static_cast<uint32_t>(i / 4), out + i,
                       [](VU w0, VU w1, VU w2, VU w3, VF& z0, VF& z1, VF& z2, VF& z3) __attribute__((always_inline)) {
                           box_muller(w0, w1, z0, z1);
                           box_muller(w2, w3, z2, z3);
                       });
    }
};

// The words themselves, as the bits of floats; room behind as for Normals.
struct Words {
    INLINE void fill(const Stream& s, uint32_t first, int64_t size, float* out) {
        Keys keys;
        set_keys(keys, s.seed);
        for (int64_t i = 0; i < size; i += DRAWN)
            draw_blocks(s, keys, first + static_cast<uint32_t>(i / 4), out + i,
                       [](VU w0, VU w1, VU w2, VU w3, VF& z0, VF& z1, VF& z2, VF& z3) __attribute__((always_inline)) {
                           z0 = (VF)w0, z1 = (VF)w1, z2 = (VF)w2, z3 = (VF)w3;
                       });
    }
};

template <int Channels>
INLINE void interleave(const float* const* rows, int64_t pixels, float* out, int64_t stride) {
    for (int64_t p = 0; p < pixels; ++p)
        for (int c = 0; c < Channels; ++c) out[p * stride + c] = rows[c][p];
}

// Noise of a tile in the order of its elements in memory. ``out`` has room for DRAWN floats behind the tile; ``scratch``
// is 4 (pixels + 2 DRAWN) floats, needed for NHWC alone: there each channel is drawn in turn, and they are interleaved.
template <class Kind>
INLINE const float* draw(const Draw& d, const Shape& s, const Tile& t, float* out, float* scratch) {
    const Stream noise = stream(d, t.sample);
    if (!s.nhwc || s.height * s.width == 1) {
        Kind::fill(noise, static_cast<uint32_t>(t.begin / 4), t.size, out);
        return out;
    }
    const int64_t first = t.begin / s.channels, pixels = t.size / s.channels, room = pixels + 2 * DRAWN;
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
