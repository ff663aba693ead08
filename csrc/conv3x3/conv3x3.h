#pragma once

#include "common/data.h"
#include "common/isa.h"
#include "common/panels.h"

namespace fastddpm {

enum : int64_t {
    TOGETHER = 16,           // channels of a work item that transforms weights
    BLOCK = 12,              // tiles of a block are a multiple of this, those of the last aside
    WAVE = 1 << 20,          // floats that the tiles of a wave are transformed to, for each of up to four threads
    BLOCK_OF_ROWS = 410'000,  // floats that a row of frequencies of a block of a wave takes
    MANY = 1024,             // tiles of 2x2, of which a wave writes and reads more than transformed weights are
    HIGH = 64,               // output channels of a work item of the gradient
    CHUNK = 32,              // tiles at a time of the gradient
    KEPT = 96,               // of x, at most: with the sums they lie in the second cache
    PACK = 16,               // output channels whose weights lie together as they are
    ALONG = 128,             // channels of a work item that packs weights, along the axis that they lie along
    FEW = 4,                 // tiles of a block are a multiple of this, with such weights
};

// Channels of a work item of the gradient: its sums, of each frequency, shall lie in the second cache.
constexpr int64_t GRADIENT_WIDE(int64_t tile) { return tile == 4 ? 64 : 128; }

// Floats that it needs, with so many tiles of x kept.
constexpr int64_t GRADIENT_SCRATCH(int64_t tile, int64_t kept) {
    const int64_t wide = GRADIENT_WIDE(tile);
    return (tile + 2) * (tile + 2) * (kept * wide + CHUNK * HIGH + HIGH * wide + 3 * APART) + wide;
}

// What the convolution is cut into: tiles of 2x2 or 4x4 pixels of the output, each from two more of the input either way.
// Of a panel of 32 output channels the weights lie together.
struct Conv3x3 {
    int64_t tile;                 // 2 or 4
    Shape shape;                  // of the input: NHWC order is the fast one
    int64_t outputs;              // channels of the output
    int64_t down, across, tiles;  // tiles of a column, of a row, of all samples
    int64_t blocks, block;        // of tiles, and tiles of the largest, a multiple of BLOCK; an item is one with a panel
    Image x, y;
    Values bias;           // [outputs], or none
    const float* weights;  // transformed: [panels, (tile + 2)^2, channels, 32]
    Values packed;         // as they are: [packs, channels, 9, 16]
    int64_t scratch;       // floats that a call needs
};

// Tiles whose input all threads transform; then they multiply, each its share of the frequencies and panels; then they
// transform the output. Transformed weights are read once for all tiles, and by one thread.
struct Conv3x3Wave {
    Conv3x3 of;
    int64_t first, count, rows;  // its tiles, and as many as the products take
    int64_t v_apart, m_apart;    // floats between frequencies
    float *v, *m;                // [frequencies, rows, channels], [frequencies, panels, rows, 32]
    const float* zeros;          // [channels]
};

// A wave with weights as they are: who multiplies a block of its tiles with a row of frequencies of a panel transforms
// that row of the weights just before, and sums the products along it.
struct Conv3x3Rows {
    Conv3x3 of;
    int64_t first, count, rows;   // its tiles, and as many as the products take
    int64_t deep, blocks, block;  // rows of frequencies; of tiles, and tiles of the largest
    int64_t v_apart;              // floats between rows of frequencies
    float *v, *m;                 // [tile + 2, rows, tile + 2, channels + APART], [panels, tile + 2, rows, tile, 32]
    const float* zeros;           // [channels]
};

// Weights [outputs, channels, 3, 3] to [panels, (tile + 2)^2, channels, 32], or as they are to [packs, channels, 9, 16] in half
// precision or float32: 0 in the channels of a panel or a pack beyond the last. Strides count elements; backward exchanges
// the first two, and turns the filter by 180 degrees.
struct Conv3x3Weights {
    int64_t tile;
    int64_t outputs, channels;
    int64_t output_stride, channel_stride, row_stride, column_stride;
    bool turned;
    Values from;
    void* to;
};

// The gradient of the weights: a work item is GRADIENT_WIDE channels by HIGH output channels of a slice of the tiles. If
// its tiles are no more than are kept, what x is transformed to serves the items that follow, with other output channels.
struct Conv3x3Gradient {
    Conv3x3 of;      // x, and y the gradient of the output
    int64_t slices;  // of the tiles: as many whatever the threads, for their sums come to the same then
    int64_t kept;    // tiles of x, at least CHUNK
    float* sums;     // [slices, outputs, 9, channels]
    float* bias;     // [slices, outputs], or nullptr
    Image gradient;  // what they come to, as [outputs, 3, 3, channels]
};

FASTDDPM_DECLARE(conv3x3_forward, const Conv3x3& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(conv3x3_input, const Conv3x3Wave& w, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_products, const Conv3x3Wave& w, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_output, const Conv3x3Wave& w, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_pack, const Conv3x3Weights& a, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_rows_input, const Conv3x3Rows& w, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_rows, const Conv3x3Rows& w, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(conv3x3_rows_output, const Conv3x3Rows& w, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_packed, const Conv3x3& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(conv3x3_weights, const Conv3x3Weights& a, int64_t begin, int64_t end)
FASTDDPM_DECLARE(conv3x3_gradient, const Conv3x3Gradient& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(conv3x3_sum, const Conv3x3Gradient& a, int64_t begin, int64_t end)

}  // namespace fastddpm
