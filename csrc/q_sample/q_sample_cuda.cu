// x_t = signal x_0 + sigma eps, x_0 = pixel_scale * flip(image[index]) + pixel_shift (Ho et al. 2020, eq. 4).
//
// A thread takes 8 elements of one sample in C, H, W order, or 4 pixels in NHWC order (common/cuda/pictures.cuh); what
// belongs to the sample, it reads once. The noise never is in memory unless it is asked for. Bytes an element: 1 (uint8)
// + 4 (float32) or 2. What limits it: memory, closely followed by the multiplications of Philox and by Box-Muller.

#include "q_sample/q_sample_cuda.h"

#include "common/cuda/pictures.cuh"

namespace fastddpm::cuda {
namespace {

// In, Out: the types of x0 and of the outputs. With both known the noise is drawn; with Any it may be given.
template <class Tile, class In, class Out>
__global__ void __launch_bounds__(BLOCK) q_sample_kernel(const QSample a, const int64_t count) {
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
cudaError_t run(const QSample& a, cudaStream_t stream) {
    return launch(q_sample_kernel<Tile, In, Out>, over_samples<Tile>(a.shape, stream), a, Tile::count(a.shape));
}

// Types known, noise drawn: outputs are in order and aligned, x0 must be.
template <class In, class Out>
cudaError_t run_fast(const QSample& a, cudaStream_t stream) {
    constexpr int WIDTH = 16 / sizeof(Out);
    if (!a.shape.nhwc) return run<Elements<WIDTH, 8 / WIDTH>, In, Out>(a, stream);
    return a.shape.channels == 3 ? run<Pixels<3>, In, Out>(a, stream) : run<Pixels<4>, In, Out>(a, stream);
}

cudaError_t run_any(QSample a, cudaStream_t stream) {
    const bool mirrors = a.flip != nullptr;
    if (suits_pixels(a.shape, mirrors)) {
        for (Image* image : {&a.x0, &a.noise}) image->in_order = image->in_order && aligned(*image, 4 * a.shape.channels);
        switch (a.shape.channels) {
            case 2: return run<Pixels<2>, Any, Any>(a, stream);
            case 3: return run<Pixels<3>, Any, Any>(a, stream);
            default: return run<Pixels<4>, Any, Any>(a, stream);
        }
    }
    const auto in_fours = [&](const Image& image) { return !image.data || (image.in_order && aligned(image, 4)); };
    if (suits_elements(a.shape, 4, mirrors) && in_fours(a.x0) && in_fours(a.noise))
        return run<Elements<4, 1>, Any, Any>(a, stream);
    return run<Scattered, Any, Any>(a, stream);
}

template <class Out>
cudaError_t run_to(const QSample& a, DType same, cudaStream_t stream) {
    const bool mirrors = a.flip != nullptr, pixels = suits_pixels(a.shape, mirrors) && a.shape.channels > 2;
    constexpr int WIDTH = 16 / sizeof(Out);
    const bool fast = (pixels || suits_elements(a.shape, WIDTH, mirrors)) && !a.noise.data && a.x0.in_order &&
                      aligned(a.x0, pixels ? 4 * a.shape.channels : WIDTH);
    if (fast && a.x0.dtype == DType::u8) return run_fast<uint8_t, Out>(a, stream);
    if (fast && a.x0.dtype == same) return run_fast<Out, Out>(a, stream);
    return run_any(a, stream);
}

}  // namespace

cudaError_t q_sample(const QSample& a, cudaStream_t stream) {
    switch (a.x_t.dtype) {
        case DType::bf16: return run_to<bf16>(a, DType::bf16, stream);
        case DType::f16: return run_to<f16>(a, DType::f16, stream);
        default: return run_to<float>(a, DType::f32, stream);
    }
}

}  // namespace fastddpm::cuda
