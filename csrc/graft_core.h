// The formula of a blend, shared by the C++ and the CUDA backend (docs/grafts.md).
//
//   residual seed:  coefficient alpha
//   replace seed:   coefficient alpha / max(1, A'),  host factor 1 - min(1, A')
//
// A' is the sum of the alphas of the replace seeds that cover a feature. It changes only at the borders of chunk-scoped
// replace seeds, so the features fall into a few groups, each with one host factor and one coefficient a seed.
#pragma once

#include <cstdint>

#include "common.h"

namespace esper::graft {

// The exponent is all ones exactly for infinities and NaN. Bits, because a compiler may assume x == x.
ESPER_HD bool finite_bits(std::uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }
ESPER_HD bool finite_bits(std::uint64_t bits) {
    return (bits & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

template <typename T>
ESPER_HD T host_factor(T replace_sum) {
    return replace_sum >= T(1) ? T(0) : T(1) - replace_sum;
}

template <typename T>
ESPER_HD T replace_scale(T replace_sum) {
    return replace_sum > T(1) ? T(1) / replace_sum : T(1);
}

// The host's part of the sum. A factor of 0 must not read h (0 * inf is NaN), and -0 is the number that added to any k
// gives k, the sign of zero included. A factor of 1 gives h itself.
template <typename T>
ESPER_HD T host_part(T factor, T h) {
    return factor == T(0) ? T(-0.0) : factor * h;
}

// A seed that is switched off must not be read either, for the same reason.
template <typename T>
ESPER_HD T add_seed(T sum, T coefficient, T k) {
    return coefficient == T(0) ? sum : sum + coefficient * k;
}

}  // namespace esper::graft
