// The seed state machine, row by row: one definition for the C++ and the CUDA backend, no CUDA headers needed.
//
// All seeds of a model live in one buffer. Every field is one array of `rows` elements, padded to kAlign bytes; the order of
// the fields, and so the position of each, follows from `rows` alone (Fields). docs/lattice.md gives the semantics;
// esper/ops/lattice/table.py holds the same numbers, and esper.ops refuses a library whose numbers differ.
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace esper::lattice {

enum State : int32_t {
    kDormant = 0,
    kLoading = 1,
    kActive = 2,
    kErrorRecovery = 3,
    kFossilized = 4,
    kGrafting = 5,
    kTraining = 6,
    kCulled = 7,
};
constexpr int kStates = 8;

constexpr uint32_t bit(State state) { return 1u << state; }

// Row: from; bit: to.
constexpr uint32_t kTransitions[kStates] = {
    /* DORMANT        */ bit(kLoading) | bit(kActive) | bit(kGrafting) | bit(kTraining) | bit(kErrorRecovery),
    /* LOADING        */ bit(kDormant) | bit(kActive) | bit(kGrafting) | bit(kTraining) | bit(kErrorRecovery),
    /* ACTIVE         */ bit(kDormant) | bit(kGrafting) | bit(kTraining) | bit(kFossilized) | bit(kCulled) | bit(kErrorRecovery),
    /* ERROR_RECOVERY */ bit(kDormant) | bit(kLoading) | bit(kCulled),
    /* FOSSILIZED     */ bit(kErrorRecovery),
    /* GRAFTING       */ bit(kDormant) | bit(kActive) | bit(kTraining) | bit(kFossilized) | bit(kCulled) | bit(kErrorRecovery),
    /* TRAINING       */ bit(kDormant) | bit(kActive) | bit(kGrafting) | bit(kFossilized) | bit(kCulled) | bit(kErrorRecovery),
    /* CULLED         */ bit(kDormant),
};
constexpr uint32_t kAwake = bit(kActive) | bit(kFossilized) | bit(kGrafting) | bit(kTraining);
constexpr uint32_t kTimed = bit(kTraining) | bit(kCulled);
constexpr uint32_t kBusy = kAwake | kTimed;  // a step does something to a row in one of these, even if nobody touched it
constexpr int32_t kMaxFaults = 3;
constexpr float kHealthRate = 0.1f;

// Every transition that step_row makes on its own has to stand in the table.
constexpr bool legal(State from, State to) { return (kTransitions[from] >> to) & 1u; }
static_assert(legal(kGrafting, kActive) && legal(kGrafting, kTraining));
static_assert(legal(kTraining, kActive) && legal(kCulled, kDormant));
static_assert(legal(kActive, kErrorRecovery) && legal(kFossilized, kErrorRecovery));
static_assert(legal(kGrafting, kErrorRecovery) && legal(kTraining, kErrorRecovery));

constexpr int64_t kAlign = 64;

// The fields of a buffer of `rows` seeds. The persistent ones come first, so that the checksum and the snapshot are about one
// contiguous range.
struct Fields {
    int64_t* active_kernel_id;
    float* alpha_blend;
    float* alpha_target;
    float* alpha_step;
    float* health_accumulator;
    int32_t* last_update_epoch;
    int32_t* exec_latency_us;
    int32_t* error_count;
    int32_t* state_timer;
    uint8_t* lifecycle_states;
    uint8_t* fallback_active;
    float* health_sample;
    uint8_t* fault_flags;

    ESPER_HD Fields(uint8_t* base, int64_t rows) {
        active_kernel_id = take<int64_t>(base, rows);
        alpha_blend = take<float>(base, rows);
        alpha_target = take<float>(base, rows);
        alpha_step = take<float>(base, rows);
        health_accumulator = take<float>(base, rows);
        last_update_epoch = take<int32_t>(base, rows);
        exec_latency_us = take<int32_t>(base, rows);
        error_count = take<int32_t>(base, rows);
        state_timer = take<int32_t>(base, rows);
        lifecycle_states = take<uint8_t>(base, rows);
        fallback_active = take<uint8_t>(base, rows);
        health_sample = take<float>(base, rows);
        fault_flags = take<uint8_t>(base, rows);
    }

  private:
    template <typename T>
    static ESPER_HD T* take(uint8_t*& cursor, int64_t rows) {
        T* field = reinterpret_cast<T*>(cursor);
        cursor += (rows * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
        return field;
    }
};

// Conditions are masks, all bits or none, and choices are bit operations: a compiler that sees `?:` on integers may turn it into
// jumps, and one jump keeps the whole loop from becoming vector code.
ESPER_HD int32_t mask(bool condition) { return -static_cast<int32_t>(condition); }
ESPER_HD int32_t pick(int32_t mask, int32_t yes, int32_t no) { return (yes & mask) | (no & ~mask); }

#if defined(__CUDA_ARCH__)
ESPER_HD int32_t bits(float value) { return __float_as_int(value); }
ESPER_HD float from_bits(int32_t value) { return __int_as_float(value); }
#else
ESPER_HD int32_t bits(float value) { return __builtin_bit_cast(int32_t, value); }
ESPER_HD float from_bits(int32_t value) { return __builtin_bit_cast(float, value); }
#endif
ESPER_HD float pick(int32_t mask, float yes, float no) { return from_bits(pick(mask, bits(yes), bits(no))); }

// Membership by comparison, not by shift: it vectorises on every instruction set, and a corrupt state belongs to no set.
template <uint32_t Set>
ESPER_HD int32_t in_set(int32_t state) {
    int32_t hit = 0;
    for (int32_t member = 0; member < kStates; ++member) {
        if ((Set >> member) & 1u) hit |= mask(state == member);
    }
    return hit;
}

// What a step reads and writes of one row, apart from health. All lanes are 32 bits wide.
struct Row {
    int32_t state;
    int32_t flag;      // in: fault raised since the last step
    int32_t timer;
    int32_t errors;
    int32_t fallback;
    float alpha;
    float target;
    float stride;
    int32_t touched;   // out: mask, the state changed or a fault was counted
    int32_t dead;      // out: mask, sent to ERROR_RECOVERY
};

ESPER_HD Row step_row(const Row in) {
    Row out;
    const int32_t state = in.state;
    const int32_t awake = in_set<kAwake>(state);

    // Faults count only while the seed's kernel is bound; a flag that arrives later is dropped.
    const int32_t fault = awake & mask(in.flag != 0);
    const int32_t counted = in.errors - mask(in.errors < INT32_MAX);
    const int32_t streak = fault & counted;
    const int32_t dead = fault & mask(streak >= kMaxFaults);
    out.flag = 0;
    out.errors = pick(awake, streak, in.errors);
    out.fallback = pick(awake, fault & 1, in.fallback);

    // A remainder of less than half a stride goes with this move, so that n strides take n steps whatever the rounding.
    // The comparison is false for NaN, which sends a damaged alpha to its target.
    const float distance = in.target - in.alpha;
    const float stride = fabsf(in.stride);
    const float moved = pick(mask(distance > 0.0f), in.alpha + stride, in.alpha - stride);
    const float reached = pick(mask(fabsf(distance) > 1.5f * stride), moved, in.target);
    out.alpha = from_bits(bits(pick(awake, reached, in.alpha)) & ~dead);
    out.target = from_bits(bits(in.target) & ~dead);
    out.stride = from_bits(bits(in.stride) & ~dead);

    const int32_t timed = in_set<kTimed>(state);
    out.timer = (in.timer + (timed & mask(in.timer > 0))) & ~dead;  // a mask is -1

    const int32_t arrived = mask(state == kGrafting) & mask(out.alpha == out.target);
    const int32_t expired = timed & mask(in.timer == 1);  // 0 means no timer, not an expired one
    int32_t next = state;
    next = pick(arrived, pick(mask(in.timer > 0), kTraining, kActive), next);
    next = pick(expired, pick(mask(state == kTraining), kActive, kDormant), next);
    next = pick(dead, kErrorRecovery, next);
    out.state = next;
    out.dead = dead;
    out.touched = fault | mask(next != state);
    return out;
}

// The exponential mean of health. The caller has checked that the sample is not NaN; it is clamped to [0, 1].
ESPER_HD float mix_health(float health, float sample) {
    const float floored = pick(mask(sample > 0.0f), sample, 0.0f);
    const float score = pick(mask(floored < 1.0f), floored, 1.0f);
    const float change = (score - health) * kHealthRate;
    return health + change;
}

// CRC-32C (Castagnoli) as arithmetic on polynomials over GF(2), bit-reflected: bit 31 is x^0. A message of n 32-bit
// little-endian words w_0..w_{n-1} has the raw remainder  xor_i w_i * x^(32 (n - i)) mod P, which any number of threads may
// compute in any order. Polynomial and conventions: RFC 3720, appendix B.4; product as in zlib's crc32_combine.
constexpr uint32_t kCrcPolynomial = 0x82F63B78u;
constexpr uint32_t kCrcOne = 0x80000000u;

ESPER_HD constexpr uint32_t crc_times_x(uint32_t a) { return (a >> 1) ^ ((a & 1u) ? kCrcPolynomial : 0u); }

ESPER_HD constexpr uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int i = 31; i >= 0; --i) {
        product ^= ((a >> i) & 1u) ? b : 0u;
        b = crc_times_x(b);
    }
    return product;
}

// x^n mod P by repeated squaring.
ESPER_HD constexpr uint32_t crc_power(uint64_t n) {
    uint32_t result = kCrcOne;
    uint32_t square = kCrcOne >> 1;
    for (; n != 0; n >>= 1) {
        if (n & 1u) result = crc_multiply(result, square);
        square = crc_multiply(square, square);
    }
    return result;
}

}  // namespace esper::lattice
