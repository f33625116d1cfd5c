"""The blend of contributions that others computed, for families whose products are left to libraries.

    y = host * h + sum_s c_s * k_s

One program takes a stretch of the tensor seen as ``[outer, features, inner]``: h and each k that counts are read once,
y is written once. The addresses of at most eight contributions travel as arguments. Seeds lie in ``seats``, int32
``[seeds, 6]``, as ``graft_math`` has them; here the last two numbers mean nothing.
"""

import triton
import triton.language as tl

from .graft_math import FUSING, SEAT, any_fault, coefficient_at, finite, host_factor

#: Contributions one launch takes.
PARTS = 8


@triton.jit
def _nth(i: tl.constexpr, a, b, c, d, e, f, g, h):
    # Written out, because not every Triton that we support takes tuples. A tree keeps it short.
    if i < 4:
        if i < 2:
            return a if i == 0 else b
        else:
            return c if i == 2 else d
    else:
        if i < 6:
            return e if i == 4 else f
        else:
            return g if i == 6 else h


@triton.jit
def _replaced(alpha, seats, channel, SEEDS: tl.constexpr):
    """A' of each feature, as ``replaced_at`` has it; its loop, not unrolled, costs up to 44 registers a thread here."""
    total = channel.to(tl.float32) * 0.0
    for s in tl.static_range(SEEDS):
        at = seats + s * SEAT
        a = tl.where(tl.load(at + 3) != 0, tl.load(alpha + tl.load(at)), 0.0)
        total += tl.where((channel >= tl.load(at + 1)) & (channel < tl.load(at + 2)), a, 0.0)
    return total


@triton.jit
def _place(seats, s: tl.constexpr, outer, channel, inner_index, inner):
    """Where a feature lies in the seed's contribution, which holds the seed's own features."""
    first = tl.load(seats + s * SEAT + 1)
    width = (tl.load(seats + s * SEAT + 2) - first).to(tl.int64)
    return (outer * width + (channel - first)) * inner + inner_index


@triton.jit(do_not_specialize=["count", "features", "inner"])
def graft_blend_kernel(
    h,
    y,
    k0,
    k1,
    k2,
    k3,
    k4,
    k5,
    k6,
    k7,
    t0,
    t1,
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    alpha,
    seats,
    faults,
    count,
    features,
    inner,
    SEEDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blend, and say who is at fault for what is not finite. Grid: ``cdiv(count, BLOCK)``.

    ``k``: the contributions, ``t``: uint8 ``[outer, inner]``, where each seed's tap is finite. ``faults``: uint8
    ``[SEEDS]``, 0 before; programs write nothing but 1 to it, so their order does not matter.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    inner_index = i % inner
    channel = i // inner % features
    outer = i // inner // features
    replaced = _replaced(alpha, seats, channel, SEEDS)
    host = host_factor(replaced)
    as_is = tl.load(h + i, mask=inside & (host != 0.0), other=0.0)
    # -0 where the host does not count: added to any k it gives k, the sign of zero included.
    nothing = tl.full([BLOCK], -2147483648, tl.int32).to(tl.float32, bitcast=True)
    total = tl.where(host == 0.0, nothing, host * as_is.to(tl.float32))
    counting = tl.zeros([BLOCK], tl.int32)
    for s in tl.static_range(SEEDS):
        c = coefficient_at(alpha, seats, s, channel, replaced)
        at = _nth(s, k0, k1, k2, k3, k4, k5, k6, k7) + _place(seats, s, outer, channel, inner_index, inner)
        k = tl.load(at, mask=inside & (c != 0.0), other=0.0).to(tl.float32)
        total = tl.where(c != 0.0, total + c * k, total)
        counting = counting | (c != 0.0).to(tl.int32)
    # Without a seed h goes through as it is: a NaN that is widened and rounded is another one.
    result = tl.where(counting != 0, total.to(dtype), as_is)
    tl.store(y + i, result, mask=inside)
    broken = inside & (finite(result.to(tl.float32)) == 0)
    if tl.max(broken.to(tl.int32), 0) != 0:
        own = tl.load(h + i, mask=inside, other=0.0).to(tl.float32)
        overflow = broken & finite(own)
        largest = tl.zeros([BLOCK], tl.float32)
        one = tl.full([], 1, tl.uint8)
        for s in tl.static_range(SEEDS):
            c = coefficient_at(alpha, seats, s, channel, replaced)
            at = _nth(s, k0, k1, k2, k3, k4, k5, k6, k7) + _place(seats, s, outer, channel, inner_index, inner)
            k = (c * tl.load(at, mask=broken & (c != 0.0), other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
            position = outer * inner + inner_index
            sound_tap = tl.load(_nth(s, t0, t1, t2, t3, t4, t5, t6, t7) + position, mask=broken, other=0) != 0
            sound = finite(k)
            if tl.max((broken & (sound == 0) & sound_tap).to(tl.int32), 0) != 0:
                tl.store(faults + s, one)
            overflow = overflow & ((c == 0.0) | (sound & sound_tap))
            largest = tl.maximum(largest, tl.where(sound, tl.abs(k), 0.0))
        overflow = overflow & (largest > 0.0)
        if tl.max(overflow.to(tl.int32), 0) != 0:
            for s in tl.static_range(SEEDS):
                c = coefficient_at(alpha, seats, s, channel, replaced)
                at = _nth(s, k0, k1, k2, k3, k4, k5, k6, k7) + _place(seats, s, outer, channel, inner_index, inner)
                k = (c * tl.load(at, mask=broken & (c != 0.0), other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
                if tl.max((overflow & (tl.abs(k) == largest)).to(tl.int32), 0) != 0:
                    tl.store(faults + s, one)


@triton.jit(do_not_specialize=["count", "features", "inner"])
def graft_blend_backward_kernel(
    gy,
    gh,
    g0,
    g1,
    g2,
    g3,
    g4,
    g5,
    g6,
    g7,
    alpha,
    seats,
    faults,
    count,
    features,
    inner,
    SEEDS: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The factors of the forward, or after a fault gy for h and 0 for the rest. Grid: ``cdiv(count, BLOCK)``."""
    dtype: tl.constexpr = gy.dtype.element_ty
    fault = any_fault(faults, SEEDS, SEATS)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    inner_index = i % inner
    channel = i // inner % features
    outer = i // inner // features
    stored = tl.load(gy + i, mask=inside, other=0.0)
    g = stored.to(tl.float32)
    replaced = _replaced(alpha, seats, channel, SEEDS)
    host = tl.where(fault != 0, 1.0, host_factor(replaced))
    tl.store(gh + i, tl.where(host == 0.0, 0.0, host * g).to(dtype), mask=inside)
    for s in tl.static_range(SEEDS):
        c = tl.where(fault != 0, 0.0, coefficient_at(alpha, seats, s, channel, replaced))
        first = tl.load(seats + s * SEAT + 1)
        mask = inside & (channel >= first) & (channel < tl.load(seats + s * SEAT + 2))
        at = _nth(s, g0, g1, g2, g3, g4, g5, g6, g7) + _place(seats, s, outer, channel, inner_index, inner)
        tl.store(at, tl.where(c == 0.0, 0.0, c * g).to(dtype), mask=mask)


BLEND_BLOCKS = {"BLOCK": 1024}
BLEND_OPTIONS = {"num_warps": 4, **FUSING}


def blend_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_blend_kernel``."""
    return {
        **dict.fromkeys(("h", "y", *(f"k{i}" for i in range(PARTS))), f"*{dtype}"),
        **dict.fromkeys((f"t{i}" for i in range(PARTS)), "*u8"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8"},
        **dict.fromkeys(("count", "features", "inner"), "i64"),
    }


def blend_backward_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_blend_backward_kernel``."""
    return {
        **dict.fromkeys(("gy", "gh", *(f"g{i}" for i in range(PARTS))), f"*{dtype}"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8"},
        **dict.fromkeys(("count", "features", "inner"), "i64"),
    }


AOT = [
    entry
    for dtype, seeds in (("bf16", 1), ("fp16", 2), ("fp32", 3))
    for entry in (
        (graft_blend_kernel, blend_signature(dtype), {"SEEDS": seeds, **BLEND_BLOCKS}, BLEND_OPTIONS),
        (
            graft_blend_backward_kernel,
            blend_backward_signature(dtype),
            {"SEEDS": seeds, "SEATS": 64, **BLEND_BLOCKS},
            BLEND_OPTIONS,
        ),
    )
]
