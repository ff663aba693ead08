// How a call of group_norm_silu is cut into blocks: host code alone. It decides in which order sums are taken, and so the
// bits of the result. It asks the device for its clusters and the size of its shared memory, and nothing else, so that all
// devices of one architecture give the same bits.

#include "group_norm_silu/group_norm_silu_cuda.cuh"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fastddpm::cuda {
namespace {

constexpr int PROCESSORS = 132;       // of a large GPU: those to keep busy
constexpr int BATCHES = 16;           // that a thread takes of a part, without one_read, at most
constexpr int PART_BYTES = 64 << 10;  // that such a part takes on the chip, and one of the cooperative kernel
constexpr int MOST_CHANNELS = 1024;   // of a slab that is not read twice
constexpr int LEAST_RUN = 64;         // bytes of memory side by side, in NHWC order, of a slab of the cooperative kernel
constexpr int PORTABLE = 8;           // blocks of a cluster that every device with clusters runs; 16 is for measurements

enum Way { BY_PLAN, TWO_READS, COOPERATIVE };
int wanted_slab = 0, wanted_cluster = 0, wanted_way = BY_PLAN;  // by fastddpm_group_norm_plan
int64_t cooperative_forward = -1, cooperative_backward = -1;    // by fastddpm_group_norm_cooperative

int round_up(int64_t n, int64_t to) { return static_cast<int>(ceil_div(n, to) * to); }

// The largest power of two up to n.
int power_of_two(int64_t n) {
    int p = 1;
    while (2 * p <= n) p *= 2;
    return p;
}

// Whether 16-byte accesses suit an image: neighbours in its order, as many as fill them, and aligned.
bool suits(const Image& t, int64_t channels, int64_t pixels, DType dtype, bool nhwc) {
    if (!t.data) return true;
    const int64_t n = 16 / element_size(dtype);
    if (t.dtype != dtype || dtype == DType::f64 || alignment(t, element_size(dtype)) < 16) return false;
    return nhwc ? t.channel_stride == 1 && channels % n == 0 && (pixels == 1 || t.pixel_stride % n == 0)
                : t.pixel_stride == 1 && pixels % n == 0 && t.channel_stride % n == 0;
}

bool all_suit(const GroupNorm& a, bool nhwc) {
    const int64_t c = a.shape.channels, c1 = a.channels1, pixels = a.shape.height * a.shape.width;
    for (const Image* t : {&a.residual, &a.y, &a.h, &a.dy, &a.dh, &a.dresidual})
        if (!suits(*t, c, pixels, a.x.dtype, nhwc)) return false;
    return suits(a.x, c1, pixels, a.x.dtype, nhwc) && suits(a.dx, c1, pixels, a.x.dtype, nhwc) &&
           suits(a.x2, c - c1, pixels, a.x.dtype, nhwc) && suits(a.dx2, c - c1, pixels, a.x.dtype, nhwc);
}

// Lays out the shared memory; ``slabs``: images of the part that stay in it.
void lay_out(const GroupNorm& a, GroupNormPlan& p, int slabs) {
    const int n = p.vectors ? static_cast<int>(16 / element_size(a.x.dtype)) : 1;
    const int of_group = static_cast<int>(a.shape.channels / a.groups);
    p.slabs = static_cast<int>(ceil_div(a.shape.channels, p.slab));
    const int64_t pixels = std::min<int64_t>(p.pixels, a.shape.height * a.shape.width);
    p.lanes = power_of_two(std::clamp<int64_t>(pixels / n, 1, 32));
    p.groups_at = round_up(4 * TABLES * round_up(p.slab, 4), 16);
    p.entries_at = p.groups_at + 16 * (p.one_read ? p.slab / of_group : 0);
    p.sums_at = p.entries_at + 16 * (p.one_read ? p.slab : 0);
    // The most that add_up takes: three sums in backward. Fewer columns, in a last slab, may take up more by rounding.
    const int channels = p.vectors ? 4 : 1, columns = std::min(p.slab / channels, p.threads);
    const int sums = p.nhwc ? 4 * 3 * channels * (p.threads / 4 + columns) : 0;
    p.arrays_at = p.sums_at + round_up(sums, 16);
    p.array_bytes = p.vectors ? round_up(int64_t(p.pixels) * p.slab * element_size(a.x.dtype), 16) : 0;
    p.masks_at = p.arrays_at + slabs * p.array_bytes;
    int64_t masks = 0;
    if (p.vectors && a.draw.sample)
        masks = p.nhwc ? ceil_div(p.pixels, 4) * (p.slab / 4) * 2
                       : int64_t(p.slab) * ceil_div(p.pixels, BATCH * p.lanes * n) * p.lanes * 4;
    p.shared = p.masks_at + round_up(masks, 16);
}

// Threads for this many accesses: a batch for each, where there are few.
int threads_for(int64_t accesses) { return std::clamp(power_of_two(accesses / BATCH), 64, MOST_THREADS); }

// What a plan costs: the elements that a processor has to move, more where a block moves few, where runs of memory are
// short, and where no second block fits beside the first to load while it computes. From public figures (128 bytes a run;
// two or three blocks a processor), not yet from measurements of these kernels.
double cost(const GroupNorm& a, const GroupNormPlan& p, const Device& d) {
    const double blocks = static_cast<double>(a.shape.batch) * p.slabs * p.parts;
    const double turns = std::max(1.0, std::ceil(blocks / PROCESSORS));
    double elements = double(p.slab) * p.pixels + 1024 + 512 * std::log2(double(p.parts));
    const double run = double(p.slab) * static_cast<double>(element_size(a.x.dtype));
    if (p.nhwc && run < 128) elements *= std::sqrt(128 / run);
    const int together = (d.shared_memory + 1024) / (p.shared + 1024);
    elements *= together >= 3 ? 1.0 : together == 2 ? 1.05 : 1.2;
    return turns * elements;
}

bool one_read(const GroupNorm& a, const Device& d, int slabs, GroupNormPlan& best) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width, of_group = channels / a.groups;
    const int64_t n = 16 / element_size(a.x.dtype);
    const int64_t unit = best.nhwc ? std::lcm(of_group, n) : of_group, units = channels / unit;
    if (pixels == 0 || pixels * unit > (int64_t(1) << 24)) return false;
    bool found = false;
    double least = 0;
    const int most = d.architecture < 90 ? 1 : wanted_cluster ? 16 : PORTABLE;
    for (int parts = 1; parts <= most; parts *= 2) {
        if (wanted_cluster && d.architecture >= 90 && parts != wanted_cluster) continue;
        if (parts > 1 && ceil_div(pixels, parts) < 8) break;
        for (int64_t count = 1; count <= units; ++count) {
            GroupNormPlan p = best;
            p.one_read = true;
            p.slab = static_cast<int>(ceil_div(units, count) * unit);
            if (p.slab > MOST_CHANNELS || (count > 1 && ceil_div(units, count) == ceil_div(units, count - 1))) continue;
            if (wanted_slab && p.slab != round_up(std::min<int64_t>(wanted_slab, channels), unit)) continue;
            p.parts = parts, p.pixels = round_up(ceil_div(pixels, parts), 8);
            if (int64_t(p.pixels) * p.slab * slabs * element_size(a.x.dtype) > d.shared_memory) continue;
            p.threads = threads_for(int64_t(p.pixels) * p.slab / n);
            lay_out(a, p, slabs);
            if (p.shared > d.shared_memory) continue;
            const double c = cost(a, p, d);
            if (!found || c < least) found = true, least = c, best = p;
        }
    }
    return found;
}

// Bytes that a second-level cache keeps while two teams are at work. By architecture, and of a small GPU of each: how a
// call is cut, and so the bits of its result, do not depend on the GPU.
int64_t cache(const Device& d) {
    const int64_t megabytes = d.architecture == 86 ? 4 : d.architecture == 89 || d.architecture >= 120 ? 24 : 40;
    return megabytes << 20;
}

// Slabs of runs of 128 bytes or, of what the cache cannot hold so, half of it; in NCHW order of as many channels as a
// block takes at once. What is too large as well is left to two reads.
bool cooperative(const GroupNorm& a, const Device& d, int slabs, GroupNormPlan& best) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width, of_group = channels / a.groups;
    const int64_t size = element_size(a.x.dtype), unit = best.nhwc ? std::lcm(of_group, 16 / size) : of_group;
    const int64_t units = channels / unit;  // none where there are no samples, whose channels suit whatever they are
    if (pixels == 0 || units == 0 || pixels >= int64_t(1) << 30) return false;
    for (const int64_t run : {2 * LEAST_RUN, LEAST_RUN}) {
        const int64_t least = wanted_slab ? wanted_slab : best.nhwc ? run / size : MOST_THREADS / 32;
        const int64_t count = std::max<int64_t>(1, units / ceil_div(least, unit));
        GroupNormPlan p = best;
        p.cooperative = true;
        p.slab = static_cast<int>(std::min<int64_t>(ceil_div(units, count) * unit, MOST_CHANNELS + 1));
        const int64_t of_pixel = p.slab * slabs * size;
        if (p.slab > MOST_CHANNELS || 2 * pixels * of_pixel > cache(d)) continue;
        p.pixels = round_up(wanted_cluster ? ceil_div(pixels, wanted_cluster) : std::max<int64_t>(1, PART_BYTES / of_pixel - 7), 8);
        p.parts = static_cast<int>(ceil_div(pixels, p.pixels));
        p.threads = threads_for(int64_t(p.pixels) * p.slab * size / 16);
        lay_out(a, p, slabs);
        if (p.shared > d.shared_memory || a.shape.batch * p.slabs >= int64_t(1) << 30) continue;
        best = p;
        return true;
    }
    return false;
}

bool wants_cooperative(const GroupNorm& a) {
    const int64_t from = a.dy.data ? cooperative_backward : cooperative_forward;
    const int64_t elements = a.shape.batch * a.shape.channels * a.shape.height * a.shape.width;
    return wanted_way == COOPERATIVE || (wanted_way == BY_PLAN && from >= 0 && elements >= from);
}

void two_reads(const GroupNorm& a, int slabs, GroupNormPlan& p) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width;
    const int n = p.vectors ? static_cast<int>(16 / element_size(a.x.dtype)) : 1;
    p.threads = MOST_THREADS;
    // Pixels of a batch of all threads of a block.
    int64_t step;
    if (p.nhwc) {
        const int64_t most = std::min<int64_t>(256, MOST_THREADS * n);
        p.slab = round_up(ceil_div(channels, ceil_div(channels, most)), n);
        step = BATCH * std::max(1, MOST_THREADS / (p.slab / n));
    } else {
        const int lanes = power_of_two(std::clamp<int64_t>(pixels / n, 1, 32));
        p.slab = static_cast<int>(std::min<int64_t>(channels, MOST_THREADS / lanes));
        step = int64_t(BATCH) * lanes * n;
    }
    const int64_t steps = std::max<int64_t>(1, ceil_div(pixels, step));
    const int64_t blocks_of_a_step = a.shape.batch * ceil_div(channels, p.slab) * steps, enough = 4 * PROCESSORS;
    int64_t most = BATCHES;
    if (p.vectors) most = std::min<int64_t>(most, PART_BYTES / (step * p.slab * slabs * element_size(a.x.dtype)));
    const int64_t of_part = std::max<int64_t>(1, std::min(blocks_of_a_step / enough, most));
    p.pixels = round_up(of_part * step, 8);
    p.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(pixels, p.pixels)));
    lay_out(a, p, slabs);
}

}  // namespace

GroupNormPlan plan(const GroupNorm& a, int slabs) {
    const Device d = device();
    GroupNormPlan p{};
    if (a.shape.channels == 0) {  // a grid without blocks
        p.slab = p.parts = 1, p.pixels = 8, p.threads = MOST_THREADS;
        lay_out(a, p, 0);
        return p;
    }
    p.nhwc = a.shape.nhwc || a.shape.height * a.shape.width == 1;  // of one pixel the channels lie side by side
    p.vectors = all_suit(a, p.nhwc);
    GroupNormPlan cluster = p;
    const bool fits = p.vectors && wanted_way == BY_PLAN && one_read(a, d, slabs, cluster);
    const bool narrow = fits && p.nhwc && cluster.slab < a.shape.channels && cluster.slab * element_size(a.x.dtype) < LEAST_RUN;
    if (p.vectors && (!fits || narrow) && wants_cooperative(a) && cooperative(a, d, slabs, p)) return p;
    if (fits) return cluster;
    two_reads(a, slabs, p);
    return p;
}

}  // namespace fastddpm::cuda

extern "C" void fastddpm_group_norm_plan(int slab, int cluster, int way) {
    fastddpm::cuda::wanted_slab = slab, fastddpm::cuda::wanted_cluster = cluster, fastddpm::cuda::wanted_way = way;
}

extern "C" void fastddpm_group_norm_cooperative(int64_t forward, int64_t backward) {
    fastddpm::cuda::cooperative_forward = forward, fastddpm::cuda::cooperative_backward = backward;
}
