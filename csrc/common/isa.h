// Kernels are compiled once for each instruction set, in a namespace of its name, and chosen at run time.
#pragma once

#include <optional>

namespace fastddpm {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best set that was built and that this processor has, or what use_isa asked for.
Isa isa();
bool use_isa(Isa wanted);  // false where this processor lacks it

bool on_amd();  // a processor of AMD

// Whether a vector of 16 quotients takes no longer than three multiplications and a reciprocal: since AMD's Zen 5 it takes
// 2.5 cycles there, in a unit that multiplications leave free; on Intel's processors 16.
extern const bool divides_quickly;

// Whether products of bfloat16 numbers are taken in pairs: where the instruction for it, of AVX512_BF16, multiplies twice as
// many as one for float32 does. On AMD's processors (Zen 5) it does, on Intel's it is no faster.
bool multiplies_pairs();
void use_pairs(std::optional<bool> wanted);  // whatever the processor, for kernels of every set can; or as it is faster

}  // namespace fastddpm

#if defined(FASTDDPM_X86)
#define FASTDDPM_DECLARE(name, ...)            \
    namespace baseline { void name(__VA_ARGS__); } \
    namespace avx2 { void name(__VA_ARGS__); }     \
    namespace avx512 { void name(__VA_ARGS__); }   \
    namespace avx512_bf16 { void name(__VA_ARGS__); }
#define FASTDDPM_KERNEL(name)                                   \
    (::fastddpm::isa() == Isa::avx512_bf16 ? avx512_bf16::name \
     : ::fastddpm::isa() == Isa::avx512    ? avx512::name      \
     : ::fastddpm::isa() == Isa::avx2      ? avx2::name        \
                                           : baseline::name)
#else
#define FASTDDPM_DECLARE(name, ...) \
    namespace baseline { void name(__VA_ARGS__); }
#define FASTDDPM_KERNEL(name) baseline::name
#endif
