"""All elementwise seeds of a layer in one pass over memory.

    y = host * h + sum_s c_s * (scale_s * act(x) + shift_s)
      = host * h + (sum_s c_s * scale_s) * act(x) + sum_s c_s * shift_s

The sums over the seeds depend on the feature alone, so a program forms them once for its features and streams rows: the
cost does not grow with the number of seeds. The same holds backward, where the gradients of all scales and shifts
come from two sums a feature, ``sum gy * act(x)`` and ``sum gy``.

Tensors are ``[outer, features, inner]``. With PLANES (``inner`` above 1: images) a program has one feature, its lanes
are pixels; without, its lanes are features. Seeds lie in ``seats`` as ``graft_math`` has them; the last two numbers of
each mean nothing here.
"""

import triton
import triton.language as tl

from .graft_math import FUSING, activate, any_fault, coefficient_at, finite, host_factor, replaced_at, slope

_SIZES = ["outer", "features", "inner", "seeds", "parts", "stretch", "x_row", "h_row", "y_row"]


@triton.jit
def _folded(alpha, seats, weights, seeds, features, channel, inside, replaced, off, BLOCK_N: tl.constexpr):
    """``sum_s c_s * weights_s`` by feature and whether any seed counts there; ``off`` switches all of them off."""
    # -0 where nothing counts: added to any k it gives k, the sign of zero included.
    total = tl.full([BLOCK_N], -2147483648, tl.int32).to(tl.float32, bitcast=True)
    counting = tl.zeros([BLOCK_N], tl.int32)
    for s in range(0, seeds):
        c = coefficient_at(alpha, seats, s, channel, replaced)
        counts = inside & (tl.where(off != 0, 0.0, c) != 0.0)
        w = tl.load(weights + s * features + channel, mask=counts, other=0.0).to(tl.float32)
        total = tl.where(counts, total + c * w, total)
        counting = counting | counts.to(tl.int32)
    return total, counting


@triton.jit
def _alone(
    alpha,
    seats,
    scale,
    shift,
    s,
    features,
    channel,
    inside,
    replaced,
    active,
    dtype: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """What seed s adds, rounded to ``dtype``, and its coefficient at each feature; ``active`` is act(x)."""
    c = tl.where(inside, coefficient_at(alpha, seats, s, channel, replaced), 0.0)
    w = tl.load(scale + s * features + channel, mask=c != 0.0, other=0.0).to(tl.float32)
    each = w[None, :] * active
    if SHIFTED:
        b = tl.load(shift + s * features + channel, mask=c != 0.0, other=0.0).to(tl.float32)
        each += b[None, :]
    return (c[None, :] * each).to(dtype).to(tl.float32), c


@triton.jit(do_not_specialize=_SIZES)
def graft_elementwise_kernel(
    x,
    h,
    y,
    scale,
    shift,
    alpha,
    seats,
    faults,
    outer,
    features,
    inner,
    seeds,
    parts,
    stretch,
    x_row,
    h_row,
    y_row,
    ACT: tl.constexpr,
    SHIFTED: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blend, and say who is at fault for what is not finite. Grid: ``parts * cdiv(outer, stretch)``.

    ``parts``: tiles of BLOCK_N features, or with PLANES the features. ``scale``, ``shift``: ``[seeds, features]``.
    ``faults``: uint8 ``[seeds]``, 0 before; programs write nothing but 1 to it, so their order does not matter.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    pid = tl.program_id(0)
    part = pid % parts
    start = (pid // parts).to(tl.int64) * stretch
    stop = tl.minimum(start + stretch, outer)
    lane = tl.arange(0, BLOCK_N)
    channel = part + 0 * lane if PLANES else part * BLOCK_N + lane
    present = channel < features
    replaced = replaced_at(alpha, seats, seeds, channel)
    host = host_factor(replaced)
    factor, counting = _folded(alpha, seats, scale, seeds, features, channel, present, replaced, 0 * pid, BLOCK_N)
    offset = factor
    if SHIFTED:
        offset, _ = _folded(alpha, seats, shift, seeds, features, channel, present, replaced, 0 * pid, BLOCK_N)
    for n in range(0, inner if PLANES else 1, BLOCK_N):
        inside = present & (n + lane < inner) if PLANES else present
        col = channel.to(tl.int64) * inner + n + lane if PLANES else channel.to(tl.int64)
        for first in range(start, stop, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            mask = (m < stop)[:, None] & inside[None, :]
            # What does not count is not read: 0 * NaN is NaN.
            as_is = tl.load(h + m[:, None] * h_row + col[None, :], mask=mask & (host != 0.0)[None, :], other=0.0)
            v = tl.load(x + m[:, None] * x_row + col[None, :], mask=mask & (counting != 0)[None, :], other=0.0)
            k = factor[None, :] * activate(v.to(tl.float32), ACT)
            if SHIFTED:
                k += offset[None, :]
            total = tl.where((host == 0.0)[None, :], k, host[None, :] * as_is.to(tl.float32) + k)
            # Without a seed h goes through as it is: a NaN that is widened and rounded is another one.
            result = tl.where((counting != 0)[None, :], total.to(dtype), as_is)
            tl.store(y + m[:, None] * y_row + col[None, :], result, mask=mask)
            broken = mask & (finite(result.to(tl.float32)) == 0)
            if tl.max(tl.max(broken.to(tl.int32), 1), 0) != 0:
                a = activate(v.to(tl.float32), ACT)
                own = tl.load(h + m[:, None] * h_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
                trusted = finite(v.to(tl.float32))
                overflow = broken & finite(own) & trusted
                largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                one = tl.full([], 1, tl.uint8)
                for s in range(0, seeds):
                    each, c = _alone(
                        alpha, seats, scale, shift, s, features, channel, present, replaced, a, dtype, SHIFTED
                    )
                    sound = finite(each) | (c == 0.0)[None, :]
                    if tl.max(tl.max((broken & (sound == 0) & trusted).to(tl.int32), 1), 0) != 0:
                        tl.store(faults + s, one)
                    overflow = overflow & sound
                    largest = tl.maximum(largest, tl.where(sound & (c != 0.0)[None, :], tl.abs(each), 0.0))
                if tl.max(tl.max(overflow.to(tl.int32), 1), 0) != 0:
                    for s in range(0, seeds):
                        each, c = _alone(
                            alpha, seats, scale, shift, s, features, channel, present, replaced, a, dtype, SHIFTED
                        )
                        most = overflow & (c != 0.0)[None, :] & (tl.abs(each) == largest)
                        if tl.max(tl.max(most.to(tl.int32), 1), 0) != 0:
                            tl.store(faults + s, one)


@triton.jit(
    do_not_specialize=["outer", "features", "inner", "seeds", "parts", "stretch", "x_row", "gy_row", "gx_row", "gh_row"]
)
def graft_elementwise_backward_kernel(
    x,
    gy,
    gx,
    gh,
    scale,
    alpha,
    seats,
    faults,
    partials,
    outer,
    features,
    inner,
    seeds,
    parts,
    stretch,
    x_row,
    gy_row,
    gx_row,
    gh_row,
    ACT: tl.constexpr,
    PLANES: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_H: tl.constexpr,
    WANT_W: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gx, gh, and the two sums of each stretch: ``partials[stretches, 2, features]``, float32. Grid as forward.

    After a fault gh is gy and gx 0; nobody reads the sums then.
    """
    dtype: tl.constexpr = gy.dtype.element_ty
    pid = tl.program_id(0)
    part = pid % parts
    split = (pid // parts).to(tl.int64)
    start = split * stretch
    stop = tl.minimum(start + stretch, outer)
    lane = tl.arange(0, BLOCK_N)
    channel = part + 0 * lane if PLANES else part * BLOCK_N + lane
    present = channel < features
    fault = any_fault(faults, seeds, SEATS)
    replaced = replaced_at(alpha, seats, seeds, channel)
    host = tl.where(fault != 0, 1.0, host_factor(replaced))
    factor, counting = _folded(alpha, seats, scale, seeds, features, channel, present, replaced, fault, BLOCK_N)
    with_value = tl.zeros([BLOCK_N], tl.float32)
    plain = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, inner if PLANES else 1, BLOCK_N):
        inside = present & (n + lane < inner) if PLANES else present
        col = channel.to(tl.int64) * inner + n + lane if PLANES else channel.to(tl.int64)
        for first in range(start, stop, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            mask = (m < stop)[:, None] & inside[None, :]
            counts = mask & (counting != 0)[None, :]
            g = tl.load(gy + m[:, None] * gy_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
            if WANT_H:
                kept = tl.where((host == 0.0)[None, :], 0.0, host[None, :] * g).to(dtype)
                tl.store(gh + m[:, None] * gh_row + col[None, :], kept, mask=mask)
            v = tl.load(x + m[:, None] * x_row + col[None, :], mask=counts, other=0.0).to(tl.float32)
            if WANT_X:
                back = tl.where(counts, factor[None, :] * slope(v, ACT) * g, 0.0).to(dtype)
                tl.store(gx + m[:, None] * gx_row + col[None, :], back, mask=mask)
            if WANT_W:
                with_value += tl.sum(tl.where(counts, g * activate(v, ACT), 0.0), 0)
                plain += tl.sum(tl.where(counts, g, 0.0), 0)
    if WANT_W:
        at = partials + split * 2 * features
        if PLANES:
            tl.store(at + part, tl.sum(with_value, 0))
            tl.store(at + features + part, tl.sum(plain, 0))
        else:
            tl.store(at + channel, with_value, mask=present)
            tl.store(at + features + channel, plain, mask=present)


@triton.jit(do_not_specialize=["features", "seeds", "splits", "tiles"])
def graft_elementwise_reduce_kernel(
    partials,
    gscale,
    gshift,
    alpha,
    seats,
    faults,
    features,
    seeds,
    splits,
    tiles,
    SHIFTED: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The stretches added in order, times each seed's coefficient. Grid: ``tiles * seeds``, tiles of BLOCK_C features.

    Where a seed does not count, and after a fault, the gradients are 0 and nothing is read.
    """
    dtype: tl.constexpr = gscale.dtype.element_ty
    pid = tl.program_id(0)
    s = pid // tiles
    channel = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < features
    replaced = replaced_at(alpha, seats, seeds, channel)
    c = coefficient_at(alpha, seats, s, channel, replaced)
    counts = present & (tl.where(any_fault(faults, seeds, SEATS) != 0, 0.0, c) != 0.0)
    with_value = tl.zeros([BLOCK_C], tl.float32)
    plain = tl.zeros([BLOCK_C], tl.float32)
    at = partials + channel.to(tl.int64)
    for _ in range(0, splits):
        with_value += tl.load(at, mask=counts, other=0.0)
        if SHIFTED:
            plain += tl.load(at + features, mask=counts, other=0.0)
        at += 2 * features
    tl.store(gscale + s * features + channel, tl.where(counts, c * with_value, 0.0).to(dtype), mask=present)
    if SHIFTED:
        tl.store(gshift + s * features + channel, tl.where(counts, c * plain, 0.0).to(dtype), mask=present)


def elementwise_blocks(planes: bool) -> dict[str, int]:
    """Tile sizes: 16 bytes a lane and load for rows of halves, short rows of pixels for small images."""
    return {"BLOCK_M": 4 if planes else 8, "BLOCK_N": 256}


def elementwise_options(planes: bool, shifted: bool = False) -> dict[str, int]:
    """Launch options; the backward reads no shift.

    ``maxnreg`` leaves room for five, three or four blocks: left to itself, ptxas spills a few bytes in some variants to
    fit one more.
    """
    return {"num_warps": 4, "num_stages": 2, "maxnreg": 96 if planes else 168 if shifted else 128, **FUSING}


REDUCE_BLOCKS = {"BLOCK_C": 256}
REDUCE_OPTIONS = {"num_warps": 4, **FUSING}

_NUMBERS = ("outer", "features", "inner", "seeds", "parts", "stretch")


def elementwise_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_elementwise_kernel``."""
    return {
        **dict.fromkeys(("x", "h", "y", "scale", "shift"), f"*{dtype}"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8"},
        **dict.fromkeys(_NUMBERS, "i32"),
        **dict.fromkeys(("x_row", "h_row", "y_row"), "i64"),
    }


def elementwise_backward_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_elementwise_backward_kernel``."""
    return {
        **dict.fromkeys(("x", "gy", "gx", "gh", "scale"), f"*{dtype}"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8", "partials": "*fp32"},
        **dict.fromkeys(_NUMBERS, "i32"),
        **dict.fromkeys(("x_row", "gy_row", "gx_row", "gh_row"), "i64"),
    }


def elementwise_reduce_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_elementwise_reduce_kernel``."""
    return {
        "partials": "*fp32",
        **dict.fromkeys(("gscale", "gshift"), f"*{dtype}"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8"},
        **dict.fromkeys(("features", "seeds", "splits", "tiles"), "i32"),
    }


def _case(dtype: str, act: int, shifted: bool, planes: bool, replaces: bool = True) -> list[tuple[object, ...]]:
    tiles = elementwise_blocks(planes)
    wants = {"WANT_X": True, "WANT_H": replaces, "WANT_W": True, "SEATS": 64}
    return [
        (
            graft_elementwise_kernel,
            elementwise_signature(dtype),
            {"ACT": act, "SHIFTED": shifted, "PLANES": planes, **tiles},
            elementwise_options(planes, shifted),
        ),
        (
            graft_elementwise_backward_kernel,
            elementwise_backward_signature(dtype),
            {"ACT": act, "PLANES": planes, **wants, **tiles},
            elementwise_options(planes),
        ),
    ]


AOT = [
    *_case("bf16", 2, True, False),
    *_case("bf16", 0, False, True),
    *_case("fp16", 6, True, True),
    *_case("fp32", 4, True, False),
    *_case("fp16", 0, False, False, replaces=False),
    *(
        (
            graft_elementwise_reduce_kernel,
            elementwise_reduce_signature(dtype),
            {"SHIFTED": True, "SEATS": 64, **REDUCE_BLOCKS},
            REDUCE_OPTIONS,
        )
        for dtype in ("bf16", "fp16", "fp32")
    ),
]
