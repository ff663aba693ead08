// y = silu(n gain + shift), n = sqrt(C) x / max(||x||, eps) over the channels of a pixel, gain = weight (1 + scale)
// (Zhang and Sennrich 2019, eq. 4).
//
// A block takes an item: a run of pixels of one sample, with all their channels. It reads x (and dy) once, and keeps
// - in NHWC order, a pixel in the registers of a few lanes or warps, 16 bytes after 16 bytes: the sum over its channels
//   goes through shuffles, that over its pixels stays in registers until the item is done;
// - in NCHW order, a tile of pixels in shared memory, copied there in rows of 32 to 512 bytes: a thread has the same few
//   pixels of several channels;
// - where 16 bytes do not fit (C, or H W in NCHW order, odd, or too many channels), nothing: it reads again, number by
//   number, mostly out of the caches.
// Backward leaves sums of da and da n over the pixels of each item; a small kernel behind it adds them up, always in the
// same order, for the gradients of the parameters: no atomics. How work is cut depends on shapes and alignment alone.
// Bytes an element in half precision: 4 forward, 6 backward. What limits it: memory.

#include "rms_norm_silu/rms_norm_silu_cuda.h"

#include "common/cuda/vec.cuh"

namespace fastddpm::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;  // of a block, at most
constexpr int FEWER = 192;  // where a lane has 24 channels in backward: two such blocks leave 168 registers for a thread
constexpr int64_t ITEMS = 2048;            // wanted: several for each place where a block can run
constexpr size_t SHARED_MOST = 96 * 1024;  // every device from sm_80 on has 99 KB for a block

// How the work is cut.
struct Work {
    enum { rows, tiles, any } path;
    int vectors;         // rows: of 16 bytes, those of a lane
    int lanes;           // rows: of a pixel; tiles: along pixels; any: of a pixel
    int threads;         // of a block
    int64_t pixels;      // of an item; the last of a sample may have fewer
    unsigned per_sample;  // items
    size_t shared;       // bytes
};

// Pixels first .. end - 1 of a sample.
struct Item {
    int64_t sample, first, end;
    __device__ __forceinline__ Item(const Shape& s, const Work& w) {
        sample = blockIdx.x / w.per_sample;
        first = static_cast<int64_t>(blockIdx.x % w.per_sample) * w.pixels;
        end = min(first + w.pixels, s.height * s.width);
    }
};

// Arithmetic.

// 1 / (1 + exp(-a)) by the two approximate instructions.
__device__ __forceinline__ float sigmoid(float a) {
#if defined(FASTDDPM_EMULATED)
    return emulation::rcp_approx(1.0f + emulation::ex2_approx(-1.4426950408889634f * a));
#else
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * a));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
#endif
}

__device__ __forceinline__ float activated(float a, bool activation) { return activation ? a * sigmoid(a) : a; }

// The gradient of a from that of y.
__device__ __forceinline__ float before_activation(float dy, float a, bool activation) {
    if (!activation) return dy;
    const float s = sigmoid(a);
    return dy * (s * (1.0f + a * (1.0f - s)));
}

// sqrt(x) and 1 / x to 2^-23, by one instruction and its scaling: the exact ones call a function, which needs a stack.
__device__ __forceinline__ float approximate_sqrt(float x) {
#if defined(FASTDDPM_EMULATED)
    return emulation::sqrt_approx(x);
#else
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}
__device__ __forceinline__ float approximate_inverse(float x) {
#if defined(FASTDDPM_EMULATED)
    return emulation::rcp_approx(x);
#else
    float result;
    asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// sqrt(C) / max(||x||, eps), from ||x||^2; NaN stays.
struct Factor {
    float value;
    bool is_norm;  // whether ||x|| is the larger of the two
    __device__ __forceinline__ Factor(const RmsNorm& a, float squares) {
        const float norm = approximate_sqrt(squares);
        value = a.root * approximate_inverse(norm < a.eps ? a.eps : norm);
        is_norm = norm > a.eps;
    }
};

__device__ __forceinline__ float gain_of(const RmsNorm& a, int64_t sample, int64_t c) {
    return read(a.weight, 0, c, 0.0f) * (1.0f + read(a.scale, sample, c, 0.0f));
}

// To shared memory, in accesses of 16 bytes. (cuda::store is for device memory alone: it names it.)
template <int N>
__device__ __forceinline__ void keep(float* shared, const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(shared + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

// NHWC: rows of channels.

// Where channel c is kept in shared memory: lanes that read whole vectors of V floats, four at a time, then read
// neighbours.
template <int V>
__device__ __forceinline__ int place_of(int c, int vectors) {
    return (c % V / 4 * vectors + c / V) * 4 + c % 4;
}
template <int V>
__device__ __forceinline__ void load_places(const float* shared, int vectors, int i, float (&x)[V]) {
#pragma unroll
    for (int h = 0; h < V / 4; ++h) {
        float four[4];
        load(shared + (h * vectors + i) * 4, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * h + j] = four[j];
    }
}
template <int V>
__device__ __forceinline__ void add_places(float* shared, int vectors, int i, const float (&x)[V], bool first) {
#pragma unroll
    for (int h = 0; h < V / 4; ++h) {
        float four[4];
        load(shared + (h * vectors + i) * 4, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = first ? x[4 * h + j] : four[j] + x[4 * h + j];
        keep(shared + (h * vectors + i) * 4, four);
    }
}

// Who holds what of a block's pixels: ``lanes`` threads side by side have one pixel, each the vectors lane, lane + lanes ..
template <class T>
struct Rows {
    static constexpr int V = 16 / sizeof(T);
    int lanes, lane, group, groups, vectors, channels;
    float *gain, *shift, *of_warps;  // shared memory: [C], [C], [2, WARPS]

    __device__ __forceinline__ Rows(const RmsNorm& a, const Work& w) {
        lanes = w.lanes, channels = static_cast<int>(a.shape.channels), vectors = channels / V;
        lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
        of_warps = shared_memory<float>(), gain = of_warps + 2 * WARPS, shift = gain + channels;
    }

    __device__ __forceinline__ void read_affine(const RmsNorm& a, int64_t sample) const {
        for (int c = threadIdx.x; c < channels; c += blockDim.x) {
            gain[place_of<V>(c, vectors)] = gain_of(a, sample, c);
            shift[place_of<V>(c, vectors)] = read(a.shift, sample, c, 0.0f);
        }
        __syncthreads();
    }

    // The sum over the lanes of a pixel; every thread of the block calls it, in turn with 0 and 1.
    __device__ __forceinline__ float sum(float x, int turn) const {
        for (int d = min(lanes, 32) / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
        if (lanes <= 32) return x;
        const int warps = lanes / 32;
        if (threadIdx.x % 32 == 0) of_warps[turn * WARPS + threadIdx.x / 32] = x;
        __syncthreads();  // two places: whoever writes the first again has seen all others pass the second
        x = 0;
        for (int i = 0; i < warps; ++i) x += of_warps[turn * WARPS + group * warps + i];
        return x;
    }
};

// K vectors of 16 bytes of a pixel.
template <class T, int K>
struct Row {
    static constexpr int V = Rows<T>::V;
    unsigned words[K][4];

    // Zeros where there is no pixel, or no vector.
    __device__ __forceinline__ void load(const Image& image, const Rows<T>& r, int64_t sample, int64_t pixel, bool real) {
        const T* row = static_cast<const T*>(image.data) + sample * image.sample_stride + pixel * r.channels;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = r.lane + k * r.lanes;
#pragma unroll
            for (int j = 0; j < 4; ++j) words[k][j] = 0;
            if (real && i < r.vectors) load_words(row + i * V, words[k]);
        }
    }
    // The same in two steps, by way of shared memory; ``place`` is this thread's own, K times THREADS apart.
    __device__ __forceinline__ static void send(const Image& image, const Rows<T>& r, int64_t sample, int64_t pixel, bool real,
                                                uint4* place) {
        const T* row = static_cast<const T*>(image.data) + sample * image.sample_stride + pixel * r.channels;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = r.lane + k * r.lanes;
            if (real && i < r.vectors) copy_16_bytes(place + k * THREADS, row + i * V);
        }
    }
    __device__ __forceinline__ void receive(const Rows<T>& r, bool real, const uint4* place) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int j = 0; j < 4; ++j) words[k][j] = 0;
            if (real && r.lane + k * r.lanes < r.vectors) load_words(place + k * THREADS, words[k]);
        }
    }
    __device__ __forceinline__ float squares() const {
        float total = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float x[V];
            unpack<T>(words[k], x);
#pragma unroll
            for (int j = 0; j < V; ++j) total += x[j] * x[j];
        }
        return total;
    }
};

template <class T, int K>
__global__ void __launch_bounds__(THREADS, 3) forward_rows(const RmsNorm a, const Work w) {
    constexpr int V = Rows<T>::V;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Rows<T> r(a, w);
    Row<T, K> row;
    row.load(a.x, r, item.sample, item.first + r.group, item.first + r.group < item.end);
    r.read_affine(a, item.sample);
    int turn = 0;
    for (int64_t first = item.first; first < item.end; first += r.groups, turn ^= 1) {
        const int64_t pixel = first + r.group, later = pixel + r.groups;
        Row<T, K> next;  // on its way while this one is worked on
        next.load(a.x, r, item.sample, later, later < item.end);
        const Factor factor(a, r.sum(row.squares(), turn));
        T* y = static_cast<T*>(a.y.data) + item.sample * a.y.sample_stride + pixel * r.channels;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = r.lane + k * r.lanes;
            if (pixel >= item.end || i >= r.vectors) continue;
            float x[V], gain[V], shift[V];
            unpack<T>(row.words[k], x);
            load_places(r.gain, r.vectors, i, gain);
            load_places(r.shift, r.vectors, i, shift);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] = activated(x[j] * factor.value * gain[j] + shift[j], a.activation);
            store(y + i * V, x);
        }
        row = next;
    }
}

// dx = sqrt(C) / ||x|| (dn - n mean_c(dn n)), dn = da gain, without the second term where eps stands for ||x||.
template <class T, int K>
__global__ void __launch_bounds__(K * Rows<T>::V > 16 ? FEWER : THREADS, 2) backward_rows(const RmsNorm a, const Work w) {
    constexpr int V = Rows<T>::V;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Rows<T> r(a, w);
    // Two stages of x and dy: the next pixel is on its way while this one is worked on.
    uint4* own = reinterpret_cast<uint4*>(r.shift + r.channels) + threadIdx.x;
    const auto place = [&](int stage, int image) { return own + (2 * stage + image) * K * THREADS; };
    const auto send = [&](int64_t pixel, int stage) {
        Row<T, K>::send(a.x, r, item.sample, pixel, pixel < item.end, place(stage, 0));
        Row<T, K>::send(a.dy, r, item.sample, pixel, pixel < item.end, place(stage, 1));
        commit_copies();
    };
    float of_da[K][V]{}, of_da_n[K][V]{};
    send(item.first + r.group, 0);
    r.read_affine(a, item.sample);
    int stage = 0;
    for (int64_t first = item.first; first < item.end; first += r.groups, stage ^= 1) {
        const int64_t pixel = first + r.group;
        const bool real = pixel < item.end;
        send(pixel + r.groups, stage ^ 1);
        wait_for_copies<1>();
        Row<T, K> x_row, dy_row;
        x_row.receive(r, real, place(stage, 0));
        dy_row.receive(r, real, place(stage, 1));
        const Factor factor(a, r.sum(x_row.squares(), 0));
        float dn[K][V], dot = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = r.lane + k * r.lanes;
            if (!real || i >= r.vectors) continue;
            float x[V], dy[V], gain[V], shift[V];
            unpack<T>(x_row.words[k], x);
            unpack<T>(dy_row.words[k], dy);
            load_places(r.gain, r.vectors, i, gain);
            load_places(r.shift, r.vectors, i, shift);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float n = x[j] * factor.value;
                const float da = before_activation(dy[j], n * gain[j] + shift[j], a.activation);
                of_da[k][j] += da;
                of_da_n[k][j] += da * n;
                dn[k][j] = da * gain[j];
                dot += dn[k][j] * n;
            }
        }
        dot = r.sum(dot, 1);
        const float mean = factor.is_norm ? dot * a.inverse : 0.0f;
        T* dx = static_cast<T*>(a.dx.data) + item.sample * a.dx.sample_stride + pixel * r.channels;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = r.lane + k * r.lanes;
            if (!real || i >= r.vectors) continue;
            float x[V];
            unpack<T>(x_row.words[k], x);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] = factor.value * (dn[k][j] - x[j] * factor.value * mean);
            store(dx + i * V, x);
        }
    }

    // Other lanes of the warp have other pixels of the same channels, and so have other warps: these take turns.
    for (int d = r.lanes; d < 32; d *= 2)
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int j = 0; j < V; ++j) {
                of_da[k][j] += __shfl_xor_sync(ALL_LANES, of_da[k][j], d);
                of_da_n[k][j] += __shfl_xor_sync(ALL_LANES, of_da_n[k][j], d);
            }
    float *da = r.gain, *da_n = r.shift;  // no longer read behind this barrier
    __syncthreads();
    const int thread = threadIdx.x, together = max(r.lanes, 32), turns = blockDim.x / together;
    for (int turn = 0; turn < turns; ++turn) {
        if (thread / together == turn && thread % together < r.lanes)
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const int i = r.lane + k * r.lanes;
                if (i >= r.vectors) continue;
                add_places(da, r.vectors, i, of_da[k], turn == 0);
                add_places(da_n, r.vectors, i, of_da_n[k], turn == 0);
            }
        __syncthreads();
    }
    float* sums = a.sums + static_cast<int64_t>(blockIdx.x) * 2 * r.channels;
    for (int c = threadIdx.x; c < r.channels; c += blockDim.x) {
        sums[c] = da[place_of<V>(c, r.vectors)];
        sums[r.channels + c] = da_n[place_of<V>(c, r.vectors)];
    }
}

// NCHW: tiles of pixels.

// Who holds what of a tile: ``lanes`` threads side by side have a row of pixels, V each; of the channels, each such slot
// of threads has every ``slots``-th. A thread copies what it alone reads.
template <class T>
struct Tiles {
    static constexpr int V = 16 / sizeof(T);
    int lanes, lane, slot, slots, channels;
    uint4 *x, *dy;                       // shared memory: [C, lanes]
    float *gain, *shift, *of_da, *of_da_n;  // [C]
    float *of_warps, *of_pixels;         // [WARPS, lanes V], [lanes V]

    static size_t bytes(int64_t channels, int lanes, bool backward) {
        return channels * (backward ? 2 * 16 * lanes + 16 : 16 * lanes + 8) + (WARPS + 1) * lanes * V * 4;
    }

    __device__ __forceinline__ Tiles(const RmsNorm& a, const Work& w, bool backward) {
        lanes = w.lanes, lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = THREADS / lanes;
        channels = static_cast<int>(a.shape.channels);
        x = shared_memory<uint4>();
        dy = x + channels * lanes;
        of_pixels = reinterpret_cast<float*>(backward ? dy + channels * lanes : dy);
        of_warps = of_pixels + lanes * V;
        gain = of_warps + WARPS * lanes * V, shift = gain + channels;
        of_da = shift + channels, of_da_n = of_da + channels;
    }

    // f(c) for the channels of this thread.
    template <class F>
    __device__ __forceinline__ void for_channels(F f) const {
#pragma unroll 2
        for (int c = slot; c < channels; c += slots) f(c);
    }

    __device__ __forceinline__ void copy(const Image& from, const RmsNorm& a, int64_t sample, int64_t pixel, uint4* to) const {
        const T* p = static_cast<const T*>(from.data) + sample * from.sample_stride + pixel;
        const int64_t pixels = a.shape.height * a.shape.width;
        for_channels([&](int c) { copy_16_bytes(to + c * lanes + lane, p + c * pixels); });
    }
    __device__ __forceinline__ void get(const uint4* from, int c, float (&values)[V]) const {
        unsigned words[4];
        load_words(from + c * lanes + lane, words);
        unpack<T>(words, values);
    }

    __device__ __forceinline__ void read_affine(const RmsNorm& a, int64_t sample) const {
        for (int c = threadIdx.x; c < channels; c += THREADS) {
            gain[c] = gain_of(a, sample, c);
            shift[c] = read(a.shift, sample, c, 0.0f);
        }
    }

    __device__ __forceinline__ bool has_pixel() const { return static_cast<int>(threadIdx.x) < lanes * V; }

    // The sum over all channels of what each thread has of its own, for pixel threadIdx.x of the tile: see has_pixel.
    __device__ __forceinline__ float sum(float (&of_own)[V]) const {
        for (int d = lanes; d < 32; d *= 2)
#pragma unroll
            for (int v = 0; v < V; ++v) of_own[v] += __shfl_xor_sync(ALL_LANES, of_own[v], d);
        if (static_cast<int>(threadIdx.x % 32) < lanes) keep(of_warps + (threadIdx.x / 32 * lanes + lane) * V, of_own);
        __syncthreads();
        float total = 0;
        if (has_pixel())
#pragma unroll
            for (int i = 0; i < WARPS; ++i) total += of_warps[i * lanes * V + threadIdx.x];
        return total;
    }
    // Pixel threadIdx.x gives a number, and each thread takes those of its own pixels.
    __device__ __forceinline__ void spread(float of_pixel, float (&of_own)[V]) const {
        if (has_pixel()) of_pixels[threadIdx.x] = of_pixel;
        __syncthreads();  // the barrier of the next sum is between this and the next write
        load(of_pixels + lane * V, of_own);
    }

    __device__ __forceinline__ void squares(bool real, float (&total)[V]) const {
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] = 0;
        if (!real) return;
        for_channels([&](int c) {
            float own[V];
            get(x, c, own);
#pragma unroll
            for (int v = 0; v < V; ++v) total[v] += own[v] * own[v];
        });
    }
};

template <class T>
__global__ void __launch_bounds__(THREADS, 3) forward_tiles(const RmsNorm a, const Work w) {
    constexpr int V = Tiles<T>::V;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Tiles<T> t(a, w, false);
    const int64_t pixels = a.shape.height * a.shape.width;
    for (int64_t first = item.first; first < item.end; first += t.lanes * V) {
        const int64_t pixel = first + t.lane * V;
        const bool real = pixel < item.end;
        if (real) t.copy(a.x, a, item.sample, pixel, t.x);
        commit_copies();
        if (first == item.first) t.read_affine(a, item.sample);
        wait_for_copies();
        float factor[V];
        t.squares(real, factor);
        t.spread(Factor(a, t.sum(factor)).value, factor);
        if (!real) continue;
        T* y = static_cast<T*>(a.y.data) + item.sample * a.y.sample_stride + pixel;
        t.for_channels([&](int c) {
            float x[V];
            t.get(t.x, c, x);
            const float gain = t.gain[c], shift = t.shift[c];
#pragma unroll
            for (int v = 0; v < V; ++v) x[v] = activated(x[v] * factor[v] * gain + shift, a.activation);
            store(y + c * pixels, x);
        });
    }
}

// da is computed twice, since there is no room to keep it as it is.
template <class T>
__global__ void __launch_bounds__(THREADS, 3) backward_tiles(const RmsNorm a, const Work w) {
    constexpr int V = Tiles<T>::V;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Tiles<T> t(a, w, true);
    const int64_t pixels = a.shape.height * a.shape.width;
    for (int64_t first = item.first; first < item.end; first += t.lanes * V) {
        const int64_t pixel = first + t.lane * V;
        const bool real = pixel < item.end;
        if (real) t.copy(a.x, a, item.sample, pixel, t.x), t.copy(a.dy, a, item.sample, pixel, t.dy);
        commit_copies();
        if (first == item.first) t.read_affine(a, item.sample);
        wait_for_copies();
        float factor[V], mean[V]{};
        t.squares(real, factor);
        const Factor of_pixel(a, t.sum(factor));
        t.spread(of_pixel.value, factor);

        // n and da of channel c
        const auto both = [&](int c, float (&n)[V], float (&da)[V]) {
            t.get(t.x, c, n);
            t.get(t.dy, c, da);
            const float gain = t.gain[c], shift = t.shift[c];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                n[v] *= factor[v];
                da[v] = before_activation(da[v], n[v] * gain + shift, a.activation);
            }
        };
        for (int some = 0; some < t.channels; some += t.slots) {  // as often for each thread: all of a warp shuffle
            const int c = some + t.slot;
            float of_da = 0, of_da_n = 0;
            if (real && c < t.channels) {
                float n[V], da[V];
                both(c, n, da);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    of_da += da[v];
                    of_da_n += da[v] * n[v];
                    mean[v] += da[v] * n[v] * t.gain[c];
                }
            }
            for (int d = t.lanes / 2; d > 0; d /= 2) {
                of_da += __shfl_xor_sync(ALL_LANES, of_da, d);
                of_da_n += __shfl_xor_sync(ALL_LANES, of_da_n, d);
            }
            if (t.lane == 0 && c < t.channels) {  // this thread alone has these
                t.of_da[c] = first == item.first ? of_da : t.of_da[c] + of_da;
                t.of_da_n[c] = first == item.first ? of_da_n : t.of_da_n[c] + of_da_n;
            }
        }
        const float dot = t.sum(mean);
        t.spread(of_pixel.is_norm ? dot * a.inverse : 0.0f, mean);
        if (!real) continue;
        T* dx = static_cast<T*>(a.dx.data) + item.sample * a.dx.sample_stride + pixel;
        t.for_channels([&](int c) {
            float n[V], da[V];
            both(c, n, da);
#pragma unroll
            for (int v = 0; v < V; ++v) da[v] = factor[v] * (da[v] * t.gain[c] - n[v] * mean[v]);
            store(dx + c * pixels, da);
        });
    }
    float* sums = a.sums + static_cast<int64_t>(blockIdx.x) * 2 * t.channels;
    if (t.lane == 0) t.for_channels([&](int c) { sums[c] = t.of_da[c], sums[t.channels + c] = t.of_da_n[c]; });
}

// Any other size and alignment.

// A sum that keeps what rounding takes from it (Kahan 1965): one thread may add up thousands of channels.
struct Sum {
    float total = 0, lost = 0;
    __device__ __forceinline__ void add(float x) {
        const float corrected = x - lost, next = total + corrected;
        lost = next - total - corrected;
        total = next;
    }
};

// ``lanes`` threads have one pixel, each every lanes-th channel: neighbours in NHWC order; in NCHW order neighbours have
// neighbouring pixels instead.
template <class T>
struct Any {
    int lanes, lane, group, groups;
    bool nhwc;
    int64_t channels, channel_stride, pixel_stride, sample_stride;
    float *of_threads, *factors;  // shared memory: [THREADS], [pixels of an item]

    __device__ __forceinline__ Any(const RmsNorm& a, const Work& w) {
        lanes = w.lanes, groups = THREADS / lanes, nhwc = a.shape.nhwc;
        lane = nhwc ? threadIdx.x % lanes : threadIdx.x / groups;
        group = nhwc ? threadIdx.x / lanes : threadIdx.x % groups;
        channels = a.shape.channels, sample_stride = a.x.sample_stride;
        channel_stride = a.x.channel_stride, pixel_stride = a.x.pixel_stride;
        of_threads = shared_memory<float>(), factors = of_threads + THREADS;
    }

    __device__ __forceinline__ int64_t at(int64_t sample, int64_t pixel, int64_t c) const {
        return sample * sample_stride + pixel * pixel_stride + c * channel_stride;
    }

    // f(c) for the channels of this thread.
    template <class F>
    __device__ __forceinline__ void for_channels(bool real, F f) const {
        if (real)
            for (int64_t c = lane; c < channels; c += lanes) f(c);
    }

    // The sum over the lanes of a pixel; every thread of the block calls it.
    __device__ __forceinline__ float sum(float x) const {
        if (nhwc) {
            for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
            return x;
        }
        __syncthreads();
        of_threads[threadIdx.x] = x;
        __syncthreads();
        x = 0;
        for (int i = 0; i < lanes; ++i) x += of_threads[i * groups + group];
        return x;
    }

    __device__ __forceinline__ Factor factor(const RmsNorm& a, int64_t sample, int64_t pixel, bool real) const {
        Sum squares;
        for_channels(real, [&](int64_t c) {
            const float x = to_float(static_cast<const T*>(a.x.data)[at(sample, pixel, c)]);
            squares.add(x * x);
        });
        return Factor(a, sum(squares.total));
    }
};

template <class T>
__global__ void __launch_bounds__(THREADS, 3) forward_any(const RmsNorm a, const Work w) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Any<T> t(a, w);
    for (int64_t first = item.first; first < item.end; first += t.groups) {
        const int64_t pixel = first + t.group, b = item.sample;
        const bool real = pixel < item.end;
        const Factor factor = t.factor(a, b, pixel, real);
        t.for_channels(real, [&](int64_t c) {
            const int64_t i = t.at(b, pixel, c);
            const float n = to_float(static_cast<const T*>(a.x.data)[i]) * factor.value;
            const float y = activated(n * gain_of(a, b, c) + read(a.shift, b, c, 0.0f), a.activation);
            static_cast<T*>(a.y.data)[i] = from_float<T>(y);
        });
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) backward_any(const RmsNorm a, const Work w) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Item item(a.shape, w);
    const Any<T> t(a, w);
    const int64_t b = item.sample, channels = t.channels;

    // n and da of an element
    const auto both = [&](int64_t pixel, int64_t c, float factor, float gain) {
        const int64_t i = t.at(b, pixel, c);
        const float n = to_float(static_cast<const T*>(a.x.data)[i]) * factor;
        const float dy = to_float(static_cast<const T*>(a.dy.data)[i]);
        return make_float2(n, before_activation(dy, n * gain + read(a.shift, b, c, 0.0f), a.activation));
    };
    for (int64_t first = item.first; first < item.end; first += t.groups) {
        const int64_t pixel = first + t.group;
        const bool real = pixel < item.end;
        const Factor factor = t.factor(a, b, pixel, real);
        if (real && t.lane == 0) t.factors[pixel - item.first] = factor.value;
        Sum dot;
        t.for_channels(real, [&](int64_t c) {
            const float gain = gain_of(a, b, c);
            const float2 e = both(pixel, c, factor.value, gain);
            dot.add(e.x * e.y * gain);
        });
        const float of_pixel = t.sum(dot.total), mean = factor.is_norm ? of_pixel * a.inverse : 0.0f;
        t.for_channels(real, [&](int64_t c) {
            const float gain = gain_of(a, b, c);
            const float2 e = both(pixel, c, factor.value, gain);
            static_cast<T*>(a.dx.data)[t.at(b, pixel, c)] = from_float<T>(factor.value * (e.y * gain - e.x * mean));
        });
    }
    __syncthreads();

    // The sums over pixels: a thread has a channel in NHWC order, a warp has one in NCHW order.
    const int width = t.nhwc ? 1 : 32, lane = threadIdx.x % width;
    float* sums = a.sums + static_cast<int64_t>(blockIdx.x) * 2 * channels;
    for (int64_t c = threadIdx.x / width; c < channels; c += THREADS / width) {  // the same for all of a warp, or alone
        const float gain = gain_of(a, b, c);
        float of_da = 0, of_da_n = 0;
        for (int64_t pixel = item.first + lane; pixel < item.end; pixel += width) {
            const float2 e = both(pixel, c, t.factors[pixel - item.first], gain);
            of_da += e.y, of_da_n += e.x * e.y;
        }
        if (!t.nhwc)
            for (int d = 16; d > 0; d /= 2) {
                of_da += __shfl_xor_sync(ALL_LANES, of_da, d);
                of_da_n += __shfl_xor_sync(ALL_LANES, of_da_n, d);
            }
        if (lane == 0) sums[c] = of_da, sums[channels + c] = of_da_n;
    }
}

// The gradients of the parameters, from the sums of the items.

constexpr int FINISHED = 8, FINISH_SLOTS = 64;  // channels of a block: 32 bytes; threads of each

__device__ __forceinline__ void put(const Gradient& g, int64_t i, double x) {
    if (!g.data) return;
    if (g.dtype == DType::f64)
        static_cast<double*>(g.data)[i] = x;
    else
        write(g.dtype, g.data, i, static_cast<float>(x));
}

// A channel has several threads: ``together`` for as many samples, times those that share the items of a sample.
__global__ void __launch_bounds__(FINISHED* FINISH_SLOTS) finish_kernel(const RmsNorm a, const int64_t per_sample,
                                                                         const int together) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    double *of_da = shared_memory<double>(), *of_da_n = of_da + FINISHED * FINISH_SLOTS;
    const int64_t channels = a.shape.channels, c = static_cast<int64_t>(blockIdx.x) * FINISHED + threadIdx.x % FINISHED;
    const int slot = threadIdx.x / FINISHED, part = slot / together, parts = FINISH_SLOTS / together;
    double dweight = 0;
    for (int64_t first = 0; first < a.shape.batch; first += together) {
        const int64_t b = first + slot % together;
        const bool real = b < a.shape.batch && c < channels;
        double da = 0, da_n = 0;
        if (real) {
            const float* p = a.sums + b * per_sample * 2 * channels + c;
#pragma unroll 4
            for (int64_t k = part; k < per_sample; k += parts)
                da += p[k * 2 * channels], da_n += p[(k * 2 + 1) * channels];
        }
        of_da[threadIdx.x] = da, of_da_n[threadIdx.x] = da_n;
        __syncthreads();
        if (real && part == 0) {
            for (int i = 1; i < parts; ++i) {
                const int other = i * together * FINISHED + threadIdx.x;
                da += of_da[other], da_n += of_da_n[other];
            }
            put(a.dshift, b * channels + c, da);
            put(a.dscale, b * channels + c, read(a.weight, 0, c, 0.0f) * da_n);
            dweight += (1.0f + read(a.scale, b, c, 0.0f)) * da_n;
        }
        __syncthreads();
    }
    of_da[threadIdx.x] = dweight;
    __syncthreads();
    if (slot != 0 || c >= channels) return;
    for (int i = 1; i < together; ++i) dweight += of_da[i * FINISHED + threadIdx.x];
    put(a.dweight, c, dweight);
}

// The host's side.

// Whether 16 bytes at a time suit images whose rows of neighbours have so many elements.
bool suits(int64_t neighbours, std::initializer_list<const Image*> images) {
    for (const Image* i : images)
        if (i->data && (neighbours * element_size(i->dtype) % 16 || alignment(*i, element_size(i->dtype)) < 16)) return false;
    return true;
}

int64_t power_above(int64_t x) {
    int64_t power = 1;
    while (power < x) power *= 2;
    return power;
}

// Lanes for rows of so many vectors, where each takes at most ``each``: a part of a warp, or whole warps; 0: too many.
int lanes_for(int64_t vectors, int each) {
    const int64_t needed = ceil_div(vectors, each);
    const int64_t lanes = needed <= 32 ? power_above(needed) : ceil_div(needed, 32) * 32;
    return lanes <= THREADS ? static_cast<int>(lanes) : 0;
}

// Samples of one pixel lie in both orders; in NHWC order, where neither scale nor shift is given, all are one.
RmsNorm folded(RmsNorm a) {
    if (!a.shape.nhwc && a.shape.height * a.shape.width != 1) return a;
    a.shape.nhwc = true;
    for (Image* i : {&a.x, &a.y, &a.dy, &a.dx}) i->channel_stride = 1, i->pixel_stride = a.shape.channels;
    if (a.scale.data || a.shift.data) return a;
    a.shape = {1, a.shape.channels, a.shape.batch, a.shape.height * a.shape.width, true};
    return a;
}

Work work(const RmsNorm& a, bool backward) {
    const Shape& s = a.shape;
    const int64_t pixels = s.height * s.width, size = element_size(a.x.dtype), V = 16 / size;
    const int most = size == 4 ? 4 : 3;  // vectors of a lane: 16 or 24 channels
    Work w{Work::any, 0, 32, THREADS, 0, 0, 0};
    int64_t step = 0;  // pixels that a block takes at once
    if (suits(s.nhwc ? s.channels : pixels, {&a.x, &a.y, &a.dy, &a.dx})) {
        if (s.nhwc) {
            const int64_t vectors = s.channels / V;
            double best = 0;  // the share of the lanes' vectors that are there; the more of them a lane has, the better
            for (int each = 1; each <= most; ++each) {
                const int lanes = lanes_for(vectors, each);
                const double share = lanes ? static_cast<double>(vectors) / (lanes * each) : 0.0;
                if (share == 0.0 || share < best || (share == best && lanes < 8)) continue;
                best = share, w.path = Work::rows, w.vectors = each, w.lanes = lanes;
            }
            const int threads = backward && w.vectors * V > 16 && w.lanes <= FEWER ? FEWER : THREADS;
            w.threads = threads / w.lanes * w.lanes;
            w.shared = 4 * (2 * s.channels + 2 * WARPS) + (backward ? 4 * 16 * THREADS * w.vectors : 0);
            step = w.threads / w.lanes;
        } else {
            const int64_t across = power_above(ceil_div(pixels, V));
            const auto bytes = [&](int lanes) {
                return size == 4 ? Tiles<float>::bytes(s.channels, lanes, backward) : Tiles<bf16>::bytes(s.channels, lanes, backward);
            };
            int lanes = 8;
            while (lanes < 32 && s.channels * lanes < 2 * THREADS) lanes *= 2;
            while (lanes > across || (lanes > 2 && bytes(lanes) > SHARED_MOST)) lanes /= 2;
            if (bytes(lanes) <= SHARED_MOST) w.path = Work::tiles, w.lanes = lanes, w.shared = bytes(lanes), step = lanes * V;
        }
    }
    if (w.path == Work::any) {
        w.lanes = s.nhwc ? static_cast<int>(power_above(s.channels < 32 ? s.channels : 32)) : WARPS;
        step = THREADS / w.lanes;
    }
    const int64_t wanted = s.batch * pixels / ITEMS, steps = wanted / step < 1 ? 1 : wanted / step;
    w.pixels = step * (w.path == Work::any && steps > 8 ? 8 : steps);
    w.per_sample = static_cast<unsigned>(ceil_div(pixels, w.pixels));
    if (w.path == Work::any) w.shared = 4 * (THREADS + w.pixels);
    return w;
}

template <class Kernel>
cudaError_t run(Kernel kernel, const RmsNorm& a, const Work& w, cudaStream_t stream) {
    Launch l;
    l.grid = dim3(static_cast<unsigned>(a.shape.batch * w.per_sample));
    l.block = dim3(w.threads), l.shared = w.shared, l.stream = stream, l.dependent = true;
    return launch(kernel, l, a, w);
}

template <class T>
cudaError_t forward_as(const RmsNorm& a, cudaStream_t stream) {
    const Work w = work(a, false);
    if (w.path == Work::any) return run(forward_any<T>, a, w, stream);
    if (w.path == Work::tiles) return run(forward_tiles<T>, a, w, stream);
    switch (w.vectors) {
        case 1: return run(forward_rows<T, 1>, a, w, stream);
        case 2: return run(forward_rows<T, 2>, a, w, stream);
        case 3: return run(forward_rows<T, 3>, a, w, stream);
        default: return run(forward_rows<T, sizeof(T) == 4 ? 4 : 3>, a, w, stream);
    }
}

template <class T>
cudaError_t backward_as(const RmsNorm& a, cudaStream_t stream) {
    const Work w = work(a, true);
    if (w.path == Work::any) return run(backward_any<T>, a, w, stream);
    if (w.path == Work::tiles) return run(backward_tiles<T>, a, w, stream);
    switch (w.vectors) {
        case 1: return run(backward_rows<T, 1>, a, w, stream);
        case 2: return run(backward_rows<T, 2>, a, w, stream);
        case 3: return run(backward_rows<T, 3>, a, w, stream);
        default: return run(backward_rows<T, sizeof(T) == 4 ? 4 : 3>, a, w, stream);
    }
}

cudaError_t finish(const RmsNorm& a, const Work& w, cudaStream_t stream) {
    Launch l;
    l.grid = dim3(static_cast<unsigned>(ceil_div(a.shape.channels, FINISHED)));
    l.block = dim3(FINISHED * FINISH_SLOTS), l.shared = 2 * sizeof(double) * FINISHED * FINISH_SLOTS;
    l.stream = stream, l.dependent = true;
    const int64_t together = power_above(a.shape.batch < FINISH_SLOTS ? a.shape.batch : FINISH_SLOTS);
    return launch(finish_kernel, l, a, w.per_sample, static_cast<int>(together));
}

}  // namespace

int64_t rms_norm_sums(const RmsNorm& a) {
    const RmsNorm f = folded(a);
    return f.shape.batch * work(f, true).per_sample;
}

cudaError_t rms_norm_forward(const RmsNorm& a, cudaStream_t stream) {
    const RmsNorm f = folded(a);
    switch (a.x.dtype) {
        case DType::bf16: return forward_as<bf16>(f, stream);
        case DType::f16: return forward_as<f16>(f, stream);
        default: return forward_as<float>(f, stream);
    }
}

cudaError_t rms_norm_backward(const RmsNorm& a, cudaStream_t stream) {
    const RmsNorm f = folded(a);
    const cudaError_t error = a.x.dtype == DType::bf16  ? backward_as<bf16>(f, stream)
                              : a.x.dtype == DType::f16 ? backward_as<f16>(f, stream)
                                                        : backward_as<float>(f, stream);
    return error != cudaSuccess ? error : finish(f, work(f, true), stream);
}

}  // namespace fastddpm::cuda
