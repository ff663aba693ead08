// How group_norm_silu cuts images of 32 groups, with every address aligned. Arguments: the numbers of rows of a table, nine
// each (GroupNormCut). Reads calls, a line each: channels height batch backward residual nhwc float32 (else bfloat16); prints
// for each: which way, slab, parts, pixels of a part, threads, shared bytes.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "group_norm_silu/group_norm_silu_cuda.h"

using namespace fastddpm;
using namespace fastddpm::cuda;

int main(int count, char** arguments) {
    std::vector<GroupNormCut> rows(static_cast<size_t>(count / 9));
    for (size_t r = 0; r < rows.size(); ++r) {
        const auto number = [&](size_t i) { return static_cast<int64_t>(atoll(arguments[1 + 9 * r + i])); };
        rows[r] = {number(0), {number(1), number(2)}, {number(3), number(4)}, number(5), number(6), number(7), number(8)};
    }
    fastddpm_group_norm_cuts(rows.data(), static_cast<int64_t>(rows.size()));
    long long channels, height, batch;
    int backward, residual, nhwc, wide;
    while (scanf("%lld %lld %lld %d %d %d %d", &channels, &height, &batch, &backward, &residual, &nhwc, &wide) == 7) {
        alignas(16) static char memory[16];
        const int64_t pixels = height * height;
        const Image image{memory, wide ? DType::f32 : DType::bf16, channels * pixels, nhwc ? 1 : pixels, nhwc ? channels : 1, true};
        GroupNorm a{};
        a.shape = {batch, channels, height, height, nhwc != 0}, a.channels1 = channels, a.groups = 32, a.x = image;
        if (backward) a.dy = a.dx = image;
        else a.y = image;
        if (residual) a.residual = image;
        if (residual) (backward ? a.dresidual : a.h) = image;
        GroupNormPlan p;
        if (plan(a, 1 + backward + residual, p) != cudaSuccess) return 1;
        printf("%s %d %d %d %d %d\n", p.one_read ? "cluster" : p.cooperative ? "team" : "two", p.slab, p.parts, p.pixels, p.threads, p.shared);
    }
}
