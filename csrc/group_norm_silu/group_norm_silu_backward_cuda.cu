// With a = (h - mean) gain + offset before the activation, the gain with rstd in it: da is dy through dropout and SiLU;
// dx = da gain - mean(da gain) - (h - mean) rstd^2 mean(da gain (h - mean)) + dh, the means over each group.
//
// The sums over the pixels of da, da (h - mean), h - mean and dh give every other gradient, and that of the channel
// bias, the sum of dx, too: no further pass. Each sample leaves its share [3, B, C] of those that are summed over the
// batch, and a small kernel adds them up: no atomics, so that the result is the same at every run.
//
// As forward: one read, where x, dy and the residual of a slab fit the shared memory of a block or of a cluster, which
// exchanges the sums of its channels through distributed shared memory; or two, with sums of each part in between; or the
// cooperative kernel.
//
// Bytes an element in half precision: 4 read and 2 written; with two reads 8 and 2. Memory limits it.

#include "group_norm_silu/group_norm_silu_cuda.cuh"

namespace fastddpm::cuda {
namespace {

// What gives the gradient before the activation at an access of a channel.
template <class Access, class A>
struct Inputs {
    typename A::Plane x, dy, residual;

    __device__ __forceinline__ Inputs(const GroupNorm& a, const Part& part, int c)
        : x(Access::template plane<A>(a, part, 0, c)), dy(Access::template plane<A>(a, part, 1, c)),
          residual(Access::template plane<A>(a, part, 2, c)) {}

    // M elements from ``from`` on at pixel q: x + residual, and dy through dropout, of which ``word`` says what it keeps.
    template <int M>
    __device__ __forceinline__ void load(const GroupNorm& a, bool with_residual, unsigned word, int j, int q, int from,
                                         float (&h)[M], float (&dy_q)[M]) const {
        x.load(q, from, h), dy.load(q, from, dy_q);
        if (with_residual) add(residual, q, from, h);
        if (a.draw.sample) {
#pragma unroll
            for (int i = 0; i < M; ++i) dy_q[i] = is_kept<A>(word, j, from + i) ? dy_q[i] * a.keep_scale : 0.0f;
        }
    }
};

// da, the gradient before the activation, from that behind it.
__device__ __forceinline__ float through_activation(float dy, float d, float gain, float offset) {
    const float t = d * gain + offset, sigma = sigmoid(t);
    return dy * (sigma * (1.0f + t * (1.0f - sigma)));
}

// Sums over the pixels of a part, for each channel. dh is summed where it matters: for the gradient of a channel bias.
template <class Access>
__device__ __forceinline__ void part_sums(const GroupNorm& a, const Part& part, const Tables& s, bool with_residual,
                                          Entry* entries) {
    using A = typename Access::Sums;
    using Out = typename Access::OutSums;
    constexpr int N = A::N, C = A::CHANNELS;
    const Lanes<A> lanes(part.channels, a.plan);
    lanes.for_channels(part.channels, [&](int c, bool live) {
        const Inputs<Access, A> inputs(a, part, live ? c : 0);
        float centre[C]{}, gain[C]{}, offset[C]{}, sums[3][SUMS<A>]{};
        if (live) load(s.centre + c, centre), load(s.gain + c, gain), load(s.offset + c, offset);
        lanes.for_batches(live, part.pixels, [&](int p) {
            const unsigned word = a.draw.sample ? Access::kept(a, part, lanes, c, p) : 0;
            lanes.for_accesses(p, part.pixels, [&](int j, int q) {
                float d[N], da[N];
                inputs.load(a, with_residual, word, j, q, 0, d, da);
#pragma unroll
                for (int i = 0; i < N; ++i) d[i] -= centre[A::NHWC ? i : 0];
                if (a.activation) {
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        const int k = A::NHWC ? i : 0;
                        da[i] = through_activation(da[i], d[i], gain[k], offset[k]);
                    }
                }
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    sums[0][i % SUMS<A>] += da[i];
                    sums[1][i % SUMS<A>] += da[i] * d[i];
                    sums[2][i % SUMS<A>] += d[i];
                }
            });
        });
        float total[3][C], of_dh[1][C]{};
#pragma unroll
        for (int k = 0; k < 3; ++k) collapse<A>(sums[k], total[k]);
        add_up(lanes, live, s.room, total);
        if (with_residual && a.dh.data && a.channel_bias.data) {
            float more[SUMS<A>]{};
            lanes.for_batches(live, part.pixels, [&](int p) {
                lanes.for_accesses(p, part.pixels, [&](int, int q) {
                    float g[N];
                    plane<Out>(a.dh, part, c).load(q, 0, g);
#pragma unroll
                    for (int i = 0; i < N; ++i) more[i % SUMS<A>] += g[i];
                });
            });
            collapse<A>(more, of_dh[0]);
            add_up(lanes, live, s.room, of_dh);
        }
        if (live && lanes.row == 0)
#pragma unroll
            for (int i = 0; i < C; ++i) entries[c + i] = {total[0][i], total[1][i], total[2][i], of_dh[0][i]};
    });
}

// dx of a part, from what is in the tables.
template <class Access>
__device__ __forceinline__ void make_gradient(const GroupNorm& a, const Part& part, const Tables& s, bool with_residual) {
    using A = typename Access::Result;
    using Out = typename Access::Out;
    constexpr int N = A::N;
    const Lanes<A> lanes(part.channels, a.plan);
    lanes.for_channels(part.channels, [&](int c, bool live) {
        if (!live) return;
        const Inputs<Access, A> inputs(a, part, c);
        const auto dx = plane<Out>(a.dx, a.dx2, a.channels1, part, c);
        lanes.for_batches(live, part.pixels, [&](int p) {
            const unsigned word = a.draw.sample ? Access::kept(a, part, lanes, c, p) : 0;
            lanes.for_accesses(p, part.pixels, [&](int j, int q) {
                float d[N];
                forget_tables<A>();
#pragma unroll
                for (int piece = 0; piece < Pieces<A>::COUNT; ++piece) {
                    constexpr int M = Pieces<A>::N;
                    typename Pieces<A>::Numbers centre, gain, offset, slope, level;
                    const int first = c + piece * Pieces<A>::CHANNELS;
                    load(s.centre + first, centre), load(s.gain + first, gain), load(s.offset + first, offset);
                    load(s.slope + first, slope), load(s.level + first, level);
                    float h[M], da[M];
                    inputs.load(a, with_residual, word, j, q, piece * M, h, da);
#pragma unroll
                    for (int i = 0; i < M; ++i) h[i] -= centre[A::NHWC ? i : 0];
                    if (a.activation) {
#pragma unroll
                        for (int i = 0; i < M; ++i) {
                            const int k = A::NHWC ? i : 0;
                            da[i] = through_activation(da[i], h[i], gain[k], offset[k]);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < M; ++i) {
                        const int k = A::NHWC ? i : 0;
                        d[piece * M + i] = da[i] * gain[k] + (h[i] * slope[k] + level[k]);
                    }
                }
                if (with_residual && a.dh.data) add(plane<Out>(a.dh, part, c), q, 0, d);
                dx.store(q, d);
                if (with_residual) plane<Out>(a.dresidual, part, c).store(q, d);
            });
        });
    });
}

__device__ __forceinline__ void put(const Image& to, int64_t sample, int64_t channel, float x) {
    const int64_t at = sample * to.sample_stride + channel;
    if (to.dtype == DType::f64) static_cast<double*>(to.data)[at] = x;
    else write(to.dtype, to.data, at, x);
}

// Of a group: the mean of dn = da gain, and -rstd^2 mean(dn (h - mean)).
struct Means {
    float dn, slope;
};

// What the parameters need of the sums of a channel over all pixels.
__device__ __forceinline__ void parameters(const GroupNorm& a, int64_t sample, int64_t channel, const Entry& sums,
                                           float rest, float gain, float rstd, const Means& of_group) {
    const float pixels = static_cast<float>(a.shape.height * a.shape.width);
    const float da_n = (sums.b - rest * sums.a) * rstd, centred = sums.c - rest * pixels;
    const float factor = 1.0f + read(a.scale, sample, channel, 0.0f);
    const int64_t at = sample * a.shape.channels + channel, size = a.shape.batch * a.shape.channels;
    a.small[at] = factor * da_n;
    a.small[size + at] = factor * sums.a;
    if (a.scale.data)
        put(a.dscale, sample, channel, read(a.weight, sample, channel, 0.0f) * da_n + read(a.bias, sample, channel, 0.0f) * sums.a);
    if (a.shift.data) put(a.dshift, sample, channel, sums.a);
    if (a.channel_bias.data) {
        const float of_dx = (gain * sums.a - of_group.dn * pixels) + of_group.slope * centred + sums.d;
        if (a.channel_bias.row_stride) put(a.dchannel_bias, sample, channel, of_dx);
        else a.small[2 * size + at] = of_dx;
    }
}

// Tables of dx, each thread for its channels; means(c) of the channel's group.
template <class MeansOf>
__device__ __forceinline__ void finish_channels(const Part& part, const Tables& s, MeansOf means_of) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < part.channels; c += static_cast<int>(blockDim.x)) {
        const Means m = means_of(c);
        s.slope[c] = m.slope, s.level[c] = -m.dn - m.slope * s.rest[c];
    }
}

template <class Access, bool RESIDUAL>
__global__ void __launch_bounds__(MOST_THREADS, RESIDUAL ? 2 : 3) one_read_backward_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const GroupNormPlan& plan = a.plan;
    const Part part(a.shape, plan);
    const Tables s(plan);
    Access::begin(a, part, RESIDUAL, a.draw.sample);
    read_parameters(a, part, s);
    centre_channels(a, part, s);
    Access::end();
    __syncthreads();

    part_sums<Access>(a, part, s, RESIDUAL, s.entries);
    if (plan.parts > 1) cluster_sync();
    else __syncthreads();

    // A warp for each group; every block of the cluster comes to the same numbers.
    const int of_group = static_cast<int>(a.shape.channels / a.groups), groups = part.channels / of_group;
    const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
    const float elements = static_cast<float>(of_group) * static_cast<float>(a.shape.height * a.shape.width);
    float *dn_of = reinterpret_cast<float*>(s.mean), *slope_of = dn_of + groups;
#pragma unroll 1
    for (int g = static_cast<int>(threadIdx.x / 32); g < groups; g += warps) {
        float dn = 0, dn_centred = 0;
#pragma unroll 1
        for (int i = lane; i < plan.parts * of_group; i += 32) {
            const int c = g * of_group + i % of_group;
            const Entry e = *in_block(s.entries + c, static_cast<unsigned>(i / of_group));
            dn += s.gain[c] * e.a;
            dn_centred += s.gain[c] * (e.b - s.rest[c] * e.a);
        }
        dn = sum_over_warp(dn), dn_centred = sum_over_warp(dn_centred);
        const float rstd = a.rstd[part.sample * a.groups + part.channel / of_group + g];
        if (lane == 0) dn_of[g] = dn / elements, slope_of[g] = -rstd * rstd * (dn_centred / elements);
    }
    __syncthreads();
    const auto means_of = [&](int c) { return Means{dn_of[c / of_group], slope_of[c / of_group]}; };
    finish_channels(part, s, means_of);
    // The blocks of the cluster share the channels.
#pragma unroll 1
    for (int c = part.rank + plan.parts * static_cast<int>(threadIdx.x); c < part.channels;
         c += plan.parts * static_cast<int>(blockDim.x)) {
        Entry sums{};
#pragma unroll 1
        for (int r = 0; r < plan.parts; ++r) {
            const Entry e = *in_block(s.entries + c, static_cast<unsigned>(r));
            sums.a += e.a, sums.b += e.b, sums.c += e.c, sums.d += e.d;
        }
        const float rstd = a.rstd[part.sample * a.groups + (part.channel + c) / of_group];
        parameters(a, part.sample, part.channel + c, sums, s.rest[c], s.gain[c], rstd, means_of(c));
    }
    if (plan.parts > 1) cluster_arrive();  // has read what the others hold
    __syncthreads();

    make_gradient<Access>(a, part, s, RESIDUAL);
    if (plan.parts > 1) cluster_wait();  // the others have read what this block holds
}

// The sums of a part in device memory.
template <class Access>
__device__ __forceinline__ void leave_sums(const GroupNorm& a, const Part& part, const Tables& s) {
    Access::begin(a, part, a.residual.data, a.draw.sample);
    read_parameters(a, part, s);
    centre_channels(a, part, s);
    Access::end();
    __syncthreads();
    Entry* entries = a.entries + (part.sample * a.plan.parts + part.rank) * a.shape.channels + part.channel;
    part_sums<Access>(a, part, s, a.residual.data, entries);
}

// Those of a group, from those of all parts; by a block, a warp for each channel.
__device__ __forceinline__ void merge_sums(const GroupNorm& a, int64_t sample, int64_t group) {
    const int64_t of_group = a.shape.channels / a.groups, number = sample * a.groups + group;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const double mean = a.mean[number];
    const float rstd = a.rstd[number];
    const auto rest_of = [&](int64_t c) { return Centre(mean, read(a.channel_bias, sample, c, 0.0f)).rest; };
    double dn = 0, dn_centred = 0;
    for (int64_t i = warp; i < of_group; i += blockDim.x / 32) {
        const int64_t c = group * of_group + i;
        Entry sums{};
        Entry* own = a.entries + sample * a.plan.parts * a.shape.channels + c;
#pragma unroll 1
        for (int part = lane; part < a.plan.parts; part += 32) {
            const Entry e = own[part * a.shape.channels];
            sums.a += e.a, sums.b += e.b, sums.c += e.c, sums.d += e.d;
        }
        sums = {sum_over_warp(sums.a), sum_over_warp(sums.b), sum_over_warp(sums.c), sum_over_warp(sums.d)};
        if (lane == 0) {
            *own = sums;
            const float gain = gain_of(a, sample, c).gain * rstd;
            dn += static_cast<double>(gain * sums.a);
            dn_centred += static_cast<double>(gain * (sums.b - rest_of(c) * sums.a));
        }
    }
    const double elements = static_cast<double>(of_group) * static_cast<double>(a.shape.height * a.shape.width);
    dn = sum_over_block(dn, shared_memory<double>()), dn_centred = sum_over_block(dn_centred, shared_memory<double>());
    const Means means{static_cast<float>(dn / elements), static_cast<float>(-rstd * rstd * (dn_centred / elements))};
    if (threadIdx.x == 0) a.means[2 * number] = means.dn, a.means[2 * number + 1] = means.slope;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < of_group; i += blockDim.x) {
        const int64_t c = group * of_group + i;
        const Entry& sums = a.entries[sample * a.plan.parts * a.shape.channels + c];
        parameters(a, sample, c, sums, rest_of(c), gain_of(a, sample, c).gain * rstd, rstd, means);
    }
}

// dx of a part from the means in device memory; ``there``: it lies in shared memory.
template <class Access>
__device__ __forceinline__ void apply(const GroupNorm& a, const Part& part, const Tables& s, bool there) {
    if (!there) Access::begin(a, part, a.residual.data, a.draw.sample);
    read_parameters(a, part, s);
    centre_channels(a, part, s);
    const int of_group = static_cast<int>(a.shape.channels / a.groups);
    finish_channels(part, s, [&](int c) {
        const float* means = a.means + 2 * (part.sample * a.groups + (part.channel + c) / of_group);
        return Means{means[0], means[1]};
    });
    Access::end();
    __syncthreads();
    make_gradient<Access>(a, part, s, a.residual.data);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, 2) sums_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    leave_sums<Access>(a, Part(a.shape, a.plan), Tables(a.plan));
}

// A block for each group of a sample.
__global__ void __launch_bounds__(MOST_THREADS) merge_sums_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    merge_sums(a, blockIdx.x / a.groups, blockIdx.x % a.groups);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, 2) dx_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    apply<Access>(a, Part(a.shape, a.plan), Tables(a.plan), false);
}

template <class Access>
__global__ void __launch_bounds__(MOST_THREADS, Access::Out::NHWC ? 3 : 2) cooperative_backward_kernel(const GroupNorm a) {
    let_next_kernel_start();
    const Tables s(a.plan);
    in_teams(a, [&](const Part& part, bool) { leave_sums<Access>(a, part, s); },
             [&](int64_t sample, int64_t group) { merge_sums(a, sample, group); },
             [&](const Part& part, bool there) { apply<Access>(a, part, s, there); });
}

// Shares of the samples added up: eight channels a block, 32 rows of threads along the batch. What limits it is the time
// of a launch.
__global__ void __launch_bounds__(MOST_THREADS) over_batch_kernel(const GroupNorm a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int COLUMNS = 8, ROWS = MOST_THREADS / COLUMNS;
    float* room = shared_memory<float>();
    const int column = static_cast<int>(threadIdx.x) % COLUMNS, row = static_cast<int>(threadIdx.x) / COLUMNS;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * COLUMNS + column, channels = a.shape.channels;
    const int count = a.channel_bias.data && !a.channel_bias.row_stride ? 3 : 2;
    for (int k = 0; k < count; ++k) {
        float sum = 0;
        if (channel < channels)
            for (int64_t b = row; b < a.shape.batch; b += ROWS) sum += a.small[(k * a.shape.batch + b) * channels + channel];
        room[threadIdx.x] = sum;
        __syncthreads();
        if (row == 0 && channel < channels) {
            for (int r = 1; r < ROWS; ++r) sum += room[r * COLUMNS + column];
            put(k == 0 ? a.dweight : k == 1 ? a.dbias : a.dchannel_bias, 0, channel, sum);
        }
        __syncthreads();
    }
}

template <class Access>
auto one_read(const GroupNorm& a) {
    return a.residual.data ? one_read_backward_kernel<Access, true> : one_read_backward_kernel<Access, false>;
}

}  // namespace

cudaError_t group_norm_silu_backward_clusters(const GroupNorm& a, int& clusters) {
    return with_copied(a, [&]<class Access>() { return clusters_for(one_read<Access>(a), over_parts(a, nullptr), clusters); });
}

cudaError_t group_norm_silu_backward(const GroupNorm& a, cudaStream_t stream) {
    const Launch l = over_parts(a, stream);
    Launch small = l;
    small.block = dim3(MOST_THREADS), small.shared = MOST_THREADS * sizeof(float), small.cluster = 1;
    cudaError_t error;
    if (a.plan.one_read) {
        error = with_copied(a, [&]<class Access>() { return launch(one_read<Access>(a), l, a); });
    } else if (a.plan.cooperative) {
        error = with_copied(a, [&]<class Access>() { return launch_teams(cooperative_backward_kernel<Access>, a, l); });
    } else {
        error = with_access(a, [&]<class Access>() { return launch(sums_kernel<Access>, l, a); });
        small.grid = dim3(static_cast<unsigned>(a.shape.batch * a.groups));
        if (error == cudaSuccess) error = launch(merge_sums_kernel, small, a);
        if (error == cudaSuccess) error = with_access(a, [&]<class Access>() { return launch(dx_kernel<Access>, l, a); });
    }
    if (error != cudaSuccess) return error;
    small.grid = dim3(static_cast<unsigned>(ceil_div(a.shape.channels, 8)));
    return launch(over_batch_kernel, small, a);
}

}  // namespace fastddpm::cuda
