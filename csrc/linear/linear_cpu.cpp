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

// Of the panel that begins with output ``first``, ``count`` inputs from ``k`` on.
template <class E>
void pack_panel(const LinearWeight& a, int64_t first, int64_t k, int64_t count, E* to) {
    with_type(a.from.dtype, a.from.data, [&](const auto* from) {
        to_panel(from + first * a.output_stride + k * a.input_stride, a.output_stride, a.input_stride, a.outputs - first,
                 count, to);
    });
}

template <class E, class T>
void forward(const Linear& a, T* y, int64_t begin, int64_t end, float* scratch) {
    const int64_t panels = panels_of(a.outputs), inputs = elements_of<E>(a.inputs);
    float *bias = scratch, *products = bias + PANEL;
    E *own = reinterpret_cast<E*>(products + ROWS_OF_BLOCK * PANEL), *v = own + (a.weights ? 0 : inputs * PANEL);
    const bool far = a.outputs * sizeof(T) > 2048;  // rows of y: a processor does not ask for the next by itself
    for (int64_t item = begin, last = -1; item < end; ++item) {
        const int64_t block = item / panels, panel = item % panels, row = first_of_block(a, block);
        const int64_t count = first_of_block(a, block + 1) - row, rows = (count + REST - 1) / REST * REST;
        if (block != last) {
            with_type(a.x.dtype, a.x.data, [&](const auto* x) {
                to_rows(x + row * a.of_x, a.of_x, count, a.of_x, v, inputs);
            });
            with_type(a.x2.dtype, a.x2.data, [&](const auto* x2) {
                const int64_t of_x2 = a.inputs - a.of_x;
                to_rows(x2 + row * of_x2, of_x2, count, of_x2, v, inputs, a.of_x);
            });
            memset(v + count * inputs, 0, sizeof(E) * (rows - count) * inputs);
        }
        last = block;
        const E *weights = static_cast<const E*>(a.weights), *u = weights ? weights + panel * inputs * PANEL : own;
        if (!weights) pack_panel(a.weight, panel * PANEL, 0, a.inputs, own);
        const int64_t first = panel * PANEL, of_n = a.outputs - first < PANEL ? a.outputs - first : PANEL;
        for (int64_t t = 0; t < count && far; ++t)
            for (int64_t i = 0; i < of_n; i += LINE / sizeof(T))
                __builtin_prefetch(y + (row + t) * a.outputs + first + i, 1, 2);
        multiply_rows(v, rows, inputs, u, products, !weights ? own : panel + 1 < panels ? u + inputs * PANEL : weights);
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

// The sums of rows: floats of 16, those in double.
template <class T>
INLINE void sum_rows(const T* d, int64_t row, int64_t count, int64_t columns, float* sums) {
    double total[TALL] = {};
    for (int64_t first = 0; first < count; first += 16) {
        float some[TALL] = {};
        for (int64_t t = first; t < count && t < first + 16; ++t)
            for_vectors(columns, [&](int64_t i, int64_t n) { store(some + i, load(some + i) + load(d + t * row + i, n)); });
        for (int64_t i = 0; i < columns; ++i) total[i] += some[i];
    }
    for (int64_t i = 0; i < columns; ++i) sums[i] = static_cast<float>(total[i]);
}

}  // namespace

// A work item is DEEP inputs of a panel.
void linear_pack(const LinearWeight& a, int64_t begin, int64_t end) {
    const int64_t parts = (a.inputs + DEEP - 1) / DEEP;
    const auto pack = [&]<class E>(E* to) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t first = item / parts * PANEL, k = item % parts * DEEP;
            const int64_t count = a.inputs - k < DEEP ? a.inputs - k : DEEP;
            pack_panel(a, first, k, count, to + (first * elements_of<E>(a.inputs) + k / TERMS_OF<E> * PANEL));
        }
    };
    a.pairs ? pack(static_cast<Pair*>(a.to)) : pack(static_cast<float*>(a.to));
}

void linear_forward(const Linear& a, int64_t begin, int64_t end, float* scratch) {
    with_output_type(a.dtype, a.y, [&](auto* y) {
        a.pairs ? forward<Pair>(a, y, begin, end, scratch) : forward<float>(a, y, begin, end, scratch);
    });
}

void linear_gradient(const LinearGradient& a, int64_t begin, int64_t end, float* scratch) {
    float* u = scratch + COLUMNS_SCRATCH;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t slice = item / (a.wide * a.tall), k = item / a.tall % a.wide * WIDE, n = item % a.tall * TALL;
        const int64_t of_k = a.inputs - k < WIDE ? a.inputs - k : WIDE, of_n = a.outputs - n < TALL ? a.outputs - n : TALL;
        const int64_t row = slice * a.rows / a.slices, rows = (slice + 1) * a.rows / a.slices - row;
        with_type(a.dy.dtype, a.dy.data, [&](const auto* dy) {
            dy += row * a.outputs + n;
            with_type(a.x.dtype, a.x.data, [&](const auto* x) {
                x += row * a.inputs + k;
                a.pairs ? multiply_columns<Pair>(dy, a.outputs, of_n, x, a.inputs, of_k, rows, scratch, u)
                        : multiply_columns<float>(dy, a.outputs, of_n, x, a.inputs, of_k, rows, scratch, u);
            });
            if (a.bias && k == 0) sum_rows(dy, a.outputs, rows, of_n, a.bias + slice * a.outputs + n);
        });
        write_columns(u, of_n, of_k, a.sums + (slice * a.outputs + n) * a.inputs + k, a.inputs);
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
