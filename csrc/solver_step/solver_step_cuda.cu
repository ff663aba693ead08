// pred = clamp(k0 x + k1 o), x' = k2 pred + k3 x + k4 pred_prev + k5 z + k6 o; o with guidance, k5 with a learned variance,
// and then the blend with what is known: see fastddpm/ops/solver_step/interface.py.
//
// A thread takes a tile of one sample: 16 bytes of a state in NCHW order, four or eight whole pixels in NHWC order. Bytes
// an element: 12 of a float32 state (x read, x' and pred written), and 2 or 4 of the prediction. What limits it is memory;
// a small batch, the latency of three loads one behind the other: the step, its row of the table, and what it multiplies.
// So the images are asked for before the row, and the noise is made while both are under way.

#include "solver_step/solver_step_cuda.h"

#include "common/cuda/tile.cuh"

namespace fastddpm::cuda {
namespace {

// A row of float32 or float64 numbers.
template <int N>
__device__ __forceinline__ void load_row(const Values& table, int64_t row, float (&k)[N]) {
    if (table.dtype == DType::f64) {
        const double* p = static_cast<const double*>(table.data) + row * N;
#pragma unroll
        for (int i = 0; i < N; ++i) k[i] = static_cast<float>(p[i]);
    } else {
        const float* p = static_cast<const float*>(table.data) + row * N;
#pragma unroll
        for (int i = 0; i < N; ++i) k[i] = p[i];
    }
}

// The first C channels of [B, 2C, H, W], and the second: in NHWC order those of a tile are one run of memory.
template <class O, int V, int C>
__device__ __forceinline__ void load_halves(const SolverStep& a, const Image& first, const Image& second, int64_t b,
                                            const Tile<V, C>& tile, float (&x)[Tile<V, C>::SIZE],
                                            float (&y)[Tile<V, C>::SIZE]) {
    if constexpr (C == 0) {
        tile.template load_as<O>(first, a.shape, b, x);
        if (second.data) tile.template load_as<O>(second, a.shape, b, y);
    } else {
        float run[2 * Tile<V, C>::SIZE];
        load(static_cast<const O*>(first.data) + b * first.sample_stride + 2 * tile.first, run);
#pragma unroll
        for (int i = 0; i < Tile<V, C>::SIZE; ++i) x[i] = run[i / C * 2 * C + i % C], y[i] = run[i / C * 2 * C + C + i % C];
    }
}
template <class O>
__device__ __forceinline__ void load_halves(const SolverStep& a, const Image& first, const Image& second, int64_t b,
                                            const AnyTile& tile, float (&x)[AnyTile::SIZE], float (&y)[AnyTile::SIZE]) {
    tile.load(first, a.shape, b, x);
    if (second.data) tile.load(second, a.shape, b, y);
}

// A mask, of which one sample or channel may stand for all.
template <class T, int V, int C>
__device__ __forceinline__ void load_mask(const SolverStep& a, int64_t b, const Tile<V, C>& tile,
                                          float (&x)[Tile<V, C>::SIZE]) {
    const T* of_sample = static_cast<const T*>(a.mask.data) + b * a.mask.sample_stride;
    const int64_t pixels = a.shape.height * a.shape.width;
    int64_t channel = C ? 0 : tile.first / pixels, pixel = C ? tile.first / C : tile.first % pixels;
#pragma unroll
    for (int i = 0; i < Tile<V, C>::SIZE; ++i) {
        x[i] = to_float(of_sample[channel * a.mask.channel_stride + pixel * a.mask.pixel_stride]);
        if (C ? ++channel == C : ++pixel == pixels) C ? (channel = 0, ++pixel) : (pixel = 0, ++channel);
    }
}
template <class T>
__device__ __forceinline__ void load_mask(const SolverStep& a, int64_t b, const AnyTile& tile, float (&x)[AnyTile::SIZE]) {
    tile.load(a.mask, a.shape, b, x);
}

// Noise that is given, or drawn at this row.
template <class X, class Tile>
__device__ __forceinline__ void noise(const Image& given, const Source& source, int64_t row, const SolverStep& a,
                                      int64_t b, const Tile& tile, float (&z)[Tile::SIZE]) {
    if (given.data) {
        tile.template load_as<X>(given, a.shape, b, z);
    } else {
        Stream s = stream(source, b);
        s.step = static_cast<uint32_t>(row);
        tile.draw(s, a.shape, z);
    }
}

// start + weight (end - start), exact at both ends.
__device__ __forceinline__ float lerp(float start, float end, float weight) {
    return weight < 0.5f ? fmaf(weight, end - start, start) : fmaf(start - end, 1.0f - weight, end);
}

// The state and what is added to it are of type X, the prediction of type O, the mask is of float32 or X; AnyTile looks
// itself. Plain: no option but drawn noise and the clamp. Products are summed by fmaf throughout, so that every instance
// gives the same bits.
template <class Tile, class X, class O, bool Plain>
__device__ __forceinline__ void step_tile(const SolverStep& a, int64_t b, const Tile& tile) {
    constexpr int N = Tile::SIZE;
    const int64_t row = a.step_tensor ? *a.step_tensor : a.step;
    float x[N], o[N], y[N], z[N], variance[N], uncond[N], prev[N], k[9];
    tile.template load_as<X>(a.x, a.shape, b, x);
    if constexpr (Plain) {
        tile.template load_as<O>(a.out, a.shape, b, o);
    } else {
        if (a.variance.data)
            load_halves<O>(a, a.out, a.variance, b, tile, o, variance);
        else
            tile.template load_as<O>(a.out, a.shape, b, o);
        if (a.uncond.data) {
            float unused[N];
            if (a.variance.data)
                load_halves<O>(a, a.uncond, Image{}, b, tile, uncond, unused);
            else
                tile.template load_as<O>(a.uncond, a.shape, b, uncond);
        }
        if (a.pred_prev.data) tile.template load_as<X>(a.pred_prev, a.shape, b, prev);
    }
    const float bound = read(a.clamp, b, 0, a.bound);  // a branch: behind it comes what waits for the row
    load_row(a.table, row, k);
    const bool noisy = a.source.sample || (!Plain && a.noise.data);
    if constexpr (Plain) {
        if (noisy) noise<X>(Image{}, a.source, row, a, b, tile, z);
    } else if (a.uncond.data) {
        const float weight = read(a.guidance, 0, 0, a.guidance_scale);
#pragma unroll
        for (int i = 0; i < N; ++i) o[i] = lerp(uncond[i], o[i], weight);
    }

    const float k0 = bound == bound ? k[0] : bound;  // NaN as a bound makes all of the sample NaN
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float pred = fmaf(k0, x[i], k[1] * o[i]);
        pred = pred < -bound ? -bound : pred;  // NaN stays NaN
        pred = pred > bound ? bound : pred;
        y[i] = fmaf(k[2], pred, fmaf(k[3], x[i], k[6] * o[i]));
        x[i] = pred;
    }
    tile.template store_as<X>(a.pred, a.shape, b, x);

    if constexpr (!Plain) {
        if (a.pred_prev.data) {
#pragma unroll
            for (int i = 0; i < N; ++i) y[i] = fmaf(k[4], prev[i], y[i]);
        }
        if (noisy) noise<X>(a.noise, a.source, row, a, b, tile, z);
        if (noisy && a.variance.data && k[5] != 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float f = fmaf(variance[i], 0.5f, 0.5f);
                y[i] = fmaf(expf(0.5f * fmaf(f, k[8], (1.0f - f) * k[7])), z[i], y[i]);
            }
        }
    }
    if (noisy && (Plain || !a.variance.data)) {
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = fmaf(k[5], z[i], y[i]);
    }
    if constexpr (!Plain) {
        if (a.mask.data) {
            float level[2], known[N], mask[N];
            load_row(a.known_table, row, level);
            tile.template load_as<X>(a.known, a.shape, b, known);
            if (a.mask.dtype == DType::f32)
                load_mask<float>(a, b, tile, mask);
            else
                load_mask<X>(a, b, tile, mask);
            noise<X>(a.known_noise, a.known_source, row, a, b, tile, z);
#pragma unroll
            for (int i = 0; i < N; ++i) y[i] = lerp(y[i], fmaf(level[0], known[i], level[1] * z[i]), mask[i]);
        }
    }
    tile.template store_as<X>(a.next, a.shape, b, y);
}

// Blocks that a processor is to hold: as many as leave the registers that a tile needs. Left to itself, nvcc aims at more,
// and puts what is left over into local memory.
constexpr int resident(int size, bool plain) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    if (size == 12 && !plain) return 1;
#endif
    return size <= 4 ? (plain ? 5 : 3) : size <= 8 ? (plain ? 4 : 2) : size <= 12 ? (plain ? 3 : 2) : (plain ? 2 : 1);
}

template <class Tile, class X, class O, bool Plain>
__global__ void __launch_bounds__(THREADS, resident(Tile::SIZE, Plain)) solver_step_kernel(const SolverStep a, const int64_t per_sample) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    for_tiles<Tile>(a.shape, per_sample, [&](int64_t b, const Tile& tile) { step_tile<Tile, X, O, Plain>(a, b, tile); });
}

template <class Tile, class X, class O, bool Plain>
cudaError_t run(const SolverStep& a, cudaStream_t stream) {
    return launch(solver_step_kernel<Tile, X, O, Plain>, over_tiles<Tile>(a.shape, stream), a, Tile::per_sample(a.shape));
}

// Whether both halves of a prediction in NHWC order can be read as one run.
bool is_one_run(const Shape& s, const Image& half) {
    return s.nhwc && half.channel_stride == 1 && half.pixel_stride == 2 * s.channels &&
           alignment(half, element_size(half.dtype)) == 16;
}

// Whether tiles of V suit every image, and the types are those that they are read by.
bool is_fast(const SolverStep& a, int v) {
    for (const Image* image : {&a.pred_prev, &a.noise, &a.known, &a.known_noise})
        if (image->data && image->dtype != a.x.dtype) return false;
    if (a.uncond.data && a.uncond.dtype != a.out.dtype) return false;
    if (a.mask.data && a.mask.dtype != DType::f32 && a.mask.dtype != a.x.dtype) return false;
    if (!suits(a.shape, v, {&a.x, &a.next, &a.pred, &a.pred_prev, &a.noise, &a.known, &a.known_noise})) return false;
    if (a.variance.data && a.shape.nhwc) return is_one_run(a.shape, a.out) && (!a.uncond.data || is_one_run(a.shape, a.uncond));
    return suits(a.shape, v, {&a.out, &a.variance, &a.uncond});
}

// By tiles of 16 bytes of the state in NCHW order, of four pixels in NHWC order (of 3 or 4 channels: images, latents).
template <class X, class O>
cudaError_t fast(const SolverStep& a, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(X);
    const bool nhwc = a.shape.nhwc && a.shape.channels > 1;
    if (!is_fast(a, nhwc ? 4 : V) || (nhwc && a.shape.channels == 2)) return run<AnyTile, float, float, false>(a, stream);
    const bool plain = !a.variance.data && !a.uncond.data && !a.pred_prev.data && !a.noise.data && !a.mask.data;
    const auto run_tiles = [&]<class Tile>() {
        return plain ? run<Tile, X, O, true>(a, stream) : run<Tile, X, O, false>(a, stream);
    };
    switch (nhwc ? a.shape.channels : 1) {
        case 3: return run_tiles.template operator()<Tile<4, 3>>();
        case 4: return run_tiles.template operator()<Tile<4, 4>>();
        default: return run_tiles.template operator()<Tile<V, 0>>();
    }
}

}  // namespace

cudaError_t solver_step(const SolverStep& a, cudaStream_t stream) {
    const DType x = a.x.dtype, o = a.out.dtype;
    if (x == DType::f32 && o == DType::f32) return fast<float, float>(a, stream);
    if (x == DType::f32 && o == DType::bf16) return fast<float, bf16>(a, stream);
    if (x == DType::f32 && o == DType::f16) return fast<float, f16>(a, stream);
    if (x == DType::bf16 && o == DType::bf16) return fast<bf16, bf16>(a, stream);
    if (x == DType::f16 && o == DType::f16) return fast<f16, f16>(a, stream);
    return run<AnyTile, float, float, false>(a, stream);
}

}  // namespace fastddpm::cuda
