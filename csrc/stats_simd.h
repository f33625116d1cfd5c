// Four lanes of double: loading any dtype and rounding back. GCC vector extensions, so one source serves SSE2, AVX2 and
// AVX-512; everything is inlined into functions that carry target_clones. Four, a register of AVX2: with eight the sums of
// a tile do not fit its 16 registers, and the compiler keeps them in memory, which made everything five to ten times as slow.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "stats_core.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // every function below is inlined: there is no ABI to speak of

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define ESPER_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ESPER_CLONES
#endif
#define ESPER_INLINE static inline __attribute__((always_inline))

namespace esper::stats {

constexpr int kLanes = 4;
typedef double vd __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

// The same in memory, where they may begin anywhere. Through memcpy GCC 12 moves halves of a register, by way of the stack.
typedef vd vd_at __attribute__((aligned(8), may_alias));
typedef vl vl_at __attribute__((aligned(8), may_alias));
typedef vf vf_at __attribute__((aligned(4), may_alias));
typedef vh vh_at __attribute__((aligned(2), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

ESPER_INLINE vd splat(double x) { return vd{x, x, x, x}; }
ESPER_INLINE vd vabs(vd x) { return (vd)((vl)x & INT64_MAX); }
ESPER_INLINE vl is_finite(vd magnitude) { return (vl)(magnitude <= std::numeric_limits<double>::max()); }

// Pairwise, so that the order is the same on every machine.
ESPER_INLINE double sum_lanes(vd x) { return (x[0] + x[2]) + (x[1] + x[3]); }

ESPER_INLINE vd load(const double* p) { return *reinterpret_cast<const vd_at*>(p); }
ESPER_INLINE vl load(const int64_t* p) { return *reinterpret_cast<const vl_at*>(p); }
ESPER_INLINE void store(double* p, vd x) { *reinterpret_cast<vd_at*>(p) = x; }
ESPER_INLINE void store(int64_t* p, vl x) { *reinterpret_cast<vl_at*>(p) = x; }

ESPER_INLINE vd widen(const float* p) { return __builtin_convertvector(*reinterpret_cast<const vf_at*>(p), vd); }
ESPER_INLINE vd widen(const double* p) { return load(p); }
ESPER_INLINE vd widen(const bf16* p) {
    const vh x = *reinterpret_cast<const vh_at*>(p);
    const vu bits = __builtin_convertvector(x, vu) << 16;
    return __builtin_convertvector((vf)bits, vd);
}
ESPER_INLINE vd widen(const f16* p) {
    const vh x = *reinterpret_cast<const vh_at*>(p);
    const vu bits = __builtin_convertvector(x, vu);
    // Shifted into float32's fields the exponent is 112 short; the product is exact, subnormals included.
    const vu magnitude = (bits & 0x7fffu) << 13;
    const vf scaled = (vf)magnitude * 0x1p112f;
    const vu special = (vu)(magnitude >= 0x0f800000u);
    const vu value = (special & (magnitude | 0x7f800000u)) | (~special & (vu)scaled);
    return __builtin_convertvector((vf)(value | ((bits & 0x8000u) << 16)), vd);
}

ESPER_INLINE void narrow(vd x, double* p) { store(p, x); }
ESPER_INLINE void narrow(vd x, float* p) { *reinterpret_cast<vf_at*>(p) = __builtin_convertvector(x, vf); }
ESPER_INLINE void narrow(vd x, bf16* p) {
    const vu bits = (vu)__builtin_convertvector(x, vf);
    const vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    *reinterpret_cast<vh_at*>(p) = __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), vh);
}
ESPER_INLINE uint16_t to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal half: adding 0.5 aligns the ulp of the sum with half's smallest step, so the adder does the rounding.
        float shifted;
        std::memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        std::memcpy(&bits, &shifted, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
ESPER_INLINE void narrow(vd x, f16* p) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_half(static_cast<float>(x[i]));
}

// Applies an activation to a run of n elements of one dtype; steps in elements.
using Activate = void (*)(const void* in, int64_t in_step, void* out, int64_t out_step, int64_t n);
Activate find_activation(int activation, int dtype);

}  // namespace esper::stats
