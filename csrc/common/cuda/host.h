// What the host code of every CUDA op shares: the stream, where noise is drawn, the error of a launch.
//
// FASTDDPM_EMULATED: for the tests that run the kernels on a CPU (tests/cuda), tensors lie in the memory of the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/cuda/data.h"
#include "common/host.h"

#if defined(FASTDDPM_EMULATED)
#define FASTDDPM_DEVICE_KEY CPU
#else
#define FASTDDPM_DEVICE_KEY CUDA
#endif

namespace fastddpm::cuda {

// Makes the device of a tensor the current one as long as it lives, and gives the stream that torch uses there.
class __attribute__((visibility("hidden"))) OnDevice {
public:
    explicit OnDevice(const Tensor& t)
#if !defined(FASTDDPM_EMULATED)
        : guard(t.get_device_index()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
    torch::stable::accelerator::DeviceGuard guard;
#else
    {
        (void)t;
    }
#endif
    cudaStream_t stream = nullptr;
};

inline void check(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

inline const int64_t* pointer(const MaybeTensor& t) { return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr; }

// Numbers, or tensors [] on the device that take their place; no sample: nothing is drawn.
inline Source source(int64_t seed, const MaybeTensor& seed_tensor, const MaybeTensor& sample, int64_t step,
                     const MaybeTensor& step_tensor, uint32_t stream) {
    return {static_cast<uint64_t>(seed), pointer(seed_tensor), pointer(step_tensor), pointer(sample),
            static_cast<uint32_t>(step), stream};
}

// New tensors on the device of ``like``.
inline Tensor new_image(const Tensor& like, const Shape& s, ScalarType type) {
    const int64_t sizes[] = {s.batch, s.channels, s.height, s.width};
    using torch::headeronly::MemoryFormat;
    return torch::stable::empty({sizes, 4}, type, std::nullopt, like.device(), std::nullopt,
                                s.nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, like.device());
}

}  // namespace fastddpm::cuda
