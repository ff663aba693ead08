// The machine behind cuda_runtime.h: fibers, and who may run next.

#include <cstdarg>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED(call) call
#else
#define SANITIZED(call)
#endif

extern "C" {
int emulated_cooperative_launches = 0, emulated_cluster_launches = 0;  // so far: tests look which kernels a plan has chosen
int emulated_questions = 0;  // to the device about a kernel, or orders: what a call need not say again
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

unsigned cluster_rank, cluster_size;

namespace {

int number_from(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

}  // namespace

int compute_capability = number_from("FASTDDPM_EMULATION_ARCH", 90);
int errors = number_from("FASTDDPM_EMULATION_ERRORS", 0);

namespace {

constexpr size_t STACK = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    size_t size, zeros;
};

uint64_t random_state;

// xorshift64*
uint64_t random_number() {
    random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
    return random_state * 0x2545F4914F6CDD1Dull;
}

struct Block;

// The blocks of a cluster, and its barrier: how many threads have arrived since all had the last time, and how often that was.
struct Cluster {
    std::vector<Block*> blocks;
    size_t arrived = 0;
    uint64_t phase = 0;
};

struct Fiber {
    uint3 thread, block;
    unsigned rank;
    ucontext_t context;
    void* stack = nullptr;
    void* fake_stack = nullptr;
    Block* home = nullptr;
    unsigned lane = 0, warp = 0;
    enum { ready, waiting, done } state = ready;
    Barrier at{};
    unsigned mask = 0;
    const unsigned* watched = nullptr;
    unsigned seen = 0;
    std::vector<Copy> copies;
    std::vector<std::vector<Copy>> batches;  // the oldest first
    // two places to show values in: a lane may be one exchange ahead of those that still read
    std::vector<unsigned char> shown[2];
    unsigned exchanges = 0;
    bool arrived = false;  // at the barrier of the cluster, in this phase, without having waited
    uint64_t phase = 0;
    bool early = false;  // may have started before the kernel in front of its own has ended
};

struct Block {
    std::vector<Fiber> fibers;
    unsigned char* shared = nullptr;
    size_t shared_size = 0, left = 0;
    uint64_t slowness = random_number() >> 60;  // sixteenths of the occasions to go on that it lets pass
    Cluster* cluster = nullptr;
    size_t arrived = 0;   // threads, at the barrier of the cluster
    bool asleep = false;  // since all of them have: until nobody else can go on
};

Fiber* current = nullptr;
const std::function<void()>* kernel;
ucontext_t scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
std::vector<void*> free_stacks;

void to_scheduler(Fiber* fiber, bool last) {
    SANITIZED(__sanitizer_start_switch_fiber(last ? nullptr : &fiber->fake_stack, scheduler_stack, scheduler_stack_size));
    (void)last;
    swapcontext(&fiber->context, &scheduler);
    SANITIZED(__sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_size));
}

void body() {
    SANITIZED(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size));
    (*kernel)();
    Fiber* fiber = current;
    if (fiber->early) fail("a kernel that may start early ends and does not wait for the one before it");
    if (fiber->arrived) fail("a thread has arrived at the barrier of its cluster and ends without waiting there");
    fiber->state = Fiber::done;  // copies that were not waited for never take place
    if (--fiber->home->left == 0) {
        free(fiber->home->shared);  // whoever reads it from another block now is seen by AddressSanitizer
        fiber->home->shared = nullptr;
    }
    to_scheduler(fiber, true);
}

void begin(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
}

void resume(Fiber* fiber) {
    current = fiber;
    threadIdx = fiber->thread, blockIdx = fiber->block, cluster_rank = fiber->rank;
    SANITIZED(__sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, STACK));
    swapcontext(&scheduler, &fiber->context);
    SANITIZED(__sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr));
    current = nullptr;
}

void* new_stack() {
    if (!free_stacks.empty()) {
        void* stack = free_stacks.back();
        free_stacks.pop_back();
        return stack;
    }
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the stack of a thread");
    return stack;
}

const char* name_of(Barrier barrier) {
    const char* names[] = {"a barrier or shuffle of its warp", "the barrier of its block", "the barrier of its cluster",
                           "a counter that other blocks should change"};
    return names[static_cast<int>(barrier)];
}

// Let those go on whose barrier is complete. Returns whether there were any. ``hold_back``: blocks stay where they are,
// the slow ones more often, so that those of a cluster run apart and meet at the barriers of the cluster alone.
bool release(std::vector<Block*>& blocks, bool hold_back) {
    bool any = false;
    const auto let_go = [&](const std::vector<Fiber*>& group) {
        for (Fiber* fiber : group) fiber->state = Fiber::ready;
        any = any || !group.empty();
    };
    for (Block* block : blocks) {
        bool all_at_block = true;
        std::vector<Fiber*> members, woken;
        for (auto& fiber : block->fibers) {
            members.push_back(&fiber);
            all_at_block = all_at_block && fiber.state == Fiber::waiting && fiber.at == Barrier::block;
            if (fiber.state != Fiber::waiting) continue;
            if (fiber.at == Barrier::memory && *fiber.watched != fiber.seen) woken.push_back(&fiber);
            if (fiber.at == Barrier::cluster && block->cluster->phase != fiber.phase) woken.push_back(&fiber);
        }
        if (hold_back && random_number() >> 60 < block->slowness) continue;
        let_go(woken);
        if (all_at_block) {
            let_go(members);
            continue;
        }
        for (size_t first = 0; first < members.size(); first += 32) {
            const size_t end = std::min(first + 32, members.size());
            for (size_t i = first; i < end; ++i) {  // lanes of one mask, all at the barrier with this same mask
                if (members[i]->state != Fiber::waiting || members[i]->at != Barrier::warp) continue;
                const unsigned mask = members[i]->mask;
                std::vector<Fiber*> lanes;
                bool complete = true;
                for (size_t j = first; j < first + 32; ++j) {
                    if (!(mask >> (j - first) & 1)) continue;
                    if (j >= end) {
                        if (mask == 0xffffffffu) continue;  // a last warp that is not full
                        fail("the mask %08x names a lane that the warp does not have", mask);
                    }
                    Fiber* other = members[j];
                    complete = complete && other->state == Fiber::waiting && other->at == Barrier::warp && other->mask == mask;
                    lanes.push_back(other);
                }
                if (complete) let_go(lanes);
            }
        }
    }
    return any;
}

// Run blocks that are on the device together until all their threads have ended.
void run_together(std::vector<Block*>& blocks) {
    std::vector<Fiber*> ready;
    while (true) {
        ready.clear();
        bool all_done = true, later = false;
        for (Block* block : blocks) {
            const bool held_back = blocks.size() > 1 && random_number() >> 60 < block->slowness;
            for (Fiber& fiber : block->fibers) {
                if (fiber.state == Fiber::ready && held_back && !block->asleep) later = true;
                if (fiber.state == Fiber::ready && !held_back && !block->asleep) ready.push_back(&fiber);
                all_done = all_done && fiber.state == Fiber::done;
            }
        }
        if (all_done) return;
        // also while a slow block lets its turn pass: those who need it no longer go on
        if (ready.empty() && !(blocks.size() > 1 && release(blocks, true)) && !later && !release(blocks, false)) {
            std::vector<Block*> asleep;
            for (Block* block : blocks)
                if (block->asleep) asleep.push_back(block);
            if (!asleep.empty()) {
                asleep[random_number() % asleep.size()]->asleep = false;
                continue;
            }
            std::string who;
            int shown = 0, ended = 0;
            for (Block* block : blocks)
                for (auto& fiber : block->fibers) {
                    ended += fiber.state == Fiber::done;
                    if (fiber.state == Fiber::waiting && shown++ < 8)
                        who += "\n  thread " + std::to_string(fiber.thread.x) + " of block " + std::to_string(fiber.block.x) +
                               " waits at " + name_of(fiber.at);
                }
            fail("deadlock: %d threads wait, %d have ended%s", shown, ended, who.c_str());
        }
        for (size_t left = ready.size(); left > 0; --left) {  // each once, in a random order
            const size_t pick = random_number() % left;
            std::swap(ready[pick], ready[left - 1]);
            resume(ready[left - 1]);
        }
    }
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "CUDA emulation: ");
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (current)
        fprintf(stderr, " (thread %u,%u,%u of block %u,%u,%u)", current->thread.x, current->thread.y, current->thread.z,
                current->block.x, current->block.y, current->block.z);
    fprintf(stderr, "\n");
    fflush(stderr);
    abort();
}

void wait(Barrier barrier, unsigned mask) {
    Fiber* fiber = current;
    if (fiber->early) fail("a kernel that may start early comes to a barrier or shuffle and does not wait for the one before it");
    if (barrier == Barrier::warp && !(mask >> fiber->lane & 1)) fail("lane %u waits with the others of mask %08x", fiber->lane, mask);
    fiber->state = Fiber::waiting;
    fiber->at = barrier;
    fiber->mask = mask;
    to_scheduler(fiber, false);
}

void wait_for_change(const unsigned* p, unsigned seen) {
    current->watched = p, current->seen = seen;
    wait(Barrier::memory);
}

void arrive_at_cluster() {
    Fiber* fiber = current;
    Cluster* cluster = fiber->home->cluster;
    if (fiber->arrived) fail("a thread arrives at the barrier of its cluster again and has not waited there");
    fiber->arrived = true, fiber->phase = cluster->phase;
    size_t threads = 0;
    for (Block* block : cluster->blocks) threads += block->fibers.size();
    if (++cluster->arrived == threads) cluster->arrived = 0, ++cluster->phase;
    if (++fiber->home->arrived == fiber->home->fibers.size()) fiber->home->arrived = 0, fiber->home->asleep = random_number() >> 63;
    to_scheduler(fiber, false);  // others may be well ahead before this thread goes on
}

void wait_for_cluster() {
    if (!current->arrived) fail("a thread waits at the barrier of its cluster and has not arrived there");
    wait(Barrier::cluster);
    current->arrived = false;
}

void* shared_memory() { return current->home->shared; }

void* peer_shared_memory(const void* own, unsigned rank) {
    Block* home = current->home;
    const ptrdiff_t offset = static_cast<const unsigned char*>(own) - home->shared;
    if (offset < 0 || static_cast<size_t>(offset) >= home->shared_size) fail("what is mapped to another block is not shared memory");
    if (rank >= home->cluster->blocks.size()) fail("block %u of a cluster of %zu", rank, home->cluster->blocks.size());
    Block* peer = home->cluster->blocks[rank];
    if (!peer->shared) fail("block %u of the cluster has ended, and its shared memory is gone", rank);
    return peer->shared + offset;
}

void exchange(const void* value, size_t size, unsigned mask) {
    Fiber* fiber = current;
    auto& place = fiber->shown[++fiber->exchanges % 2];
    const auto* bytes = static_cast<const unsigned char*>(value);
    place.assign(bytes, bytes + size);
    wait(Barrier::warp, mask);
}

void shown(void* value, size_t size, unsigned lane, unsigned mask) {
    Fiber* fiber = current;
    const size_t index = fiber->warp * 32 + lane;
    if (index >= fiber->home->fibers.size() || !(mask >> lane & 1)) {
        memset(value, 0xff, size);  // on a device: undefined
        return;
    }
    Fiber* other = &fiber->home->fibers[index];
    const auto& place = other->shown[fiber->exchanges % 2];
    if (place.size() != size) fail("lane %u shows %zu bytes, and lane %u reads %zu", lane, place.size(), fiber->lane, size);
    memcpy(value, place.data(), size);
}

void copy_later(void* to, const void* from, size_t size, size_t zeros) {
    if (current->early) fail("a kernel that may start early copies and does not wait for the one before it");
    if (size != 4 && size != 8 && size != 16) fail("an asynchronous copy of %zu bytes", size);
    if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
        fail("an asynchronous copy of %zu bytes from or to an address that is not a multiple of it", size);
    current->copies.push_back({to, from, size, zeros});
}

void commit_copies() {
    Fiber* fiber = current;
    fiber->batches.push_back(std::move(fiber->copies));
    fiber->copies.clear();
}

void wait_copies(size_t still_under_way) {
    Fiber* fiber = current;
    while (fiber->batches.size() > still_under_way) {
        for (const Copy& copy : fiber->batches.front()) {
            memcpy(copy.to, copy.from, copy.size - copy.zeros);
            memset(static_cast<unsigned char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
        }
        fiber->batches.erase(fiber->batches.begin());
    }
}

void wait_for_kernel_before() { current->early = false; }

namespace {

struct Allowed {
    size_t shared = 48 << 10;
    bool wide = false;
};
std::map<const void*, Allowed> allowed;

}  // namespace

void allow(const void* kernel, size_t shared, bool wide) {
    ++emulated_questions;
    Allowed& may = allowed[kernel];
    if (shared) may.shared = shared;
    may.wide = may.wide || wide;
}

bool is_allowed(const Launch& launch) {
    const Allowed may = allowed[launch.kernel];
    return launch.shared <= may.shared && (launch.cluster <= 8 || may.wide);
}

int clusters_at_once(const Launch& launch) {
    ++emulated_questions;
    static const int most = number_from("FASTDDPM_EMULATION_CLUSTER", 16);
    return is_allowed(launch) && launch.cluster <= static_cast<unsigned>(most) ? 1 : 0;
}

int run(const Launch& launch, const std::function<void()>& body_of_kernel) {
    const uint64_t grid = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    const unsigned cluster = std::max(1u, launch.cluster);
    int shared_most = 0;
    cudaDeviceGetAttribute(&shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    if (grid == 0 || threads == 0 || threads > 1024 || launch.grid.y > 65535 || launch.grid.z > 65535 ||
        launch.grid.x > 0x7fffffffu || launch.shared > static_cast<size_t>(shared_most))
        return cudaErrorInvalidConfiguration;
    if (launch.cooperative && grid > uint64_t(PROCESSORS * BLOCKS_OF_PROCESSOR)) return cudaErrorCooperativeLaunchTooLarge;
    if (cluster > 1 && (compute_capability < 90 || cluster > 16 || launch.grid.x % cluster))
        return cudaErrorInvalidConfiguration;
    if (!is_allowed(launch)) return cudaErrorInvalidValue;
    emulated_cooperative_launches += launch.cooperative, emulated_cluster_launches += cluster > 1;
    static const uint64_t seed = number_from("FASTDDPM_EMULATION_SEED", 1);
    static uint64_t launches = 0;  // each in an order of its own, the same in every run of the process
    random_state = (seed * 0x9E3779B97F4A7C15ull ^ ++launches * 0xBF58476D1CE4E5B9ull) | 1;
    kernel = &body_of_kernel;
    blockDim = launch.block, gridDim = launch.grid, cluster_size = cluster;

    const uint64_t together = launch.cooperative ? grid : cluster;
    std::vector<uint64_t> order(grid / together);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t left = order.size(); left > 1; --left) std::swap(order[random_number() % left], order[left - 1]);
    for (const uint64_t group : order) {
        std::vector<std::unique_ptr<Block>> blocks;
        std::vector<Cluster> clusters(together / cluster);
        std::vector<Block*> all;
        for (uint64_t i = 0; i < together; ++i) {
            const uint64_t index = group * together + i;
            auto block = std::make_unique<Block>();
            block->shared_size = launch.shared;
            void* shared = nullptr;
            if (posix_memalign(&shared, 128, std::max<size_t>(1, launch.shared)) != 0) fail("no shared memory");
            memset(shared, 0xff, launch.shared);  // NaN in every float type
            block->shared = static_cast<unsigned char*>(shared);
            block->left = threads;
            block->cluster = &clusters[i / cluster];
            clusters[i / cluster].blocks.push_back(block.get());
            block->fibers = std::vector<Fiber>(threads);
            for (unsigned t = 0; t < threads; ++t) {
                Fiber& fiber = block->fibers[t];
                fiber.thread = {t % launch.block.x, t / launch.block.x % launch.block.y, t / launch.block.x / launch.block.y};
                fiber.block = {static_cast<unsigned>(index % launch.grid.x), static_cast<unsigned>(index / launch.grid.x % launch.grid.y),
                                static_cast<unsigned>(index / launch.grid.x / launch.grid.y)};
                fiber.rank = i % cluster;
                fiber.home = block.get();
                fiber.early = launch.dependent;
                fiber.lane = t % 32, fiber.warp = t / 32;
                fiber.stack = new_stack();
                begin(fiber);
            }
            all.push_back(block.get());
            blocks.push_back(std::move(block));
        }
        run_together(all);
        for (auto& block : blocks)
            for (auto& fiber : block->fibers) free_stacks.push_back(fiber.stack);
    }
    return cudaSuccess;
}

}  // namespace emulation
