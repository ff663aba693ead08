// Numbers in memory as floats: 16 bytes at a time where they lie side by side, else one by one.
#pragma once

#include <type_traits>

#include "common/cuda/platform.cuh"

namespace fastddpm::cuda {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
#if defined(FASTDDPM_EMULATED)
    _Float16 half;
    memcpy(&half, &x, 2);
    return static_cast<float>(half);
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#endif
}

// Two numbers rounded to nearest, ties to even, the first in the low half.
__device__ __forceinline__ unsigned pack(bf16, float low, float high) {
#if defined(FASTDDPM_EMULATED)
    const auto rounded = [](float x) {
        const unsigned b = __float_as_uint(x);
        return x != x ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
#else
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}
__device__ __forceinline__ unsigned pack(f16, float low, float high) {
#if defined(FASTDDPM_EMULATED)
    const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    unsigned result;
    memcpy(&result, halves, 4);
    return result;
#else
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (sizeof(T) == 2)
        return T{static_cast<uint16_t>(pack(T{}, x, 0.0f))};
    else
        return static_cast<T>(x);
}

// Words of 32 bits from memory, in accesses of 16 bytes where their number is a multiple of four; aligned accordingly.
template <int Words>
__device__ __forceinline__ void load_words(const void* p, unsigned (&w)[Words]) {
    if constexpr (Words % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Words; i += 4) {
            const uint4 v = reinterpret_cast<const uint4*>(p)[i / 4];
            w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
        }
    } else if constexpr (Words % 2 == 0) {
#pragma unroll
        for (int i = 0; i < Words; i += 2) {
            const uint2 v = reinterpret_cast<const uint2*>(p)[i / 2];
            w[i] = v.x, w[i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Words; ++i) w[i] = reinterpret_cast<const unsigned*>(p)[i];
    }
}
// (__stwb is a plain store that the compiler leaves whole: it splits one of a uint4 into four where paths join.)
template <int Words>
__device__ __forceinline__ void store_words(void* p, const unsigned (&w)[Words]) {
    if constexpr (Words % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Words; i += 4)
            __stwb(reinterpret_cast<uint4*>(p) + i / 4, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
    } else if constexpr (Words % 2 == 0) {
#pragma unroll
        for (int i = 0; i < Words; i += 2) __stwb(reinterpret_cast<uint2*>(p) + i / 2, make_uint2(w[i], w[i + 1]));
    } else {
#pragma unroll
        for (int i = 0; i < Words; ++i) reinterpret_cast<unsigned*>(p)[i] = w[i];
    }
}

// The numbers in words, and back.
template <class T, int N>
__device__ __forceinline__ void unpack(const unsigned (&w)[N * sizeof(T) / 4], float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (sizeof(T) == 4) {
            x[i] = __uint_as_float(w[i]);
        } else if constexpr (sizeof(T) == 1) {
            x[i] = static_cast<float>((w[i / 4] >> (8 * (i % 4))) & 0xffu);
        } else {
            x[i] = to_float(T{static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)))});
        }
    }
}
template <class T, int N>
__device__ __forceinline__ void pack(const float (&x)[N], unsigned (&w)[N * sizeof(T) / 4]) {
#pragma unroll
    for (int i = 0; i < N * static_cast<int>(sizeof(T)) / 4; ++i) {
        if constexpr (sizeof(T) == 4)
            w[i] = __float_as_uint(x[i]);
        else
            w[i] = pack(T{}, x[2 * i], x[2 * i + 1]);
    }
}

// N neighbours as floats, N sizeof(T) a multiple of 4 bytes; aligned to the largest power of two up to 16 in that.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[N]) {
    if constexpr (sizeof(T) == 8) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = to_float(p[i]);
    } else {
        unsigned w[N * sizeof(T) / 4];
        load_words(p, w);
        unpack<T>(w, x);
    }
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
    unsigned w[N * sizeof(T) / 4];
    pack<T>(x, w);
    store_words(p, w);
}

// Call f with a pointer of the type that a tensor has: every dtype that is read ..
template <class F>
__host__ __device__ __forceinline__ void with_type(DType dtype, const void* data, F f) {
    switch (dtype) {
        case DType::f32: f(static_cast<const float*>(data)); break;
        case DType::f64: f(static_cast<const double*>(data)); break;
        case DType::bf16: f(static_cast<const bf16*>(data)); break;
        case DType::f16: f(static_cast<const f16*>(data)); break;
        case DType::u8: f(static_cast<const uint8_t*>(data)); break;
    }
}

// .. and those that are written: float32, bfloat16, float16.
template <class F>
__host__ __device__ __forceinline__ void with_output_type(DType dtype, void* data, F f) {
    switch (dtype) {
        case DType::bf16: f(static_cast<bf16*>(data)); break;
        case DType::f16: f(static_cast<f16*>(data)); break;
        default: f(static_cast<float*>(data)); break;
    }
}

// One number of any dtype; the branch is the same for all threads.
__device__ __forceinline__ float read(DType dtype, const void* data, int64_t i) {
    float x = 0;
    with_type(dtype, data, [&](const auto* p) { x = to_float(p[i]); });
    return x;
}
__device__ __forceinline__ void write(DType dtype, void* data, int64_t i, float x) {
    with_output_type(dtype, data, [&](auto* p) { p[i] = from_float<std::remove_reference_t<decltype(*p)>>(x); });
}

// Value c of row b of a vector or matrix; ``otherwise`` where none is given.
__device__ __forceinline__ float read(const Values& v, int64_t b, int64_t c, float otherwise) {
    return v.data ? read(v.dtype, v.data, b * v.row_stride + c) : otherwise;
}

// Bytes that every access to an image can count on as its alignment, up to 16: that of its start and of its samples.
inline int alignment(const Image& a, int64_t element_size) {
    uint64_t bits = reinterpret_cast<uintptr_t>(a.data) | static_cast<uint64_t>(a.sample_stride * element_size) | 16;
    return static_cast<int>(bits & (~bits + 1));
}
inline int64_t element_size(DType dtype) {
    return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

}  // namespace fastddpm::cuda
