// The Python module fastddpm._C: makes the native library importable, and reports how it was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include <torch/headeronly/version.h>

#include "common/host.h"
#include "common/isa.h"
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
    if (__builtin_cpu_supports("avx512bf16")) sets.emplace_back("avx512bf16");
#elif defined(__ARM_NEON)
    sets.emplace_back("neon");
#endif
    return sets;
}

// The sets that kernels were compiled for, the slowest first.
const std::vector<std::pair<std::string, fastddpm::Isa>> KERNELS = {
    {"baseline", fastddpm::Isa::baseline},
#if defined(FASTDDPM_X86)
    {"avx2", fastddpm::Isa::avx2},
    {"avx512", fastddpm::Isa::avx512},
    {"avx512_bf16", fastddpm::Isa::avx512_bf16},
#endif
};

std::string instruction_set() {
    for (const auto& [name, isa] : KERNELS)
        if (isa == fastddpm::isa()) return name;
    return "unknown";
}

void use_instruction_set(const std::string& wanted) {
    for (const auto& [name, isa] : KERNELS)
        if (name == wanted) {
            if (fastddpm::use_isa(isa)) return;
            throw pybind11::value_error("this processor lacks " + wanted);
        }
    throw pybind11::value_error("no kernels were built for " + wanted);
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["flags"] = FASTDDPM_COMPILE_FLAGS;
    info["torch_headers"] = TORCH_VERSION;
    info["baseline_instruction_sets"] = baseline_instruction_sets();
    info["cpu_instruction_sets"] = cpu_instruction_sets();
    std::vector<std::string> kernels;
    for (const auto& [name, isa] : KERNELS) kernels.push_back(name);
    info["kernel_instruction_sets"] = kernels;
    info["instruction_set"] = instruction_set();
    info["multiplies_pairs"] = fastddpm::multiplies_pairs();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The native part of fastddpm.";
    module.def("build_info", &build_info, "How this module was built, and the instruction sets of the processor at hand.");
    module.def("instruction_set", &instruction_set, "The set that the kernels run with.");
    module.def("use_instruction_set", &use_instruction_set,
               "Run the kernels with another set from now on, for tests and timings: baseline, avx2, avx512 or avx512_bf16.");
    module.def("on_amd", &fastddpm::on_amd, "Whether the processor is one of AMD.");
    module.def("use_pairs", &fastddpm::use_pairs,
               "Multiply bfloat16 numbers in pairs from now on, or not, for tests and timings; None: where that is faster.");
    module.def("multiplies_pairs", &fastddpm::multiplies_pairs, "Whether bfloat16 numbers are multiplied in pairs.");
    module.def("free_scratch", [] { fastddpm::scratches() = {}; },
               "Free what the kernels keep for this thread from call to call; the next call takes it anew.");
}
