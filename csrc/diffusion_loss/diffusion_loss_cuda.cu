// loss = mean_b (weight_b mean (pred - target)^2 + vlb_weight_b L_b) and its gradient, in one pass over the prediction:
// see fastddpm/ops/diffusion_loss/interface.py.
//
// A thread takes 8 elements of one sample in C, H, W order, or 4 pixels in NHWC order (common/cuda/pictures.cuh). The
// target is made again from the images and the counter of the noise. Each block leaves the sum of its terms; a second,
// small kernel adds these up in their order, in float64: no atomics, and a result that depends on the shape alone.
// Bytes an element: 4 (float32) or 2 read and as many written, and 1 (uint8) for v. What limits it: memory, closely followed
// by the multiplications of Philox.

#include "diffusion_loss/diffusion_loss_cuda.h"

#include "common/cuda/pictures.cuh"

namespace fastddpm::cuda {
namespace {

constexpr int FINISHING = 512;  // threads of the second kernel
constexpr float INVERSE_LN2 = 1.44269504f, LEAST_PROBABILITY = 1e-12f;

// The variational bound. What can cancel is written so that it does not.

// e^x - 1 - x
__device__ __forceinline__ float exp_minus_two_terms(float x) {
    float p = x * 2.7557319e-6f + 2.4801587e-5f;  // Taylor: 1/9! .. 1/2!
    p = p * x + 1.9841270e-4f;
    p = p * x + 1.3888889e-3f;
    p = p * x + 8.3333333e-3f;
    p = p * x + 4.1666667e-2f;
    p = p * x + 1.6666667e-1f;
    p = p * x + 0.5f;
    return fabsf(x) < 0.5f ? p * x * x : (expf(x) - 1.0f) - x;
}

// erfc(x) = e^(-x^2) t p(t) for x >= 0, t = 1 / (1 + 0.4 x): p is a least-squares fit with a relative error of 3e-8 on
// 0 <= x <= 12. The upper half of the digits of x is squared without rounding.
__device__ __forceinline__ float complementary_error_function(float x) {
    const float z = fminf(fabsf(x), 20.0f), t = 1.0f / (1.0f + 0.4f * z);
    float p = t * -0.02602676302f + 0.17882896960f;
    p = p * t - 0.45420664549f;
    p = p * t + 0.48871457577f;
    p = p * t - 0.23624572158f;
    p = p * t + 0.24667142332f;
    p = p * t + 0.13828937709f;
    p = p * t + 0.21311469376f;
    p = p * t + 0.22516375780f;
    p = p * t + 0.22569632530f;
    const float upper = __uint_as_float(__float_as_uint(z) & 0xfffff000u);
    const float positive = p * t * expf(-upper * upper) * expf((upper - z) * (upper + z));
    return x >= 0 ? positive : 2.0f - positive;
}

// The density of a standard normal number.
__device__ __forceinline__ float phi(float x) { return expf(-0.5f * x * x) * 0.3989422804014327f; }

// x phi(x), which is 0 at infinity.
__device__ __forceinline__ float x_phi(float x) {
    const float finite = fminf(fmaxf(x, -1e4f), 1e4f);
    return finite * phi(finite);
}

// P(lower < Z < upper): both tails on the negative side; a narrow bin by the density at its middle.
__device__ __forceinline__ float normal_between(float lower, float upper) {
    const float a = lower > 0 ? -upper : lower, b = lower > 0 ? -lower : upper, width = b - a, middle = 0.5f * (a + b);
    if (width < 0.25f && fabsf(middle) < 4.0f) {
        const float s = middle * middle, w = width * width;
        const float more = (s - 1.0f) * (1.0f / 24) + w * (s * s - 6.0f * s + 3.0f) * (1.0f / 1920);
        return phi(middle) * width * (1.0f + w * more);
    }
    return 0.5f * (complementary_error_function(b * -0.7071067811865476f) -
                   complementary_error_function(a * -0.7071067811865476f));
}

struct Bits {
    float value, slope;  // the derivative by v
};

// The row of the table of the bound for the t of a sample; variances as logarithms.
struct Bound {
    float mean_slope, least, most, of_q, half_bin;
    bool first;  // t = 0
};

// L of one element: KL(q || p) or, at t = 0, -log2 of the discretised decoder.
__device__ __forceinline__ Bits bound_bits(const Bound& q, float v, float difference, float clean) {
    const float mean_error = q.mean_slope * difference, f = (v + 1.0f) * 0.5f;  // mean_error = mu_theta - mu_q
    const float logvar = f * q.most + (1.0f - f) * q.least, to_v = 0.5f * (q.most - q.least) * INVERSE_LN2;
    if (q.first) {
        const float inverse_std = expf(-0.5f * logvar);
        const float upper = clean > 1.0f - q.half_bin ? INFINITY : (q.half_bin - mean_error) * inverse_std;
        const float lower = clean < -1.0f + q.half_bin ? -INFINITY : (-q.half_bin - mean_error) * inverse_std;
        const float p = normal_between(lower, upper);
        const bool seen = !(p <= LEAST_PROBABILITY);  // NaN is
        return {-logf(p < LEAST_PROBABILITY ? LEAST_PROBABILITY : p) * INVERSE_LN2,
                seen ? 0.5f * (x_phi(upper) - x_phi(lower)) / p * to_v : 0.0f};
    }
    const float d = q.of_q - logvar, scaled = mean_error * mean_error * expf(-logvar);
    return {0.5f * INVERSE_LN2 * (exp_minus_two_terms(d) + scaled), 0.5f * (1.0f - expf(d) - scaled) * to_v};
}

// The sum over a row of threads of the block, for its first thread: by shuffles, then over the warps of the row.
__device__ __forceinline__ float sum_of_row(float x, float* of_warps) {
    const unsigned across = blockDim.x, lanes = across < 32 ? across : 32;
    for (unsigned distance = lanes / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, static_cast<int>(distance));
    if (across <= 32) return x;
    const unsigned thread = threadIdx.y * across + threadIdx.x;
    if (thread % 32 == 0) of_warps[thread / 32] = x;
    __syncthreads();
    if (threadIdx.x != 0) return 0.0f;
    x = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < BLOCK / 32; ++i) x += i < across / 32 ? of_warps[thread / 32 + i] : 0.0f;
    return x;
}

// What a kernel is made for; ``any`` has every option, the others the noise drawn and no bound.
enum class Path { eps, v, any };

template <Path P, class Tile, class In, class T>
__global__ void __launch_bounds__(BLOCK) diffusion_loss_kernel(const DiffusionLoss a, const int64_t count) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int SIZE = Tile::SIZE;
    const Sample sample(a.shape);
    const Tile tile(a.shape, count, sample);
    const int64_t b = sample.number;

    float pred[SIZE], wanted[SIZE], clean[SIZE];
    tile.template load<T>(a.pred, a.shape, b, pred);
    if (P == Path::v || (P == Path::any && a.x0.data)) {
        tile.template load<In>(a.x0, a.shape, a.index ? a.index[b] : b, clean, a.flip && a.flip[b]);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) clean[i] = clean[i] * a.pixel_scale + a.pixel_shift;
    }
    if (P == Path::any && a.target.data) {
        tile.template load<Any>(a.target, a.shape, b, wanted);
    } else if (P == Path::any && a.objective == Objective::x0) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) wanted[i] = clean[i];
    } else {
        tile.draw(stream(a.source, b), a.shape, wanted);
        if (P == Path::v || (P == Path::any && a.objective == Objective::v)) {
            const float signal = entry(a.table, a.t[b], 0), sigma = entry(a.table, a.t[b], 1);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) wanted[i] = signal * wanted[i] - sigma * clean[i];
        }
    }

    const float weight = read(a.weight, b, 0, 1.0f), slope = 2.0f * weight * a.gradient_scale;
    float total = 0.0f, out[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
        pred[i] -= wanted[i];
        total += tile.has(i) ? pred[i] * pred[i] : 0.0f;
        out[i] = pred[i] * slope;
    }
    total *= weight;
    if (a.gradient.data) tile.template store<T>(a.gradient, a.shape, b, out);

    if (P == Path::any && a.vlb.data) {
        const int64_t t = a.t[b];
        const Bound bound{entry(a.vlb, t, 0), entry(a.vlb, t, 1), entry(a.vlb, t, 2), entry(a.vlb, t, 3),
                          1.0f / static_cast<float>(a.levels - 1), t == 0};
        const float bound_weight = read(a.vlb_weight_tensor, b, 0, a.vlb_weight);
        const float scale = bound_weight * a.gradient_scale;
        float bits = 0.0f;
        tile.template load<T>(a.variance, a.shape, b, out);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            const Bits l = bound_bits(bound, out[i], pred[i], clean[i]);
            bits += tile.has(i) ? l.value : 0.0f;
            out[i] = l.slope * scale;
        }
        total += bits * bound_weight;
        if (a.variance_gradient.data) tile.template store<T>(a.variance_gradient, a.shape, b, out);
    }
    total = sum_of_row(total, shared_memory<float>() + Tile::SHARED / sizeof(float));
    if (threadIdx.x == 0 && sample.exists) a.sums[b * gridDim.x + blockIdx.x] = total;
}

// The loss of each sample, and their mean: one block. ``lanes`` neighbours, a power of two, take a sample together. The
// sums are no __restrict__ ones: the kernel in front may still write them when this one starts, and such loads take what
// the processor has kept.
__global__ void __launch_bounds__(FINISHING) finish_kernel(const float* sums, float* per_sample, float* loss,
                                                           const int64_t batch, const int64_t blocks,
                                                           const int64_t elements, const int lanes) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, together = FINISHING / lanes;
    double total = 0.0;
    for (int64_t first = 0; first < batch; first += together) {
        const int64_t b = first + thread / lanes;
        double of_sample = 0.0;
        if (b < batch)
            for (int64_t i = lane; i < blocks; i += lanes) of_sample += sums[b * blocks + i];
        for (int distance = lanes / 2; distance > 0; distance /= 2)
            of_sample += __shfl_xor_sync(ALL_LANES, of_sample, distance);
        if (lane == 0 && b < batch) {
            of_sample /= static_cast<double>(elements);
            per_sample[b] = static_cast<float>(of_sample);
            total += of_sample;
        }
    }
    double* totals = shared_memory<double>();
    totals[thread] = total;
    for (int half = FINISHING / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) totals[thread] += totals[thread + half];
    }
    if (thread == 0) *loss = static_cast<float>(totals[0] / static_cast<double>(batch));
}

// The kernel for a call, as f.template operator()<Path, Tile, In, T>().
template <class Tile, class T, class F>
auto with_fast_kernel(const DiffusionLoss& a, F f) {
    if (a.objective == Objective::eps) return f.template operator()<Path::eps, Tile, uint8_t, T>();
    if (a.x0.dtype == DType::u8) return f.template operator()<Path::v, Tile, uint8_t, T>();
    return f.template operator()<Path::v, Tile, T, T>();
}

template <class Tile>
bool suits(const DiffusionLoss& a) {
    const bool known = a.objective == Objective::eps ||
                       (a.objective == Objective::v && (a.x0.dtype == DType::u8 || a.x0.dtype == a.pred.dtype));
    return known && !a.target.data && !a.vlb.data && Tile::at_once(a.pred) && (!a.x0.data || Tile::at_once(a.x0));
}

template <class T, class F>
auto with_kernel_of(const DiffusionLoss& a, F f) {
    constexpr int WIDTH = 16 / sizeof(T);
    using Runs = Elements<WIDTH, 8 / WIDTH>;
    const bool mirrors = a.flip != nullptr, pixels = suits_pixels(a.shape, mirrors);
    if (suits_elements(a.shape, WIDTH, mirrors) && suits<Runs>(a)) return with_fast_kernel<Runs, T>(a, f);
    if (pixels && a.shape.channels == 3 && suits<Pixels<3>>(a)) return with_fast_kernel<Pixels<3>, T>(a, f);
    if (pixels && a.shape.channels == 4 && suits<Pixels<4>>(a)) return with_fast_kernel<Pixels<4>, T>(a, f);
    return with_any_tile(a.shape, mirrors, {&a.pred, &a.variance, &a.target, &a.x0, &a.gradient, &a.variance_gradient},
                         [&]<class Tile>() { return f.template operator()<Path::any, Tile, Any, Any>(); });
}

template <class F>
auto with_kernel(const DiffusionLoss& a, F f) {
    switch (a.pred.dtype) {
        case DType::bf16: return with_kernel_of<bf16>(a, f);
        case DType::f16: return with_kernel_of<f16>(a, f);
        default: return with_kernel_of<float>(a, f);
    }
}

}  // namespace

int64_t diffusion_loss_blocks(const DiffusionLoss& a) {
    return with_kernel(a, [&]<Path P, class Tile, class In, class T>() {
        return static_cast<int64_t>(over_samples<Tile>(a.shape, nullptr).grid.x);
    });
}

cudaError_t diffusion_loss(const DiffusionLoss& a, cudaStream_t stream) {
    const cudaError_t error = with_kernel(a, [&]<Path P, class Tile, class In, class T>() {
        Launch l = over_samples<Tile>(a.shape, stream);
        l.shared += BLOCK / 32 * sizeof(float);
        DiffusionLoss noted = a;
        look_at<Tile>({&noted.pred, &noted.variance, &noted.target, &noted.x0, &noted.gradient,
                       &noted.variance_gradient});
        return launch(diffusion_loss_kernel<P, Tile, In, T>, l, noted, Tile::count(a.shape));
    });
    if (error != cudaSuccess) return error;
    const int64_t blocks = diffusion_loss_blocks(a), elements = a.shape.channels * a.shape.height * a.shape.width;
    int lanes = 1;
    while (lanes < 32 && lanes < blocks) lanes *= 2;
    Launch l;
    l.block = dim3(FINISHING), l.shared = FINISHING * sizeof(double), l.stream = stream, l.dependent = true;
    return launch(finish_kernel, l, a.sums, a.per_sample, a.loss, a.shape.batch, blocks, elements, lanes);
}

}  // namespace fastddpm::cuda
