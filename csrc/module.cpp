// The Python module fastddpm._C: makes the native library importable, and reports how it was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include <torch/headeronly/version.h>

#include "fastddpm_build.h"  // written by setup.py: the flags of this build

#if TORCH_ABI_VERSION < TORCH_TARGET_VERSION
#error "the headers of torch are older than the version this module is built for"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
    return "Clang " __clang_version__;
#elif defined(__GNUC__)
    return "GCC " __VERSION__;
#else
    return "unknown";
#endif
}

// The sets of which this file may use any instruction: the baseline that a machine must have for the module to load.
std::vector<std::string> baseline_instruction_sets() {
    std::vector<std::string> sets;
#if defined(__SSE2__)
    sets.emplace_back("sse2");
#endif
#if defined(__SSE4_2__)
    sets.emplace_back("sse4.2");
#endif
#if defined(__AVX2__)
    sets.emplace_back("avx2");
#endif
#if defined(__FMA__)
    sets.emplace_back("fma");
#endif
#if defined(__AVX512F__)
    sets.emplace_back("avx512f");
#endif
#if defined(__ARM_NEON)
    sets.emplace_back("neon");
#endif
    return sets;
}

// The sets that the processor at hand has, of those that kernels choose between.
std::vector<std::string> cpu_instruction_sets() {
    std::vector<std::string> sets;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse2")) sets.emplace_back("sse2");
    if (__builtin_cpu_supports("sse4.2")) sets.emplace_back("sse4.2");
    if (__builtin_cpu_supports("avx2")) sets.emplace_back("avx2");
    if (__builtin_cpu_supports("fma")) sets.emplace_back("fma");
    if (__builtin_cpu_supports("avx512f")) sets.emplace_back("avx512f");
    if (__builtin_cpu_supports("avx512bw")) sets.emplace_back("avx512bw");
    if (__builtin_cpu_supports("avx512dq")) sets.emplace_back("avx512dq");
    if (__builtin_cpu_supports("avx512vl")) sets.emplace_back("avx512vl");
#elif defined(__ARM_NEON)
    sets.emplace_back("neon");
#endif
    return sets;
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["flags"] = FASTDDPM_COMPILE_FLAGS;
    info["torch_headers"] = TORCH_VERSION;
    info["baseline_instruction_sets"] = baseline_instruction_sets();
    info["cpu_instruction_sets"] = cpu_instruction_sets();
    info["cuda_architectures"] = std::vector<std::string>{};  // no CUDA source is compiled into this module
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The native part of fastddpm.";
    module.def("build_info", &build_info, "How this module was built, and the instruction sets of the processor at hand.");
}
