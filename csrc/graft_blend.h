// The blend of elements, and who is at fault for one. Load gives a part's or the host's value in the dtype of the sum; Round
// takes a sum to the precision of the result and back, because what the layer hands on is what must be finite.
#pragma once

#include <cstdint>

#include "graft_core.h"

namespace esper::graft {

template <typename T>
ESPER_HD bool is_finite(T value) {
    return value - value == T(0);  // compiled without -ffast-math, so NaN and infinity fail
}

// The blend of `N` neighbours: features that all belong to the same seeds, or positions of one feature. `values` holds the
// host's numbers and becomes the result; `replaced` is the features' replace_sum, and load(part, at, k) gives k[N].
template <int N, typename T, typename Load, typename Round>
ESPER_HD void blend_neighbours(const Seats& seats, const float* alpha, T replaced, std::int64_t outer, std::int64_t c,
                               std::int64_t inner_size, std::int64_t inner, T (&values)[N], Load load, Round round) {
    const T kept = host_factor(replaced);
    for (int i = 0; i < N; ++i) values[i] = host_part(kept, values[i]);
    for (int s = 0; s < seats.count; ++s) {
        const Seat& seat = seats.seat[s];
        if (c < seat.begin || c >= seat.end) continue;
        const T factor = coefficient(seat, alpha, replaced);
        if (factor == T(0)) continue;
        T k[N];
        load(seat.part, part_offset(seat, outer, c, inner_size, inner), k);
        for (int i = 0; i < N; ++i) values[i] = add_seed(values[i], factor, k[i]);
    }
    for (int i = 0; i < N; ++i) values[i] = round(values[i]);
}

// Called where something is not finite; `blame(s)` for each seed at fault.
template <typename T, typename Load, typename Round, typename Blame>
ESPER_HD void blame_element(const Seats& seats, const float* alpha, T h, T y, std::int64_t outer, std::int64_t c,
                            std::int64_t inner_size, std::int64_t inner, Load load, Round round, Blame blame) {
    const T replaced = replace_sum<T>(seats, alpha, c);
    bool overflow = !is_finite(y) && is_finite(h);
    T largest = 0;
    for (int s = 0; s < seats.count; ++s) {
        const Seat& seat = seats.seat[s];
        if (c < seat.begin || c >= seat.end) continue;
        const T factor = coefficient(seat, alpha, replaced);
        if (factor == T(0)) continue;
        const T k = round(factor * load(seat.part, part_offset(seat, outer, c, inner_size, inner)));
        const bool sound_tap = seat.trusted[outer * inner_size + inner] != 0;
        if (!is_finite(k)) {
            overflow = false;
            if (sound_tap) blame(s);
        } else {
            overflow = overflow && sound_tap;
            const T size = k < T(0) ? -k : k;
            largest = size > largest ? size : largest;
        }
    }
    if (!overflow || largest == T(0)) return;
    for (int s = 0; s < seats.count; ++s) {
        const Seat& seat = seats.seat[s];
        if (c < seat.begin || c >= seat.end) continue;
        const T factor = coefficient(seat, alpha, replaced);
        if (factor == T(0)) continue;
        const T k = round(factor * load(seat.part, part_offset(seat, outer, c, inner_size, inner)));
        if ((k < T(0) ? -k : k) == largest) blame(s);
    }
}

}  // namespace esper::graft
