// fastddpm::adam_ema_: schema and host code. What it computes: fastddpm/ops/adam_ema/reference.py.

#include "adam_ema/adam_ema.h"

#include <cmath>

#include "common/host.h"

namespace fastddpm {
namespace {

constexpr int64_t CHUNK = 8192;  // elements: what a chunk touches stays in the second cache until its mirror is written

int64_t bytes(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

double or_number(const MaybeTensor& tensor, double value) { return tensor ? number(*tensor) : value; }

// Written over: params, exp_avg, exp_avg_sq, step, ema, mirror, found_inf. Returns the norm of the gradients.
Tensor adam_ema_(const std::vector<Tensor> params, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avg,
                 const std::vector<Tensor> exp_avg_sq, Tensor step, double lr, const MaybeTensor lr_tensor,
                 double beta1, double beta2, double eps, double weight_decay, std::optional<double> max_grad_norm,
                 const std::vector<Tensor> ema, double ema_decay, const MaybeTensor ema_decay_tensor,
                 const std::vector<Tensor> mirror, const MaybeTensor grad_scale, const MaybeTensor found_inf) {
    std::vector<AdamChunk> chunks;
    for (size_t i = 0; i < params.size(); ++i) {
        const auto floats = [&](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
        AdamChunk c{floats(params[i]), floats(exp_avg[i]), floats(exp_avg_sq[i]), nullptr, grads[i].data_ptr(), nullptr,
                    dtype(grads[i]), DType::f32, 0};
        if (!ema.empty()) c.ema = floats(ema[i]);
        if (!mirror.empty()) c.mirror = mirror[i].data_ptr(), c.mirror_type = dtype(mirror[i]);
        for (int64_t left = params[i].numel(); left > 0; left -= c.size) {
            c.size = std::min(CHUNK, left);
            chunks.push_back(c);
            c.param += c.size, c.exp_avg += c.size, c.exp_avg_sq += c.size;
            if (c.ema) c.ema += c.size;
            c.gradient = static_cast<const char*>(c.gradient) + c.size * bytes(c.gradient_type);
            if (c.mirror) c.mirror = static_cast<char*>(c.mirror) + c.size * bytes(c.mirror_type);
        }
    }
    std::vector<double> squares(chunks.size());
    AdamEma a{};
    a.chunks = chunks.data(), a.squares = squares.data();
    const auto run = [&](auto kernel) {
        parallel(static_cast<int64_t>(chunks.size()), CHUNK,
                 [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
    };
    run(FASTDDPM_KERNEL(gradient_squares));

    double total = 0;
    for (double s : squares) total += s;
    double factor = 1 / or_number(grad_scale, 1.0);
    const float norm = static_cast<float>(std::sqrt(total) * factor);
    Tensor result = new_tensor({}, ScalarType::Float);
    *static_cast<float*>(result.data_ptr()) = norm;
    if (max_grad_norm) factor *= std::min(1.0, *max_grad_norm / (double(norm) + 1e-6));

    const bool valid = std::isfinite(norm) && (!found_inf || *static_cast<float*>(found_inf->data_ptr()) == 0);
    if (found_inf) *static_cast<float*>(found_inf->data_ptr()) = valid ? 0.0f : 1.0f;
    if (!valid) return result;
    int64_t& steps = *static_cast<int64_t*>(step.data_ptr());
    const double n = static_cast<double>(steps + 1), rate = or_number(lr_tensor, lr);
    a.factor = static_cast<float>(factor);
    a.weight1 = static_cast<float>(1 - beta1), a.weight2 = static_cast<float>(1 - beta2);
    a.rate = static_cast<float>(rate / (1 - std::pow(beta1, n)));
    a.shrink = static_cast<float>(1 - rate * weight_decay);
    a.root = static_cast<float>(std::sqrt(1 - std::pow(beta2, n)));
    a.eps = static_cast<float>(eps);
    a.ema_weight = static_cast<float>(1 - or_number(ema_decay_tensor, ema_decay));
    run(FASTDDPM_KERNEL(adam_ema));
    steps += 1;
    return result;
}

}  // namespace
}  // namespace fastddpm

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "adam_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!) step, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, "
        "float? max_grad_norm, Tensor(e!)[] ema, float ema_decay, Tensor? ema_decay_tensor, Tensor(f!)[] mirror, "
        "Tensor? grad_scale, Tensor(g!)? found_inf) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) { m.impl("adam_ema_", TORCH_BOX(&fastddpm::adam_ema_)); }
