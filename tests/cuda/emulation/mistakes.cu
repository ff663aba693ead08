// A sum over a cluster of blocks, right (mistake 0) and with one mistake each, and one over the blocks of a cooperative
// launch: tests/cuda/test_emulation.py expects the emulation to find every mistake. Usage: mistakes N; prints the sum, or
// ends with what was found.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/cuda/platform.cuh"

using namespace fastddpm::cuda;

enum Mistake {
    none,
    no_block_barrier,          // a warp reads sums that another has not written
    no_cluster_barrier,        // a block reads the sum of another that has not written it
    no_last_cluster_barrier,   // a block ends while others still read its shared memory
    no_wait_for_copies,        // what was copied asynchronously is read at once
    barrier_for_some,          // half of the threads do not come to the barrier
    shuffle_for_some,          // a lane does not come to a shuffle of all
    beyond_global,             // reads behind an array
    beyond_shared,             // writes behind the shared memory
    nothing_written,           // reads shared memory that nobody has written
    misaligned,                // 16 bytes from an address that is not a multiple of 16
    too_much_shared,           // more shared memory than a block may take
    cooperative,               // none, but for the other kernel; and its own:
    no_meeting,                // a block reads the sums of others that have not written them
    meeting_for_some,          // a block does not come
    too_many_blocks,           // more than the device has room for at once
    of_the_first,              // from here on of the first kernel again
    no_wait_for_kernel = of_the_first,  // which may start early: does not wait for the one before it
    late_wait_for_kernel,      // copies before it waits
    early_arrival,             // arrives at the barrier of the cluster before it has read what others hold
    no_arrival,                // waits there without
    two_arrivals,              // without waiting in between
    end_behind_arrival,        // ends without waiting
};

constexpr int THREADS = 64, WARPS = THREADS / 32, BLOCKS = 2;

__global__ void sum_kernel(const float* x, float* out, const Mistake mistake) {
    float* tile = shared_memory<float>();  // [THREADS]
    float* sums = tile + THREADS;          // [WARPS + 1], the last that of the block
    const int t = threadIdx.x, at = blockIdx.x * THREADS + t;
    const bool late = mistake == late_wait_for_kernel;
    if (mistake == no_wait_for_kernel) return;
    if (!late) wait_for_previous_kernel();
    if (t % 4 == 0) copy_16_bytes(tile + t, x + at + (mistake == misaligned));
    if (late) wait_for_previous_kernel();
    commit_copies();
    if (mistake != no_wait_for_copies) wait_for_copies();
    if (mistake != no_block_barrier) __syncthreads();
    float sum = tile[t ^ 33];  // written by a thread of another warp
    if (mistake == beyond_global) sum += x[at + BLOCKS * THREADS];
    if (mistake == barrier_for_some && t < 32) return;
    if (mistake != shuffle_for_some || t != 5)
        for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, with);
    if (t % 32 == 0) sums[t / 32] = sum;
    __syncthreads();
    if (t == 0) sums[WARPS + (mistake == beyond_shared)] = sums[0] + sums[1];
    if (mistake != no_cluster_barrier) cluster_sync();
    if (mistake == early_arrival || mistake == two_arrivals) cluster_arrive();
    if (t == 0 && cluster_rank() == 0) {
        float total = 0;
        for (unsigned rank = 0; rank < BLOCKS; ++rank) total += *in_block(sums + WARPS, rank);
        *out = total + (mistake == nothing_written ? tile[THREADS + WARPS + 1] : 0);
    }
    if (mistake == no_last_cluster_barrier) return;
    if (mistake != early_arrival && mistake != no_arrival) cluster_arrive();  // has read what the others hold
    if (mistake != end_behind_arrival) cluster_wait();
}

// Every block leaves a sum in device memory, and adds up those of all, which must be the same.
__global__ void cooperative_kernel(const float* x, float* sums, float* out, unsigned* counter, const Mistake mistake) {
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int i = 0; i < THREADS; ++i) sum += x[blockIdx.x % BLOCKS * THREADS + i];
        sums[blockIdx.x] = sum;
    }
    if (mistake == meeting_for_some && blockIdx.x == 1) return;
    if (mistake != no_meeting) meet(counter, gridDim.x);
    if (threadIdx.x == 0) {
        float total = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) total += sums[b];
        out[blockIdx.x] = total;
    }
}

int together(const std::vector<float>& x, Mistake mistake) {
    const unsigned blocks = mistake == too_many_blocks ? 10 : 8;
    std::vector<float> sums(blocks, NAN), out(blocks, NAN);
    unsigned counter = 0;
    Launch l;
    l.grid = dim3(blocks), l.block = dim3(THREADS), l.cooperative = true;
    int room = 0;
    cudaError_t error = room_for(cooperative_kernel, l, room);
    if (error == cudaSuccess && room != 8) return 2;
    if (error == cudaSuccess)
        error = launch(cooperative_kernel, l, x.data(), sums.data(), out.data(), &counter, mistake);
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
    for (float total : out)
        if (total != out[0]) out[0] = NAN;
    printf("%g\n", out[0] * BLOCKS / static_cast<float>(blocks));
    return error != cudaSuccess;
}

int main(int, char** arguments) {
    const auto mistake = static_cast<Mistake>(atoi(arguments[1]));
    std::vector<float> x(BLOCKS * THREADS);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
    if (mistake >= cooperative && mistake < of_the_first) return together(x, mistake);
    float out = -1;
    Launch l;
    l.grid = dim3(BLOCKS), l.block = dim3(THREADS), l.cluster = BLOCKS, l.dependent = true;
    l.shared = (THREADS + WARPS + 1 + (mistake == nothing_written)) * sizeof(float);
    if (mistake == too_much_shared) l.shared = 1 << 20;
    const cudaError_t error = launch(sum_kernel, l, static_cast<const float*>(x.data()), &out, mistake);
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
    printf("%g\n", out);
    return error != cudaSuccess;
}
