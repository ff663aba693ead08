// y = x W^T + b + r, and its gradients: matrix products in float32 of what is stored in any dtype, converted where it is
// read and where it is written. Neither x nor y is in memory in float32 unless the caller has it so.

#include "linear/linear.h"

#include "common/products.h"

namespace fastddpm::FASTDDPM_ISA {
namespace {

// Blocks are of as many groups of ROWS as they can be alike.
INLINE int64_t first_of_block(const Linear& a, int64_t block) {
    const int64_t first = block * ((a.rows + ROWS - 1) / ROWS) / a.blocks * ROWS;
    return first < a.rows ? first : a.rows;
}

template <class T>
void pack(const LinearWeight& a, const T* from, int64_t outputs, int64_t count, float* to) {
    for (int64_t n = 0; n < PANEL; n += W) {
        const int64_t of_n = outputs - n < 0 ? 0 : outputs - n < W ? outputs - n : W;
        if (a.output_stride == 1) {
            for (int64_t k = 0; k < count; ++k) store(to + k * PANEL + n, load(from + n + k * a.input_stride, of_n));
            continue;
        }
        for_vectors(count, [&](int64_t k, int64_t lanes) {
            float block[W][W];
            for (int64_t l = 0; l < W; ++l)
                store(block[l], l < of_n ? load(from + (n + l) * a.output_stride + k, lanes) : VF{});
            transpose(block);
            for (int64_t l = 0; l < lanes; ++l) store(to + (k + l) * PANEL + n, load(block[l]));
        });
    }
}

template <class T>
INLINE void widen_rows(const T* from, int64_t row, int64_t rows, int64_t count, float* to, int64_t to_row) {
    for (int64_t t = 0; t < rows; ++t)
        for_vectors(count, [&](int64_t i, int64_t n) { store(to + t * to_row + i, load(from + t * row + i, n), n); });
}

template <class T>
void forward(const Linear& a, T* y, int64_t begin, int64_t end, float* scratch) {
    const int64_t panels = (a.outputs + PANEL - 1) / PANEL;
    float *v = scratch, *products = v + ROWS_OF_BLOCK * a.inputs, *bias = products + ROWS_OF_BLOCK * PANEL;
    const bool far = a.outputs * sizeof(T) > 2048;  // rows of y: a processor does not ask for the next by itself
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t block = item / panels, panel = item % panels, row = first_of_block(a, block);
        const int64_t count = first_of_block(a, block + 1) - row, rows = (count + REST - 1) / REST * REST;
        if (block != last) {
            with_type(a.x.dtype, a.x.data, [&](const auto* x) {
                widen_rows(x + row * a.of_x, a.of_x, count, a.of_x, v, a.inputs);
            });
            with_type(a.x2.dtype, a.x2.data, [&](const auto* x2) {
                const int64_t of_x2 = a.inputs - a.of_x;
                widen_rows(x2 + row * of_x2, of_x2, count, of_x2, v + a.of_x, a.inputs);
            });
            memset(v + count * a.inputs, 0, 4 * (rows - count) * a.inputs);
        }
        last = block;
        const float* u = a.weights + panel * a.inputs * PANEL;
        const int64_t first = panel * PANEL, of_n = a.outputs - first < PANEL ? a.outputs - first : PANEL;
        for (int64_t t = 0; t < count && far; ++t)
            for (int64_t i = 0; i < of_n; i += LINE / sizeof(T))
                __builtin_prefetch(y + (row + t) * a.outputs + first + i, 1, 2);
        multiply_rows(v, rows, a.inputs, u, products, panel + 1 < panels ? u + a.inputs * PANEL : a.weights);
        read_bias(a.bias, first, of_n, bias);
        with_type(a.residual.dtype, a.residual.data, [&](const auto* residual) {
            for (int64_t t = 0; t < count; ++t) {
                const int64_t at = (row + t) * a.outputs + first;
                for_vectors(of_n, [&](int64_t i, int64_t n) {
                    VF sum = load(products + t * PANEL + i) + load(bias + i);
                    if (residual) sum += load(residual + at + i, n);
                    store(y + at + i, sum, n);
                });
            }
        });
    }
}

// The sums of rows d[count, TALL]: floats of 16, those in double.
INLINE void sum_rows(const float* d, int64_t count, int64_t columns, double* total) {
    for (int64_t first = 0; first < count; first += 16) {
        float some[TALL] = {};
        for (int64_t t = first; t < count && t < first + 16; ++t)
            for (int64_t i = 0; i < TALL; i += W) store(some + i, load(some + i) + load(d + t * TALL + i));
        for (int64_t i = 0; i < columns; ++i) total[i] += some[i];
    }
}

}  // namespace

// A work item is DEEP inputs of a panel.
void linear_pack(const LinearWeight& a, int64_t begin, int64_t end) {
    const int64_t parts = (a.inputs + DEEP - 1) / DEEP;
    with_type(a.from.dtype, a.from.data, [&](const auto* from) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t first = item / parts * PANEL, k = item % parts * DEEP;
            const int64_t count = a.inputs - k < DEEP ? a.inputs - k : DEEP;
            pack(a, from + first * a.output_stride + k * a.input_stride, a.outputs - first, count,
                 a.to + (first * a.inputs + k * PANEL));
        }
    });
}

void linear_forward(const Linear& a, int64_t begin, int64_t end, float* scratch) {
    with_output_type(a.dtype, a.y, [&](auto* y) { forward(a, y, begin, end, scratch); });
}

void linear_gradient(const LinearGradient& a, int64_t begin, int64_t end, float* scratch) {
    float *v = scratch, *d = v + TOKENS * WIDE + APART, *u = d + TOKENS * TALL + APART;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t slice = item / (a.wide * a.tall), k = item / a.tall % a.wide * WIDE, n = item % a.tall * TALL;
        const int64_t of_k = a.inputs - k < WIDE ? a.inputs - k : WIDE, of_n = a.outputs - n < TALL ? a.outputs - n : TALL;
        const int64_t from = slice * a.rows / a.slices, to = (slice + 1) * a.rows / a.slices;
        double total[TALL] = {};
        if (of_k < WIDE) memset(v, 0, 4 * TOKENS * WIDE);
        if (of_n < TALL) memset(d, 0, 4 * TOKENS * TALL);
        if (from == to) memset(u, 0, 4 * WIDE * TALL);
        for (int64_t row = from; row < to; row += TOKENS) {
            const int64_t count = to - row < TOKENS ? to - row : TOKENS;
            with_type(a.x.dtype, a.x.data, [&](const auto* x) {
                widen_rows(x + row * a.inputs + k, a.inputs, count, of_k, v, WIDE);
            });
            with_type(a.dy.dtype, a.dy.data, [&](const auto* dy) {
                widen_rows(dy + row * a.outputs + n, a.outputs, count, of_n, d, TALL);
            });
            for (int64_t r = 0; r < of_n; r += GRADIENT_ROWS)
                for (int64_t c = 0; c < of_k; c += PANEL)
                    accumulate<WIDE, TALL>(d + r, v + c, count, row == from, u + place_of_sum<WIDE>(r, c));
            if (a.bias && k == 0) sum_rows(d, count, of_n, total);
        }
        float* sums = a.sums + (slice * a.outputs + n) * a.inputs + k;
        for (int64_t r = 0; r < of_n; ++r)
            for (int64_t first = 0; first < of_k; first += PANEL)
                for_vectors(of_k - first < PANEL ? of_k - first : PANEL, [&](int64_t i, int64_t lanes) {
                    store(sums + r * a.inputs + first + i, load(u + place_of_sum<WIDE>(r, first + i)), lanes);
                });
        if (a.bias && k == 0)
            for (int64_t i = 0; i < of_n; ++i) a.bias[slice * a.outputs + n + i] = static_cast<float>(total[i]);
    }
}

// The slices one after the other. A work item is an output.
void linear_sum(const LinearGradient& a, int64_t begin, int64_t end) {
    const int64_t all = a.outputs * a.inputs;
    with_output_type(a.dtype, a.gradient, [&](auto* to) {
        for (int64_t i = begin * a.inputs; i < end * a.inputs; i += W) {
            const int64_t lanes = end * a.inputs - i < W ? end * a.inputs - i : W;
            VF total = load(a.sums + i, lanes);
            for (int64_t s = 1; s < a.slices; ++s) total += load(a.sums + s * all + i, lanes);
            store(to + i, total, lanes);
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
