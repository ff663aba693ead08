// fastddpm::rms_norm_silu and its backward: schemas and host code. What they compute:
// fastddpm/ops/rms_norm_silu/reference.py.

#include "rms_norm_silu/rms_norm_silu.h"

#include <memory>

#include "common/host.h"

namespace fastddpm {
namespace {

RmsNorm arguments(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift, double eps,
                  bool activation) {
    RmsNorm a{};
    a.shape = shape(x);
    const int64_t channels = std::max<int64_t>(1, a.shape.channels), pixels = a.shape.height * a.shape.width;
    a.nhwc = a.shape.nhwc || pixels == 1;
    // pixels of a block, whose sums are taken one by one in float32: few, so that they lose no digits
    const int64_t wanted = std::clamp<int64_t>(8192 / channels, 16, 64);
    a.per_sample = pixels == 0 ? 0 : std::max<int64_t>(1, pixels / wanted);  // rounded down: no block is too small
    a.block = pixels == 0 ? 0 : (pixels + a.per_sample - 1) / a.per_sample;
    a.x = image(x, a.shape);
    a.weight = values(weight, 0), a.scale = values(scale, channels), a.shift = values(shift, channels);
    a.eps = static_cast<float>(eps);
    a.activation = activation;
    a.scratch = 16 * 16 + 3 * channels + 3 * (a.block + 16) + 4 * channels * a.block;
    return a;
}

template <class Kernel>
void run(const RmsNorm& a, Kernel kernel) {
    parallel(a.shape.batch * a.per_sample, a.block * a.shape.channels,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end, scratch(a.scratch)); });
}

Tensor rms_norm_silu(const Tensor x, const Tensor weight, const MaybeTensor scale, const MaybeTensor shift, double eps,
                     bool activation) {
    RmsNorm a = arguments(x, weight, scale, shift, eps, activation);
    Tensor y = new_image(a.shape, x.scalar_type());
    a.y = image(y, a.shape);
    run(a, FASTDDPM_KERNEL(rms_norm_forward));
    return y;
}

// A small tensor of any float dtype.
std::vector<double> numbers(const Tensor& t) {
    std::vector<double> all(t.numel());
    const auto read = [&](const auto* from) {
        for (size_t i = 0; i < all.size(); ++i) all[i] = from[i];
    };
    switch (dtype(t)) {
        case DType::f64: read(static_cast<const double*>(t.data_ptr())); break;
        case DType::bf16: read(static_cast<const torch::headeronly::BFloat16*>(t.data_ptr())); break;
        case DType::f16: read(static_cast<const torch::headeronly::Half*>(t.data_ptr())); break;
        default: read(static_cast<const float*>(t.data_ptr())); break;
    }
    return all;
}

// Gradients of x and weight, and of those of scale and shift that are given, in order.
std::vector<Tensor> rms_norm_silu_backward(const Tensor dy, const Tensor x, const Tensor weight,
                                           const MaybeTensor scale, const MaybeTensor shift, double eps,
                                           bool activation) {
    RmsNorm a = arguments(x, weight, scale, shift, eps, activation);
    const int64_t batch = a.shape.batch, channels = a.shape.channels;
    Tensor dx = new_image(a.shape, x.scalar_type());
    a.dx = image(dx, a.shape), a.dy = image(dy, a.shape);
    const std::unique_ptr<float[]> sums(new float[batch * a.per_sample * 2 * channels]);  // kernels write all of it
    a.sums = sums.get();
    run(a, FASTDDPM_KERNEL(rms_norm_backward));

    const std::vector<double> w = numbers(weight), s = scale ? numbers(*scale) : std::vector<double>();
    std::vector<double> dweight(channels), dscale(s.size()), dshift(shift ? batch * channels : 0);
    std::vector<double> of_sample(2 * channels);
    for (int64_t b = 0; b < batch; ++b) {
        std::fill(of_sample.begin(), of_sample.end(), 0.0);
        for (int64_t k = b * a.per_sample; k < (b + 1) * a.per_sample; ++k)
            for (int64_t i = 0; i < 2 * channels; ++i) of_sample[i] += sums[2 * k * channels + i];
        for (int64_t c = 0; c < channels; ++c) {
            const double da = of_sample[c], da_n = of_sample[channels + c];
            const int64_t i = b * channels + c;
            dweight[c] += scale ? (1 + s[i]) * da_n : da_n;
            if (scale) dscale[i] = w[c] * da_n;
            if (shift) dshift[i] = da;
        }
    }
    std::vector<Tensor> gradients{dx, rounded(dweight, weight)};
    if (scale) gradients.push_back(rounded(dscale, *scale));
    if (shift) gradients.push_back(rounded(dshift, *shift));
    return gradients;
}

}  // namespace
}  // namespace fastddpm

#define OPTIONS "Tensor x, Tensor weight, Tensor? scale, Tensor? shift, float eps, bool activation)"

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def("rms_norm_silu(" OPTIONS " -> Tensor");
    m.def("rms_norm_silu_backward(Tensor dy, " OPTIONS " -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("rms_norm_silu", TORCH_BOX(&fastddpm::rms_norm_silu));
    m.impl("rms_norm_silu_backward", TORCH_BOX(&fastddpm::rms_norm_silu_backward));
}
