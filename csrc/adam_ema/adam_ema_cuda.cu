// g = factor gradient;  m <- m + (1 - beta1) (g - m);  v <- v + (1 - beta2) (g^2 - v);
// p <- shrink p - rate m / (sqrt(v) / root + eps);  ema <- ema + (1 - decay) (p - ema);  mirror <- p, rounded
// (Loshchilov and Hutter 2019, algorithm 2); factor unscales and clips by the norm of all gradients.
//
// Two launches over all parameters. The first sums the squares of the gradients, a chunk a block: bytes an element: 4. In
// the second, every block adds up the sums of all chunks, in one order, and so knows the norm; then the blocks, as many as
// the device holds, share pieces of the chunks. Bytes an element: 38 with the average and a mirror of two bytes. What
// limits both is memory. Accesses to float32 are of 16 bytes; to a mirror or gradient of two bytes an element of 8, side by
// side in a warp, since a thread with twice as many floats would write halves of sectors.
//
// Addresses come as parameters of the kernels, which a captured graph keeps: those of SOME tensors where there are no more
// or the toolkit takes no more, else of MANY; beyond that there are more launches. Which ones changes no bit.

#include "adam_ema/adam_ema_cuda.h"

#include "common/cuda/tile.cuh"

namespace fastddpm::cuda {
namespace {

constexpr int V = 4, PIECE = V * THREADS, PIECES = 8, CHUNK = PIECES * PIECE;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCKS = 4;  // that a processor holds

// What is known of N tensors; in the parameters of a kernel.
template <int N>
struct Table {
    float *param[N], *exp_avg[N], *exp_avg_sq[N], *ema[N];
    const void* gradient[N];
    void* mirror[N];
    int64_t size[N];
    int first[N + 1];  // chunk: tensor i has first[i] .. first[i + 1] - 1
    int count;
    uint8_t gradient_type[N], mirror_type[N];
    bool aligned[N];  // all of its addresses, to what a thread reads at once
};
constexpr int SOME = 56;
#if CUDART_VERSION >= 12010 || defined(FASTDDPM_EMULATED)
constexpr int MANY = 504;  // 32,764 bytes of parameters, from CUDA 12.1 and sm_70 on
#else
constexpr int MANY = SOME;
#endif

// The numbers that all parameters share, but for those that wait for the norm. The first launch makes them, since the
// second writes over what they are made of.
struct Numbers {
    double inverse_scale, rate, root, shrink, ema_weight, skip;
};
constexpr int HEAD = sizeof(Numbers) / sizeof(double);

// And those that the update takes; in shared memory behind the sums of warps.
struct Shared {
    float factor, weight1, weight2, rate, shrink, inverse_root, eps, ema_weight;
    bool valid;
};

// What the kernels take beside the table.
struct Sums {
    Numbers* numbers;
    double* sums;  // of each chunk of all tensors
    int64_t chunks;
    int64_t first;  // that of the table
};

__device__ __forceinline__ double number(const Values& v, double otherwise) {
    if (!v.data) return otherwise;
    return v.dtype == DType::f64 ? *static_cast<const double*>(v.data) : static_cast<double>(*static_cast<const float*>(v.data));
}

// By squaring, which for beta^n < 1 is as exact as 1 - beta^n needs.
__device__ __forceinline__ double power(double beta, int64_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, beta *= beta)
        if (n & 1) result *= beta;
    return result;
}

__device__ __forceinline__ Numbers numbers(const AdamEma& a) {
    const int64_t n = *a.step + 1;
    const double rate = number(a.lr, a.lr_number);
    Numbers k;
    k.inverse_scale = 1 / number(a.grad_scale, 1);
    k.rate = rate / (1 - power(a.beta1, n));
    k.root = sqrt(1 - power(a.beta2, n));
    k.shrink = 1 - rate * a.weight_decay;
    k.ema_weight = 1 - number(a.ema_decay, a.ema_decay_number);
    k.skip = a.found_inf && *a.found_inf != 0 ? 1 : 0;
    return k;
}

// The sum over the block, in its first thread. Takes WARPS numbers of shared memory.
__device__ __forceinline__ double block_sum(double x, double* of_warps) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) x += __shfl_xor_sync(ALL_LANES, x, with);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < WARPS; ++i) x += of_warps[i];
    return x;
}

// The tensor that a chunk belongs to, which is no earlier than ``from``.
template <int N>
__device__ __forceinline__ int tensor_of(const Table<N>& t, int chunk, int from) {
    int end = t.count;
    while (end - from > 1) {
        const int middle = (from + end) / 2;
        if (t.first[middle] <= chunk)
            from = middle;
        else
            end = middle;
    }
    return from;
}

// The sum, of type S, of the squares of this thread's share of n gradients.
template <class S, class T>
__device__ __forceinline__ double squares(const T* g, int64_t n) {
    constexpr int W = 16 / sizeof(T), AT_ONCE = sizeof(S) == 4 ? 4 : 1;
    const int64_t vectors = reinterpret_cast<uintptr_t>(g) % 16 == 0 ? n / W : 0;
    S sum[W]{};
    const auto add = [&](const float(&x)[W]) {
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += static_cast<S>(x[j]) * static_cast<S>(x[j]);
    };
    int64_t i = threadIdx.x;
#pragma unroll 1
    for (; i + (AT_ONCE - 1) * THREADS < vectors; i += AT_ONCE * THREADS) {
        float x[AT_ONCE][W];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) load(g + (i + k * THREADS) * W, x[k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) add(x[k]);
    }
#pragma unroll 1
    for (; i < vectors; i += THREADS) {
        float x[W];
        load(g + i * W, x);
        add(x);
    }
#pragma unroll 1
    for (i = vectors * W + threadIdx.x; i < n; i += THREADS) {
        const S x = to_float(g[i]);
        sum[0] += x * x;
    }
#pragma unroll
    for (int j = 1; j < W; ++j) sum[0] += sum[j];
    return sum[0];
}

template <int N>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    gradient_squares_kernel(const __grid_constant__ Table<N> t, const __grid_constant__ AdamEma a, const Sums s) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    double* of_warps = shared_memory<double>();
    const int chunk = blockIdx.x;
    double sum = 0;
    if (chunk < t.first[t.count]) {
        const int i = tensor_of(t, chunk, 0);
        const int64_t begin = static_cast<int64_t>(chunk - t.first[i]) * CHUNK, left = t.size[i] - begin;
        const int64_t n = left < CHUNK ? left : CHUNK;
        with_type(static_cast<DType>(t.gradient_type[i]), t.gradient[i], [&](const auto* g) {
            sum = squares<float>(g + begin, n);
            if (!(sum > 1e-24 && sum < 1e36)) sum = squares<double>(g + begin, n);  // too small or large for floats
        });
    }
    sum = block_sum(sum, of_warps);
    if (threadIdx.x) return;
    if (chunk < t.first[t.count]) s.sums[s.first + chunk] = sum;
    if (chunk == 0 && s.first == 0) *s.numbers = numbers(a);
}

// start + weight (end - start), exact at both ends.
__device__ __forceinline__ float lerp(float start, float end, float weight) {
    return weight < 0.5f ? fmaf(weight, end - start, start) : fmaf(start - end, 1.0f - weight, end);
}

__device__ __forceinline__ void update(const Shared& k, float gradient, float& p, float& m, float& v) {
    const float g = gradient * k.factor;
    m = lerp(m, g, k.weight1);
    v = lerp(v, g * g, k.weight2);
    p = fmaf(p, k.shrink, -k.rate * __fdividef(m, fmaf(sqrtf(v), k.inverse_root, k.eps)));
}

// Four neighbours.
template <int N>
__device__ __forceinline__ void update_vector(const Table<N>& t, int i, int64_t at, const Shared& k) {
    float p[V], m[V], v[V], e[V], g[V];
    load(t.param[i] + at, p);
    load(t.exp_avg[i] + at, m);
    load(t.exp_avg_sq[i] + at, v);
    if (t.ema[i]) load(t.ema[i] + at, e);
    with_type(static_cast<DType>(t.gradient_type[i]), t.gradient[i], [&](const auto* gradient) { load(gradient + at, g); });
#pragma unroll
    for (int j = 0; j < V; ++j) update(k, g[j], p[j], m[j], v[j]);
    store(t.param[i] + at, p);
    store(t.exp_avg[i] + at, m);
    store(t.exp_avg_sq[i] + at, v);
    if (t.ema[i]) {
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] = lerp(e[j], p[j], k.ema_weight);
        store(t.ema[i] + at, e);
    }
    if (!t.mirror[i]) return;
    const DType type = static_cast<DType>(t.mirror_type[i]);
    if (type == DType::f64) {
#pragma unroll
        for (int j = 0; j < V; ++j) static_cast<double*>(t.mirror[i])[at + j] = p[j];
    } else {
        with_output_type(type, t.mirror[i], [&](auto* mirror) { store(mirror + at, p); });
    }
}

template <int N>
__device__ __forceinline__ void update_one(const Table<N>& t, int i, int64_t at, const Shared& k) {
    float p = t.param[i][at], m = t.exp_avg[i][at], v = t.exp_avg_sq[i][at];
    update(k, read(static_cast<DType>(t.gradient_type[i]), t.gradient[i], at), p, m, v);
    t.param[i][at] = p, t.exp_avg[i][at] = m, t.exp_avg_sq[i][at] = v;
    if (t.ema[i]) t.ema[i][at] = lerp(t.ema[i][at], p, k.ema_weight);
    if (!t.mirror[i]) return;
    const DType type = static_cast<DType>(t.mirror_type[i]);
    if (type == DType::f64)
        static_cast<double*>(t.mirror[i])[at] = p;
    else
        write(type, t.mirror[i], at, p);
}

// What the sum of all squares decides. One thread of the device ``writes`` the results of the step.
__device__ __forceinline__ Shared finish(const AdamEma& a, const Numbers& n, double sum, bool writes) {
    const float norm = static_cast<float>(sqrt(sum) * n.inverse_scale);
    const double clip = a.max_grad_norm / (static_cast<double>(norm) + 1e-6);
    Shared k;
    k.factor = static_cast<float>(n.inverse_scale * (clip < 1 ? clip : 1));
    k.weight1 = static_cast<float>(1 - a.beta1), k.weight2 = static_cast<float>(1 - a.beta2);
    k.rate = static_cast<float>(n.rate), k.shrink = static_cast<float>(n.shrink);
    k.inverse_root = static_cast<float>(1 / n.root), k.eps = static_cast<float>(a.eps);
    k.ema_weight = static_cast<float>(n.ema_weight);
    k.valid = norm <= 3.402823466e38f && n.skip == 0;
    if (writes) {
        *a.norm = norm;
        if (a.found_inf) *a.found_inf = k.valid ? 0.0f : 1.0f;
        if (k.valid) *a.step += 1;
    }
    return k;
}

template <int N>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    adam_ema_kernel(const __grid_constant__ Table<N> t, const __grid_constant__ AdamEma a, const Sums s) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    double sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < s.chunks; i += THREADS) sum += s.sums[i];
    double* of_warps = shared_memory<double>();
    Shared* shared = reinterpret_cast<Shared*>(of_warps + WARPS);
    sum = block_sum(sum, of_warps);
    if (threadIdx.x == 0) *shared = finish(a, *s.numbers, sum, blockIdx.x == 0 && s.first == 0);
    __syncthreads();
    const Shared k = *shared;
    if (!k.valid) return;

    const int64_t pieces = static_cast<int64_t>(t.first[t.count]) * PIECES;
    int i = 0;
    for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        i = tensor_of(t, static_cast<int>(piece / PIECES), i);
        const int64_t begin = (piece - static_cast<int64_t>(t.first[i]) * PIECES) * PIECE, left = t.size[i] - begin;
        if (t.aligned[i] && left >= PIECE) {
            update_vector(t, i, begin + V * threadIdx.x, k);
        } else {
            const int64_t end = begin + (left < PIECE ? left : PIECE);
            for (int64_t at = begin + threadIdx.x; at < end; at += THREADS) update_one(t, i, at, k);
        }
    }
}

int64_t chunks_of(const AdamTensor& t) { return ceil_div(t.size, CHUNK); }

// The tensors from ``next`` on that a table holds, without those that are empty; ``next`` becomes the first that is left.
template <int N>
Table<N> table(const AdamEma& a, int64_t& next) {
    Table<N> t;
    t.count = 0, t.first[0] = 0;
    for (; next < a.count && t.count < N; ++next) {
        const AdamTensor& x = a.tensors[next];
        if (x.size == 0) continue;
        const int i = t.count++;
        t.param[i] = x.param, t.exp_avg[i] = x.exp_avg, t.exp_avg_sq[i] = x.exp_avg_sq, t.ema[i] = x.ema;
        t.gradient[i] = x.gradient, t.mirror[i] = x.mirror, t.size[i] = x.size;
        t.gradient_type[i] = static_cast<uint8_t>(x.gradient_type), t.mirror_type[i] = static_cast<uint8_t>(x.mirror_type);
        const auto lies_at = [](const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
        const auto vector = [](DType type) { return type == DType::f64 ? 8 : V * element_size(type); };
        t.aligned[i] = lies_at(x.param, 16) && lies_at(x.exp_avg, 16) && lies_at(x.exp_avg_sq, 16) && lies_at(x.ema, 16) &&
                       lies_at(x.gradient, vector(x.gradient_type)) && lies_at(x.mirror, vector(x.mirror_type));
        t.first[i + 1] = t.first[i] + static_cast<int>(chunks_of(x));
    }
    return t;
}

// The first kernel, or the second, over all tensors.
template <int N, class Kernel>
cudaError_t over_tables(const AdamEma& a, int64_t chunks, int64_t most_blocks, int64_t pieces, Kernel kernel, cudaStream_t stream) {
    static_assert(sizeof(Table<N>) + sizeof(AdamEma) + sizeof(Sums) <= (N == SOME ? 4096 : 32764), "parameters of a kernel");
    Sums s{reinterpret_cast<Numbers*>(a.workspace), a.workspace + HEAD, chunks, 0};
    int64_t next = 0;
    do {
        const Table<N> t = table<N>(a, next);
        const int64_t items = t.first[t.count] * pieces, blocks = items < most_blocks ? items : most_blocks;
        Launch l;
        l.grid = dim3(static_cast<unsigned>(blocks > 1 ? blocks : 1)), l.block = dim3(THREADS);
        l.shared = WARPS * sizeof(double) + sizeof(Shared), l.stream = stream, l.dependent = true;
        const cudaError_t error = launch(kernel, l, t, a, s);
        if (error != cudaSuccess) return error;
        s.first += t.first[t.count];
    } while (next < a.count);
    return cudaSuccess;
}

template <int N>
cudaError_t run(const AdamEma& a, cudaStream_t stream) {
    const int64_t chunks = workspace_size(a.tensors, a.count) - HEAD;
    Device d;
    cudaError_t error = device(d);
    if (error == cudaSuccess) error = over_tables<N>(a, chunks, 0x7fffffff, 1, gradient_squares_kernel<N>, stream);
    if (error != cudaSuccess) return error;
    return over_tables<N>(a, chunks, int64_t(BLOCKS) * d.processors, PIECES, adam_ema_kernel<N>, stream);
}

}  // namespace

int64_t workspace_size(const AdamTensor* tensors, int64_t count) {
    int64_t size = HEAD;
    for (int64_t i = 0; i < count; ++i) size += chunks_of(tensors[i]);
    return size;
}

cudaError_t adam_ema(const AdamEma& a, cudaStream_t stream) {
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return error;
    return a.count <= SOME || driver < 12010 ? run<SOME>(a, stream) : run<MANY>(a, stream);
}

}  // namespace fastddpm::cuda
