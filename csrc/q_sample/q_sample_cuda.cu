// x_t = signal x_0 + sigma eps, x_0 = pixel_scale * flip(image[index]) + pixel_shift (Ho et al. 2020, eq. 4).
//
// A thread takes 8 elements of one sample in C, H, W order, or 4 pixels in NHWC order (common/cuda/pictures.cuh); what
// belongs to the sample, it reads once. The noise never is in memory unless it is asked for. Bytes an element: 1 (uint8) +
// 4 (float32) or 2. What limits it: memory, closely followed by the multiplications of Philox and by Box-Muller.

#include "q_sample/q_sample_cuda.h"

#include "common/cuda/pictures.cuh"

namespace fastddpm::cuda {
namespace {

// In, Out: the types of x0 and of the outputs. With both known the noise is drawn; with Any it may be given.
template <class Tile, class In, class Out>
__global__ void __launch_bounds__(BLOCK, 6) q_sample_kernel(const QSample a, const int64_t count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int SIZE = Tile::SIZE;
    const Sample sample(a.shape);
    const Tile tile(a.shape, count, sample);
    const int64_t b = sample.number, t = a.t[b];
    float x[SIZE], eps[SIZE], out[SIZE];
    tile.template load<In>(a.x0, a.shape, a.index ? a.index[b] : b, x, a.flip && a.flip[b]);
    const float signal = entry(a.table, t, 0), sigma = entry(a.table, t, 1);
    if (std::is_same_v<In, Any> && a.noise.data)
        tile.template load<Any>(a.noise, a.shape, b, eps);
    else
        tile.draw(stream(a.source, b), a.shape, eps);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) x[i] = x[i] * a.pixel_scale + a.pixel_shift, out[i] = signal * x[i] + sigma * eps[i];
    tile.template store<Out>(a.x_t, a.shape, b, out);
    switch (a.returns) {
        case QSampleReturns::x_t: break;
        case QSampleReturns::noise: tile.template store<Out>(a.second, a.shape, b, eps); break;
        case QSampleReturns::x0: tile.template store<Out>(a.second, a.shape, b, x); break;
        case QSampleReturns::v:
#pragma unroll
            for (int i = 0; i < SIZE; ++i) out[i] = signal * eps[i] - sigma * x[i];
            tile.template store<Out>(a.second, a.shape, b, out);
    }
}

template <class Tile, class In, class Out>
cudaError_t run(QSample a, cudaStream_t stream) {
    look_at<Tile>({&a.x0, &a.noise, &a.x_t, &a.second});
    return launch(q_sample_kernel<Tile, In, Out>, over_samples<Tile>(a.shape, stream), a, Tile::count(a.shape));
}

// Types known, noise drawn.
template <class Tile, class Out>
bool suits(const QSample& a) {
    return !a.noise.data && Tile::at_once(a.x0) && (a.x0.dtype == DType::u8 || a.x0.dtype == a.x_t.dtype);
}
template <class Tile, class Out>
cudaError_t run_fast(const QSample& a, cudaStream_t stream) {
    return a.x0.dtype == DType::u8 ? run<Tile, uint8_t, Out>(a, stream) : run<Tile, Out, Out>(a, stream);
}

template <class Out>
cudaError_t run_to(const QSample& a, cudaStream_t stream) {
    constexpr int WIDTH = 16 / sizeof(Out);
    using Runs = Elements<WIDTH, 8 / WIDTH>;
    const bool mirrors = a.flip != nullptr, pixels = suits_pixels(a.shape, mirrors);
    if (suits_elements(a.shape, WIDTH, mirrors) && suits<Runs, Out>(a)) return run_fast<Runs, Out>(a, stream);
    if (pixels && a.shape.channels == 3 && suits<Pixels<3>, Out>(a)) return run_fast<Pixels<3>, Out>(a, stream);
    if (pixels && a.shape.channels == 4 && suits<Pixels<4>, Out>(a)) return run_fast<Pixels<4>, Out>(a, stream);
    return with_any_tile(a.shape, mirrors, {&a.x0, &a.noise},
                         [&]<class Tile>() { return run<Tile, Any, Any>(a, stream); });
}

}  // namespace

cudaError_t q_sample(const QSample& a, cudaStream_t stream) {
    switch (a.x_t.dtype) {
        case DType::bf16: return run_to<bf16>(a, stream);
        case DType::f16: return run_to<f16>(a, stream);
        default: return run_to<float>(a, stream);
    }
}

}  // namespace fastddpm::cuda
