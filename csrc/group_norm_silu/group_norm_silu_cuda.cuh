// What the kernels of group_norm_silu, forward and backward, share: who computes what, and sums over the pixels.
//
// A block owns a part: a slab of neighbouring channels of one sample, over a range of its pixels. A thread stays with
// its channels (in NHWC order the neighbours of one access, else one channel) and walks over pixels in batches of four
// accesses, so that what belongs to a channel lies in registers, and the sums over pixels, too.
#pragma once

#include "common/cuda/noise.cuh"
#include "common/cuda/vec.cuh"
#include "group_norm_silu/group_norm_silu_cuda.h"

namespace fastddpm::cuda {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int BATCH = 4;  // accesses: in NHWC order four neighbouring pixels, which share a counter of the noise

struct Part {
    int64_t sample, channel, pixel;  // the first ones
    int channels, pixels, rank;      // rank: which part of the slab
    __device__ __forceinline__ Part(const Shape& s, const GroupNormPlan& plan)
        : Part(s, plan, blockIdx.x / static_cast<unsigned>(plan.parts),
               static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.parts))) {}
    // Of the slabs of all samples, the one with this number.
    __device__ __forceinline__ Part(const Shape& s, const GroupNormPlan& plan, unsigned slab, int rank) : rank(rank) {
        const unsigned slabs = static_cast<unsigned>(plan.slabs);
        sample = slab / slabs;
        channel = static_cast<int64_t>(slab % slabs) * plan.slab;
        channels = static_cast<int>(min(static_cast<int64_t>(plan.slab), s.channels - channel));
        pixel = static_cast<int64_t>(rank) * plan.pixels;
        const int64_t left = s.height * s.width - pixel;
        pixels = static_cast<int>(max(int64_t(0), min(static_cast<int64_t>(plan.pixels), left)));
    }
};

// Access to N neighbours in device or, if Shared, in shared memory, which is aligned to all their bytes.
template <class T_, int N_, bool NHWC_, bool Shared = false>
struct Vectors {
    using T = T_;
    static constexpr int N = N_, CHANNELS = NHWC_ ? N : 1;
    static constexpr bool NHWC = NHWC_;
    static constexpr int UNROLLED = 1;  // accesses of a batch; one alone keeps a thread busy
    // A channel, or N of them, of a sample.
    struct Plane {
        using Offset = std::conditional_t<Shared, int, int64_t>;
        T* first;
        int step;  // from pixel to pixel
        __device__ __forceinline__ Plane(T* first, int step) : first(first), step(step) {}
        __device__ __forceinline__ Plane(const Image& t, int64_t sample, int64_t channel, int64_t pixel)
            : first(static_cast<T*>(t.data) + sample * t.sample_stride + channel * t.channel_stride + pixel * t.pixel_stride),
              step(static_cast<int>(t.pixel_stride)) {}
        __device__ __forceinline__ T* at(int pixel) const { return first + static_cast<Offset>(pixel) * step; }
        // M elements of an access, from element ``from`` on.
        template <int M>
        __device__ __forceinline__ void load(int pixel, int from, float (&x)[M]) const {
            cuda::load(at(pixel) + from, x);
        }
        __device__ __forceinline__ void store(int pixel, const float (&x)[N]) const { cuda::store(at(pixel), x); }
    };
};

// Access to one element of any dtype in an image of any order.
template <bool NHWC_>
struct Scalars {
    static constexpr int N = 1, CHANNELS = 1;
    static constexpr int UNROLLED = BATCH;
    static constexpr bool NHWC = NHWC_;  // whether neighbouring threads take neighbouring channels
    struct Plane {
        void* data;
        int64_t first, step;
        DType dtype;
        __device__ __forceinline__ Plane(const Image& t, int64_t sample, int64_t channel, int64_t pixel)
            : data(t.data), first(sample * t.sample_stride + channel * t.channel_stride + pixel * t.pixel_stride),
              step(t.pixel_stride), dtype(t.dtype) {}
        __device__ __forceinline__ void load(int pixel, int, float (&x)[1]) const { x[0] = read(dtype, data, first + pixel * step); }
        __device__ __forceinline__ void store(int pixel, const float (&x)[1]) const {
            if (dtype == DType::f64) static_cast<double*>(data)[first + pixel * step] = x[0];
            else write(dtype, data, first + pixel * step, x[0]);
        }
    };
};

// A channel of [first, second].
template <class A>
__device__ __forceinline__ typename A::Plane plane(const Image& first, const Image& second, int64_t channels1,
                                                   const Part& part, int channel) {
    const int64_t c = part.channel + channel;
    if (c < channels1) return typename A::Plane(first, part.sample, c, part.pixel);
    return typename A::Plane(second, part.sample, c - channels1, part.pixel);
}
template <class A>
__device__ __forceinline__ typename A::Plane plane(const Image& t, const Part& part, int channel) {
    return typename A::Plane(t, part.sample, part.channel + channel, part.pixel);
}

// The place of a thread in its block. Rows are threads of the same channels.
template <class A>
struct Lanes {
    int column, columns, row, rows;  // columns: of all threads together
    int begin, step, gap;            // pixels: of the first access, from batch to batch, from access to access

    __device__ __forceinline__ Lanes(int channels, const GroupNormPlan& plan) {
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        if constexpr (A::NHWC) {
            columns = min(channels / A::N, threads);
            rows = threads / columns;
            column = thread % columns, row = thread / columns;
            begin = BATCH * row, step = BATCH * rows, gap = 1;
        } else {
            rows = plan.lanes;
            columns = threads / rows;
            column = thread / rows, row = thread % rows;
            begin = row * A::N, step = BATCH * rows * A::N, gap = rows * A::N;
        }
    }
    // f(channel, whether this thread has it) for the channels of a slab; the same number of times for every thread.
    template <class F>
    __device__ __forceinline__ void for_channels(int channels, F f) const {
#pragma unroll 1
        for (int c = 0; c < channels; c += columns * A::CHANNELS) {
            const int mine = c + column * A::CHANNELS;
            f(mine, mine < channels && row < rows);
        }
    }
    // f(first pixel) for the batches of this thread.
    template <class F>
    __device__ __forceinline__ void for_batches(bool live, int pixels, F f) const {
#pragma unroll 1
        for (int p = live ? begin : pixels; p < pixels; p += step) f(p);
    }
    // f(access, its pixel) for those of a batch.
    template <class F>
    __device__ __forceinline__ void for_accesses(int p, int pixels, F f) const {
#pragma unroll A::UNROLLED
        for (int j = 0; j < BATCH; ++j)
            if (p + j * gap < pixels) f(j, p + j * gap);
    }
};

template <int M, class Plane>
__device__ __forceinline__ void add(const Plane& plane, int pixel, int from, float (&x)[M]) {
    float more[M];
    plane.load(pixel, from, more);
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] += more[i];
}

// A result is made in pieces of up to four channels, so that their numbers fit the registers, and stored whole. Those of
// one piece stay there from access to access; those of two are read from the tables each time: the compiler must forget.
template <class A>
struct Pieces {
    static constexpr int CHANNELS = A::CHANNELS > 4 ? 4 : A::CHANNELS;
    static constexpr int N = A::NHWC ? CHANNELS : A::N, COUNT = A::N / N;
    using Numbers = float[CHANNELS];
};
template <class A>
__device__ __forceinline__ void forget_tables() {
    if constexpr (Pieces<A>::COUNT > 1) asm volatile("" ::: "memory");
}

// x[k] summed over the rows: every thread of a channel gets the sums. All threads of the block call it together.
// ``room``: K ceil(rows / 4) numbers for each channel that the threads have at once. The order is always the same.
template <class A, int K>
__device__ __forceinline__ void add_up(const Lanes<A>& lanes, bool live, float* room, float (&x)[K][A::CHANNELS]) {
    if constexpr (A::NHWC) {
        if (lanes.rows == 1) return;
        const int turns = min(lanes.rows, 4), lines = (lanes.rows + 3) / 4, width = lanes.columns * A::CHANNELS;
        float* own = room + lanes.column * A::CHANNELS;
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {
            if (live && lanes.row % 4 == turn) {
#pragma unroll
                for (int k = 0; k < K; ++k)
#pragma unroll
                    for (int i = 0; i < A::CHANNELS; ++i) {
                        float& sum = own[(k * lines + lanes.row / 4) * width + i];
                        sum = turn ? sum + x[k][i] : x[k][i];
                    }
            }
            __syncthreads();
        }
#pragma unroll 1
        for (int line = 0; live && line < lines; ++line) {
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
                for (int i = 0; i < A::CHANNELS; ++i) {
                    const float sum = own[(k * lines + line) * width + i];
                    x[k][i] = line ? x[k][i] + sum : sum;
                }
        }
        __syncthreads();  // the room is used again
    } else {
#pragma unroll 1
        for (int with = lanes.rows / 2; with > 0; with /= 2)
#pragma unroll
            for (int k = 0; k < K; ++k) x[k][0] += __shfl_xor_sync(ALL_LANES, x[k][0], with);
    }
}

// How many sums a thread keeps of what it adds up: one for each channel, or several of the one channel, so that an
// addition need not wait for the one before.
template <class A>
constexpr int SUMS = A::NHWC ? A::N : A::N < 4 ? A::N : 4;

template <class A>
__device__ __forceinline__ void collapse(const float (&sums)[SUMS<A>], float (&x)[A::CHANNELS]) {
    if constexpr (A::NHWC) {
#pragma unroll
        for (int i = 0; i < A::N; ++i) x[i] = sums[i];
    } else {
        x[0] = sums[0];
#pragma unroll
        for (int i = 1; i < SUMS<A>; ++i) x[0] += sums[i];
    }
}

// Dropout. A word has a bit for each element of a batch: whether it is kept. In NHWC order four for each channel, those
// of the pixels; otherwise eight for each access.
template <class A>
__device__ __forceinline__ bool is_kept(unsigned word, int access, int element) {
    return word >> (A::NHWC ? BATCH * element + access : 8 * access + element) & 1;
}

// Of elements e .. e + 3 of a sample, in C, H, W order, in the four lowest bits.
__device__ __forceinline__ unsigned four_kept(const Stream& stream, int64_t e, uint32_t below) {
    const auto of_counter = [&](int64_t counter) {
        const uint4 w = philox(stream, static_cast<uint32_t>(counter));
        return (w.x >= below ? 1u : 0u) | (w.y >= below ? 2u : 0u) | (w.z >= below ? 4u : 0u) | (w.w >= below ? 8u : 0u);
    };
    unsigned bits = of_counter(e / 4);
    if (e % 4) bits = (bits | of_counter(e / 4 + 1) << 4) >> (e % 4) & 15;
    return bits;
}

template <class A>
__device__ __forceinline__ unsigned draw(const GroupNorm& a, const Stream& stream, const Part& part,
                                         const Lanes<A>& lanes, int channel, int p) {
    constexpr int FOURS = A::NHWC ? A::N : (A::N + 3) / 4;  // of them, in one channel (in one access)
    const int64_t pixels = a.shape.height * a.shape.width;
    const int64_t e = (part.channel + channel) * pixels + part.pixel + p;
    unsigned word = 0;
#pragma unroll 1
    for (int i = 0; i < (A::NHWC ? 1 : BATCH) * FOURS; ++i) {
        if constexpr (A::NHWC)
            word |= four_kept(stream, e + i * pixels, a.drop_below) << (4 * i);
        else
            word |= (four_kept(stream, e + i / FOURS * lanes.gap + i % FOURS * 4, a.drop_below) & (A::N == 1 ? 1 : 15))
                    << (8 * (i / FOURS) + i % FOURS * 4);
    }
    return word;
}

// Numbers of each channel of the slab, in shared memory, and of each group.
// a = (x + residual - centre) gain + offset goes into the activation, once the gain has rstd in it. centre is the mean
// less the channel bias, rounded; ``rest`` is what the rounding took away, and is in the offset, so that a large mean
// costs no digits. dx = da gain + (h - mean) slope + level + dh.
struct Tables {
    float *centre, *gain, *offset, *bias, *rest, *slope, *level;
    double* mean;
    float* rstd;
    Entry* entries;
    float* room;
    __device__ __forceinline__ explicit Tables(const GroupNormPlan& plan) {
        unsigned char* memory = shared_memory<unsigned char>();
        float* first = reinterpret_cast<float*>(memory);
        const int width = (plan.slab + 3) / 4 * 4;
        centre = first, gain = first + width, offset = first + 2 * width, bias = first + 3 * width;
        rest = first + 4 * width, slope = first + 5 * width, level = first + 6 * width;
        const int groups = (plan.entries_at - plan.groups_at) / 16;
        mean = reinterpret_cast<double*>(memory + plan.groups_at);
        rstd = reinterpret_cast<float*>(mean + groups);
        entries = reinterpret_cast<Entry*>(memory + plan.entries_at);
        room = reinterpret_cast<float*>(memory + plan.sums_at);
    }
};
constexpr int TABLES = 7;

struct Gain {
    float gain, offset;
};
__device__ __forceinline__ Gain gain_of(const GroupNorm& a, int64_t sample, int64_t channel) {
    const float factor = 1.0f + read(a.scale, sample, channel, 0.0f);
    return {read(a.weight, sample, channel, 1.0f) * factor,
            read(a.bias, sample, channel, 0.0f) * factor + read(a.shift, sample, channel, 0.0f)};
}

struct Centre {
    float centre, rest;
    __device__ __forceinline__ Centre(double mean, float bias) {
        const double exact = mean - static_cast<double>(bias);
        centre = static_cast<float>(exact);
        rest = static_cast<float>(exact - static_cast<double>(centre));
    }
};

// Tables of what the parameters say.
__device__ __forceinline__ void read_parameters(const GroupNorm& a, const Part& part, const Tables& s) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < part.channels; c += static_cast<int>(blockDim.x)) {
        const Gain g = gain_of(a, part.sample, part.channel + c);
        s.gain[c] = g.gain, s.offset[c] = g.offset;
        s.bias[c] = read(a.channel_bias, part.sample, part.channel + c, 0.0f);
    }
}

// What mean and rstd make of them, each thread for the channels that it has read; mean(c), rstd(c) of the channel's group.
template <class Mean, class Rstd>
__device__ __forceinline__ void centre_channels(const Part& part, const Tables& s, Mean mean, Rstd rstd) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < part.channels; c += static_cast<int>(blockDim.x)) {
        const Centre k(mean(c), s.bias[c]);
        const float gain = s.gain[c] * rstd(c);
        s.centre[c] = k.centre, s.rest[c] = k.rest, s.gain[c] = gain;
        s.offset[c] -= k.rest * gain;
    }
}

// The same with the statistics in device memory.
__device__ __forceinline__ void centre_channels(const GroupNorm& a, const Part& part, const Tables& s) {
    const int of_group = static_cast<int>(a.shape.channels / a.groups);
    const auto group = [&](int c) { return part.sample * a.groups + (part.channel + c) / of_group; };
    centre_channels(part, s, [&](int c) { return a.mean[group(c)]; }, [&](int c) { return a.rstd[group(c)]; });
}

// Where a kernel reads an image, by its number: 0 is [x, x2], 1 dy, 2 the residual. Out is what it stores through, with
// the same lanes as Result; Sums is what it takes sums over the pixels by, and OutSums has the lanes of these.

// Images that lie as they should: slabs are copied to shared memory, 16 bytes a piece, in their order. What is copied
// there needs no registers until it is used, so that all of it can be on its way.
template <class T, bool NHWC_>
struct Copied {
    static constexpr int N = 16 / sizeof(T), NARROW = NHWC_ ? 4 : N;  // four channels, so that their sums fit the registers
    using Out = Vectors<T, N, NHWC_>;
    using Result = Vectors<T, N, NHWC_, true>;
    using OutSums = Vectors<T, NARROW, NHWC_>;
    using Sums = Vectors<T, NARROW, NHWC_, true>;

    // Forward has no dy, and keeps the residual in its place.
    static __device__ __forceinline__ T* slab(const GroupNorm& a, int number) {
        if (number == 2 && !a.dy.data) number = 1;
        unsigned char* memory = shared_memory<unsigned char>() + a.plan.arrays_at + number * a.plan.array_bytes;
        return reinterpret_cast<T*>(memory);
    }
    template <class A>
    static __device__ __forceinline__ typename A::Plane plane(const GroupNorm& a, const Part& part, int number, int channel) {
        if constexpr (A::NHWC) return typename A::Plane(slab(a, number) + channel, part.channels);
        else return typename A::Plane(slab(a, number) + channel * a.plan.pixels, 1);
    }

    static __device__ __forceinline__ void fetch(const GroupNorm& a, const Part& part, int number, const Image& first,
                                                 const Image& second, int64_t channels1) {
        const Lanes<Out> lanes(part.channels, a.plan);
        lanes.for_channels(part.channels, [&](int c, bool live) {
            if (!live) return;
            const auto from = cuda::plane<Out>(first, second, channels1, part, c);
            const auto to = plane<Result>(a, part, number, c);
            lanes.for_batches(live, part.pixels, [&](int p) {
#pragma unroll
                for (int j = 0; j < BATCH; ++j) {
                    const int q = p + j * lanes.gap;
                    if (q < part.pixels) copy_16_bytes(to.at(q), from.at(q));
                }
            });
        });
    }
    // Begin to copy what the kernel reads; drop: draw what dropout drops while that is on its way.
    static __device__ __forceinline__ void begin(const GroupNorm& a, const Part& part, bool with_residual, bool drop) {
        fetch(a, part, 0, a.x, a.x2, a.channels1);
        if (a.dy.data) fetch(a, part, 1, a.dy, a.dy, a.shape.channels);
        if (with_residual) fetch(a, part, 2, a.residual, a.residual, a.shape.channels);
        commit_copies();
        if (drop) draw_masks(a, part);
    }
    static __device__ __forceinline__ void end() { wait_for_copies(); }

    // Dropout masks. In NHWC order 16 bits for four channels of a batch, which threads with four channels and those with
    // eight both find; otherwise a word for each batch.
    template <class A>
    static __device__ __forceinline__ uint16_t* mask(const GroupNorm& a, const Part& part, const Lanes<A>& lanes, int c, int p) {
        auto* masks = reinterpret_cast<uint16_t*>(shared_memory<unsigned char>() + a.plan.masks_at);
        if constexpr (A::NHWC) return masks + p / BATCH * (part.channels / 4) + c / 4;
        const int batches = static_cast<int>(ceil_div(a.plan.pixels, lanes.step));
        return masks + 2 * ((c * batches + p / lanes.step) * lanes.rows + lanes.row);
    }
    static __device__ __forceinline__ void draw_masks(const GroupNorm& a, const Part& part) {
        const Stream noise = stream(a.draw, part.sample);
        const Lanes<Out> lanes(part.channels, a.plan);
        lanes.for_channels(part.channels, [&](int c, bool live) {
            lanes.for_batches(live, part.pixels, [&](int p) {
                const unsigned word = draw(a, noise, part, lanes, c, p);
                uint16_t* to = mask(a, part, lanes, c, p);
                if constexpr (NHWC_ && N == 4) *to = static_cast<uint16_t>(word);
                else *reinterpret_cast<unsigned*>(to) = word;
            });
        });
    }
    template <class A>
    static __device__ __forceinline__ unsigned kept(const GroupNorm& a, const Part& part, const Lanes<A>& lanes, int c, int p) {
        const uint16_t* from = mask(a, part, lanes, c, p);
        if constexpr (A::NHWC && A::N == 4) return *from;
        else return *reinterpret_cast<const unsigned*>(from);
    }
};

// Any other image: element by element, where it lies.
template <bool NHWC>
struct InPlace {
    using Out = Scalars<NHWC>;
    using Result = Out;
    using OutSums = Out;
    using Sums = Out;
    template <class A>
    static __device__ __forceinline__ typename A::Plane plane(const GroupNorm& a, const Part& part, int number, int channel) {
        if (number == 0) return cuda::plane<A>(a.x, a.x2, a.channels1, part, channel);
        return cuda::plane<A>(number == 1 ? a.dy : a.residual, part, channel);
    }
    static __device__ __forceinline__ void begin(const GroupNorm&, const Part&, bool, bool) {}
    static __device__ __forceinline__ void end() {}
    template <class A>
    static __device__ __forceinline__ unsigned kept(const GroupNorm& a, const Part& part, const Lanes<A>& lanes, int c, int p) {
        return draw(a, stream(a.draw, part.sample), part, lanes, c, p);
    }
};

__device__ __forceinline__ float sigmoid(float a) { return __fdividef(1.0f, 1.0f + __expf(-a)); }

template <class X>
__device__ __forceinline__ X sum_over_warp(X x) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) x += __shfl_xor_sync(ALL_LANES, x, with);
    return x;
}

// The sum over all threads of the block, for all of them; ``room``: a number for each warp.
__device__ __forceinline__ double sum_over_block(double x, double* room) {
    x = sum_over_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += room[w];
    return sum;
}

// What a cooperative kernel does. A team of blocks takes a slab and shares its parts and its groups; first(part, whether it
// is the last one of this block), then merge(sample, group), then second(part, whether it is that one: it lies in the
// shared memory still). The others come in the opposite order: what was read last is likeliest in the cache.
template <class First, class Merge, class Second>
__device__ __forceinline__ void in_teams(const GroupNorm& a, First first, Merge merge, Second second) {
    const int members = a.plan.members, member = static_cast<int>(blockIdx.x) % members;
    const int last = member + (a.plan.parts - 1 - member) / members * members;
    const unsigned team = blockIdx.x / static_cast<unsigned>(members);
    unsigned all = 0;
    const auto meet_team = [&] { meet(a.counters + COUNTER * team, all += static_cast<unsigned>(a.plan.members)); };
#pragma unroll 1
    for (unsigned slab = team; slab < static_cast<unsigned>(a.shape.batch) * static_cast<unsigned>(a.plan.slabs);
         slab += gridDim.x / static_cast<unsigned>(a.plan.members)) {
#pragma unroll 1
        for (int rank = member; rank <= last; rank += a.plan.members) {
            first(Part(a.shape, a.plan, slab, rank), rank == last);
            __syncthreads();  // the shared memory is used again
        }
        meet_team();
        const Part any(a.shape, a.plan, slab, 0);
        const int of_group = static_cast<int>(a.shape.channels / a.groups);
#pragma unroll 1
        for (int g = member; g < any.channels / of_group; g += a.plan.members) merge(any.sample, any.channel / of_group + g);
        meet_team();
#pragma unroll 1
        for (int rank = last; rank >= 0; rank -= a.plan.members) {
            second(Part(a.shape, a.plan, slab, rank), rank == last);
            __syncthreads();
        }
    }
}

// Runs such a kernel. Two teams at least where there are two slabs: one moves data while the other waits. A block takes
// several parts where the device has no room for as many blocks.
template <class Kernel>
[[nodiscard]] cudaError_t launch_teams(Kernel kernel, GroupNorm a, Launch l) {
    const int64_t slabs = a.shape.batch * a.plan.slabs;
    if (slabs == 0) return cudaSuccess;
    l.cooperative = true, l.dependent = false;
    int room = 0;
    cudaError_t error = room_for(kernel, l, room);
    if (error != cudaSuccess) return error;
    a.plan.members = min(a.plan.parts, slabs > 1 && room > 1 ? room / 2 : room);
    const int64_t teams = min(min(slabs, int64_t(MOST_TEAMS)), static_cast<int64_t>(room / a.plan.members));
    l.grid = dim3(static_cast<unsigned>(teams * a.plan.members));
    error = cudaMemsetAsync(a.counters, 0, static_cast<size_t>(teams) * COUNTER * sizeof(unsigned), l.stream);
    return error != cudaSuccess ? error : launch(kernel, l, a);
}

inline Launch over_parts(const GroupNorm& a, cudaStream_t stream) {
    const int64_t blocks = a.shape.batch * a.plan.slabs * a.plan.parts;
    Launch l;
    l.grid = dim3(static_cast<unsigned>(min(blocks, int64_t(0xffffffff))));  // too many are an error of the launch
    l.block = dim3(static_cast<unsigned>(a.plan.threads));
    l.shared = static_cast<size_t>(a.plan.shared), l.stream = stream;
    l.cluster = a.plan.one_read ? static_cast<unsigned>(a.plan.parts) : 1;
    l.dependent = true;
    return l;
}

// f.template operator()<Copied<dtype of x, NHWC>>() ..
template <class F>
cudaError_t with_copied(const GroupNorm& a, F f) {
    const bool nhwc = a.plan.nhwc;
    switch (a.x.dtype) {
        case DType::bf16: return nhwc ? f.template operator()<Copied<bf16, true>>() : f.template operator()<Copied<bf16, false>>();
        case DType::f16: return nhwc ? f.template operator()<Copied<f16, true>>() : f.template operator()<Copied<f16, false>>();
        default: return nhwc ? f.template operator()<Copied<float, true>>() : f.template operator()<Copied<float, false>>();
    }
}
// .. or with InPlace.
template <class F>
cudaError_t with_access(const GroupNorm& a, F f) {
    if (a.plan.vectors) return with_copied(a, f);
    return a.plan.nhwc ? f.template operator()<InPlace<true>>() : f.template operator()<InPlace<false>>();
}

}  // namespace
}  // namespace fastddpm::cuda
