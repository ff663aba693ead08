// Kernels of group_norm_silu, solver_step and q_sample on images of few elements that lie more than 2^32 elements apart:
// an offset of 32 bits, in a sample or from sample to sample, would go elsewhere. Usage: far; prints a line for each call,
// with "same" where the bits are those of the same images side by side.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <sys/mman.h>

#include "group_norm_silu/group_norm_silu_cuda.h"
#include "q_sample/q_sample_cuda.h"
#include "solver_step/solver_step_cuda.h"

using namespace fastddpm;
using namespace fastddpm::cuda;

constexpr int64_t BATCH = 2, FAR = int64_t(1) << 33;  // elements from sample to sample; a sample has as many places

// Float32 images of one shape, in memory of which only what is used is there.
class Images {
public:
    Images(const Shape& s, bool far, bool in_order) : s(s), in_order(in_order) {
        const int64_t pixels = s.height * s.width;
        stride = far ? FAR + 64 : s.channels * pixels;
        const int64_t channels = far && !in_order ? FAR / s.channels & -64 : pixels, rows = far && !in_order ? FAR / pixels & -64 : s.channels;
        channel = s.nhwc ? 1 : channels, pixel = s.nhwc ? rows : 1;
    }
    ~Images() {
        for (float* memory : made) munmap(memory, bytes());
    }
    // Numbers of an image, the same at every call with this seed; 0: none yet.
    Image image(int seed) {
        void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) perror("mmap"), exit(2);
        made.push_back(static_cast<float*>(memory));
        each([&](int64_t at, int64_t i) { made.back()[at] = seed ? std::sin(static_cast<float>(i * seed)) : NAN; });
        return {memory, DType::f32, stride, channel, pixel, in_order};
    }
    void read(const Image& from, std::vector<float>& to) const {
        each([&](int64_t at, int64_t) { to.push_back(static_cast<float*>(from.data)[at]); });
    }

private:
    Shape s;
    bool in_order;
    int64_t stride, channel, pixel;
    std::vector<float*> made;
    size_t bytes() const { return static_cast<size_t>(BATCH * stride) * sizeof(float); }
    template <class F>
    void each(F f) const {
        int64_t i = 0;
        for (int64_t b = 0; b < BATCH; ++b)
            for (int64_t c = 0; c < s.channels; ++c)
                for (int64_t p = 0; p < s.height * s.width; ++p) f(b * stride + c * channel + p * pixel, ++i);
    }
};

using Result = std::vector<float>;

void check(cudaError_t error) {
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error)), exit(1);
}

Result norm(Images& images, const Shape& s, int way) {
    fastddpm_group_norm_plan(0, way == 2 ? 3 : 0, way);
    std::vector<float> weight(s.channels, 1.5f), bias(s.channels, 0.25f), small(3 * BATCH * s.channels), rstd(BATCH * 4);
    std::vector<float> dweight(s.channels), dbias(s.channels), means(2 * BATCH * 4);
    std::vector<double> mean(BATCH * 4);
    GroupNorm a{};
    a.shape = s, a.channels1 = s.channels, a.groups = 4, a.eps = 1e-6f, a.activation = true;
    a.x = images.image(1), a.y = images.image(0);
    a.weight = {weight.data(), DType::f32, 0}, a.bias = {bias.data(), DType::f32, 0};
    a.mean = mean.data(), a.rstd = rstd.data(), a.small = small.data(), a.means = means.data();
    std::vector<unsigned> counters(MOST_TEAMS * COUNTER);
    a.counters = counters.data();
    Result result;
    const auto run = [&](int slabs, cudaError_t (*kernel)(const GroupNorm&, cudaStream_t)) {
        check(plan(a, slabs, a.plan));
        if ((a.plan.one_read ? 0 : a.plan.cooperative ? 2 : 1) != way) fprintf(stderr, "another way\n"), exit(1);
        std::vector<Entry> entries(BATCH * a.plan.parts * s.channels);
        a.entries = entries.data();
        check(kernel(a, nullptr));
    };
    run(1, group_norm_silu);
    images.read(a.y, result);
    a.dy = images.image(2), a.dx = images.image(0);
    a.dweight = {dweight.data(), DType::f32, 0, 1, 1, true}, a.dbias = {dbias.data(), DType::f32, 0, 1, 1, true};
    run(2, group_norm_silu_backward);
    images.read(a.dx, result);
    result.insert(result.end(), dweight.begin(), dweight.end());
    return result;
}

const int64_t numbers[] = {3, 4};  // of samples, and steps

Result step(Images& images, const Shape& s) {
    const float table[] = {0.5f, 0.25f, 0.75f, 0.5f, 0.0f, 0.5f, 0.25f, -4.0f, -2.0f};
    SolverStep a{};
    a.shape = s, a.x = images.image(1), a.out = images.image(2), a.next = images.image(0), a.pred = images.image(0);
    a.table = {table, DType::f32, 9}, a.bound = 1.0f, a.source = {7, nullptr, nullptr, numbers, 0, SAMPLER_NOISE};
    check(solver_step(a, nullptr));
    Result result;
    images.read(a.next, result), images.read(a.pred, result);
    return result;
}

Result sample(Images& images, const Shape& s, bool flip) {
    const float table[] = {0.9f, 0.1f, 0.8f, 0.2f, 0.6f, 0.4f, 0.5f, 0.5f, 0.2f, 0.8f};
    const bool flips[] = {true, true};
    QSample a{};
    a.shape = s, a.x0 = images.image(1), a.x_t = images.image(0), a.second = images.image(0), a.t = numbers;
    a.flip = flip ? flips : nullptr, a.table = {table, DType::f32, 2}, a.pixel_scale = 2.0f, a.pixel_shift = -1.0f;
    a.source = {7, nullptr, nullptr, numbers, 2, TRAINING_NOISE}, a.returns = QSampleReturns::v;
    check(q_sample(a, nullptr));
    Result result;
    images.read(a.x_t, result), images.read(a.second, result);
    return result;
}

// f(images) on images side by side, and far apart.
template <class F>
void compare(const char* name, const Shape& s, bool in_order, F f) {
    Images near(s, false, true), far(s, true, in_order);
    const Result expected = f(near), found = f(far);
    const bool same = expected.size() == found.size() && !memcmp(expected.data(), found.data(), sizeof(float) * found.size());
    printf("%s %s%s: %s\n", name, s.nhwc ? "NHWC" : "NCHW", in_order ? ", samples in order" : "", same ? "same" : "other bits");
}

int main() {
    for (const bool nhwc : {false, true}) {
        const Shape norms{BATCH, 32, 8, 8, nhwc}, pictures{BATCH, 4, 4, 8, nhwc}, odd{BATCH, 3, 5, 3, nhwc};
        const char* ways[] = {"one read", "two reads", "cooperative"};
        for (int way = 0; way < 3; ++way) compare(ways[way], norms, false, [&](Images& i) { return norm(i, norms, way); });
        for (const Shape& s : {pictures, odd})
            for (const bool in_order : {true, false}) {
                compare("solver_step", s, in_order, [&](Images& i) { return step(i, s); });
                compare("q_sample", s, in_order, [&](Images& i) { return sample(i, s, false); });
                compare("q_sample, flipped", s, in_order, [&](Images& i) { return sample(i, s, true); });
            }
    }
}
