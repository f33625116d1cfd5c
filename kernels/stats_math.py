"""What the statistics kernels share: activations, Chan's formula, and how records of statistics are written."""

import triton
import triton.language as tl

from .graft_math import tanh


@triton.jit
def merge(n0, mean0, m20, n1, mean1, m21):
    """Chan's formula; an empty side changes nothing."""
    n = n0 + n1
    weight = tl.where(n > 0.0, n1 / tl.where(n > 0.0, n, 1.0), 0.0)
    delta = mean1 - mean0
    return n, mean0 + delta * weight, m20 + m21 + delta * delta * (n0 * weight)


@triton.jit
def _gelu_single(x, COARSE: tl.constexpr):
    """Returns x times the share q of a normal distribution below it, without a branch and without cancellation.

    For w = ``|x|`` and t = 1 / (1 + a w), log2(q / t) + w^2 log2(e) / 2 is smooth in t on [0, 1], and so a polynomial
    (Chebyshev's, as in Numerical Recipes' ``erfcc``, fitted for w up to 15, where q is below the smallest float32).
    Its error in q is 9e-8 q, and with COARSE, for what is rounded to 16 bits, 8e-6 q, a thirtieth of half an ulp of
    float16. Rounding adds some ulps, and w^2 / 2 of them for the exponent's.
    """
    w = tl.abs(x)
    if COARSE:
        # A square root's reciprocal is one instruction, a quotient ten.
        t = tl.rsqrt(tl.fma(w, 0.3535533905932738, 1.0))
        t = t * t
        p = tl.fma(t, 0.3314271867275238, -1.027448058128357)
        p = tl.fma(t, p, 0.6897571086883545)
        p = tl.fma(t, p, 0.3641175925731659)
        p = tl.fma(t, p, 1.4694664478302002)
        p = tl.fma(t, p, -2.8273088932037354)
    else:
        t = 1.0 / tl.fma(w, 0.4, 1.0)
        p = tl.fma(t, 0.2747895419597626, -1.4070416688919067)
        p = tl.fma(t, p, 2.809998035430908)
        p = tl.fma(t, p, -2.525326728820801)
        p = tl.fma(t, p, 0.781211256980896)
        p = tl.fma(t, p, -0.2613930404186249)
        p = tl.fma(t, p, 0.5367664098739624)
        p = tl.fma(t, p, 1.4385138750076294)
        p = tl.fma(t, p, -2.647517442703247)
    q = t * tl.exp2(tl.fma(w * -0.7213475204444817, w, p))
    return x * tl.where(x > 0.0, 1.0 - q, q)


@triton.jit
def activate(x, ACT: tl.constexpr, DOUBLE: tl.constexpr, COARSE: tl.constexpr):
    """Activation number ACT; COARSE says that the result is rounded to 16 bits."""
    if ACT == 1:  # relu; a NaN stays
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == 2:  # gelu
        if DOUBLE:
            return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
        else:
            return _gelu_single(x, COARSE)
    elif ACT == 3:  # gelu, tanh form: 0.5 (1 + tanh u) is sigmoid(2 u)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == 4:  # tanh
        return tanh(x)
    elif ACT == 5:  # sigmoid
        return 1.0 / (1.0 + tl.exp(-x))
    else:  # silu
        return x / (1.0 + tl.exp(-x))


@triton.jit
def widen(x, acc: tl.constexpr):
    """``x`` in the type that is computed in."""
    if x.dtype == tl.bfloat16:
        # By its bits: of a value that is rounded, stored and widened in the usual way the compiler rounds each element
        # by itself, at a quarter of the speed.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(acc)


@triton.jit
def put_column(at, stride, mask, n, mean, m2, absmax, bad, DIRECT: tl.constexpr):
    """Write some features' record, or with DIRECT merge it into what is there."""
    if DIRECT:
        n, mean, m2 = merge(
            tl.load(at, mask=mask, other=0.0),
            tl.load(at + stride, mask=mask, other=0.0),
            tl.load(at + 2 * stride, mask=mask, other=0.0),
            n,
            mean,
            m2,
        )
        absmax = tl.maximum(absmax, tl.load(at + 3 * stride, mask=mask, other=0.0))
        bad += tl.load(at + 4 * stride, mask=mask, other=0.0)
    tl.store(at, n, mask=mask)
    tl.store(at + stride, mean, mask=mask)
    tl.store(at + 2 * stride, m2, mask=mask)
    tl.store(at + 3 * stride, absmax, mask=mask)
    tl.store(at + 4 * stride, bad, mask=mask)


@triton.jit
def put_chunk(at, stride, mask, n, mean, m2, skipped, DIRECT: tl.constexpr):
    """As :func:`put_column`, of several seeds, or of one with the mask None."""
    if DIRECT:
        n, mean, m2 = merge(tl.load(at, mask), tl.load(at + stride, mask), tl.load(at + 2 * stride, mask), n, mean, m2)
        skipped += tl.load(at + 3 * stride, mask)
    tl.store(at, n, mask)
    tl.store(at + stride, mean, mask)
    tl.store(at + 2 * stride, m2, mask)
    tl.store(at + 3 * stride, skipped, mask)


@triton.jit
def row_moments(sums, whole):
    """Count, mean and M2 of a vector of float64 row sums where ``whole``; two passes."""
    n = tl.sum(whole.to(tl.int32), 0).to(tl.float64)
    some = tl.maximum(n, 1.0)
    mean = tl.sum(tl.where(whole, sums, 0.0), 0) / some
    d = tl.where(whole, sums - mean, 0.0)
    return n, mean, tl.sum(d * d, 0)
