// Vectors of the width at hand, their arithmetic, and conversions. Included by kernels alone (<op>_cpu.cpp).
//
// GCC's vector extensions, which Clang shares, give the operators; an intrinsic stands where a compiler misses the one
// instruction. Everything has internal linkage: what is compiled for AVX-512 must not be linked into another set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/data.h"
#include "common/isa.h"

#ifndef FASTDDPM_ISA
#define FASTDDPM_ISA baseline
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTDDPM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTDDPM_VECTOR_BYTES 32
#else
#define FASTDDPM_VECTOR_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))  // what is large, and called from many places: compiled once

namespace fastddpm::FASTDDPM_ISA {
namespace {

constexpr int64_t W = FASTDDPM_VECTOR_BYTES / 4;  // floats in a vector

typedef float VF __attribute__((vector_size(FASTDDPM_VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(FASTDDPM_VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(FASTDDPM_VECTOR_BYTES)));
typedef uint64_t VL __attribute__((vector_size(FASTDDPM_VECTOR_BYTES)));  // W / 2 lanes
typedef uint16_t VH __attribute__((vector_size(FASTDDPM_VECTOR_BYTES / 2)));
typedef uint8_t VB __attribute__((vector_size(FASTDDPM_VECTOR_BYTES / 4)));

INLINE VF splat(float x) { return VF{} + x; }
INLINE VF select(VI mask, VF a, VF b) { return mask ? a : b; }
INLINE VF min(VF a, VF b) { return select(a < b, a, b); }  // b where one is NaN
INLINE VF max(VF a, VF b) { return select(a > b, a, b); }

INLINE VF abs(VF x) { return (VF)((VU)x & 0x7fffffffu); }

// a b + c, the product not rounded where the processor has an instruction for it; of a b + c d a compiler may choose which.
INLINE VF fused(VF a, VF b, VF c) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTDDPM_VECTOR_BYTES == 32 && defined(__FMA__)
    return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE VF sqrt(VF x) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VF)_mm512_sqrt_ps((__m512)x);
#elif FASTDDPM_VECTOR_BYTES == 32
    return (VF)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (VF)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

INLINE float sum(VF x) {
#if FASTDDPM_VECTOR_BYTES == 64
    return _mm512_reduce_add_ps((__m512)x);  // in the order of what others do
#else
    float t[W];
    memcpy(t, &x, sizeof x);
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
#endif
}

// e^x to about one rounding, for every float: 0 and infinity beyond the range, NaN for NaN.
INLINE VF exp(VF x) {
    x = select(x < 88.8f, x, select(x != x, x, splat(88.8f)));
    x = select(x < -104.0f, splat(-104.0f), x);
    VF rounded = x * 1.44269504f + 12582912.0f;  // the low bits are the nearest integer n
    VI n = (VI)rounded - 0x4b400000;
    rounded = rounded - 12582912.0f;
    VF r = x - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    VF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    VI half = n >> 1;  // 2^n in two factors: each is a normal number
    return p * (VF)((half + 127) << 23) * (VF)((n - half + 127) << 23);
}

// ln x for a normal number x > 0.
INLINE VF log(VF x) {
    VU b = (VU)x - 0x3f3504f3u;  // x = 2^e (1 + m), 1 + m in [sqrt(1/2), sqrt(2))
    VF e = __builtin_convertvector((VI)b >> 23, VF);
    VF m = (VF)((b & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    VF z = m * m;
    VF p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return e * 0.693359375f + (m + ((m * z * p - 0.5f * z) + e * -2.12194440e-4f));
}

// start + weight (end - start), exact at both ends.
INLINE VF lerp(VF start, VF end, VF weight) {
    VF d = end - start;
    return select(weight < 0.5f, fused(weight, d, start), fused(weight - 1.0f, d, end));
}

// x no smaller than low and no larger than high; NaN stays NaN.
INLINE VF clamp(VF x, float low, float high) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VF)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif FASTDDPM_VECTOR_BYTES == 32
    return (VF)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
    x = select(x < low, splat(low), x);
    return select(x > high, splat(high), x);
#endif
}

// f(k) for k < N, N vectors side by side: the steps of one are a chain in which each waits for the one before, too long
// for the processor to find enough others behind it.
template <int N, class F>
INLINE void side_by_side(F f) {
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) f(k);
}

#if FASTDDPM_VECTOR_BYTES == 64
// 8 2^(j / 32).
alignas(64) constexpr float POWERS[32] = {
    8.0f, 8.17517757f, 8.35418987f, 8.53712368f, 8.72406197f, 8.91509438f, 9.11030865f, 9.30979919f,
    9.51365662f, 9.72197914f, 9.93486214f, 10.1524076f, 10.3747168f, 10.6018934f, 10.8340445f, 11.0712795f,
    11.3137083f, 11.5614462f, 11.8146095f, 12.0733156f, 12.3376865f, 12.6078472f, 12.8839226f, 13.1660442f,
    13.4543428f, 13.7489548f, 14.0500174f, 14.3576727f, 14.6720648f, 14.9933414f, 15.3216524f, 15.6571531f,
};
#endif

// scale (1 + 2^t) of N vectors. Coarse: to 2e-4, for what is rounded to a half-precision number next: that is 5e-4 or more.
// Else to about one rounding, and no larger than 2^126: its reciprocal is a normal number, which processors are quick with.
template <bool COARSE, int N>
INLINE void one_plus_powers(float scale, const VF (&t)[N], VF (&y)[N]) {
#if FASTDDPM_VECTOR_BYTES == 64
    VF f[N], p[N];
    if (COARSE) {  // 2^t = 2^floor(t) 2^f
        side_by_side<N>([&](int k) { f[k] = (VF)_mm512_reduce_ps((__m512)t[k], _MM_FROUND_TO_NEG_INF); });
        side_by_side<N>([&](int k) { p[k] = f[k] * (scale * 7.80245066e-2f) + scale * 2.26067215e-1f; });
        side_by_side<N>([&](int k) { p[k] = p[k] * f[k] + scale * 6.95833504e-1f; });
        side_by_side<N>([&](int k) { p[k] = p[k] * f[k] + scale * 9.99925196e-1f; });
        side_by_side<N>([&](int k) { y[k] = (VF)_mm512_scalef_ps((__m512)p[k], (__m512)t[k]) + scale; });
    } else {  // 2^t = 2^floor(t) 2^(j / 32) 2^f, 0 <= f < 1 / 32: j are the low bits of a sum that is rounded down, as f is
        constexpr int DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, TO_ZERO = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
        const __m512 low = _mm512_load_ps(POWERS), high = _mm512_load_ps(POWERS + 16);
        const __m512 last_bit = _mm512_set1_ps(12582912.0f / 32);
        const float s = 0.125f * scale;
        side_by_side<N>([&](int k) { f[k] = (VF)_mm512_reduce_ps((__m512)t[k], 5 << 4 | _MM_FROUND_TO_NEG_INF); });
        side_by_side<N>([&](int k) { p[k] = f[k] * (s * 2.42844783e-1f) + s * 6.93116432e-1f; });
        side_by_side<N>([&](int k) { p[k] = p[k] * f[k] + s; });  // after which f needs no registers
        side_by_side<N>([&](int k) { f[k] = (VF)_mm512_add_round_ps((__m512)t[k], last_bit, DOWN); });
        side_by_side<N>([&](int k) { f[k] = (VF)_mm512_permutex2var_ps(low, (__m512i)f[k], high); });
        side_by_side<N>([&](int k) {  // what overflows is the largest number then
            f[k] = (VF)_mm512_scalef_round_ps((__m512)f[k], (__m512)t[k], TO_ZERO);
        });
        side_by_side<N>([&](int k) { y[k] = p[k] * f[k] + scale; });
    }
#else
    for (int k = 0; k < N; ++k) {
        VF v = clamp(t[k], -125.0f, 125.0f);
        VF rounded = v + 12582912.0f;  // the low bits are the nearest integer n; 2^v = 2^n 2^f
        VI power = (VI)rounded << 23;
        VF f = v - (rounded - 12582912.0f);
        VF p = f * 1.535336188e-4f + 1.339887440e-3f;
        p = p * f + 9.618437358e-3f;
        p = p * f + 5.550332471e-2f;
        p = p * f + 2.402264791e-1f;
        p = p * f + 6.931472029e-1f;
        p = p * f + 1.0f;
        y[k] = (VF)((VI)p + power) * scale + scale;
    }
#endif
}

// x / y of N vectors to about one rounding, for 2^-126 <= |y| <= 2^126; coarse: to 6e-5. Of most processors the unit that
// divides is slow with wide vectors.
template <bool COARSE, int N>
INLINE void quotients(VF (&x)[N], const VF (&y)[N]) {
#if FASTDDPM_VECTOR_BYTES == 64
#if defined(__AVX512BF16__)  // those that divide quickly have it
    if (!COARSE && divides_quickly) return side_by_side<N>([&](int k) { x[k] = x[k] / y[k]; });
#endif
    VF r[N];
    side_by_side<N>([&](int k) { r[k] = (VF)_mm512_rcp14_ps((__m512)y[k]); });
    side_by_side<N>([&](int k) { x[k] = x[k] * r[k]; });
    if (!COARSE) side_by_side<N>([&](int k) { x[k] = x[k] * (2.0f - y[k] * r[k]); });
#else
    for (int k = 0; k < N; ++k) x[k] = x[k] / y[k];
#endif
}

constexpr float MINUS_LOG2_E = -1.44269504f;

// a / (1 + e^-a) of N vectors, given as t = -a log2(e), which a multiplication before can be made to give.
template <bool COARSE, int N>
INLINE void silus(VF (&t)[N]) {
    VF y[N];
    one_plus_powers<COARSE>(MINUS_LOG2_E, t, y);
    quotients<COARSE>(t, y);
}

// Of N vectors: da = dy silu'(a), silu'(a) = s + a s (1 - s), s = 1 / (1 + e^-a). ``dy`` becomes da; ``a`` is used up.
template <int N>
INLINE void before_activation(VF (&dy)[N], VF (&a)[N]) {
    constexpr float LN_2 = 0.693147181f;
    VF s[N], y[N];
    side_by_side<N>([&](int k) { a[k] = a[k] * MINUS_LOG2_E, s[k] = splat(1.0f); });
    one_plus_powers<false>(1.0f, a, y);
    quotients<false>(s, y);
    side_by_side<N>([&](int k) { a[k] = a[k] * s[k], y[k] = fused(s[k], splat(LN_2), splat(-LN_2)); });
    side_by_side<N>([&](int k) { dy[k] = dy[k] * fused(a[k], y[k], s[k]); });
}

// The first n lanes, 0 in the others.
INLINE VF first_lanes(VF x, int64_t n) {
    for (int64_t i = n; i < W; ++i) x[i] = 0;
    return x;
}

// Elements of memory by type. The first n <= W of a vector are read (the others are 0) or written.

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class V, class T>
INLINE V read_lanes(const T* p, int64_t n) {
    V v{};
    if (n == W) {
        memcpy(&v, p, sizeof v);
        return v;
    }
#if FASTDDPM_VECTOR_BYTES == 64
    const unsigned first = (1u << n) - 1;
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(first, p);
    else if constexpr (sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16(first, p);
    else return (V)_mm_maskz_loadu_epi8(first, p);
#else
    memcpy(&v, p, n * sizeof(T));
    return v;
#endif
}

template <class V, class T>
INLINE void write_lanes(T* p, int64_t n, V v) {
    if (n == W) {
        memcpy(p, &v, sizeof v);
        return;
    }
#if FASTDDPM_VECTOR_BYTES == 64
    const unsigned first = (1u << n) - 1;
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, first, (__m512i)v);
    else _mm256_mask_storeu_epi16(p, first, (__m256i)v);
#else
    memcpy(p, &v, n * sizeof(T));
#endif
}

INLINE VF load(const float* p, int64_t n = W) { return read_lanes<VF>(p, n); }
INLINE void store(float* p, VF x, int64_t n = W) { write_lanes(p, n, x); }

// A whole vector, past the caches where the processor can; p at a multiple of its size. ``fence`` before others may read it.
INLINE void stream(float* p, VF x) {
#if FASTDDPM_VECTOR_BYTES == 64
    _mm512_stream_ps(p, (__m512)x);
#elif FASTDDPM_VECTOR_BYTES == 32
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}
INLINE void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

INLINE VU widen(VH h) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VU)_mm512_cvtepu16_epi32((__m256i)h);
#else
    return __builtin_convertvector(h, VU);
#endif
}
INLINE VH narrow(VU u) {
#if FASTDDPM_VECTOR_BYTES == 64
    return (VH)_mm512_cvtepi32_epi16((__m512i)u);
#else
    return __builtin_convertvector(u, VH);
#endif
}

INLINE VF load(const bf16* p, int64_t n = W) { return (VF)(widen(read_lanes<VH>(p, n)) << 16); }
INLINE void store(bf16* p, VF x, int64_t n = W) {  // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
    write_lanes(p, n, (VH)_mm512_cvtneps_pbh((__m512)x));
#else
    VU b = (VU)x;
    VU rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    VI nan = x != x;
    rounded = nan ? (VU{} + 0x7fc0u) : rounded;
    write_lanes(p, n, narrow(rounded));
#endif
}

INLINE VF load(const f16* p, int64_t n = W) {
    VH h = read_lanes<VH>(p, n);
#if FASTDDPM_VECTOR_BYTES == 64
    return (VF)_mm512_cvtph_ps((__m256i)h);
#elif FASTDDPM_VECTOR_BYTES == 32 && defined(__F16C__)
    return (VF)_mm256_cvtph_ps((__m128i)h);
#else
    VU b = widen(h);
    VF magnitude = (VF)((b & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormal numbers too
    VU bits = (VU)magnitude;
    VI special = (VI)(b & 0x7fffu) >= 0x7c00;
    bits = special ? (bits | 0x7f800000u) : bits;
    return (VF)(bits | ((b & 0x8000u) << 16));
#endif
}
INLINE void store(f16* p, VF x, int64_t n = W) {
#if FASTDDPM_VECTOR_BYTES == 64
    write_lanes(p, n, (VH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif FASTDDPM_VECTOR_BYTES == 32 && defined(__F16C__)
    write_lanes(p, n, (VH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    VU b = (VU)x & 0x7fffffffu, sign = ((VU)x >> 16) & 0x8000u;
    VU normal = (b + 0xfffu + ((b >> 13) & 1u) - (112u << 23)) >> 13;
    VU subnormal = (VU)((VF)b + 0.5f) - 0x3f000000u;  // 2^-24 is the last bit of a float near 1/2
    VU result = (VI)b < 0x38800000 ? subnormal : normal;
    result = (VI)result > 0x7c00 || (VI)b >= 0x47800000 ? (VU{} + 0x7c00u) : result;
    result = (VI)b > 0x7f800000 ? (VU{} + 0x7e00u) : result;
    write_lanes(p, n, narrow(result | sign));
#endif
}

INLINE VF load(const uint8_t* p, int64_t n = W) {
    VB b = read_lanes<VB>(p, n);
#if FASTDDPM_VECTOR_BYTES == 64
    return __builtin_convertvector((VI)_mm512_cvtepu8_epi32((__m128i)b), VF);
#elif FASTDDPM_VECTOR_BYTES == 32
    return __builtin_convertvector((VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&b)), VF);
#else
    return __builtin_convertvector(__builtin_convertvector(b, VI), VF);
#endif
}

INLINE VF load(const double* p, int64_t n = W) {
    VF v{};
    for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
    return v;
}

// f(i, n) for i = 0, W, 2W ..: n = W, but for a last and shorter one.
template <class F>
INLINE void for_vectors(int64_t size, F f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) f(i, W);
    if (i < size) f(i, size - i);
}

// Call f with a typed pointer.
template <class F>
INLINE void with_type(DType dtype, const void* data, F f) {
    switch (dtype) {
        case DType::f32: f(static_cast<const float*>(data)); break;
        case DType::f64: f(static_cast<const double*>(data)); break;
        case DType::bf16: f(static_cast<const bf16*>(data)); break;
        case DType::f16: f(static_cast<const f16*>(data)); break;
        case DType::u8: f(static_cast<const uint8_t*>(data)); break;
    }
}

// The same for what is written: float32, bfloat16 or float16.
template <class F>
INLINE void with_output_type(DType dtype, void* data, F f) {
    switch (dtype) {
        case DType::bf16: f(static_cast<bf16*>(data)); break;
        case DType::f16: f(static_cast<f16*>(data)); break;
        default: f(static_cast<float*>(data)); break;
    }
}

// Of a sample the numbers of every channel, as floats.
INLINE void read_channels(const Values& v, int64_t sample, int64_t channels, float* out) {
    with_type(v.dtype, v.data, [&](const auto* p) {
        p += sample * v.row_stride;
        for_vectors(channels, [&](int64_t i, int64_t n) { store(out + i, load(p + i, n), n); });
    });
}

// One number of any dtype.
INLINE float read(DType dtype, const void* data, int64_t i) {
    float x = 0;
    with_type(dtype, data, [&](const auto* p) { x = load(p + i, 1)[0]; });
    return x;
}

}  // namespace
}  // namespace fastddpm::FASTDDPM_ISA
