// Kernels are compiled once for each instruction set, in a namespace of its name, and chosen at run time.
#pragma once

namespace fastddpm {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best set that was built and that this processor has, or what use_isa asked for.
Isa isa();
bool use_isa(Isa wanted);  // false where this processor lacks it

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
