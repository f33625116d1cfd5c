"""Containment: which seeds of a bank are at fault, and the host's output in y's place when one is.

Both kernels are launched after every forward and return at once in the usual case, so that nothing waits for the
device. They are launches of their own because the choice is for the whole layer: one seed at fault anywhere gives h
everywhere, and only the end of a launch tells every program what the others found.
"""

import triton
import triton.language as tl

from .graft_math import (
    FUSING,
    SEAT,
    activate,
    any_fault,
    down_products,
    finite,
    live_rows,
    operand,
    product,
    replace_sum,
)


@triton.jit
def _any(flags):
    return tl.max(tl.max(flags.to(tl.int32), 1), 0) != 0


@triton.jit
def _contribution(
    z_at,
    up,
    alpha,
    seats,
    seed,
    begin,
    end,
    replaced,
    in_m,
    col,
    d_out,
    dtype: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What one seed adds to a tile, rounded to ``dtype``; 0 where it does not count."""
    at = seats + seed * SEAT
    a = tl.load(alpha + tl.load(at))
    a = tl.where(tl.load(at + 3) != 0, a * (1.0 / tl.maximum(replaced, 1.0)), a)
    c = tl.where((tl.load(at + 1) <= begin) & (tl.load(at + 2) >= end), a, 0.0)
    last = tl.load(at + 5)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(at + 4), last, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        counts = r < tl.where(c != 0.0, last, 0)
        some = tl.load(z_at + r[None, :], mask=in_m[:, None] & counts[None, :], other=0.0)
        rows_up = tl.load(
            up + r.to(tl.int64)[:, None] * d_out + col[None, :],
            mask=counts[:, None] & (col < end)[None, :],
            other=0.0,
        )
        total = product(operand(some * c, dtype, EMULATE), operand(rows_up, dtype, EMULATE), total)
    return total.to(dtype).to(tl.float32)


_SIZES = ["rows", "d_in", "d_out", "ranks", "seeds", "groups", "x_row", "h_row", "y_row", "z_row"]


@triton.jit(do_not_specialize=_SIZES)
def graft_blame_kernel(
    x,
    h,
    y,
    down,
    value,
    up,
    bias,
    value_bias,
    alpha,
    owner,
    seats,
    spans,
    z,
    suspect,
    faults,
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    groups,
    x_row,
    h_row,
    y_row,
    z_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Which seeds are at fault for what is not finite in y. Grid: any number of programs.

    The arguments are those of ``graft_bank_kernel``, but z is float32 ``[programs * BLOCK_M, z_row]``. ``faults`` is
    uint8 ``[seeds]``, 0 before, 1 after for each seed at fault. Programs write nothing but that 1, so their order does
    not matter. Slow, and seldom run.
    """
    if tl.load(suspect) == 0:
        return
    dtype: tl.constexpr = y.dtype.element_ty
    pid = tl.program_id(0)
    lane_m = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    one = tl.full([], 1, tl.uint8)
    # Each program keeps z of one block at a time in its own place.
    z_at = z + (pid.to(tl.int64) * BLOCK_M + lane_m)[:, None] * z_row
    for block in range(pid, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        m = block * BLOCK_M + lane_m.to(tl.int64)
        in_m = m < rows
        bad = tl.zeros([BLOCK_M], tl.int32)
        for n in range(0, d_out, BLOCK_N):
            mask = in_m[:, None] & (n + lane < d_out)[None, :]
            some = tl.load(y + m[:, None] * y_row + (n + lane)[None, :], mask=mask, other=0.0).to(tl.float32)
            bad = tl.maximum(bad, tl.max((finite(some) == 0).to(tl.int32), 1))
        if tl.max(bad, 0) != 0:
            # Where the tap is not finite, a seed's contribution is nobody's fault.
            spoilt = tl.zeros([BLOCK_M], tl.int32)
            for at in range(0, d_in, BLOCK_K):
                c = at + tl.arange(0, BLOCK_K)
                mask = in_m[:, None] & (c < d_in)[None, :]
                some = tl.load(x + m[:, None] * x_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
                spoilt = tl.maximum(spoilt, tl.max((finite(some) == 0).to(tl.int32), 1))
            trusted = in_m & (spoilt == 0)
            for first in range(0, ranks, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                live = live_rows(alpha, seats, owner, r, r < ranks)
                hidden, second = down_products(
                    x, down, value, bias, value_bias, m, in_m, r, live, x_row, d_in,
                    dtype, GATED, BIASED, EMULATE, BLOCK_M, BLOCK_K, BLOCK_R,
                )  # fmt: skip
                hidden = activate(hidden, ACT)
                if GATED:
                    hidden *= second
                tl.store(z_at + r[None, :], hidden, mask=in_m[:, None] & live[None, :])
            tl.debug_barrier()
            for g in range(0, groups):
                begin = tl.load(spans + 2 * g)
                end = tl.load(spans + 2 * g + 1)
                replaced = replace_sum(alpha, seats, seeds, begin, end, SEATS)
                for n in range(begin, end, BLOCK_N):
                    col = n + lane
                    mask = in_m[:, None] & (col < end)[None, :]
                    result = tl.load(y + m[:, None] * y_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
                    broken = finite(result) == 0
                    if _any(broken):
                        own = tl.load(h + m[:, None] * h_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
                        # The host is sound and every contribution is: then the sum is what broke.
                        overflow = broken & finite(own) & trusted[:, None]
                        largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                        for s in range(0, seeds):
                            part = _contribution(
                                z_at, up, alpha, seats, s, begin, end, replaced, in_m, col, d_out,
                                dtype, EMULATE, BLOCK_M, BLOCK_N, BLOCK_R,
                            )  # fmt: skip
                            sound = finite(part)
                            if _any(broken & (sound == 0) & trusted[:, None]):
                                tl.store(faults + s, one)
                            overflow = overflow & sound
                            largest = tl.maximum(largest, tl.where(sound, tl.abs(part), 0.0))
                        overflow = overflow & (largest > 0.0)
                        if _any(overflow):
                            for s in range(0, seeds):
                                part = _contribution(
                                    z_at, up, alpha, seats, s, begin, end, replaced, in_m, col, d_out,
                                    dtype, EMULATE, BLOCK_M, BLOCK_N, BLOCK_R,
                                )  # fmt: skip
                                if _any(overflow & (tl.abs(part) == largest)):
                                    tl.store(faults + s, one)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "columns", "seeds", "h_row", "y_row"])
def graft_contain_kernel(
    h,
    y,
    faults,
    rows,
    columns,
    seeds,
    h_row,
    y_row,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y = h`` if a seed is at fault. Grid: any number of programs; ``faults`` uint8 ``[seeds]``."""
    if any_fault(faults, seeds, SEATS) == 0:
        return
    blocks = tl.cdiv(columns, BLOCK_N).to(tl.int64)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_M) * blocks, tl.num_programs(0)):
        m = tile // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (m < rows)[:, None] & (col < columns)[None, :]
        kept = tl.load(h + m[:, None] * h_row + col[None, :], mask=mask)
        tl.store(y + m[:, None] * y_row + col[None, :], kept, mask=mask)


def blame_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_blame_kernel``."""
    return {
        **dict.fromkeys(("x", "h", "y", "down", "value", "up", "bias", "value_bias"), f"*{dtype}"),
        **{"alpha": "*fp32", "owner": "*i32", "seats": "*i32", "spans": "*i32", "z": "*fp32", "suspect": "*u8"},
        "faults": "*u8",
        **dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "groups"), "i32"),
        **dict.fromkeys(("x_row", "h_row", "y_row", "z_row"), "i64"),
    }


def contain_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_contain_kernel``."""
    sizes = {"rows": "i64", "columns": "i64", "seeds": "i32", "h_row": "i64", "y_row": "i64"}
    return {"h": f"*{dtype}", "y": f"*{dtype}", "faults": "*u8", **sizes}


#: Small tiles: it runs seldom, and must not spill.
BLAME_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 16}
BLAME_OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255, **FUSING}
CONTAIN_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 128}
CONTAIN_OPTIONS = {"num_warps": 4, **FUSING}


def _blame(dtype: str, act: int, gated: bool) -> tuple[object, ...]:
    kind = {"ACT": act, "GATED": gated, "BIASED": act != 0, "EMULATE": False, "SEATS": 64}
    return graft_blame_kernel, blame_signature(dtype), kind | BLAME_BLOCKS, BLAME_OPTIONS


AOT = [
    _blame("bf16", 0, False),
    _blame("fp16", 2, False),
    _blame("fp32", 6, True),
    *(
        (graft_contain_kernel, contain_signature(dtype), {"SEATS": 64, **CONTAIN_BLOCKS}, CONTAIN_OPTIONS)
        for dtype in ("bf16", "fp16", "fp32")
    ),
]
