// What kernels need of CUDA beyond the language: shared memory, clusters, launches; everything else includes this first.
//
// The same source is compiled by nvcc for a GPU and, by a C++ compiler with tests/cuda/emulation in place of the
// toolkit's headers, for the tests that run kernels on a CPU. So shared memory is always the dynamic one, launches go
// through launch(), and what stands behind FASTDDPM_EMULATED is inline assembly alone. Nothing here knows of torch.
#pragma once

#include <cstdint>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include "common/data.h"

// Clusters and distributed shared memory are there from sm_90 on.
#if defined(FASTDDPM_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTDDPM_CLUSTERS 1
#endif

namespace fastddpm::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

// The dynamic shared memory of the block, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(FASTDDPM_EMULATED)
    return static_cast<T*>(emulation::shared_memory());
#else
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

// Until every thread of every block of the cluster is here; what was written to shared memory before is seen behind.
// In two halves: what lies between them waits for nobody.
__device__ __forceinline__ void cluster_arrive() {
#if defined(FASTDDPM_CLUSTERS)
    __cluster_barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(FASTDDPM_CLUSTERS)
    __cluster_barrier_wait();
#endif
}
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ unsigned cluster_rank() {
#if defined(FASTDDPM_CLUSTERS)
    return __clusterRelativeBlockRank();
#else
    return 0;
#endif
}

// The same place in the shared memory of another block of the cluster, which must not have ended.
template <class T>
__device__ __forceinline__ T* in_block(T* own, unsigned rank) {
#if defined(FASTDDPM_CLUSTERS)
    return static_cast<T*>(__cluster_map_shared_rank(own, rank));
#else
    return own;
#endif
}

// 16 bytes from device to shared memory behind the back of the thread, which sees them after wait_for_copies.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
    __pipeline_memcpy_async(shared, global, 16);
}
__device__ __forceinline__ void commit_copies() { __pipeline_commit(); }
template <int StillUnderWay = 0>
__device__ __forceinline__ void wait_for_copies() { __pipeline_wait_prior(StillUnderWay); }

// Programmatic dependent launch: wait for what the kernel before has written, and let the next one start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(FASTDDPM_CLUSTERS)
    cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(FASTDDPM_CLUSTERS)
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Blocks of a cooperative launch, which are all on the device at once, meet at a counter in device memory: it is 0 before
// the launch, every block adds 1 each time, and goes on when ``all`` are there, which the counter is told by then. What
// any thread of them wrote before is seen behind. The sum of the arrivals may pass 2^32.
__device__ __forceinline__ void meet(unsigned* counter, unsigned all) {
    __syncthreads();
    if (threadIdx.x == 0) {
#if defined(FASTDDPM_EMULATED)
        ++*counter;
        for (unsigned seen = *counter; static_cast<int>(seen - all) < 0; seen = *counter) emulation::wait_for_change(counter, seen);
#else
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
        unsigned seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        while (static_cast<int>(seen - all) < 0);
#endif
    }
    __syncthreads();
}

struct Launch {
    dim3 grid, block;
    size_t shared = 0;
    cudaStream_t stream = nullptr;
    unsigned cluster = 1;      // blocks along x that share their shared memory
    bool dependent = false;    // may start before the kernel in front of it ends: it calls wait_for_previous_kernel
    bool cooperative = false;  // all blocks at once, or an error; not with dependent, of which CUDA says nothing beside it
};

// The device at hand: what a launcher decides by.
struct Device {
    int index, processors, architecture, shared_memory;  // architecture: 80, 89, 90 ..; shared_memory: bytes that a block may take
};

[[nodiscard]] inline cudaError_t device(Device& d) {
    static thread_local Device known[64];
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess) return error;
    Device& kept = known[index % 64];
    if (kept.processors == 0 || kept.index != index) {
        Device found{index, 0, 0, 0};
        int major = 0, minor = 0;
        const auto ask = [&](int& number, cudaDeviceAttr what) {
            if (error == cudaSuccess) error = cudaDeviceGetAttribute(&number, what, index);
        };
        ask(found.processors, cudaDevAttrMultiProcessorCount);
        ask(major, cudaDevAttrComputeCapabilityMajor), ask(minor, cudaDevAttrComputeCapabilityMinor);
        ask(found.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        if (error != cudaSuccess) return error;
        found.architecture = 10 * major + minor;
        kept = found;
    }
    d = kept;
    return cudaSuccess;
}

// A kernel takes more than 48 KB, or clusters of more than 8 blocks, once the device has been told that it may: here as
// much as any kernel may, so that it is told once, and what another thread tells it is the same.
template <class... P>
[[nodiscard]] cudaError_t allow(void (*kernel)(P...), const Launch& l) {
    const bool large = l.shared > 48 * 1024, wide = l.cluster > 8;
    if (!large && !wide) return cudaSuccess;
    static thread_local struct {
        void (*kernel)(P...);
        int device;
        bool large, wide;
    } told[64];
    Device d;
    cudaError_t error = device(d);
    if (error != cudaSuccess) return error;
    auto& last = told[reinterpret_cast<uintptr_t>(kernel) / 16 % 64];
    if (last.kernel != kernel || last.device != d.index) last = {kernel, d.index, false, false};
    if (large && !last.large) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_memory);
    last.large = last.large || (large && error == cudaSuccess);
    if (error == cudaSuccess && wide && !last.wide) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    last.wide = last.wide || (wide && error == cudaSuccess);
    return error;
}

// How many blocks of a kernel the device has room for at once.
template <class... P>
[[nodiscard]] cudaError_t room_for(void (*kernel)(P...), const Launch& l, int& blocks) {
    Device d;
    cudaError_t error = device(d);
    if (error == cudaSuccess) error = allow(kernel, l);
    if (error != cudaSuccess) return error;
    int of_processor = 0;
    const int threads = static_cast<int>(l.block.x * l.block.y * l.block.z);
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel, threads, l.shared);
    blocks = of_processor * d.processors;
    return error != cudaSuccess ? error : blocks ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// How many clusters of a kernel the device has room for at once; none where its processors, or those of a slice of it,
// do not stand together in such numbers.
template <class... P>
[[nodiscard]] cudaError_t clusters_for(void (*kernel)(P...), const Launch& l, int& clusters) {
    const cudaError_t error = allow(kernel, l);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {l.cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.cluster), config.blockDim = l.block, config.dynamicSmemBytes = l.shared;
    config.attrs = &attribute, config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
}

// Run a kernel; nothing where the grid is empty. Returns the error of the launch, which nobody may forget.
template <class... P, class... A>
[[nodiscard]] cudaError_t launch(void (*kernel)(P...), const Launch& l, const A&... arguments) {
    if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return cudaSuccess;
    Device d;
    cudaError_t error = device(d);
    if (error == cudaSuccess) error = allow(kernel, l);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[3];
    cudaLaunchConfig_t config{};
    config.gridDim = l.grid, config.blockDim = l.block;
    config.dynamicSmemBytes = l.shared, config.stream = l.stream, config.attrs = attributes;
    if (l.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {l.cluster, 1, 1};
    }
    if (l.cooperative) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (l.dependent && d.architecture >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    const cudaError_t last = cudaGetLastError();
    return error != cudaSuccess ? error : last;
}

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastddpm::cuda
