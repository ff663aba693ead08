// h = [x, x2] + channel_bias + residual;  y = drop(silu((h - mean) rstd gain + offset)), gain = weight (1 + scale),
// offset = bias (1 + scale) + shift; mean and variance over each group of channels (Wu and He 2018, eq. 1-2).
//
// One read, where a slab of whole groups fits the shared memory of a block or of a cluster of up to 8, which share its
// pixels: it is copied there in 16-byte pieces, and dropout drawn meanwhile; each thread takes the moments of what it
// owns, the block merges those of a channel, and the cluster those of a group, through distributed shared memory; then y
// is made from the copy. Two reads, where it does not fit, and for sizes, orders and dtypes that have no 16-byte pieces:
// moments of each channel in each part, a tiny kernel that merges those of a group, and y from the image itself.
// Or, of what has such pieces, a cooperative kernel: a team of blocks, all on the device at once, in the place of the
// cluster; they meet at a counter in device memory, and what their shared memory does not hold they find in the
// second-level cache. Which of the two is faster is not measured.
//
// Moments: a thread sums d and d^2, d the deviation from the first number that it meets in a channel. That number is at
// most sqrt(n - 1) standard deviations from the mean of its n, so that sum(d^2) - sum(d)^2 / n loses no more than a
// factor n of the precision, and n is at most some hundreds. All merging is centred (Chan et al. 1983), in a fixed order.
//
// Bytes an element in half precision: 2 read and 2 written, with two reads 4 and 2, and 2 and 2 more with a residual.
// What limits it is memory: 64 KB a block, three blocks a processor keep it busy. In NHWC order 64 channels make runs of
// 128 bytes.

#include "group_norm_silu/group_norm_silu_cuda.cuh"

namespace fastddpm::cuda {
namespace {

// Moments of each channel of a thread, over the rows, for all of them: mean, what its rounding took away, squares of the
// deviations.
template <class A>
__device__ __forceinline__ void moments(const Lanes<A>& lanes, bool live, int pixels, const typename A::Plane& x,
                                        const typename A::Plane& residual, bool with_residual, float* room,
                                        float (&mean)[A::CHANNELS], float (&rest)[A::CHANNELS], float (&squares)[A::CHANNELS]) {
    constexpr int N = A::N, C = A::CHANNELS;
    float first[C]{}, sum[SUMS<A>]{}, square[SUMS<A>]{};
    float count = 0;
    lanes.for_batches(live, pixels, [&](int p) {
        lanes.for_accesses(p, pixels, [&](int, int q) {
            float h[N];
            x.load(q, 0, h);
            if (with_residual) add(residual, q, 0, h);
            if (q == lanes.begin) {
#pragma unroll
                for (int i = 0; i < C; ++i) first[i] = h[i];
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float d = h[i] - first[A::NHWC ? i : 0];
                sum[i % SUMS<A>] += d;
                square[i % SUMS<A>] += d * d;
            }
            count += static_cast<float>(N / C);
        });
    });
    float off[C], total[1][C], centred[2][C];
    collapse<A>(sum, off), collapse<A>(square, centred[1]);
    const float inverse = count > 0 ? 1.0f / count : 0.0f;
#pragma unroll
    for (int i = 0; i < C; ++i) {
        total[0][i] = count * first[i] + off[i];
        centred[1][i] -= off[i] * off[i] * inverse;
        off[i] *= inverse;
    }
    add_up(lanes, live, room, total);
    const float n = static_cast<float>(max(pixels, 1));
#pragma unroll
    for (int i = 0; i < C; ++i) {
        mean[i] = total[0][i] / n;
        const float d = (first[i] - mean[i]) + off[i];
        centred[0][i] = count * d;
        centred[1][i] += count * d * d;
    }
    add_up(lanes, live, room, centred);
#pragma unroll
    for (int i = 0; i < C; ++i) {
        rest[i] = centred[0][i] / n;
        squares[i] = fmaxf(centred[1][i] - centred[0][i] * rest[i], 0.0f);
    }
}

// Those of the channels of a part.
template <class Access>
__device__ __forceinline__ void part_moments(const GroupNorm& a, const Part& part, const Tables& s, bool with_residual,
                                             Entry* entries) {
    using A = typename Access::Sums;
    const Lanes<A> lanes(part.channels, a.plan);
    lanes.for_channels(part.channels, [&](int c, bool live) {
        const int there = live ? c : 0;
        float mean[A::CHANNELS], rest[A::CHANNELS], squares[A::CHANNELS];
        moments<A>(lanes, live, part.pixels, Access::template plane<A>(a, part, 0, there),
                   Access::template plane<A>(a, part, 2, there), with_residual, s.room, mean, rest, squares);
        if (live && lanes.row == 0)
#pragma unroll
            for (int i = 0; i < A::CHANNELS; ++i)
                entries[c + i] = {mean[i], rest[i], squares[i], static_cast<float>(part.pixels)};
    });
}

// y of a part, from what is in the tables, and h.
template <class Access>
__device__ __forceinline__ void make_output(const GroupNorm& a, const Part& part, const Tables& s, bool with_residual) {
    using A = typename Access::Result;
    using Out = typename Access::Out;
    constexpr int N = A::N;
    const Lanes<A> lanes(part.channels, a.plan);
    const bool with_dropout = a.draw.sample;
    lanes.for_channels(part.channels, [&](int c, bool live) {
        if (!live) return;
        const auto x = Access::template plane<A>(a, part, 0, c), residual = Access::template plane<A>(a, part, 2, c);
        const auto y = plane<Out>(a.y, part, c);
        lanes.for_batches(live, part.pixels, [&](int p) {
            const unsigned word = with_dropout ? Access::kept(a, part, lanes, c, p) : 0;
            lanes.for_accesses(p, part.pixels, [&](int j, int q) {
                float result[N], sum[N];
                forget_tables<A>();
#pragma unroll
                for (int piece = 0; piece < Pieces<A>::COUNT; ++piece) {
                    constexpr int M = Pieces<A>::N;
                    typename Pieces<A>::Numbers centre, gain, offset;
                    const int first = c + piece * Pieces<A>::CHANNELS;
                    load(s.centre + first, centre), load(s.gain + first, gain), load(s.offset + first, offset);
                    float t[M];
                    x.load(q, piece * M, t);
                    if (with_residual) {
                        add(residual, q, piece * M, t);
#pragma unroll
                        for (int i = 0; i < M; ++i) sum[piece * M + i] = t[i] + s.bias[first + (A::NHWC ? i : 0)];
                    }
#pragma unroll
                    for (int i = 0; i < M; ++i) {
                        const int k = A::NHWC ? i : 0;
                        t[i] = (t[i] - centre[k]) * gain[k] + offset[k];
                    }
                    if (a.activation) {
#pragma unroll
                        for (int i = 0; i < M; ++i) t[i] = __fdividef(t[i], 1.0f + __expf(-t[i]));
                    }
                    if (with_dropout) {
#pragma unroll
                        for (int i = 0; i < M; ++i) t[i] = is_kept<A>(word, j, piece * M + i) ? t[i] * a.keep_scale : 0.0f;
                    }
#pragma unroll
                    for (int i = 0; i < M; ++i) result[piece * M + i] = t[i];
                }
                if (with_residual) plane<Out>(a.h, part, c).store(q, sum);
                y.store(q, result);
            });
        });
    });
}

struct Statistics {
    double mean;
    float rstd;
};

// Mean and 1 / std of a group from ``count`` entries; entry(i), bias(i); sum(x): over all threads that work on it.
template <class EntryOf, class BiasOf, class Sum>
__device__ __forceinline__ Statistics merge(int first, int step, int count, double elements, float eps, EntryOf entry,
                                            BiasOf bias, Sum sum) {
    double total = 0, squares = 0;
    const auto mean_of = [&](const Entry& e, int i) {
        return static_cast<double>(e.a) + static_cast<double>(e.b) + static_cast<double>(bias(i));
    };
#pragma unroll 1
    for (int i = first; i < count; i += step) {
        const Entry e = entry(i);
        total += static_cast<double>(e.d) * mean_of(e, i);
    }
    const double mean = sum(total) / elements;
#pragma unroll 1
    for (int i = first; i < count; i += step) {
        const Entry e = entry(i);
        const double d = mean_of(e, i) - mean;
        squares += static_cast<double>(e.c) + static_cast<double>(e.d) * d * d;
    }
    return {mean, static_cast<float>(1.0 / sqrt(sum(squares) / elements + static_cast<double>(eps)))};
}

template <class Access, bool RESIDUAL>
__global__ void __launch_bounds__(MOST_THREADS, RESIDUAL ? 2 : sizeof(typename Access::Out::T) == 2 ? 4 : 3) one_read_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const GroupNormPlan& plan = a.plan;
    const Part part(a.shape, plan);
    const Tables s(plan);
    Access::begin(a, part, RESIDUAL, a.draw.sample);
    read_parameters(a, part, s);
    Access::end();
    __syncthreads();

    part_moments<Access>(a, part, s, RESIDUAL, s.entries);
    if (plan.parts > 1) cluster_sync();
    else __syncthreads();

    // A warp for each group; every block of the cluster comes to the same numbers.
    const int of_group = static_cast<int>(a.shape.channels / a.groups), groups = part.channels / of_group;
    const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
    const double elements = static_cast<double>(of_group) * static_cast<double>(a.shape.height * a.shape.width);
#pragma unroll 1
    for (int g = static_cast<int>(threadIdx.x / 32); g < groups; g += warps) {
        const auto channel = [&](int i) { return g * of_group + i % of_group; };
        const Statistics of = merge(
            lane, 32, plan.parts * of_group, elements, a.eps,
            [&](int i) { return *in_block(s.entries + channel(i), static_cast<unsigned>(i / of_group)); },
            [&](int i) { return s.bias[channel(i)]; }, [](double x) { return sum_over_warp(x); });
        if (lane == 0) {
            s.mean[g] = of.mean, s.rstd[g] = of.rstd;
            const int64_t at = part.sample * a.groups + part.channel / of_group + g;
            if (part.rank == 0) a.mean[at] = of.mean, a.rstd[at] = of.rstd;
        }
    }
    if (plan.parts > 1) cluster_arrive();  // has read what the others hold
    __syncthreads();
    centre_channels(part, s, [&](int c) { return s.mean[c / of_group]; }, [&](int c) { return s.rstd[c / of_group]; });
    __syncthreads();

    make_output<Access>(a, part, s, RESIDUAL);
    if (plan.parts > 1) cluster_wait();  // the others have read what this block holds
}

// The moments of a part in device memory; drop: what dropout drops is drawn, too, for whoever needs the part again.
template <class Access>
__device__ __forceinline__ void leave_moments(const GroupNorm& a, const Part& part, const Tables& s, bool drop) {
    Access::begin(a, part, a.residual.data, drop);
    Access::end();
    __syncthreads();
    Entry* entries = a.entries + (part.sample * a.plan.parts + part.rank) * a.shape.channels + part.channel;
    part_moments<Access>(a, part, s, a.residual.data, entries);
}

// Those of a group, from those of all parts; by a block.
__device__ __forceinline__ void merge_moments(const GroupNorm& a, int64_t sample, int64_t group) {
    const int64_t of_group = a.shape.channels / a.groups;
    const auto channel = [&](int i) { return group * of_group + i % of_group; };
    const Statistics of = merge(
        static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), static_cast<int>(a.plan.parts * of_group),
        static_cast<double>(of_group) * static_cast<double>(a.shape.height * a.shape.width), a.eps,
        [&](int i) { return a.entries[(sample * a.plan.parts + i / of_group) * a.shape.channels + channel(i)]; },
        [&](int i) { return read(a.channel_bias, sample, channel(i), 0.0f); },
        [](double x) { return sum_over_block(x, shared_memory<double>()); });
    if (threadIdx.x == 0) a.mean[sample * a.groups + group] = of.mean, a.rstd[sample * a.groups + group] = of.rstd;
}

// y of a part from the statistics in device memory; ``there``: it lies in shared memory.
template <class Access>
__device__ __forceinline__ void apply(const GroupNorm& a, const Part& part, const Tables& s, bool there) {
    if (!there) Access::begin(a, part, a.residual.data, a.draw.sample);
    read_parameters(a, part, s);
    centre_channels(a, part, s);
    Access::end();
    __syncthreads();
    make_output<Access>(a, part, s, a.residual.data);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, 2) moments_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    leave_moments<Access>(a, Part(a.shape, a.plan), Tables(a.plan), false);
}

// A block for each group of a sample.
__global__ void __launch_bounds__(MOST_THREADS) merge_moments_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    merge_moments(a, blockIdx.x / a.groups, blockIdx.x % a.groups);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, 2) apply_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    apply<Access>(a, Part(a.shape, a.plan), Tables(a.plan), false);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, 3) cooperative_kernel(const GroupNorm a) {
    let_next_kernel_start();
    const Tables s(a.plan);
    in_teams(a, [&](const Part& part, bool last) { leave_moments<Access>(a, part, s, last && a.draw.sample); },
             [&](int64_t sample, int64_t group) { merge_moments(a, sample, group); },
             [&](const Part& part, bool there) { apply<Access>(a, part, s, there); });
}

template <class Access>
auto one_read(const GroupNorm& a) {
    return a.residual.data ? one_read_kernel<Access, true> : one_read_kernel<Access, false>;
}

}  // namespace

cudaError_t group_norm_silu_clusters(const GroupNorm& a, int& clusters) {
    return with_copied(a, [&]<class Access>() { return clusters_for(one_read<Access>(a), over_parts(a, nullptr), clusters); });
}

cudaError_t group_norm_silu(const GroupNorm& a, cudaStream_t stream) {
    const Launch l = over_parts(a, stream);
    if (a.plan.one_read)
        return with_copied(a, [&]<class Access>() { return launch(one_read<Access>(a), l, a); });
    if (a.plan.cooperative)
        return with_copied(a, [&]<class Access>() { return launch_teams(cooperative_kernel<Access>, a, l); });
    cudaError_t error = with_access(a, [&]<class Access>() { return launch(moments_kernel<Access>, l, a); });
    if (error != cudaSuccess) return error;
    Launch merging = l;
    merging.grid = dim3(static_cast<unsigned>(a.shape.batch * a.groups));
    merging.block = dim3(128), merging.shared = 4 * sizeof(double);
    error = launch(merge_moments_kernel, merging, a);
    if (error != cudaSuccess) return error;
    return with_access(a, [&]<class Access>() { return launch(apply_kernel<Access>, l, a); });
}

}  // namespace fastddpm::cuda
