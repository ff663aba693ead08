// Counter-based noise: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller.
//
// Key = seed; counter = (element / 4, sample, step, stream); element in C, H, W order whatever the memory order.
// See fastddpm/ops/philox.py, which says what every implementation must give.
#pragma once

#include "common/cuda/data.h"
#include "common/cuda/platform.cuh"

namespace fastddpm::cuda {

// Where the noise of one sample is drawn: key and counter but for its first word.
struct Stream {
    uint32_t seed_low, seed_high, sample, step, stream;
};

__device__ __forceinline__ Stream stream(const Source& d, int64_t b) {
    const uint64_t seed = d.seed_tensor ? static_cast<uint64_t>(*d.seed_tensor) : d.seed;
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(d.sample[b]),
            d.step_tensor ? static_cast<uint32_t>(*d.step_tensor) : d.step, d.stream};
}

__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(FASTDDPM_EMULATED)
    return static_cast<uint64_t>(a) * b;
#else
    uint64_t result;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
    return result;
#endif
}

// The four words of a counter. A product of 64 bits is one wide multiplication (IMAD.WIDE).
__device__ __forceinline__ uint4 philox(const Stream& s, uint32_t counter) {
    uint32_t c0 = counter, c1 = s.sample, c2 = s.step, c3 = s.stream, k0 = s.seed_low, k1 = s.seed_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// u = (word + 1/2) 2^-32
__device__ __forceinline__ float unit(uint32_t word) { return __uint2float_rn(word) * 0x1p-32f + 0x1p-33f; }

// The square root by the one approximate instruction; 0 below 2^-126.
__device__ __forceinline__ float fast_sqrt(float x) {
#if defined(FASTDDPM_EMULATED)
    return emulation::sqrt_approx(x);
#else
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

__device__ __forceinline__ float fast_log2(float x) {
#if defined(FASTDDPM_EMULATED)
    return emulation::lg2_approx(x);
#else
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// z0 = sqrt(-2 ln u0) cos(2 pi u1) and z1, its sine. By approximate instructions, ln to 2^-22 and sine and cosine to
// 2^-20.5: at most 6e-4 in z, 5e-7 in the root mean square. The exact functions would use local memory.
__device__ __forceinline__ float2 box_muller(uint32_t word0, uint32_t word1) {
    const float square = fmaxf(fast_log2(unit(word0)) * -1.3862943611198906f, 0.0f);
    const float radius = fast_sqrt(square), angle = unit(word1) * 6.283185307179586f;
    return make_float2(radius * __cosf(angle), radius * __sinf(angle));
}

// Standard normal numbers of elements 4 counter .. 4 counter + 3.
__device__ __forceinline__ void normals(const Stream& s, uint32_t counter, float (&z)[4]) {
    const uint4 w = philox(s, counter);
    const float2 a = box_muller(w.x, w.y), b = box_muller(w.z, w.w);
    z[0] = a.x, z[1] = a.y, z[2] = b.x, z[3] = b.y;
}

}  // namespace fastddpm::cuda
