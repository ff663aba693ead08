// How a call of group_norm_silu is cut into blocks: host code alone. It decides in which order sums are taken, and so the
// bits of the result. It asks the device for its clusters and the size of its shared memory, and nothing else, so that all
// devices of one architecture give the same bits, but for those (slices of a GPU) that cannot run clusters as large.

#include "group_norm_silu/group_norm_silu_cuda.cuh"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <mutex>
#include <numeric>
#include <vector>

namespace fastddpm::cuda {
namespace {

constexpr int PROCESSORS = 132;       // of a large GPU: those to keep busy
constexpr int BATCHES = 16;           // that a thread takes of a part, without one_read, at most
constexpr int PART_BYTES = 64 << 10;  // that such a part takes on the chip, and one of the cooperative kernel
constexpr int MOST_CHANNELS = 1024;   // of a slab that is not read twice
constexpr int LEAST_RUN = 64;         // bytes of memory side by side, in NHWC order, of a slab of the cooperative kernel
constexpr int PORTABLE = 8, MOST_BLOCKS = 16;  // of a cluster: by the estimates below, and where a measurement wants more

enum Way { CLUSTER, TWO_READS, COOPERATIVE };

GroupNormCut forced{};             // by fastddpm_group_norm_plan
std::vector<GroupNormCut> table;   // by fastddpm_group_norm_cuts
std::atomic<int64_t> changes = 0;  // of the two, so far: plans that were kept are for a number of them
std::mutex changing;

bool is_forced() { return forced.way || forced.slab || forced.parts; }

// What the table says of a call, or null.
const GroupNormCut* row_of(const GroupNorm& a) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width;
    for (const GroupNormCut& row : table)
        if (row.backward == (a.dy.data != nullptr) && row.channels[0] <= channels && channels <= row.channels[1] &&
            row.pixels[0] <= pixels && pixels <= row.pixels[1] && row.size == element_size(a.x.dtype))
            return &row;
    return nullptr;
}

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

// What the plan goes by where no table of measurements has a row: estimates for an H100 from public figures of copies
// (quack, AI/global_memory_coalescing_notes.md), not measured with these kernels. 2.68 TB/s in runs of 128 bytes side by
// side and 2.89 in runs of 512; in runs of 32 only 1.47 and, stored, 1.0, and of 16 0.55 and 0.25: a cluster that moves
// such runs once would take longer than two reads of long ones.
constexpr double SHORT_RUN = 128, LONG_RUN = 512, SHORT_RATE = 2.68e6, LONG_RATE = 2.89e6;  // bytes a microsecond
constexpr double LAUNCH = 2.3, LATENCY = 0.7;   // microseconds: of a kernel; of a block, at least
constexpr double FASTEST = 2;  // times its share that a processor moves where others are idle: exponentials allow no more
constexpr double ALONE = 1.2, IN_PAIRS = 1.05;  // times as long, where no second, no third block loads while one computes
constexpr double EXCHANGE = 0.1, SPREAD = 0.04;  // of a cluster, each time its size doubles; so much longer, since the
                                                 // processors stand in groups of 16 or 18, of which some are left over

// Bytes side by side of a part: all of it where it has all channels or, in NCHW order, all pixels.
double run_of(const GroupNorm& a, const GroupNormPlan& p) {
    const double size = static_cast<double>(element_size(a.x.dtype)), all = size * p.slab * p.pixels;
    if (p.nhwc) return p.slab < a.shape.channels ? size * p.slab : all;
    return p.parts > 1 ? size * p.pixels : all;
}

// The microseconds of a call.
double cost(const GroupNorm& a, const GroupNormPlan& p, const Device& d, int slabs) {
    const double blocks = static_cast<double>(a.shape.batch) * p.slabs * p.parts, run = run_of(a, p);
    const double turns = std::max(1.0, std::ceil(blocks / PROCESSORS));
    const double share = std::clamp(std::log2(run / SHORT_RUN) / std::log2(LONG_RUN / SHORT_RUN), 0.0, 1.0);
    const double rate = (SHORT_RATE + share * (LONG_RATE - SHORT_RATE)) / std::clamp<double>(blocks, PROCESSORS / FASTEST, PROCESSORS);
    const int reads = p.one_read ? 1 : 2, stores = a.residual.data ? 2 : 1;  // y and h, dx and dresidual
    const double bytes = double(reads * slabs + stores) * p.slab * p.pixels * static_cast<double>(element_size(a.x.dtype));
    const int together = (d.shared_memory + 1024) / (p.shared + 1024);
    double block = std::max(bytes / rate, reads * LATENCY);
    block *= together >= 3 ? 1.0 : together == 2 ? IN_PAIRS : ALONE;
    if (p.one_read) block += (EXCHANGE + SPREAD * block) * std::log2(double(p.parts));
    return turns * block + (p.one_read ? 1 : 3) * LAUNCH;
}

// The cheapest cluster of up to ``most`` blocks, of those that are wanted.
bool one_read(const GroupNorm& a, const Device& d, int slabs, const GroupNormCut& wanted, int most, GroupNormPlan& best) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width, of_group = channels / a.groups;
    const int64_t n = 16 / element_size(a.x.dtype);
    const int64_t unit = best.nhwc ? std::lcm(of_group, n) : of_group, units = channels / unit;
    if (pixels == 0 || pixels * unit > (int64_t(1) << 24)) return false;
    const GroupNormPlan empty = best;
    bool found = false;
    double least = 0;
    for (int parts = 1; parts <= most; parts *= 2) {
        if (wanted.parts && d.architecture >= 90 && parts != wanted.parts) continue;
        if (parts > 1 && ceil_div(pixels, parts) < 8) break;
        for (int64_t count = 1; count <= units; ++count) {
            GroupNormPlan p = empty;
            p.one_read = true;
            p.slab = static_cast<int>(ceil_div(units, count) * unit);
            if (p.slab > MOST_CHANNELS || (count > 1 && ceil_div(units, count) == ceil_div(units, count - 1))) continue;
            if (wanted.slab && p.slab != round_up(std::min<int64_t>(wanted.slab, channels), unit)) continue;
            p.parts = parts, p.pixels = round_up(ceil_div(pixels, parts), 8);
            if (!wanted.slab && run_of(a, p) < SHORT_RUN && p.slab < channels) continue;
            if (int64_t(p.pixels) * p.slab * slabs * element_size(a.x.dtype) > d.shared_memory) continue;
            p.threads = threads_for(int64_t(p.pixels) * p.slab / n);
            lay_out(a, p, slabs);
            if (p.shared > d.shared_memory) continue;
            const double c = cost(a, p, d, slabs);
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
bool cooperative(const GroupNorm& a, const Device& d, int slabs, const GroupNormCut& wanted, GroupNormPlan& best) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width, of_group = channels / a.groups;
    const int64_t size = element_size(a.x.dtype), unit = best.nhwc ? std::lcm(of_group, 16 / size) : of_group;
    const int64_t units = channels / unit;  // none where there are no samples, whose channels suit whatever they are
    if (pixels == 0 || units == 0 || pixels >= int64_t(1) << 30) return false;
    for (const int64_t run : {2 * LEAST_RUN, LEAST_RUN}) {
        const int64_t least = wanted.slab ? wanted.slab : best.nhwc ? run / size : MOST_THREADS / 32;
        const int64_t count = std::max<int64_t>(1, units / ceil_div(least, unit));
        GroupNormPlan p = best;
        p.cooperative = true;
        p.slab = static_cast<int>(std::min<int64_t>(ceil_div(units, count) * unit, MOST_CHANNELS + 1));
        const int64_t of_pixel = p.slab * slabs * size;
        if (p.slab > MOST_CHANNELS || 2 * pixels * of_pixel > cache(d)) continue;
        p.pixels = round_up(wanted.parts ? ceil_div(pixels, wanted.parts) : std::max<int64_t>(1, PART_BYTES / of_pixel - 7), 8);
        p.parts = static_cast<int>(ceil_div(pixels, p.pixels));
        p.threads = threads_for(int64_t(p.pixels) * p.slab * size / 16);
        lay_out(a, p, slabs);
        if (p.shared > d.shared_memory || a.shape.batch * p.slabs >= int64_t(1) << 30) continue;
        best = p;
        return true;
    }
    return false;
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

// A cluster that the device can run: of up to 8 blocks or, where those find no room together, fewer.
cudaError_t cluster(const GroupNorm& a, const Device& d, int slabs, const GroupNormCut& wanted, GroupNormPlan& p, bool& found) {
    int most = d.architecture < 90 ? 1 : wanted.parts ? static_cast<int>(wanted.parts) : PORTABLE;
    GroupNorm tried = a;
    for (found = false; !found && most >= 1 && wanted.parts <= most; most = tried.plan.parts / 2) {
        tried.plan = p;
        if (!one_read(a, d, slabs, wanted, most, tried.plan)) break;
        int room = 1;
        cudaError_t error = cudaSuccess;
        if (tried.plan.parts > 1)
            error = a.dy.data ? group_norm_silu_backward_clusters(tried, room) : group_norm_silu_clusters(tried, room);
        if (error != cudaSuccess) return error;
        found = room > 0;
    }
    if (found) p = tried.plan;
    return cudaSuccess;
}

// What is forced, where that is possible, else two reads; what the table says, where it is; what costs least.
cudaError_t choose(const GroupNorm& a, const Device& d, int slabs, GroupNormPlan& p) {
    GroupNormPlan other = p;
    two_reads(a, slabs, other);
    bool found = false;
    if (p.vectors && is_forced()) {
        const int most = d.architecture < 90 ? 1 : forced.parts ? MOST_BLOCKS : PORTABLE;
        found = forced.way == CLUSTER ? one_read(a, d, slabs, forced, most, p)
                                      : forced.way == COOPERATIVE && cooperative(a, d, slabs, forced, p);
    } else if (p.vectors) {
        const GroupNormCut* row = p.nhwc ? row_of(a) : nullptr;
        cudaError_t error = cudaSuccess;
        if (row && row->way == COOPERATIVE) found = cooperative(a, d, slabs, *row, p);
        if (row && row->way == CLUSTER) error = cluster(a, d, slabs, *row, p, found);
        if (error == cudaSuccess && !found && !(row && row->way == TWO_READS)) {
            error = cluster(a, d, slabs, {}, p, found);
            found = found && cost(a, p, d, slabs) <= cost(a, other, d, slabs);
        }
        if (error != cudaSuccess) return error;
    }
    if (!found) p = other;
    return cudaSuccess;
}

}  // namespace

cudaError_t plan(const GroupNorm& a, int slabs, GroupNormPlan& p) {
    Device d;
    cudaError_t error = device(d);
    if (error != cudaSuccess) return error;
    p = {};
    if (a.shape.channels == 0) {  // a grid without blocks
        p.slab = p.parts = 1, p.pixels = 8, p.threads = MOST_THREADS;
        lay_out(a, p, 0);
        return cudaSuccess;
    }
    const int64_t pixels = a.shape.height * a.shape.width;
    p.nhwc = a.shape.nhwc || pixels == 1;  // of one pixel the channels lie side by side
    p.vectors = all_suit(a, p.nhwc);
    // The search takes some microseconds: a thread keeps what it found last for each of some calls.
    const std::array<int64_t, 13> call{
        changes, d.index, a.shape.batch, a.shape.channels, pixels, a.groups, static_cast<int64_t>(a.x.dtype), p.nhwc, p.vectors,
        slabs, a.dy.data != nullptr, a.residual.data != nullptr, a.draw.sample != nullptr};
    struct Kept {
        std::array<int64_t, 13> call;
        GroupNormPlan plan;
    };
    static thread_local Kept kept[256];  // at first those of calls without channels, which do not come here
    uint64_t hash = 0;
    for (const int64_t number : call) hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15ull, hash ^= hash >> 32;
    Kept& last = kept[hash % 256];
    if (last.call == call) {
        p = last.plan;
        return cudaSuccess;
    }
    const std::lock_guard<std::mutex> lock(changing);
    error = choose(a, d, slabs, p);
    if (error == cudaSuccess) last = {call, p};
    return error;
}

}  // namespace fastddpm::cuda

extern "C" void fastddpm_group_norm_plan(int slab, int cluster, int way) {
    using namespace fastddpm::cuda;
    const std::lock_guard<std::mutex> lock(changing);
    forced = {}, forced.slab = slab, forced.parts = cluster, forced.way = way;
    ++changes;
}

extern "C" void fastddpm_group_norm_cuts(const fastddpm::cuda::GroupNormCut* rows, int64_t count) {
    using namespace fastddpm::cuda;
    const std::lock_guard<std::mutex> lock(changing);
    table.assign(rows, rows + count);
    ++changes;
}
