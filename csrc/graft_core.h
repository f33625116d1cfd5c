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

// Seeds of one call. Their addresses travel to CUDA kernels by value, and 64 of these stay within 4 KiB.
constexpr int kMaxSeeds = 64;

// One seed of a blend: k lies at part, [outer, end - begin, inner]; trusted is [outer, inner].
struct Seat {
    const void* part;
    const std::uint8_t* trusted;
    std::int32_t index;  // its row of alpha
    std::int32_t begin, end;  // features
    std::int32_t replace;
};

struct Seats {
    Seat seat[kMaxSeeds];
    int count;
};

// The sum A' of the replace seeds that change feature c.
template <typename T>
ESPER_HD T replace_sum(const Seats& seats, const float* alpha, std::int64_t c) {
    T sum = 0;
    for (int s = 0; s < seats.count; ++s) {
        const Seat& seat = seats.seat[s];
        if (seat.replace && seat.begin <= c && c < seat.end) sum += T(alpha[seat.index]);
    }
    return sum;
}

// A seed's coefficient at a feature it changes.
template <typename T>
ESPER_HD T coefficient(const Seat& seat, const float* alpha, T sum) {
    return T(alpha[seat.index]) * (seat.replace ? replace_scale(sum) : T(1));
}

// Where feature c at (outer, inner) lies in a seed's part.
ESPER_HD std::int64_t part_offset(const Seat& seat, std::int64_t outer, std::int64_t c, std::int64_t inner_size,
                                  std::int64_t inner) {
    return (outer * (seat.end - seat.begin) + (c - seat.begin)) * inner_size + inner;
}

}  // namespace esper::graft
