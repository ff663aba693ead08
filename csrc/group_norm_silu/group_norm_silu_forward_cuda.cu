// h = [x, x2] + channel_bias + residual;  y = drop(silu((h - mean) rstd gain + offset)), gain = weight (1 + scale),
// offset = bias (1 + scale) + shift; mean and variance over each group of channels (Wu and He 2018, eq. 1-2).
//
// One read, where a slab of whole groups fits the shared memory of a block or of a cluster of up to 16, which share its
// pixels: it is copied there in 16-byte pieces, and dropout drawn meanwhile; each thread takes the moments of what it
// owns, the block merges those of a channel, and the cluster those of a group, through distributed shared memory; then y
// is made from the copy. Two reads, where it does not fit, and for sizes, orders and dtypes that have no 16-byte pieces:
// moments of each channel in each part, a tiny kernel that merges those of a group, and y from the image itself.
// (Instead of the second read from device memory a cooperative kernel could find the sample in the second-level cache.
// That is not measured.)
//
// Moments: a thread sums d and d^2, d the deviation from the first number that it meets in a channel. That number is at
// most sqrt(n - 1) standard deviations from the mean of its n, so that sum(d^2) - sum(d)^2 / n loses no more than a
// factor n of the precision, and n is some dozens. All merging is centred (Chan et al. 1983), in a fixed order.
//
// Bytes an element in half precision: 2 read and 2 written, with two reads 4 and 2, and 2 and 2 more with a residual.
// What limits it is memory: 64 KB a block, three blocks a processor keep it busy. In NHWC order 64 channels make runs of
// 128 bytes.

#include "group_norm_silu/group_norm_silu_cuda.cuh"

namespace fastddpm::cuda {
namespace {

// Moments of each channel of a thread, over the rows, for all of them: mean, what its rounding took away, squares of the
// deviations. residual: or nullptr.
template <class A>
__device__ __forceinline__ void moments(const Lanes<A>& lanes, bool live, int pixels, const typename A::Plane& x,
                                        const typename A::Plane* residual, float* room, float (&mean)[A::CHANNELS],
                                        float (&rest)[A::CHANNELS], float (&squares)[A::CHANNELS]) {
    constexpr int N = A::N, C = A::CHANNELS;
    float first[C]{}, sum[N]{}, square[N]{};
    float count = 0;
    lanes.for_batches(live, pixels, [&](int p) {
        typename A::Raw raw[BATCH]{}, more[BATCH]{};
        lanes.for_accesses(p, pixels, [&](int j, int q) {
            raw[j] = x.load(q);
            if (residual) more[j] = residual->load(q);
        });
        lanes.for_accesses(p, pixels, [&](int j, int) {
            float h[N];
            A::numbers(raw[j], h);
            if (residual) {
                float r[N];
                A::numbers(more[j], r);
#pragma unroll
                for (int i = 0; i < N; ++i) h[i] += r[i];
            }
            if (j == 0 && p == lanes.begin) {
#pragma unroll
                for (int i = 0; i < C; ++i) first[i] = h[i];
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float d = h[i] - first[A::NHWC ? i : 0];
                sum[i] += d;
                square[i] += d * d;
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

// Those of the channels of a part; planes(c): of x and of the residual.
template <class A, class X, class Residual>
__device__ __forceinline__ void part_moments(const GroupNorm& a, const Part& part, const Tables& s, Entry* entries,
                                             X plane_x, Residual plane_residual) {
    const Lanes<A> lanes(part.channels, a.plan);
    lanes.for_channels(part.channels, [&](int c, bool live) {
        const int there = live ? c : 0;
        const auto x = plane_x(there), residual = plane_residual(there);
        float mean[A::CHANNELS], rest[A::CHANNELS], squares[A::CHANNELS];
        moments<A>(lanes, live, part.pixels, x, a.residual.data ? &residual : nullptr, s.room, mean, rest, squares);
        if (live && lanes.row == 0)
#pragma unroll
            for (int i = 0; i < A::CHANNELS; ++i)
                entries[c + i] = {mean[i], rest[i], squares[i], static_cast<float>(part.pixels)};
    });
}

// y of a part, from what is in the tables, and h.
template <class A, class X, class Residual, class Keep>
__device__ __forceinline__ void make_output(const GroupNorm& a, const Part& part, const Tables& s, X plane_x,
                                            Residual plane_residual, Keep keep) {
    constexpr int N = A::N, C = A::CHANNELS;
    const Lanes<A> lanes(part.channels, a.plan);
    const bool with_residual = a.residual.data, with_dropout = a.draw.sample;
    lanes.for_channels(part.channels, [&](int c, bool live) {
        if (!live) return;
        float centre[C], gain[C], offset[C];
        load_table(s.centre, c, live, centre), load_table(s.gain, c, live, gain), load_table(s.offset, c, live, offset);
        const auto x = plane_x(c), residual = plane_residual(c);
        const auto y = plane<A>(a.y, part, c), h_out = plane<A>(a.h, part, c);
        lanes.for_batches(live, part.pixels, [&](int p) {
            const unsigned word = with_dropout ? keep(lanes, c, p) : 0;
            typename A::Raw raw[BATCH]{}, more[BATCH]{};
            lanes.for_accesses(p, part.pixels, [&](int j, int q) {
                raw[j] = x.load(q);
                if (with_residual) more[j] = residual.load(q);
            });
            lanes.for_accesses(p, part.pixels, [&](int j, int q) {
                float h[N];
                A::numbers(raw[j], h);
                if (with_residual) {
                    float r[N], bias[C], sum[N];
                    A::numbers(more[j], r);
                    load_table(s.bias, c, true, bias);
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        h[i] += r[i];
                        sum[i] = h[i] + bias[A::NHWC ? i : 0];
                    }
                    h_out.store(q, sum);
                }
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const int k = A::NHWC ? i : 0;
                    const float t = (h[i] - centre[k]) * gain[k] + offset[k];
                    h[i] = a.activation ? __fdividef(t, 1.0f + __expf(-t)) : t;
                    if (with_dropout) h[i] = is_kept<A>(word, j, i) ? h[i] * a.keep_scale : 0.0f;
                }
                y.store(q, h);
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
    for (int i = first; i < count; i += step) {
        const Entry e = entry(i);
        total += static_cast<double>(e.d) * mean_of(e, i);
    }
    const double mean = sum(total) / elements;
    for (int i = first; i < count; i += step) {
        const Entry e = entry(i);
        const double d = mean_of(e, i) - mean;
        squares += static_cast<double>(e.c) + static_cast<double>(e.d) * d * d;
    }
    return {mean, static_cast<float>(1.0 / sqrt(sum(squares) / elements + static_cast<double>(eps)))};
}

template <class T, bool NHWC>
__global__ void __launch_bounds__(MOST_THREADS, 3) one_read_kernel(const GroupNorm a) {
    using W = Wide<T, NHWC>;
    using S = Narrow<T, NHWC>;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const GroupNormPlan& plan = a.plan;
    const Part part(a.shape, plan);
    const Tables s(plan);
    const Lanes<W> lanes(part.channels, plan);
    fetch<W>(a.x, a.x2, a.channels1, plan, part, lanes, 0);
    if (a.residual.data) fetch<W>(a.residual, a.residual, a.shape.channels, plan, part, lanes, 1);
    commit_copies();
    read_parameters(a, part, s);
    if (a.draw.sample) draw_masks<W>(a, part, lanes);
    wait_for_copies();
    __syncthreads();

    part_moments<S>(
        a, part, s, s.entries, [&](int c) { return plane<S>(slab<S>(plan, 0), plan, part, c); },
        [&](int c) { return plane<S>(slab<S>(plan, 1), plan, part, c); });
    if (plan.parts > 1) cluster_sync();
    else __syncthreads();

    // A warp for each group; every block of the cluster comes to the same numbers.
    const int of_group = static_cast<int>(a.shape.channels / a.groups), groups = part.channels / of_group;
    const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
    const double elements = static_cast<double>(of_group) * static_cast<double>(a.shape.height * a.shape.width);
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

    make_output<W>(
        a, part, s, [&](int c) { return plane<W>(slab<W>(plan, 0), plan, part, c); },
        [&](int c) { return plane<W>(slab<W>(plan, 1), plan, part, c); },
        [&](const Lanes<W>& own, int c, int p) { return stored_mask<W>(plan, part, own, c, p); });
    if (plan.parts > 1) cluster_wait();  // the others have read what this block holds
}

template <class A>
__global__ void __launch_bounds__(MOST_THREADS) moments_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Part part(a.shape, a.plan);
    const Tables s(a.plan);
    Entry* entries = a.entries + (part.sample * a.plan.parts + part.rank) * a.shape.channels + part.channel;
    part_moments<A>(
        a, part, s, entries, [&](int c) { return plane<A>(a.x, a.x2, a.channels1, part, c); },
        [&](int c) { return plane<A>(a.residual, part, c); });
}

// A block for each group of a sample.
__global__ void __launch_bounds__(MOST_THREADS) merge_moments_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int64_t of_group = a.shape.channels / a.groups, sample = blockIdx.x / a.groups, group = blockIdx.x % a.groups;
    const auto channel = [&](int i) { return group * of_group + i % of_group; };
    const Statistics of = merge(
        static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), static_cast<int>(a.plan.parts * of_group),
        static_cast<double>(of_group) * static_cast<double>(a.shape.height * a.shape.width), a.eps,
        [&](int i) { return a.entries[(sample * a.plan.parts + i / of_group) * a.shape.channels + channel(i)]; },
        [&](int i) { return read(a.channel_bias, sample, channel(i), 0.0f); },
        [](double x) { return sum_over_block(x, shared_memory<double>()); });
    if (threadIdx.x == 0) a.mean[blockIdx.x] = of.mean, a.rstd[blockIdx.x] = of.rstd;
}

template <class A>
__global__ void __launch_bounds__(MOST_THREADS) apply_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Part part(a.shape, a.plan);
    const Tables s(a.plan);
    read_parameters(a, part, s);
    centre_channels(a, part, s);
    __syncthreads();
    const Stream noise = a.draw.sample ? stream(a.draw, part.sample) : Stream{};
    make_output<A>(
        a, part, s, [&](int c) { return plane<A>(a.x, a.x2, a.channels1, part, c); },
        [&](int c) { return plane<A>(a.residual, part, c); },
        [&](const Lanes<A>& lanes, int c, int p) { return draw(a, noise, part, lanes, c, p); });
}

}  // namespace

cudaError_t group_norm_silu(const GroupNorm& a, cudaStream_t stream) {
    const Launch l = over_parts(a, stream);
    if (a.plan.one_read)
        return with_vectors(a, [&]<class T, bool NHWC>() { return launch(one_read_kernel<T, NHWC>, l, a); });
    cudaError_t error = with_access(a, [&]<class A>() { return launch(moments_kernel<A>, l, a); });
    if (error != cudaSuccess) return error;
    Launch merging = l;
    merging.grid = dim3(static_cast<unsigned>(a.shape.batch * a.groups));
    merging.block = dim3(128), merging.shared = 4 * sizeof(double);
    error = launch(merge_moments_kernel, merging, a);
    if (error != cudaSuccess) return error;
    return with_access(a, [&]<class A>() { return launch(apply_kernel<A>, l, a); });
}

}  // namespace fastddpm::cuda
