// Which instruction set the kernels run with.

#include "common/isa.h"

#include <atomic>

namespace fastddpm {
namespace {

Isa best() {
#if defined(FASTDDPM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
        return Isa::avx2;
#endif
    return Isa::baseline;
}

std::atomic<Isa> chosen{best()};
std::atomic<std::optional<bool>> asked_for_pairs;

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

bool use_isa(Isa wanted) {
    if (wanted > best()) return false;
    chosen = wanted;
    return true;
}

bool on_amd() {
#if defined(FASTDDPM_X86)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

bool multiplies_pairs() {
    return asked_for_pairs.load(std::memory_order_relaxed).value_or(isa() == Isa::avx512_bf16 && on_amd());
}

void use_pairs(std::optional<bool> wanted) { asked_for_pairs = wanted; }

}  // namespace fastddpm
