"""What the graft kernels share: activations and their slopes, coefficients from alpha, operands of products.

A bank's seeds lie in ``seats``, int32 ``[seeds, 6]``: row of alpha, first feature, one past the last, 1 for mode
replace, first row of the bank, one past the last. docs/grafts.md has the formula.
"""

import triton
import triton.language as tl

#: Numbers a seed has in ``seats``.
SEAT = tl.constexpr(6)

#: A launch option: a product and a sum may be one instruction. It is what Triton does unasked, and is about to change.
FUSING = {"enable_fp_fusion": True}


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v))."""
    # exp of what is not positive: it cannot overflow.
    e = tl.exp(-tl.abs(v))
    return tl.where(v >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(v):
    """Hyperbolic tangent, with the digits near 0."""
    # Near 0 the quotient cancels; there the odd series has the digits: its next term is 7e-11 of the sum at 0.3, and
    # 2e-27 at 0.02.
    near_zero: tl.constexpr = 0.02 if v.dtype == tl.float64 else 0.3
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    s = v * v
    near = 1.0 + s * (
        -0.3333333333333333
        + s
        * (
            0.13333333333333333
            + s
            * (
                -0.05396825396825397
                + s * (0.021869488536155203 + s * (-0.008863235529902197 + s * 0.003592128036572481))
            )
        )
    )
    return tl.where(tl.abs(v) < near_zero, v * near, tl.where(v < 0.0, -far, far))


@triton.jit
def activate(v, ACT: tl.constexpr):
    """Activation number ACT, as ``csrc/graft_bank.h`` numbers them; 0 is none."""
    if ACT == 1:  # relu; a NaN stays
        return tl.where(v < 0.0, 0.0, v)
    elif ACT == 2:  # gelu
        return 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    elif ACT == 3:  # gelu, tanh form: 0.5 (1 + tanh u) is sigmoid(2 u)
        return v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == 4:
        return tanh(v)
    elif ACT == 5:
        return sigmoid(v)
    elif ACT == 6:  # silu
        return v * sigmoid(v)
    else:
        return v


@triton.jit
def slope(v, ACT: tl.constexpr):
    """Derivative of :func:`activate`."""
    if ACT == 1:
        return tl.where(v > 0.0, 1.0, 0.0)
    elif ACT == 2:
        return 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476)) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif ACT == 3:
        s = sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        return s + v * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * v * v))
    elif ACT == 4:
        t = tanh(v)
        return 1.0 - t * t
    elif ACT == 5:
        s = sigmoid(v)
        return s * (1.0 - s)
    elif ACT == 6:
        s = sigmoid(v)
        return s * (1.0 + v * (1.0 - s))
    else:
        return v * 0.0 + 1.0


@triton.jit
def operand(t, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """``t`` rounded to ``dtype``, as one side of a product.

    EMULATE is for the interpreter, whose arithmetic on bfloat16 works on the bits: there the rounded number is widened
    again, and the product is exact to float32 as the tensor core's is.
    """
    rounded = t.to(dtype)
    return rounded.to(tl.float32) if EMULATE else rounded


@triton.jit
def product(a, b, acc):
    """``acc + a @ b`` in float32; float32 factors are split in three so that no digit is lost to the tensor cores."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def finite(v):
    """Neither infinite nor NaN, for which the comparison is false."""
    return tl.abs(v) < float("inf")


@triton.jit
def any_fault(faults, seeds, SEATS: tl.constexpr):
    """Whether some seed is at fault (1 or 0)."""
    seat = tl.arange(0, SEATS)
    return tl.max(tl.load(faults + seat, mask=seat < seeds, other=0).to(tl.int32), 0)


@triton.jit
def any_awake(alpha, seats, seeds, SEATS: tl.constexpr):
    """Whether some alpha is not 0 (1 or 0)."""
    seat = tl.arange(0, SEATS)
    there = seat < seeds
    index = tl.load(seats + seat * SEAT, mask=there, other=0)
    a = tl.load(alpha + index, mask=there, other=0.0)
    return tl.max((a != 0.0).to(tl.int32), 0)


@triton.jit
def replace_sum(alpha, seats, seeds, begin, end, SEATS: tl.constexpr):
    """A' between two neighbouring borders: the sum of the alphas of the replace seeds that change these features."""
    seat = tl.arange(0, SEATS)
    there = seat < seeds
    at = seats + seat * SEAT
    first = tl.load(at + 1, mask=there, other=0)
    last = tl.load(at + 2, mask=there, other=0)
    counts = there & (first <= begin) & (last >= end) & (tl.load(at + 3, mask=there, other=0) != 0)
    index = tl.load(at, mask=there, other=0)
    return tl.sum(tl.load(alpha + index, mask=counts, other=0.0), 0)


@triton.jit
def host_factor(replaced):
    """What is left for the host: 1 - A, exactly 0 from A' = 1 on."""
    return tl.where(replaced >= 1.0, 0.0, 1.0 - replaced)


@triton.jit
def replaced_at(alpha, seats, seeds, channel):
    """A' of each feature: the sum of the alphas of the replace seeds that change it."""
    total = channel.to(tl.float32) * 0.0
    for s in range(0, seeds):
        at = seats + s * SEAT
        a = tl.where(tl.load(at + 3) != 0, tl.load(alpha + tl.load(at)), 0.0)
        total += tl.where((channel >= tl.load(at + 1)) & (channel < tl.load(at + 2)), a, 0.0)
    return total


@triton.jit
def coefficient_at(alpha, seats, s, channel, replaced):
    """The coefficient of seed s at each feature, 0 where it changes nothing; ``replaced`` is A' there."""
    at = seats + s * SEAT
    a = tl.load(alpha + tl.load(at))
    scale = tl.where(tl.load(at + 3) != 0, 1.0 / tl.maximum(replaced, 1.0), 1.0)
    return tl.where((channel >= tl.load(at + 1)) & (channel < tl.load(at + 2)), a * scale, 0.0)


@triton.jit
def live_rows(alpha, seats, owner, r, inside):
    """Which rows of the bank belong to a seed whose alpha is not 0."""
    seat = tl.load(owner + r, mask=inside, other=0)
    index = tl.load(seats + seat * SEAT)
    return inside & (tl.load(alpha + index) != 0.0)


@triton.jit
def coefficients(alpha, seats, owner, r, inside, begin, end, replaced):
    """The coefficient of each row of the bank between two neighbouring borders; 0 where its seed does not count."""
    at = seats + tl.load(owner + r, mask=inside, other=0) * SEAT
    covers = inside & (tl.load(at + 1) <= begin) & (tl.load(at + 2) >= end)
    a = tl.load(alpha + tl.load(at), mask=covers, other=0.0)
    return tl.where(tl.load(at + 3) != 0, a * (1.0 / tl.maximum(replaced, 1.0)), a)


@triton.jit
def down_products(
    x,
    down,
    value,
    bias,
    value_bias,
    m,
    in_m,
    r,
    live,
    x_row,
    d_in,
    dtype: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``x @ down.T + bias`` for rows m and rows r of the bank, and the same with ``value``; sleeping rows give 0."""
    first = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    lane = tl.arange(0, BLOCK_K)
    row = r.to(tl.int64) * d_in
    for k in range(0, d_in, BLOCK_K):
        c = k + lane
        in_k = c < d_in
        tile = tl.load(x + m[:, None] * x_row + c[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        tile = operand(tile, dtype, EMULATE)
        at = row[None, :] + c[:, None]
        mask = live[None, :] & in_k[:, None]
        first = product(tile, operand(tl.load(down + at, mask=mask, other=0.0), dtype, EMULATE), first)
        if GATED:
            second = product(tile, operand(tl.load(value + at, mask=mask, other=0.0), dtype, EMULATE), second)
    if BIASED:
        first += tl.load(bias + r, mask=live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(value_bias + r, mask=live, other=0.0).to(tl.float32)[None, :]
    return first, second
