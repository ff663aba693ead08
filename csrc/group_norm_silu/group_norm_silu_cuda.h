#pragma once

#include "common/cuda/data.h"

namespace fastddpm::cuda {

// What is known of a channel of a sample, or of a part of its pixels. Forward: mean, what its rounding took away, the
// squares of the deviations, the count. Backward: sums of da, da (h - centre), h - centre, and dh; see the kernels.
struct alignas(16) Entry {
    float a, b, c, d;
};

// How a call is cut. Slabs of channels by parts of the pixels are blocks: a part has `pixels` of them, the last fewer.
struct GroupNormPlan {
    bool vectors;   // 16 bytes an access; otherwise one element, of any dtype and order
    bool nhwc;      // channels lie side by side
    bool one_read;  // the slab stays in the shared memory of `parts` blocks, a cluster, from the statistics to the end
    bool cooperative;  // one kernel whose blocks are on the device all at once: a team of `members` takes slab after slab
    int slab;       // channels; whole groups with one_read
    int slabs;      // of a sample, the last one narrower
    int parts, pixels;
    int members;         // of a team; the launcher knows what the device has room for
    int threads, lanes;  // lanes: of those, neighbours along a row of pixels in NCHW order
    // Shared memory, in bytes from its start: tables of the slab's channels, numbers of its groups, entries of its
    // channels, room to add up, the slabs, dropout masks.
    int groups_at, entries_at, sums_at, arrays_at, array_bytes, masks_at, shared;
};

constexpr int MOST_TEAMS = 1024, COUNTER = 32;  // a counter to a cache line of 128 bytes

struct GroupNorm {
    Shape shape;        // C counts the channels of x and x2
    int64_t channels1;  // of x
    int64_t groups;
    Image x, x2, residual, y, h;                      // forward
    Image dy, dh, dx, dx2, dresidual;                 // backward
    Values weight, bias, channel_bias, scale, shift;  // [C] or [B, C]
    float eps, keep_scale;                            // keep_scale: 1 / (1 - dropout)
    bool activation;
    Source draw;          // of dropout; no sample: none
    uint32_t drop_below;  // words below it drop their element
    double* mean;         // [B, G]
    float* rstd;          // [B, G]
    Entry* entries;       // [B, parts, C], without one_read; merging leaves the sums of backward in part 0
    unsigned* counters;   // [MOST_TEAMS, COUNTER], with cooperative: where the blocks of a team meet
    float* means;         // [B, G, 2], of dx, without one_read
    float* small;         // [3, B, C]: shares of the samples in dweight, dbias and dchannel_bias
    Image dweight, dbias, dchannel_bias, dscale, dshift;  // [C] or [B, C]: data, dtype and sample_stride alone
    GroupNormPlan plan;
};

// Calls of such sizes, and how they are cut: what measurements decide (_gpu_defaults.py).
struct GroupNormCut {
    int64_t backward, channels[2], pixels[2], size;  // the first and the last; size: bytes of a number
    int64_t way;          // 0: one read, by a cluster; 1: two reads; 2: the cooperative kernel
    int64_t slab, parts;  // 0 leaves them to the plan
};

// ``slabs``: images as large as y that stay on the chip in one_read: x, the residual and, in backward, dy.
[[nodiscard]] cudaError_t plan(const GroupNorm& a, int slabs, GroupNormPlan& p);

[[nodiscard]] cudaError_t group_norm_silu(const GroupNorm& a, cudaStream_t stream);
[[nodiscard]] cudaError_t group_norm_silu_backward(const GroupNorm& a, cudaStream_t stream);

// How many clusters of the plan of a call, which has one, the device runs at once.
[[nodiscard]] cudaError_t group_norm_silu_clusters(const GroupNorm& a, int& clusters);
[[nodiscard]] cudaError_t group_norm_silu_backward_clusters(const GroupNorm& a, int& clusters);

}  // namespace fastddpm::cuda

// For measurements: from now on slabs of this many channels in clusters of this many blocks (with way 2 in so many parts),
// where that is possible; way 1: two reads, 2: the cooperative kernel. 0 leaves a choice to the plan.
extern "C" __attribute__((visibility("default"))) void fastddpm_group_norm_plan(int slab, int cluster, int way);

// From now on calls that a row fits, the first of these, are cut as it says, where that is possible.
extern "C" __attribute__((visibility("default"))) void fastddpm_group_norm_cuts(const fastddpm::cuda::GroupNormCut* rows, int64_t count);
