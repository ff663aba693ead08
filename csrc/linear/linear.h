#pragma once

#include "common/data.h"
#include "common/isa.h"
#include "common/panels.h"

namespace fastddpm {

constexpr int64_t ROWS_OF_BLOCK = 96;  // of x, which stay in the second cache while all panels of the weight are read for them
constexpr int64_t DEEP = 128;          // inputs of a work item that packs a weight

// A weight of which one stride is 1 to panels: 0 in the outputs of a panel beyond the last.
struct LinearWeight {
    int64_t inputs, outputs, input_stride, output_stride;
    Values from;
    bool pairs;
    void* to;
};

// y[rows, outputs] = [x, x2][rows, inputs] times the weight, + bias + residual. Rows lie one after the other.
struct Linear {
    int64_t rows, inputs, outputs;
    int64_t blocks;        // of rows: an item is one with a panel
    int64_t of_x;          // of the inputs: the others are those of x2
    Values x, x2;
    Values bias;           // [outputs], or none
    Values residual;       // [rows, outputs], or none
    DType dtype;           // of y
    void* y;
    bool pairs;           // of bfloat16 are what is multiplied, not numbers
    const void* weights;  // packed: [panels, inputs, 32], or [panels, inputs / 2, 32] pairs; or nullptr ..
    LinearWeight weight;  // .. for one that each item packs a panel of, where a panel serves one item
};

// dw[outputs, inputs] = dy[rows, outputs]^T x[rows, inputs]: a work item is TALL outputs by WIDE inputs of a slice of the rows.
struct LinearGradient {
    int64_t rows, inputs, outputs;
    int64_t wide, tall;  // work items along the inputs, at least one, which sums the bias, and along the outputs
    int64_t slices;      // as many whatever the threads, for their sums come to the same then
    bool pairs;          // of rows are multiplied
    Values x, dy;
    float* sums;         // [slices, outputs, inputs]
    float* bias;         // [slices, outputs], or nullptr
    DType dtype;         // of what they come to
    void* gradient;      // [outputs, inputs]
};

constexpr int64_t FORWARD_SCRATCH(int64_t rows, int64_t inputs, bool packs) {
    const int64_t of_block = rows < ROWS_OF_BLOCK ? rows + 3 : ROWS_OF_BLOCK;  // as many as the products take
    return (ROWS_OF_BLOCK + 1) * PANEL + (of_block + (packs ? PANEL : 0)) * inputs;
}
constexpr int64_t GRADIENT_SCRATCH = COLUMNS_SCRATCH + WIDE * TALL;

FASTDDPM_DECLARE(linear_pack, const LinearWeight& a, int64_t begin, int64_t end)
FASTDDPM_DECLARE(linear_forward, const Linear& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(linear_gradient, const LinearGradient& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(linear_sum, const LinearGradient& a, int64_t begin, int64_t end)

}  // namespace fastddpm
