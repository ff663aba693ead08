// fastddpm::linear and its backward: schemas and host code. What they compute: fastddpm/ops/linear/reference.py.

#include "linear/linear.h"

#include "common/host.h"

namespace fastddpm {
namespace {

constexpr ScalarType TYPES[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

enum { OF_ITEM, OF_WEIGHT, OF_SUMS = OF_WEIGHT };  // uses of kept memory; the last two are never at a time

std::vector<int64_t> sizes_but_last(const Tensor& t, int64_t last) {
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    sizes.back() = last;
    return sizes;
}

int64_t rows_of(const Tensor& t) {
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
    return rows;
}

// A weight [N, K], or ``turned`` the transposed of one, to panels: [ceil(N / 32), K, 32].
LinearWeight arguments(const Tensor& weight, bool turned, bool pairs) {
    const int64_t n = turned ? 1 : 0, k = 1 - n;
    return {weight.size(k), weight.size(n), weight.stride(k), weight.stride(n), values(weight, 0), pairs, nullptr};
}

// Of bfloat16 x, with weights that are bfloat16, too, or rounded to it for what is rounded to half precision itself.
bool takes_pairs(ScalarType x, ScalarType weight, int64_t type) {
    return x == ScalarType::BFloat16 && (weight == x || type != 0) && multiplies_pairs();
}

int64_t elements(const LinearWeight& a) { return a.pairs ? ceil_div(a.inputs, 2) : a.inputs; }

void pack(LinearWeight a, void* to) {
    a.to = to;
    parallel(ceil_div(a.outputs, PANEL) * ceil_div(a.inputs, DEEP), DEEP * PANEL,
             [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(linear_pack)(a, begin, end); });
}

// ``weights``: in panels, or nullptr for those of ``weight``, of whose panels each serves one block of rows then.
Tensor run(const Tensor& x, const MaybeTensor& x2, const void* weights, const LinearWeight& weight, const MaybeTensor& bias,
           const MaybeTensor& residual, int64_t type) {
    const int64_t outputs = weight.outputs;
    Linear a{};
    a.pairs = weight.pairs, a.weight = weight;
    a.of_x = x.size(x.dim() - 1), a.inputs = a.of_x + (x2 ? x2->size(x2->dim() - 1) : 0);
    a.rows = rows_of(x), a.outputs = outputs, a.weights = weights;
    a.x = values(x, 0), a.x2 = values(x2, 0), a.bias = values(bias, 0), a.residual = values(residual, 0);
    const std::vector<int64_t> sizes = sizes_but_last(x, outputs);
    Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, TYPES[type]);
    a.dtype = dtype(y), a.y = y.data_ptr();
    a.blocks = ceil_div(a.rows, ROWS_OF_BLOCK);
    parallel(a.blocks * ceil_div(outputs, PANEL), ROWS_OF_BLOCK * a.inputs, [&](int64_t begin, int64_t end) {
        FASTDDPM_KERNEL(linear_forward)(a, begin, end, scratch<OF_ITEM>(FORWARD_SCRATCH(a.rows, a.inputs, !weights)));
    });
    return y;
}

Tensor linear(const Tensor x, const MaybeTensor x2, const Tensor weight, const MaybeTensor bias,
              const MaybeTensor residual, bool turned, int64_t type) {
    const ScalarType of_x = x2 && x2->scalar_type() != x.scalar_type() ? ScalarType::Float : x.scalar_type();
    const LinearWeight a = arguments(weight, turned, takes_pairs(of_x, weight.scalar_type(), type));
    if (rows_of(x) <= ROWS_OF_BLOCK) return run(x, x2, nullptr, a, bias, residual, type);
    float* weights = scratch<OF_WEIGHT>(ceil_div(a.outputs, PANEL) * elements(a) * PANEL);
    pack(a, weights);
    return run(x, x2, weights, a, bias, residual, type);
}

// For x and y of these dtypes.
Tensor linear_weight(const Tensor weight, int64_t of_x, int64_t type) {
    const LinearWeight a = arguments(weight, false, takes_pairs(TYPES[of_x], weight.scalar_type(), type));
    const ScalarType of_panels = a.pairs ? ScalarType::BFloat16 : ScalarType::Float;
    Tensor to = new_tensor({ceil_div(a.outputs, PANEL), elements(a), a.pairs ? 2 * PANEL : PANEL}, of_panels);
    pack(a, to.data_ptr());
    return to;
}

// With a weight that is in panels already.
Tensor linear_packed(const Tensor x, const MaybeTensor x2, const Tensor weights, int64_t outputs, const MaybeTensor bias,
                     const MaybeTensor residual, int64_t type) {
    LinearWeight a{};
    a.outputs = outputs, a.pairs = weights.scalar_type() == ScalarType::BFloat16;
    return run(x, x2, weights.data_ptr(), a, bias, residual, type);
}

// The gradient of the weight, in its dtype, and of the bias where there is one.
std::vector<Tensor> linear_gradient(const Tensor dy, const Tensor x, const Tensor weight, const MaybeTensor bias) {
    LinearGradient a{};
    a.outputs = weight.size(0), a.inputs = weight.size(1);
    a.rows = rows_of(x);
    a.x = values(x, 0), a.dy = values(dy, 0);
    a.pairs = a.x.dtype == DType::bf16 && a.dy.dtype == DType::bf16 && multiplies_pairs();
    Tensor dweight = new_tensor({a.outputs, a.inputs}, weight.scalar_type());
    a.dtype = dtype(dweight), a.gradient = dweight.data_ptr();
    a.wide = std::max<int64_t>(1, ceil_div(a.inputs, WIDE)), a.tall = ceil_div(a.outputs, TALL);
    const int64_t items = a.wide * a.tall;
    a.slices = std::clamp<int64_t>(ceil_div(12, std::max<int64_t>(1, items)), 1, std::max<int64_t>(1, a.rows / 64));
    const bool are_the_sum = a.slices == 1 && a.dtype == DType::f32;
    a.sums = are_the_sum ? static_cast<float*>(a.gradient) : scratch<OF_SUMS>(a.slices * a.outputs * a.inputs);
    std::vector<float> of_bias(bias ? a.slices * a.outputs : 0);
    a.bias = bias ? of_bias.data() : nullptr;
    parallel(a.slices * items, WIDE * TALL * a.rows / a.slices, [&](int64_t begin, int64_t end) {
        FASTDDPM_KERNEL(linear_gradient)(a, begin, end, scratch<OF_ITEM>(GRADIENT_SCRATCH));
    });
    if (!are_the_sum)
        parallel(a.outputs, a.inputs * a.slices,
                 [&](int64_t begin, int64_t end) { FASTDDPM_KERNEL(linear_sum)(a, begin, end); });
    if (!bias) return {dweight};
    std::vector<double> total(a.outputs);
    for (int64_t i = 0; i < a.slices * a.outputs; ++i) total[i % a.outputs] += of_bias[i];
    return {dweight, rounded(total, *bias)};
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def("linear(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual, bool turned, int type) -> Tensor");
    m.def("linear_weight(Tensor weight, int of_x, int type) -> Tensor");
    m.def("linear_packed(Tensor x, Tensor? x2, Tensor weights, int outputs, Tensor? bias, Tensor? residual, int type)"
          " -> Tensor");
    m.def("linear_gradient(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("linear", TORCH_BOX(&fastddpm::linear));
    m.impl("linear_weight", TORCH_BOX(&fastddpm::linear_weight));
    m.impl("linear_packed", TORCH_BOX(&fastddpm::linear_packed));
    m.impl("linear_gradient", TORCH_BOX(&fastddpm::linear_gradient));
}
