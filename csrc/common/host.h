// What the host code of every op shares: tensors as the plain data of kernels, outputs, threads.
//
// Python has checked all arguments (fastddpm/ops/<op>/interface.py); nothing is checked again here.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Double: return DType::f64;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        case ScalarType::Byte: case ScalarType::Bool: return DType::u8;
        default: return DType::f32;
    }
}

// The shape of a dense image, in the order that it lies in.
inline Shape shape(const Tensor& t) {
    return {t.size(0), t.size(1), t.size(2), t.size(3), !t.is_contiguous()};
}

// A dense image, or a mask of which any size may be 1, read in the order of ``s``.
inline Image image(const Tensor& t, const Shape& s) {
    const int64_t channels = t.size(1), pixels = t.size(2) * t.size(3);
    const bool nhwc = !t.is_contiguous();
    Image a{t.data_ptr(), dtype(t), channels * pixels, nhwc ? 1 : pixels, nhwc ? channels : 1, false};
    a.in_order = channels == s.channels && (nhwc == s.nhwc || channels == 1 || pixels == 1);
    if (channels == 1) a.channel_stride = 0;
    if (t.size(0) == 1 && s.batch != 1) a.sample_stride = 0;
    return a;
}
inline Image image(const MaybeTensor& t, const Shape& s) { return t ? image(*t, s) : Image{}; }

// The first or the second C channels of [B, 2C, H, W], read or written in the order of ``s``, which has C.
inline Image half(const Tensor& t, const Shape& s, int which) {
    Image a = image(t, s);
    const int64_t offset = which * s.channels * a.channel_stride;
    a.data = static_cast<char*>(a.data) + offset * static_cast<int64_t>(t.element_size());
    a.in_order = !s.nhwc && t.is_contiguous();
    return a;
}

// [C], [B, C], [B] or []: row b starts at b * row_stride.
inline Values values(const Tensor& t, int64_t row_stride) { return {t.data_ptr(), dtype(t), row_stride}; }
inline Values values(const MaybeTensor& t, int64_t row_stride) { return t ? values(*t, row_stride) : Values{}; }

// Element i of a tensor of any float dtype.
inline double number(const Tensor& t, int64_t i = 0) {
    switch (dtype(t)) {
        case DType::f64: return static_cast<const double*>(t.data_ptr())[i];
        case DType::bf16: return static_cast<const torch::headeronly::BFloat16*>(t.data_ptr())[i];
        case DType::f16: return static_cast<const torch::headeronly::Half*>(t.data_ptr())[i];
        default: return static_cast<const float*>(t.data_ptr())[i];
    }
}

inline int64_t integer(int64_t number, const MaybeTensor& tensor) {
    return tensor ? *static_cast<const int64_t*>(tensor->data_ptr()) : number;
}

// Numbers, or tensors [] that take their place; no sample: nothing is drawn.
inline Draw drawing(int64_t seed, const MaybeTensor& seed_tensor, const MaybeTensor& sample, int64_t step,
                    const MaybeTensor& step_tensor, uint32_t stream) {
    const void* rows = sample ? sample->data_ptr() : nullptr;
    return {static_cast<uint64_t>(integer(seed, seed_tensor)), static_cast<const int64_t*>(rows),
            static_cast<uint32_t>(integer(step, step_tensor)), stream};
}

// A new tensor on the CPU. torch::stable::empty would look up its operator by name, at every call.
inline Tensor new_strided(const int64_t* sizes, const int64_t* strides, size_t dimensions, ScalarType type) {
    AtenTensorHandle tensor;
    const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides, number,
                                                    aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
    int64_t strides[4] = {}, next = 1;
    for (size_t i = sizes.size(); i-- > 0; next *= std::max<int64_t>(1, sizes.begin()[i])) strides[i] = next;
    return new_strided(sizes.begin(), strides, sizes.size(), type);
}

// A new image of this shape, in its order.
inline Tensor new_image(const Shape& s, ScalarType type) {
    if (!s.nhwc) return new_tensor({s.batch, s.channels, s.height, s.width}, type);
    const int64_t sizes[] = {s.batch, s.channels, s.height, s.width};
    const int64_t strides[] = {s.channels * s.width * s.height, 1, s.channels * s.width, s.channels};
    return new_strided(sizes, strides, 4, type);
}

// A small gradient, summed in double, in the dtype of what it is of.
inline Tensor rounded(const std::vector<double>& sums, const Tensor& like) {
    const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    Tensor out = torch::stable::empty({sizes.data(), sizes.size()}, like.scalar_type());
    const auto fill = [&](auto* to) {
        for (size_t i = 0; i < sums.size(); ++i) to[i] = static_cast<float>(sums[i]);
    };
    switch (dtype(like)) {
        case DType::f64: std::copy(sums.begin(), sums.end(), static_cast<double*>(out.data_ptr())); break;
        case DType::bf16: fill(static_cast<torch::headeronly::BFloat16*>(out.data_ptr())); break;
        case DType::f16: fill(static_cast<torch::headeronly::Half*>(out.data_ptr())); break;
        default: fill(static_cast<float*>(out.data_ptr())); break;
    }
    return out;
}

// Second caches that what is done at a time may fill: those of the threads, up to four; it was measured with one and three.
inline int64_t caches() { return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, 4); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t TILE = 2048;        // elements: a few tiles of floats fit in the first cache
constexpr int64_t MOST_DRAWN = 128;  // floats that noise is drawn in at a time, with the widest vectors

// Tiles of whole pixels in NHWC order; otherwise of a multiple of four elements.
inline Tiling tiling(const Shape& s) {
    const int64_t elements = s.channels * s.height * s.width;
    const int64_t unit = s.nhwc ? s.channels : 4;
    const int64_t size = std::max<int64_t>(unit, std::min(TILE, elements) / unit * unit);
    return {size, elements == 0 ? 0 : (elements + size - 1) / size};
}

// Floats that one buffer for a tile takes, and what noise may write behind it.
inline int64_t tile_buffer(const Tiling& t) { return (t.size + MOST_DRAWN + 15) / 16 * 16; }

// Floats that drawing noise in NHWC order takes beside the tile.
inline int64_t draw_scratch(const Shape& s, const Tiling& t) {
    return 4 * (t.size / std::max<int64_t>(1, s.channels) + 2 * MOST_DRAWN);
}

// Memory that a thread keeps from call to call, for one use at a time, from the start of a line of the cache on.
struct Scratch {
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
};

inline std::array<Scratch, 3>& scratches() {
    static thread_local std::array<Scratch, 3> kept;
    return kept;
}

template <int USE = 0>
inline float* scratch(int64_t floats) {
    constexpr int64_t LINE = 16;
    Scratch& s = scratches()[USE];
    if (s.size < floats) {
        s = {};  // before there is more: nobody wants what was in it
        s = {std::unique_ptr<float[]>(new float[floats + LINE]), floats};
    }
    const auto at = reinterpret_cast<uintptr_t>(s.memory.get()) / sizeof(float);
    return s.memory.get() + (LINE - at % LINE) % LINE;
}

// f(begin, end) over work items, on torch's threads where there is work for several: ``cost`` counts elements an item.
template <class F>
void parallel(int64_t items, int64_t cost, const F& f) {
    constexpr int64_t WORTH_A_THREAD = 16384;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, cost));
    if (items <= grain) {
        if (items > 0) f(int64_t(0), items);
        return;
    }
    torch::stable::parallel_for(0, items, grain, f);
}

}  // namespace fastddpm
