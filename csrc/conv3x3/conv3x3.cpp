// fastddpm::conv3x3, its transformed weights and its backward: schemas and host code. What they compute:
// fastddpm/ops/conv3x3/reference.py.

#include "conv3x3/conv3x3.h"

#include <array>

#include "common/host.h"

namespace fastddpm {
namespace {

enum { OF_ITEM, OF_WEIGHTS, OF_SUMS, OF_WAVE = OF_SUMS };  // uses of kept memory; the last two are never at a time

int64_t frequencies(int64_t tile) { return (tile + 2) * (tile + 2); }

Conv3x3 arguments(const Tensor& x, int64_t outputs, int64_t tile) {
    Conv3x3 a{};
    a.tile = tile;
    a.shape = shape(x);
    a.outputs = outputs;
    a.down = ceil_div(a.shape.height, tile), a.across = ceil_div(a.shape.width, tile);
    a.tiles = a.shape.batch * a.down * a.across;
    a.x = image(x, a.shape);
    // Of 2x2, as many as the second cache holds with all their channels: the weights are read once for each block. Of 4x4,
    // as measured: fewer leave no time to ask for the next weights, and more leave too few blocks for the threads.
    const int64_t channels = std::max<int64_t>(1, a.shape.channels);
    const int64_t most = tile == 4 ? 3 : std::clamp<int64_t>(300'000 / (16 * channels) / BLOCK, 1, 8);  // of BLOCK each
    const int64_t groups = ceil_div(a.tiles, BLOCK);
    a.blocks = ceil_div(groups, most);
    a.block = a.blocks == 0 ? 0 : ceil_div(groups, a.blocks) * BLOCK;
    a.scratch = frequencies(tile) * (a.block * (channels + PANEL) + 2 * APART) + PANEL + channels;
    return a;
}

// Sizes of transformed weights: panels, frequencies, channels, PANEL.
std::array<int64_t, 4> sizes_of_weights(const Tensor& weight, bool turned, int64_t tile) {
    return {ceil_div(weight.size(turned ? 1 : 0), PANEL), frequencies(tile), weight.size(turned ? 0 : 1), PANEL};
}

Conv3x3Weights arguments(const Tensor& weight, bool turned, int64_t tile, void* to) {
    const int64_t n = turned ? 1 : 0, k = 1 - n;
    return {tile, weight.size(n), weight.size(k), weight.stride(n), weight.stride(k), weight.stride(2), weight.stride(3),
            turned, values(weight, 0), to};
}

void transform(const Tensor& weight, bool turned, int64_t tile, float* to) {
    const auto [panels, of_tile, channels, panel] = sizes_of_weights(weight, turned, tile);
    const Conv3x3Weights a = arguments(weight, turned, tile, to);
    parallel(panels * ceil_div(channels, TOGETHER), TOGETHER * panel * (9 + of_tile),
             [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_weights)(a, begin, end); });
}

// Whether tiles are taken in waves. A block reads its transformed weights again, which are as many as channels x outputs;
// a wave writes and reads what tiles are transformed to, as much as channels + outputs, in the third cache. Where the two
// take as long was measured: between 128 channels to 128 and 128 to 256.
bool in_waves(const Conv3x3& a) {
    return a.shape.channels * a.outputs > 80 * (a.shape.channels + a.outputs);
}

// Few threads have a smaller wave nearer to them, many have to wait for each other less often in a larger one. A tile is
// the same in any.
int64_t largest_wave() { return WAVE * caches(); }

// In waves that are alike, and as large as they may be.
void run_waves(const Conv3x3& a) {
    const int64_t of_tile = frequencies(a.tile), channels = a.shape.channels, panels = ceil_div(a.outputs, PANEL);
    const int64_t most = std::max<int64_t>(1, largest_wave() / (of_tile * (channels + panels * PANEL)) / BLOCK);  // of BLOCK each
    const int64_t groups = std::max<int64_t>(1, ceil_div(a.tiles, BLOCK)), rows = ceil_div(groups, ceil_div(groups, most)) * BLOCK;
    Conv3x3Wave w{a, 0, 0, rows, rows * channels + APART, panels * rows * PANEL + APART, nullptr, nullptr, nullptr};
    w.v = scratch<OF_WAVE>(of_tile * (w.v_apart + w.m_apart) + channels), w.m = w.v + of_tile * w.v_apart;
    float* zeros = w.m + of_tile * w.m_apart;
    w.zeros = std::fill_n(zeros, channels, 0.0f) - channels;
    for (; w.first < a.tiles; w.first += rows) {
        w.count = std::min(rows, a.tiles - w.first);
        parallel(w.count, of_tile * channels,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_input)(w, begin, end); });
        parallel(of_tile * panels, rows * channels,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_products)(w, begin, end); });
        parallel(w.count, of_tile * a.outputs,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_output)(w, begin, end); });
    }
}

// So many tiles of a block with so many output channels are an item of the kernel.
template <class Kernel>
void run_blocks(const Conv3x3& a, int64_t tiles, int64_t together, const Kernel& kernel) {
    parallel(a.blocks * (a.block / std::max<int64_t>(1, tiles)) * ceil_div(a.outputs, together),
             tiles * a.tile * a.tile / 4 * together * a.shape.channels,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch<OF_ITEM>(a.scratch)); });
}

template <class Run>
Tensor convolution(Conv3x3& a, const Tensor& x, const MaybeTensor& bias, const Run& run) {
    Shape of_y = a.shape;
    of_y.channels = a.outputs;
    Tensor y = new_image(of_y, x.scalar_type());
    a.y = image(y, of_y);
    a.bias = values(bias, 0);
    run(a);
    return y;
}

Tensor convolution(const Tensor& x, const float* weights, const MaybeTensor& bias, int64_t outputs, int64_t tile) {
    Conv3x3 a = arguments(x, outputs, tile);
    a.weights = weights;
    return convolution(a, x, bias, [](const Conv3x3& a) {
        in_waves(a) ? run_waves(a) : run_blocks(a, a.block, PANEL, FASTDDPM_KERNEL(conv3x3_forward));
    });
}

// With weights as they are, packed: [packs, channels, 9, PACK]. What a block of tiles is transformed to, and what a chunk
// of filters is, stay in the second cache.
Tensor conv3x3_packed(const Tensor x, const Tensor weights, const MaybeTensor bias, int64_t outputs, int64_t tile) {
    Conv3x3 a = arguments(x, outputs, tile);
    const int64_t chunks = ceil_div(std::max<int64_t>(1, a.shape.channels), TERMS), of_tile = frequencies(tile);
    const int64_t most = 300'000 / (of_tile * chunks * TERMS);
    a.blocks = ceil_div(a.tiles, most >= 64 ? 64 : most >= 32 ? 32 : 16);
    a.block = a.blocks == 0 ? 0 : ceil_div(ceil_div(a.tiles, a.blocks), FEW) * FEW;
    a.scratch = of_tile * (a.block * PACK + APART) + TERMS * 2 * (tile + 2) * PACK + PANEL + TERMS +
                chunks * a.block * (of_tile * TERMS + APART);
    a.packed = values(weights, 0);
    return convolution(a, x, bias,
                       [](const Conv3x3& a) { run_blocks(a, FEW, PACK, FASTDDPM_KERNEL(conv3x3_packed)); });
}

Tensor conv3x3_weights(const Tensor weight, bool turned, int64_t tile) {
    const std::array<int64_t, 4> sizes = sizes_of_weights(weight, turned, tile);
    Tensor to = torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Float);
    transform(weight, turned, tile, static_cast<float*>(to.data_ptr()));
    return to;
}

// With weights that are transformed already.
Tensor conv3x3_transformed(const Tensor x, const Tensor weights, const MaybeTensor bias, int64_t outputs) {
    const int64_t tile = weights.size(1) == frequencies(4) ? 4 : 2;
    return convolution(x, static_cast<const float*>(weights.data_ptr()), bias, outputs, tile);
}

// Packed in memory that is kept: to get new memory from the system takes longer than to pack them.
Values pack(const Tensor& weight, bool turned) {
    const int64_t outputs = weight.size(turned ? 1 : 0), channels = weight.size(turned ? 0 : 1), packs = ceil_div(outputs, PACK);
    const Conv3x3Weights a = arguments(weight, turned, 0, scratch<OF_WEIGHTS>(packs * PACK * 9 * channels));
    const int64_t along = a.output_stride == 1 ? PACK : ALONG;
    parallel(packs * ceil_div(channels, along), 9 * PACK * along,
             [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_pack)(a, begin, end); });
    const bool half = a.from.dtype == DType::bf16 || a.from.dtype == DType::f16;
    return {a.to, half ? a.from.dtype : DType::f32, 0};
}

// In waves that are alike, and as large as they may be; a wave in blocks, of which a row of frequencies lies in the second
// cache, or two where tiles are few: weights come from the second cache for the second.
void run_rows(const Conv3x3& a) {
    const int64_t side = a.tile + 2, panels = ceil_div(a.outputs, PANEL), row = side * (a.shape.channels + APART);
    const int64_t of_tile = side * (row + panels * a.tile * PANEL);
    const int64_t groups = ceil_div(a.tiles, BLOCK), most = std::max<int64_t>(1, largest_wave() / of_tile / BLOCK);
    Conv3x3Rows w{};
    w.of = a;
    w.rows = groups == 0 ? 0 : ceil_div(groups, ceil_div(groups, most)) * BLOCK;
    w.v_apart = w.rows * row + APART;
    w.v = scratch<OF_WAVE>(side * (w.v_apart + panels * w.rows * a.tile * PANEL) + a.shape.channels);
    w.m = w.v + side * w.v_apart;
    float* zeros = w.m + side * panels * w.rows * a.tile * PANEL;
    w.zeros = std::fill_n(zeros, a.shape.channels, 0.0f) - a.shape.channels;
    w.blocks = ceil_div(w.rows / BLOCK, std::max<int64_t>(1, BLOCK_OF_ROWS / (row * BLOCK)));
    w.deep = w.rows * row <= BLOCK_OF_ROWS / 4 ? 2 : 1;
    const int64_t of_item = side * (a.shape.channels * PANEL + APART);
    for (; w.first < a.tiles; w.first += w.rows) {
        w.count = std::min(w.rows, a.tiles - w.first);
        parallel(w.count, side * row,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_rows_input)(w, begin, end); });
        parallel(side * w.blocks * panels, w.rows / w.blocks * row, [&](int64_t begin, int64_t end) {
            FASTDDPM_KERNEL(conv3x3_rows)(w, begin, end, scratch<OF_ITEM>(of_item));
        });
        parallel(w.count, side * side * a.outputs,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_rows_output)(w, begin, end); });
    }
}

// With weights as they are, or turned by 180 degrees with channels exchanged. Tiles of 2x2 are transformed to so much more
// than they are that many of them take less time in blocks.
Tensor conv3x3(const Tensor x, const Tensor weight, const MaybeTensor bias, bool turned, int64_t tile) {
    const int64_t outputs = weight.size(turned ? 1 : 0);
    Conv3x3 a = arguments(x, outputs, tile);
    if (tile == 2 && a.tiles > MANY) {
        const std::array<int64_t, 4> sizes = sizes_of_weights(weight, turned, tile);
        float* weights = scratch<OF_WEIGHTS>(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
        transform(weight, turned, tile, weights);
        return convolution(x, weights, bias, outputs, tile);
    }
    a.packed = pack(weight, turned);
    return convolution(a, x, bias, run_rows);
}

// The gradient of the weights, in their dtype, and of the bias where there is one.
std::vector<Tensor> conv3x3_gradient(const Tensor dy, const Tensor x, const Tensor weight, const MaybeTensor bias,
                                     int64_t tile) {
    const int64_t outputs = weight.size(0), channels = weight.size(1);
    Conv3x3Gradient g{};
    g.of = arguments(x, outputs, tile);
    g.of.y = image(dy, shape(dy));
    Tensor dweight = new_image({outputs, channels, 3, 3, true}, weight.scalar_type());
    g.gradient = {dweight.data_ptr(), dtype(dweight), 9 * channels, 1, channels, true};
    const int64_t wide = GRADIENT_WIDE(tile), items = ceil_div(channels, wide) * ceil_div(outputs, HIGH);
    g.slices = std::clamp<int64_t>(ceil_div(24, std::max<int64_t>(1, items)), 1, std::max<int64_t>(1, g.of.tiles * tile * tile / 512));
    const int64_t longest = ceil_div(g.of.tiles, g.slices);
    g.kept = longest <= KEPT ? std::max<int64_t>(longest, CHUNK) : CHUNK;
    std::vector<float> of_bias(bias ? g.slices * outputs : 0);
    const bool are_the_sum = g.slices == 1 && g.gradient.dtype == DType::f32;
    g.sums = are_the_sum ? static_cast<float*>(dweight.data_ptr()) : scratch<OF_SUMS>(g.slices * outputs * 9 * channels);
    g.bias = bias ? of_bias.data() : nullptr;
    parallel(g.slices * items, wide * HIGH * g.of.tiles / g.slices, [&](int64_t begin, int64_t end) {
        FASTDDPM_KERNEL(conv3x3_gradient)(g, begin, end, scratch<OF_ITEM>(GRADIENT_SCRATCH(tile, g.kept)));
    });
    if (!are_the_sum)
        parallel(outputs, 9 * channels * g.slices,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(conv3x3_sum)(g, begin, end); });
    if (!bias) return {dweight};
    std::vector<double> total(outputs);
    for (int64_t i = 0; i < g.slices * outputs; ++i) total[i % outputs] += of_bias[i];
    return {dweight, rounded(total, *bias)};
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def("conv3x3_weights(Tensor weight, bool turned, int tile) -> Tensor");
    m.def("conv3x3_transformed(Tensor x, Tensor weights, Tensor? bias, int outputs) -> Tensor");
    m.def("conv3x3_packed(Tensor x, Tensor weights, Tensor? bias, int outputs, int tile) -> Tensor");
    m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, bool turned, int tile) -> Tensor");
    m.def("conv3x3_gradient(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int tile) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("conv3x3_weights", TORCH_BOX(&fastddpm::conv3x3_weights));
    m.impl("conv3x3_transformed", TORCH_BOX(&fastddpm::conv3x3_transformed));
    m.impl("conv3x3_packed", TORCH_BOX(&fastddpm::conv3x3_packed));
    m.impl("conv3x3", TORCH_BOX(&fastddpm::conv3x3));
    m.impl("conv3x3_gradient", TORCH_BOX(&fastddpm::conv3x3_gradient));
}
