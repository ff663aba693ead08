// Standard normal numbers: Philox 4x32-10 and Box-Muller, the noise of every other kernel on its own.
//
// A thread makes 16 bytes. Bytes an element: 4 or 2 written. What limits it: 20 wide multiplications for 4 numbers.

#include "normal/normal_cuda.h"

#include "common/cuda/tile.cuh"

namespace fastddpm::cuda {
namespace {

template <class Tile, class T>
__global__ void __launch_bounds__(THREADS) normal_kernel(const Normal a, const int64_t per_sample) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for_tiles<Tile>(a.shape, per_sample, [&](int64_t b, const Tile& tile) {
        float z[Tile::SIZE];
        tile.draw(stream(a.source, b), a.shape, z);
        tile.template store_as<T>(a.out, a.shape, b, z);
    });
}

__global__ void __launch_bounds__(THREADS) philox_words_kernel(const PhiloxWords a) {
    const int64_t counter = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (4 * counter >= a.size) return;
    for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
        const uint4 w = philox(stream(a.source, b), static_cast<uint32_t>(counter));
        const unsigned words[4] = {w.x, w.y, w.z, w.w};
        for (int64_t i = 0; i < 4 && 4 * counter + i < a.size; ++i) a.out[b * a.size + 4 * counter + i] = words[i];
    }
}

template <class T>
cudaError_t normal_as(const Normal& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(T);
    return with_tile<V>(a.shape, suits(a.shape, V, {&a.out}), [&]<class Tile>() {
        return launch(normal_kernel<Tile, T>, over_tiles<Tile>(a.shape, stream), a, Tile::per_sample(a.shape));
    });
}

}  // namespace

cudaError_t normal(const Normal& a, cudaStream_t stream) {
    switch (a.out.dtype) {
        case DType::bf16: return normal_as<bf16>(a, stream);
        case DType::f16: return normal_as<f16>(a, stream);
        default: return normal_as<float>(a, stream);
    }
}

cudaError_t philox_words(const PhiloxWords& a, cudaStream_t stream) {
    Launch l;
    l.grid = dim3(static_cast<unsigned>(ceil_div(a.size, 4 * THREADS)), static_cast<unsigned>(a.batch < 65535 ? a.batch : 65535));
    l.block = dim3(THREADS), l.stream = stream;
    return launch(philox_words_kernel, l, a);
}

}  // namespace fastddpm::cuda
