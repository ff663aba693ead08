// What a GPU computes by approximate instructions, each with the largest error that NVIDIA documents for it (PTX ISA,
// floating-point instructions) times FASTDDPM_EMULATION_ERRORS; rounded once where that is 0 or not set. Up or down is
// decided by the bits of the argument, so that the same argument always gives the same result, as on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

extern int errors;  // FASTDDPM_EMULATION_ERRORS

inline float wrong(double exact, float argument, double error) {
    if (errors == 0 || exact == 0 || argument == 0 || !std::isfinite(exact)) return static_cast<float>(exact);
    uint32_t bits;
    memcpy(&bits, &argument, 4);
    for (int i = 0; i < 2; ++i) bits = (bits ^ bits >> 16) * 0x7feb352du;
    error *= errors;
    const float result = static_cast<float>(exact + (bits >> 31 ? error : -error));
    // the rounding must not make the error larger
    return std::abs(result - exact) > error ? nextafterf(result, static_cast<float>(exact)) : result;
}

inline double ulp(double x) {
    const int exponent = x == 0 || !std::isfinite(x) ? -126 : std::ilogb(x);
    return std::ldexp(1.0, (exponent < -126 ? -126 : exponent) - 23);
}

inline float ex2_approx(float x) {
    const double y = std::exp2(static_cast<double>(x));
    return wrong(y, x, 2 * ulp(y));
}
inline float lg2_approx(float x) {
    const double y = std::log2(static_cast<double>(x));
    return wrong(y, x, 0x1p-22 * (x > 0.5f && x < 2.0f ? 1 : std::abs(y)));
}
constexpr double SINE = 6.743495761743e-7;  // 2^-20.5, between -2 pi and 2 pi
inline float sin_approx(float x) { return wrong(std::sin(static_cast<double>(x)), x, SINE); }
inline float cos_approx(float x) { return wrong(std::cos(static_cast<double>(x)), x, SINE); }
inline float sqrt_approx(float x) {
    const double y = std::sqrt(static_cast<double>(x));
    return wrong(y, x, 0x1p-23 * y);
}
inline float rcp_approx(float x) {
    const double y = 1.0 / x;
    return wrong(y, x, ulp(y));
}
inline float div_approx(float x, float by) {
    const double y = static_cast<double>(x) / by;
    return wrong(y, x + by, 2 * ulp(y));
}

}  // namespace emulation
