// The activations on the CPU. Each value is computed in float64 and rounded once to its dtype; float64 itself goes through the C
// library, which wants more bits than the polynomials below have.
#include <stdexcept>

#include "stats_simd.h"

namespace esper::stats {

// e^x = 2^n * (1 + p), |x| clamped to 700; p relative to x better than 1e-11, enough for anything rounded to float32.
struct Exp {
    vd p, scale;
};
ESPER_INLINE Exp exp_parts(vd x) {
    x = x > 700.0 ? splat(700.0) : x;
    x = x < -700.0 ? splat(-700.0) : x;
    const vd magic = splat(0x1.8p52);
    const vd shifted = x * 1.4426950408889634 + magic;  // the integer part sits in the low bits
    const vd n = shifted - magic;
    const vd r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    vd q = splat(1.0 / 3628800.0);
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    q = q * r + 1.0;
    const vl exponent = ((vl)shifted - (vl)magic + 1023) << 52;
    return {q * r, (vd)exponent};
}
ESPER_INLINE vd vexp(vd x) {
    const Exp e = exp_parts(x);
    return e.scale + e.scale * e.p;
}
ESPER_INLINE vd vsigmoid(vd x) { return 1.0 / (1.0 + vexp(-x)); }
ESPER_INLINE vd vtanh(vd x) {
    const Exp e = exp_parts(-2.0 * vabs(x));
    const vd minus1 = e.scale * e.p + (e.scale - 1.0);  // expm1: keeps its relative precision near 0
    const vd magnitude = -minus1 / (2.0 + minus1);
    return (vd)((vl)magnitude | ((vl)x & INT64_MIN));
}
// The normal distribution function: 1/2 erfc(-x / sqrt 2). For z >= 0, erfc(z) = exp(-z^2) t P(2t - 1), t = 1 / (1 + 0.4 z);
// P is our least-squares fit (Chebyshev, degree 14) to erfcx(z) / t over z in [0, 28]: relative error below 2.3e-11.
ESPER_INLINE vd vphi(vd x) {
    constexpr double kFit[] = {0.421612728118517,       0.32186073984386215,    0.18156564723344665,   0.06850045510070044,
                               0.011344606363387792,    -0.0033571783669095333, -0.0019273944562174202, 0.00017544582618502844,
                               0.0002805826193991249,   -2.255009559049302e-05, -4.3987137152637105e-05, 6.38051395227517e-06,
                               6.156933859134201e-06,   -1.21648994980199e-06,  -4.160195405175354e-07};
    const vd z = vabs(x) * 0.7071067811865476;
    const vd t = 1.0 / (1.0 + 0.4 * z), u = 2.0 * t - 1.0;
    vd poly = splat(kFit[14]);
    for (int i = 13; i >= 0; --i) poly = poly * u + kFit[i];
    const vd tail = 0.5 * vexp(-(z * z)) * (t * poly);
    return x < 0.0 ? tail : 1.0 - tail;
}

// float64 tensors want every bit: the C library, lane by lane.
ESPER_INLINE double exact(int activation, double x) {
    switch (activation) {
        case kRelu: return x <= 0.0 ? 0.0 : x;  // a NaN stays
        case kGelu: return x * (0.5 * std::erfc(-x * 0.7071067811865476));
        case kGeluTanh: return x / (1.0 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
        case kTanh: return std::tanh(x);
        case kSigmoid: return 1.0 / (1.0 + std::exp(-x));
        default: return x / (1.0 + std::exp(-x));
    }
}

template <int ACT>
ESPER_INLINE vd activate(vd x) {
    if constexpr (ACT == kRelu) return x <= 0.0 ? splat(0.0) : x;  // a NaN stays
    else if constexpr (ACT == kGelu) return x * vphi(x);
    else if constexpr (ACT == kGeluTanh) return x * vsigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x));
    else if constexpr (ACT == kTanh) return vtanh(x);
    else if constexpr (ACT == kSigmoid) return vsigmoid(x);
    else return x * vsigmoid(x);
}

template <typename T, int ACT>
ESPER_INLINE void sweep(const void* in_address, int64_t in_step, void* out_address, int64_t out_step, int64_t n) {
    const T* const in = static_cast<const T*>(in_address);
    T* const out = static_cast<T*>(out_address);
    int64_t i = 0;
    if (in_step == 1 && out_step == 1)
        for (; i + kLanes <= n; i += kLanes) narrow(activate<ACT>(widen(in + i)), out + i);
    for (; i < n; i += kLanes) {
        const int lanes = static_cast<int>(n - i < kLanes ? n - i : kLanes);
        T buffer[kLanes] = {};
        for (int k = 0; k < lanes; ++k) buffer[k] = in[(i + k) * in_step];
        narrow(activate<ACT>(widen(buffer)), buffer);
        for (int k = 0; k < lanes; ++k) out[(i + k) * out_step] = buffer[k];
    }
}

template <int ACT>
void sweep_exact(const void* in_address, int64_t in_step, void* out_address, int64_t out_step, int64_t n) {
    const double* const in = static_cast<const double*>(in_address);
    double* const out = static_cast<double*>(out_address);
    for (int64_t i = 0; i < n; ++i) out[i * out_step] = exact(ACT, in[i * in_step]);
}

#define ESPER_SWEEP(name, T, ACT)                                                                                  \
    ESPER_CLONES void name(const void* in, int64_t in_step, void* out, int64_t out_step, int64_t n) {              \
        sweep<T, ACT>(in, in_step, out, out_step, n);                                                              \
    }
#define ESPER_SWEEPS(name, ACT)          \
    ESPER_SWEEP(name##_f32, float, ACT)  \
    ESPER_SWEEP(name##_bf16, bf16, ACT)  \
    ESPER_SWEEP(name##_f16, f16, ACT)
ESPER_SWEEPS(relu, kRelu)
ESPER_SWEEPS(gelu, kGelu)
ESPER_SWEEPS(gelu_tanh, kGeluTanh)
ESPER_SWEEPS(tanh, kTanh)
ESPER_SWEEPS(sigmoid, kSigmoid)
ESPER_SWEEPS(silu, kSilu)

Activate find_activation(int activation, int dtype) {
    static constexpr Activate kTable[6][4] = {
        {relu_f32, sweep_exact<kRelu>, relu_bf16, relu_f16},
        {gelu_f32, sweep_exact<kGelu>, gelu_bf16, gelu_f16},
        {gelu_tanh_f32, sweep_exact<kGeluTanh>, gelu_tanh_bf16, gelu_tanh_f16},
        {tanh_f32, sweep_exact<kTanh>, tanh_bf16, tanh_f16},
        {sigmoid_f32, sweep_exact<kSigmoid>, sigmoid_bf16, sigmoid_f16},
        {silu_f32, sweep_exact<kSilu>, silu_bf16, silu_f16},
    };
    if (activation < kRelu || activation > kSilu) throw std::invalid_argument("esper._native: unknown activation code");
    if (dtype < kFloat32 || dtype > kFloat16) throw std::invalid_argument("esper._native: unknown dtype code");
    return kTable[activation - kRelu][dtype];
}

}  // namespace esper::stats
