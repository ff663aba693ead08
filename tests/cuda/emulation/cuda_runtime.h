// The part of CUDA that the kernels of csrc use, emulated on a CPU: this header takes the place of the toolkit's own.
//
// Every thread of a block is a fiber; the blocks of a cluster, and all of a cooperative launch, run together, some slower
// than others, in an order that FASTDDPM_EMULATION_SEED decides, and switch at each barrier (of a cluster at its arrival,
// too), shuffle and wait alone. So a missing barrier shows, since in one order or another a thread reads what another has
// not written; shared memory starts as NaN, is as large as the launch says and ends with its block, so that
// AddressSanitizer sees what lies outside; an asynchronous copy takes place when it is waited for, and no sooner. What it
// cannot show: races that need two threads at work at the same moment, weak memory order, speed; nor that a kernel which
// may start early reads before it waits for the one in front, unless it copies: the binaries are read for that.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#include "approximate.h"

#ifndef FASTDDPM_EMULATED
#define FASTDDPM_EMULATED 1
#endif
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The machine (emulator.cpp).
namespace emulation {

extern unsigned cluster_rank, cluster_size;  // of the fiber at work

enum class Barrier { warp, block, cluster, memory };
void wait(Barrier barrier, unsigned mask = 0xffffffffu);      // until all threads of it (of the mask, in a warp) are here
void wait_for_change(const unsigned* p, unsigned seen);         // until another thread has written something else there
void* shared_memory();                                         // of the block at work
void* peer_shared_memory(const void* own, unsigned rank);      // the same place in another block of the cluster
void exchange(const void* value, size_t size, unsigned mask);  // what this lane shows to its warp, until its next exchange
void shown(void* value, size_t size, unsigned lane, unsigned mask);  // what a lane of the warp has shown
void copy_later(void* to, const void* from, size_t size, size_t zeros);
void commit_copies();
void wait_copies(size_t still_under_way);
void wait_for_kernel_before();
void arrive_at_cluster();   // says that this thread needs the others no longer, and goes on
void wait_for_cluster();    // until all threads of the cluster have arrived
void allow(const void* kernel, size_t shared, bool wide);  // what it may take beyond 48 KB and 8 blocks
[[noreturn]] void fail(const char* format, ...);  // ends the process, saying which thread did what

struct Launch {
    dim3 grid, block;
    size_t shared;
    unsigned cluster;
    bool cooperative, dependent;
    const void* kernel;
};
int run(const Launch& launch, const std::function<void()>& kernel);  // a cudaError_t
int clusters_at_once(const Launch& launch);  // room for them: up to FASTDDPM_EMULATION_CLUSTER blocks each, 16 where it is not set
constexpr int PROCESSORS = 4, BLOCKS_OF_PROCESSOR = 2;  // at once, of any kernel: room for a cooperative launch
extern int compute_capability;  // FASTDDPM_EMULATION_ARCH, 90 where it is not set: what the device says that it is

}  // namespace emulation

extern uint3 threadIdx, blockIdx;  // of the fiber at work
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Barriers and shuffles.
static inline void __syncthreads() { emulation::wait(emulation::Barrier::block); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait(emulation::Barrier::warp, mask); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

namespace emulation {
inline unsigned lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
    exchange(&value, sizeof value, mask);
    T result;
    shown(&result, sizeof result, from, mask);
    return result;
}
}  // namespace emulation
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const unsigned first = emulation::lane() / width * width;
    return emulation::shuffle(mask, value, first + static_cast<unsigned>(from) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    const unsigned lane = emulation::lane(), from = lane ^ with;
    return emulation::shuffle(mask, value, from / width == lane / width ? from : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned lane = emulation::lane();
    return emulation::shuffle(mask, value, lane % width + by < static_cast<unsigned>(width) ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned lane = emulation::lane();
    return emulation::shuffle(mask, value, lane % width >= by ? lane - by : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emulation::exchange(&predicate, sizeof predicate, mask);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            int theirs;
            emulation::shown(&theirs, sizeof theirs, lane, mask);
            result |= static_cast<unsigned>(theirs != 0) << lane;
        }
    return result;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Clusters (sm_90 and later).
static inline void __cluster_barrier_arrive() { emulation::arrive_at_cluster(); }
static inline void __cluster_barrier_wait() { emulation::wait_for_cluster(); }
static inline unsigned __clusterRelativeBlockRank() { return emulation::cluster_rank; }
static inline unsigned __clusterSizeInBlocks() { return emulation::cluster_size; }
static inline void* __cluster_map_shared_rank(const void* own, unsigned rank) {
    return emulation::peer_shared_memory(own, rank);
}

// Programmatic dependent launch: kernels run one behind the other here, but one that may start early must wait.
static inline void cudaGridDependencySynchronize() { emulation::wait_for_kernel_before(); }
static inline void cudaTriggerProgrammaticLaunchCompletion() {}

// Asynchronous copies to shared memory (cuda_pipeline.h).
static inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
    emulation::copy_later(to, from, size, zeros);
}
static inline void __pipeline_commit() { emulation::commit_copies(); }
static inline void __pipeline_wait_prior(size_t still_under_way) { emulation::wait_copies(still_under_way); }

// Memory with a hint, and atomics: one fiber runs at a time.
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stwb(T* p, T value) { *p = value; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> T atomicAdd(T* p, T value) { T before = *p; *p += value; return before; }
template <class T> T atomicExch(T* p, T value) { T before = *p; *p = value; return before; }

// Arithmetic.
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static inline float __uint2float_rn(unsigned u) { return static_cast<float>(u); }
// macros: the C library has functions of some of these names
#define __logf(x) (emulation::lg2_approx(x) * 0.6931471805599453f)
#define __log2f(x) emulation::lg2_approx(x)
#define __expf(x) emulation::ex2_approx((x) * 1.4426950408889634f)
#define __sinf(x) emulation::sin_approx(x)
#define __cosf(x) emulation::cos_approx(x)
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fdividef(float x, float y) { return emulation::div_approx(x, y); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
using std::max;
using std::min;

// The host's side.
typedef int cudaError_t;
typedef struct CUstream_st* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative, cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct { unsigned x, y, z; } clusterDim;
        int cooperative, programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
namespace emulation {
inline Launch launch_of(const cudaLaunchConfig_t* config, const void* kernel) {
    Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes, 1, false, false, kernel};
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
        if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative != 0;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            launch.dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
    return launch;
}
}  // namespace emulation
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    return emulation::run(emulation::launch_of(config, reinterpret_cast<const void*>(kernel)), [&] { kernel(P(arguments)...); });
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...), const cudaLaunchConfig_t* config) {
    *clusters = emulation::clusters_at_once(emulation::launch_of(config, reinterpret_cast<const void*>(kernel)));
    return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    const bool wide = attribute == cudaFuncAttributeNonPortableClusterSizeAllowed;
    emulation::allow(reinterpret_cast<const void*>(kernel), wide ? 0 : value, wide && value);
    return cudaSuccess;
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrL2CacheSize
};
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = emulation::PROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *value = emulation::compute_capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = emulation::compute_capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:  // 227 KB, 163 KB on sm_80, 99 KB on the small ones
            *value = 1024 * (emulation::compute_capability >= 120 || emulation::compute_capability % 10 ? 99
                             : emulation::compute_capability >= 90                                      ? 227
                                                                                                        : 163);
            break;
        case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    }
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
    *blocks = emulation::BLOCKS_OF_PROCESSOR;
    return cudaSuccess;
}
static inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
static inline cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "the emulated device cannot launch this";
}
static inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
    memset(to, value, size);
    return cudaSuccess;
}
