// Which instruction set the kernels run with.

#include "common/isa.h"

#include <atomic>

#if defined(FASTDDPM_X86)
#include <cpuid.h>
#endif

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

// The family of an x86 processor, as its vendor counts: 0x1a of AMD is Zen 5.
unsigned family() {
#if defined(FASTDDPM_X86)
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid(1, &a, &b, &c, &d);
    return (a >> 8 & 0xf) + (a >> 20 & 0xff);
#else
    return 0;
#endif
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

const bool divides_quickly = on_amd() && family() >= 0x1a;

bool multiplies_pairs() {
    return asked_for_pairs.load(std::memory_order_relaxed).value_or(isa() == Isa::avx512_bf16 && on_amd());
}

void use_pairs(std::optional<bool> wanted) { asked_for_pairs = wanted; }

}  // namespace fastddpm
