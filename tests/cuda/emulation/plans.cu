// How group_norm_silu is cut where the cooperative kernel takes what fits no cluster, for images of 32 groups in bfloat16
// or float32. Usage: plans channels height images (x; x and dy; x, dy and residual) nhwc float32; prints a line: which way,
// slab, parts, pixels of a part, threads, shared bytes.

#include <cstdio>
#include <cstdlib>

#include "group_norm_silu/group_norm_silu_cuda.h"

using namespace fastddpm;
using namespace fastddpm::cuda;

int main(int, char** arguments) {
    const int64_t channels = atoi(arguments[1]), height = atoi(arguments[2]), pixels = height * height;
    const int images = atoi(arguments[3]);
    const bool nhwc = atoi(arguments[4]), wide = atoi(arguments[5]);
    alignas(16) static char memory[16];
    const Image image{memory, wide ? DType::f32 : DType::bf16, channels * pixels, nhwc ? 1 : pixels, nhwc ? channels : 1, true};
    GroupNorm a{};
    a.shape = {8, channels, height, height, nhwc}, a.channels1 = channels, a.groups = 32, a.x = image;
    if (images == 1) a.y = image;
    if (images > 1) a.dy = a.dx = image;
    if (images > 2) a.residual = a.dresidual = image;
    fastddpm_group_norm_cooperative(0, 0);
    const GroupNormPlan p = plan(a, images);
    printf("%s %d %d %d %d %d\n", p.one_read ? "cluster" : p.cooperative ? "team" : "two", p.slab, p.parts, p.pixels, p.threads, p.shared);
}
