// fastddpm::group_norm_silu and its backward: schemas and host code. What they compute:
// fastddpm/ops/group_norm_silu/reference.py.

#include "group_norm_silu/group_norm_silu.h"

#include "common/host.h"

namespace fastddpm {
namespace {

// How a sample is cut depends on its shape alone, and so do the bits of the result.
void plan(GroupNorm& a) {
    const int64_t channels = a.shape.channels, pixels = a.shape.height * a.shape.width;
    if (a.shape.nhwc) {
        a.block = std::clamp<int64_t>(8192 / std::max<int64_t>(1, channels), 64, 1024);
        const int64_t blocks = std::max<int64_t>(1, ceil_div(pixels, a.block));
        const int64_t spans = std::clamp<int64_t>(pixels * channels / 131072, 1, 32);
        a.span_pixels = ceil_div(blocks, spans) * a.block;
        a.spans = std::max<int64_t>(1, ceil_div(pixels, a.span_pixels));
    } else {
        a.block = std::clamp<int64_t>(8192 / std::max<int64_t>(1, channels / a.groups), 256, 2048);
        a.span_pixels = pixels;
        a.spans = a.groups;
    }
    a.block = std::min(a.block, std::max<int64_t>(1, pixels));
    const int64_t of_block = a.block * (a.shape.nhwc ? channels : channels / a.groups) + MOST_DRAWN + 16;
    a.draw_scratch = a.draw.sample ? 4 * (a.block + 2 * MOST_DRAWN) : 0;
    // one thread alone waits for each line that it writes to be read; of several the caches take somewhat more
    a.past_caches = torch::stable::get_num_threads() == 1 ? 8 << 20 : 16 << 20;
    a.row = ceil_div(channels, 16) * 16;
    a.scratch = ceil_div(7 * a.row + 5 * of_block + a.draw_scratch + 16 * 16, 16) * 16;
}

constexpr int64_t MOST_KEPT = 1 << 20;  // elements, 4 MB: of more, to make da again takes no longer than to keep it

// Whether threads that take whole samples wait much longer for the last of them than those that take spans, of which they
// find less in their caches in the next pass.
bool is_uneven(const GroupNorm& a) {
    const int64_t threads = torch::stable::get_num_threads(), batch = a.shape.batch;
    return 4 * ceil_div(batch, threads) * a.spans > 5 * ceil_div(batch * a.spans, threads);
}

// Memory of a thread that works on one sample at a time: for its numbers, for the kernels, which is returned, and, with
// ``keep``, for what it keeps from the first pass of backward to the last.
float* own_memory(GroupNorm& a, bool keep) {
    const int64_t numbers = NUMBERS * a.row, elements = a.shape.channels * a.shape.height * a.shape.width;
    a.numbers = scratch(numbers + a.scratch + (keep ? elements : 0)), a.numbers_stride = 0;
    a.kept = keep ? a.numbers + numbers + a.scratch : nullptr;
    return a.numbers + numbers;
}

// The numbers of each sample that are known before, if any, and three passes over the samples: each thread takes whole
// samples, which then stay in its cache, or, where there are too few to go round, parts of one.
// ``keep``: backward.
template <class Before, class First, class Middle, class Last>
void passes(const GroupNorm& a, bool keep, Before before, First first, Middle middle, Last last) {
    const int64_t batch = a.shape.batch, elements = a.shape.channels * a.shape.height * a.shape.width;
    if (!is_uneven(a) || batch * elements < 65536) {
        parallel(batch, 2 * elements, [&](int64_t begin, int64_t end) {
            GroupNorm mine = a;
            float* memory = own_memory(mine, keep && elements <= MOST_KEPT);
            for (int64_t b = begin; b < end; ++b) {
                before(mine, b, b + 1, memory);
                first(mine, b * a.spans, (b + 1) * a.spans, memory);
                middle(mine, b, b + 1, memory);
                last(mine, b * a.spans, (b + 1) * a.spans, memory);
            }
        });
        return;
    }
    GroupNorm all = a;
    all.numbers_stride = NUMBERS * a.row, all.numbers = scratch<1>(batch * all.numbers_stride);
    const auto spans = [&](auto kernel) {
        parallel(batch * a.spans, elements / a.spans,
                 [&](int64_t begin, int64_t end) { kernel(all, begin, end, scratch(a.scratch)); });
    };
    before(all, int64_t(0), batch, scratch(a.scratch));
    spans(first);
    middle(all, int64_t(0), batch, scratch(a.scratch));
    spans(last);
}

constexpr int64_t IN_CACHE = 1 << 18;  // elements: 1 MB, which the cache of a core holds

// Whether forward is better done in equal shares of the pixels than in whole samples, or in spans with a wait between.
bool in_shares(const GroupNorm& a) {
    const int64_t threads = torch::stable::get_num_threads(), elements = a.shape.channels * a.shape.height * a.shape.width;
    return a.shape.nhwc && a.shape.batch > threads && a.shape.batch % threads != 0 && elements <= IN_CACHE;
}

// Forward where the threads cannot take as many samples each: equal shares of all pixels. A thread finds the moments of
// every sample that it has a part of, the whole of it, which is in the cache of one core for the pass that follows;
// threads that wait for each other's moments would take longer.
template <class First, class Middle, class Last>
void shared_passes(const GroupNorm& a, First first, Middle middle, Last last) {
    const int64_t parts = ceil_div(a.shape.height * a.shape.width, a.block);
    const int64_t size = a.shape.batch * a.groups, elements = a.shape.channels * a.shape.height * a.shape.width;
    parallel(a.shape.batch * parts, 2 * ceil_div(elements, parts), [&](int64_t begin, int64_t end) {
        GroupNorm own = a;
        float* memory = own_memory(own, false);
        for (int64_t b = begin / parts; b * parts < end; ++b) {
            GroupNorm mine = own;
            std::vector<Moments> moments;
            std::vector<double> mean;
            std::vector<float> rstd;
            if (b * parts < begin) {  // it is for the thread before to write the outputs
                moments.resize(a.spans * size), mean.resize(size), rstd.resize(size);
                mine.moments = moments.data(), mine.mean = mean.data(), mine.rstd = rstd.data();
            }
            first(mine, b * a.spans, (b + 1) * a.spans, memory);
            middle(mine, b, b + 1, memory);
            mine.spans = parts, mine.span_pixels = a.block;  // which the last pass may cut as it likes
            last(mine, std::max(begin, b * parts), std::min(end, (b + 1) * parts), memory);
        }
    });
}

GroupNorm arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                    const MaybeTensor& channel_bias, const MaybeTensor& scale, const MaybeTensor& shift,
                    const MaybeTensor& residual, const MaybeTensor& x2, double dropout, int64_t seed,
                    const MaybeTensor& seed_tensor, const MaybeTensor& sample, int64_t step,
                    const MaybeTensor& step_tensor, int64_t layer, bool activation) {
    GroupNorm a{};
    a.shape = shape(x);
    a.x = image(x, a.shape);
    if (x2) {
        a.channels2 = x2->size(1);
        a.shape.channels += a.channels2;
        a.x2 = image(*x2, a.shape);
    }
    a.residual = image(residual, a.shape);
    a.groups = groups;
    a.weight = values(weight, 0), a.bias = values(bias, 0);
    if (channel_bias) a.channel_bias = values(*channel_bias, channel_bias->dim() == 2 ? a.shape.channels : 0);
    a.scale = values(scale, a.shape.channels), a.shift = values(shift, a.shape.channels);
    a.eps = static_cast<float>(eps);
    a.activation = activation;
    if (dropout > 0) {
        a.draw = drawing(seed, seed_tensor, sample, step, step_tensor, DROPOUT + static_cast<uint32_t>(layer));
        a.drop_below = static_cast<uint64_t>(std::nearbyint(dropout * 4294967296.0));
        a.keep_scale = static_cast<float>(1 / (1 - dropout));
    }
    if (a.shape.height * a.shape.width == 1) a.shape.nhwc = true;  // of one pixel the channels lie side by side
    plan(a);
    return a;
}

// y, mean and rstd [B, G], the mean in double; with a residual h, too.
std::vector<Tensor> group_norm_silu(
    const Tensor x, const Tensor weight, const Tensor bias, int64_t groups, double eps, const MaybeTensor channel_bias,
    const MaybeTensor scale, const MaybeTensor shift, const MaybeTensor residual, const MaybeTensor x2, double dropout,
    int64_t seed, const MaybeTensor seed_tensor, const MaybeTensor sample, int64_t step, const MaybeTensor step_tensor,
    int64_t layer, bool activation) {
    GroupNorm a = arguments(x, weight, bias, groups, eps, channel_bias, scale, shift, residual, x2, dropout, seed,
                            seed_tensor, sample, step, step_tensor, layer, activation);
    Shape of_y = shape(x);
    of_y.channels = a.shape.channels;
    std::vector<Tensor> outputs{new_image(of_y, x.scalar_type())};
    outputs.push_back(new_tensor({a.shape.batch, groups}, ScalarType::Double));
    outputs.push_back(new_tensor({a.shape.batch, groups}, ScalarType::Float));
    if (residual) outputs.push_back(new_image(of_y, x.scalar_type()));
    a.y = image(outputs[0], a.shape);
    a.mean = static_cast<double*>(outputs[1].data_ptr()), a.rstd = static_cast<float*>(outputs[2].data_ptr());
    if (residual) a.h = image(outputs[3], a.shape);
    std::vector<Moments> moments(a.shape.batch * (a.shape.nhwc ? a.spans : 1) * groups);
    a.moments = moments.data();
    const auto run = [&](auto how) {
        how(FASTDDPM_KERNEL(group_norm_statistics), FASTDDPM_KERNEL(group_norm_finish), FASTDDPM_KERNEL(group_norm_apply));
    };
    const auto nothing = [](const GroupNorm&, int64_t, int64_t, float*) {};
    if (in_shares(a)) run([&](auto... kernels) { shared_passes(a, kernels...); });
    else run([&](auto... kernels) { passes(a, false, nothing, kernels...); });
    return outputs;
}

// Gradients of x, weight and bias, and of those of channel_bias, scale, shift, residual and x2 that are given, in order.
std::vector<Tensor> group_norm_silu_backward(
    const Tensor dy, const MaybeTensor dh, const Tensor mean, const Tensor rstd, const Tensor x, const Tensor weight,
    const Tensor bias, int64_t groups, const MaybeTensor channel_bias, const MaybeTensor scale, const MaybeTensor shift,
    const MaybeTensor residual, const MaybeTensor x2, double dropout, int64_t seed, const MaybeTensor seed_tensor,
    const MaybeTensor sample, int64_t step, const MaybeTensor step_tensor, int64_t layer, bool activation) {
    GroupNorm a = arguments(x, weight, bias, groups, 1.0, channel_bias, scale, shift, residual, x2, dropout, seed,
                            seed_tensor, sample, step, step_tensor, layer, activation);
    const int64_t batch = a.shape.batch, channels = a.shape.channels;
    Shape of_x = shape(x);
    Tensor dx = new_image(of_x, x.scalar_type());
    MaybeTensor dresidual, dx2;
    if (residual) dresidual = new_image(shape(*residual), residual->scalar_type());
    if (x2) dx2 = new_image(shape(*x2), x2->scalar_type());
    a.dy = image(dy, a.shape), a.dh = image(dh, a.shape), a.dx = image(dx, a.shape);
    a.dresidual = image(dresidual, a.shape), a.dx2 = image(dx2, a.shape);
    a.mean = static_cast<double*>(mean.data_ptr()), a.rstd = static_cast<float*>(rstd.data_ptr());
    const int64_t spans = a.shape.nhwc ? a.spans : 1;
    const auto sums = std::make_unique_for_overwrite<double[]>(batch * spans * SUMS * channels);
    a.sums = sums.get();
    passes(a, true, FASTDDPM_KERNEL(group_norm_backward_numbers), FASTDDPM_KERNEL(group_norm_backward_sums),
           FASTDDPM_KERNEL(group_norm_backward_finish), FASTDDPM_KERNEL(group_norm_backward_apply));

    // The parameters need the sums alone.
    std::vector<double> dweight(channels), dbias(channels), dscale(scale ? batch * channels : 0), dshift(shift ? batch * channels : 0);
    const bool per_sample = channel_bias && channel_bias->dim() == 2;
    std::vector<double> dchannel_bias(!channel_bias ? 0 : per_sample ? batch * channels : channels);
    const int64_t of_group = channels / groups;
    std::vector<double> da_n(channels), factor(channels, 1.0);
    for (int64_t b = 0; b < batch; ++b) {
        const double *of_sample = sums.get() + b * spans * SUMS * channels, *da = of_sample + DA * channels;
        const double *da_centred = of_sample + DA_CENTRED * channels, *dx_sum = of_sample + DX * channels;
        const int64_t first = b * channels;
        for (int64_t g = 0, c = 0; g < groups; ++g)
            for (const double rstd = a.rstd[b * groups + g]; c < (g + 1) * of_group; ++c) da_n[c] = da_centred[c] * rstd;
        for (int64_t c = 0; scale && c < channels; ++c) {
            factor[c] = 1 + number(*scale, first + c);
            dscale[first + c] = number(weight, c) * da_n[c] + number(bias, c) * da[c];
        }
        for (int64_t c = 0; c < channels; ++c) dweight[c] += factor[c] * da_n[c], dbias[c] += factor[c] * da[c];
        if (shift) std::copy_n(da, channels, &dshift[first]);
        for (int64_t c = 0; channel_bias && c < channels; ++c) dchannel_bias[per_sample ? first + c : c] += dx_sum[c];
    }
    std::vector<Tensor> gradients{dx, rounded(dweight, weight), rounded(dbias, bias)};
    if (channel_bias) gradients.push_back(rounded(dchannel_bias, *channel_bias));
    if (scale) gradients.push_back(rounded(dscale, *scale));
    if (shift) gradients.push_back(rounded(dshift, *shift));
    if (residual) gradients.push_back(*dresidual);
    if (x2) gradients.push_back(*dx2);
    return gradients;
}

}  // namespace
}  // namespace fastddpm

#define OPTIONS                                                                                               \
    "float dropout, int seed, Tensor? seed_tensor, Tensor? sample, int step, Tensor? step_tensor, int layer, " \
    "bool activation) -> Tensor[]"

STABLE_TORCH_LIBRARY_FRAGMENT(fastddpm, m) {
    m.def(
        "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? channel_bias, "
        "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? x2, " OPTIONS);
    m.def(
        "group_norm_silu_backward(Tensor dy, Tensor? dh, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias, "
        "int num_groups, Tensor? channel_bias, Tensor? scale, Tensor? shift, Tensor? residual, Tensor? x2, " OPTIONS);
}
STABLE_TORCH_LIBRARY_IMPL(fastddpm, CPU, m) {
    m.impl("group_norm_silu", TORCH_BOX(&fastddpm::group_norm_silu));
    m.impl("group_norm_silu_backward", TORCH_BOX(&fastddpm::group_norm_silu_backward));
}
