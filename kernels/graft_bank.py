"""All low-rank, bottleneck or gated seeds of a layer in one launch.

    z = act(x @ down.T + bias)                       bottleneck; lowrank without act and bias
    z = act(x @ down.T + bias) * (x @ value.T + value_bias)        gated
    y = host * h + (c * z) @ up

A program takes a block of rows: z in float32, then the features of the output tile by tile, segment by segment
(between two borders of chunks every coefficient is constant), so x and h are read once and y is written once. Where
rows are few, ``parts`` programs share a block and take its tiles in turns, each with its own z. Beyond BLOCK_R rows of
the bank (WIDE) z goes through memory that only its own program reads back.

``graft_blame_kernel`` finds the seeds at fault and returns at once unless some y is not finite.
"""

import triton
import triton.language as tl

from .graft_math import (
    FUSING,
    activate,
    any_awake,
    coefficients,
    down_products,
    finite,
    host_factor,
    live_rows,
    operand,
    product,
    replace_sum,
)

#: Numbers that must not recompile anything: ALIGNED says what the compiler needs to know of them.
SIZES = ["rows", "d_in", "d_out", "ranks", "seeds", "groups", "parts", "x_row", "h_row", "y_row", "z_row"]


@triton.jit(do_not_specialize=SIZES)
def graft_bank_kernel(
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
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    groups,
    parts,
    x_row,
    h_row,
    y_row,
    z_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Blend one block of rows. Grid: ``cdiv(rows, BLOCK_M) * parts``.

    Args:
        x: The tap, ``[rows, d_in]``, ``x_row`` from row to row.
        h: The host's output, ``[rows, d_out]``.
        y: As h, written.
        down: ``[ranks, d_in]``; ``value`` the same when GATED.
        value: See ``down``; any pointer of its type otherwise.
        up: ``[ranks, d_out]``; 0 outside of the features of a seed that changes only its own.
        bias: ``[ranks]`` when BIASED, ``value_bias`` too when GATED.
        value_bias: See ``bias``.
        alpha: float32, one a seed of the layer.
        owner: int32 ``[ranks]``: which line of ``seats`` a row of the bank belongs to.
        seats: See ``graft_math``.
        spans: int32 ``[groups, 2]``: the segments.
        z: float32 ``[rows, z_row]``; used when WIDE.
        suspect: uint8, set to 1 when some y is not finite.
        rows: Rows of x.
        d_in: Features of x.
        d_out: Features of h.
        ranks: Rows of the bank.
        seeds: Lines of ``seats``, at most SEATS.
        groups: Lines of ``spans``.
        parts: Programs that share a block of rows.
        x_row: Distance of rows, as ``h_row``, ``y_row`` and ``z_row``.
        h_row: See ``x_row``.
        y_row: See ``x_row``.
        z_row: See ``x_row``.
        ACT: The activation, see ``activate``.
        GATED: Whether there are two products down.
        BIASED: Whether there are biases.
        WIDE: Whether ``ranks`` is above BLOCK_R.
        ALIGNED: Whether widths, distances of rows and borders are multiples of 16.
        EMULATE: For the interpreter, see ``operand``.
        SEATS: Lanes for the seeds.
        BLOCK_M: Rows of a block.
        BLOCK_N: Features of a tile of the output.
        BLOCK_K: Features of x taken at a time.
        BLOCK_R: Rows of the bank taken at a time.
    """
    if ALIGNED:  # said so that the compiler sees it
        d_in, d_out = d_in // 16 * 16, d_out // 16 * 16
        x_row, h_row, y_row, z_row = x_row // 16 * 16, h_row // 16 * 16, y_row // 16 * 16, z_row // 16 * 16
    dtype: tl.constexpr = y.dtype.element_ty
    pid = tl.program_id(0)
    part = pid % parts
    m = (pid // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < rows
    lane = tl.arange(0, BLOCK_N)
    h_at = h + m[:, None] * h_row
    y_at = y + m[:, None] * y_row
    if any_awake(alpha, seats, seeds, SEATS) == 0:
        for n in range(part * BLOCK_N, d_out, parts * BLOCK_N):
            mask = in_m[:, None] & (n + lane < d_out)[None, :]
            tl.store(y_at + (n + lane)[None, :], tl.load(h_at + (n + lane)[None, :], mask=mask), mask=mask)
        return

    rank = tl.arange(0, BLOCK_R)
    hidden = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for first in range(0, ranks if WIDE else 1, BLOCK_R):
        r = first + rank
        live = live_rows(alpha, seats, owner, r, r < ranks)
        hidden, second = down_products(
            x, down, value, bias, value_bias, m, in_m, r, live, x_row, d_in,
            dtype, GATED, BIASED, EMULATE, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        hidden = activate(hidden, ACT)
        if GATED:
            hidden *= second
        if WIDE:
            tl.store(z + m[:, None] * z_row + r[None, :], hidden, mask=in_m[:, None] & live[None, :])
    if WIDE:
        tl.debug_barrier()

    bad = tl.zeros([BLOCK_M], tl.int32)
    for g in range(0, groups):
        begin = tl.load(spans + 2 * g)
        end = tl.load(spans + 2 * g + 1)
        if ALIGNED:
            begin, end = begin // 16 * 16, end // 16 * 16
        replaced = replace_sum(alpha, seats, seeds, begin, end, SEATS)
        host = host_factor(replaced)
        c = coefficients(alpha, seats, owner, rank, rank < ranks, begin, end, replaced)
        # 0 * NaN is NaN: a seed that does not count here is left out rather than multiplied.
        scaled = operand(tl.where((c != 0.0)[None, :], hidden * c[None, :], 0.0), dtype, EMULATE)
        counting = tl.max((c != 0.0).to(tl.int32), 0)
        if WIDE:
            for first in range(BLOCK_R, ranks, BLOCK_R):
                r = first + rank
                more = coefficients(alpha, seats, owner, r, r < ranks, begin, end, replaced)
                counting = tl.maximum(counting, tl.max((more != 0.0).to(tl.int32), 0))
        # A host whose factor is 0 is not read. (The interpreter cannot combine a mask with a scalar.)
        in_h = m < tl.where(host != 0.0, rows, 0)
        for n in range(begin + part * BLOCK_N, end, parts * BLOCK_N):
            col = n + lane
            in_n = col < end
            mask = in_m[:, None] & in_n[None, :]
            as_is = tl.load(h_at + col[None, :], mask=in_h[:, None] & in_n[None, :], other=0.0)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if WIDE:
                for first in range(0, ranks, BLOCK_R):
                    r = first + rank
                    c = coefficients(alpha, seats, owner, r, r < ranks, begin, end, replaced)
                    some = tl.load(
                        z + m[:, None] * z_row + r[None, :], mask=in_m[:, None] & (c != 0.0)[None, :], other=0.0
                    )
                    rows_up = tl.load(
                        up + r.to(tl.int64)[:, None] * d_out + col[None, :],
                        mask=(c != 0.0)[:, None] & in_n[None, :],
                        other=0.0,
                    )
                    total = product(operand(some * c[None, :], dtype, EMULATE), operand(rows_up, dtype, EMULATE), total)
            else:
                rows_up = tl.load(
                    up + rank.to(tl.int64)[:, None] * d_out + col[None, :],
                    mask=(c != 0.0)[:, None] & in_n[None, :],
                    other=0.0,
                )
                total = product(scaled, operand(rows_up, dtype, EMULATE), total)
            # Without a seed h goes through as it is: -0 + 0 would be +0, and a NaN that is widened and rounded is
            # another one.
            result = tl.where(counting != 0, (host * as_is.to(tl.float32) + total).to(dtype), as_is)
            tl.store(y_at + col[None, :], result, mask=mask)
            bad = tl.maximum(bad, tl.max((mask & (finite(result.to(tl.float32)) == 0)).to(tl.int32), 1))
    if tl.max(bad, 0) != 0:
        tl.store(suspect, tl.full([], 1, tl.uint8))


def bank_blocks(dtype: str, ranks: int, rows: int, gated: bool, aligned: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time constants and launch options that depend on sizes.

    Args:
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        ranks: Rows of the bank.
        rows: Rows of x.
        gated: Whether there are two products down.
        aligned: As ALIGNED.

    ``maxnreg`` is as many registers as a thread can have: ptxas would rather spill a few bytes to fit more blocks.
    """
    blocks = {"BLOCK_M": 64 if rows > 1024 else 16, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16 if ranks <= 16 else 64}
    if dtype == "fp32":  # each product is three, from twice the bytes
        roomy = rows > 1024 and ranks <= 64 and aligned and not gated
        blocks |= {"BLOCK_M": 32 if roomy else 16, "BLOCK_N": 32, "BLOCK_K": 32}
        return {"WIDE": ranks > 64, **blocks}, {"num_warps": 8, "num_stages": 2, "maxnreg": 255, **FUSING}
    if not aligned:  # an address for every element instead of every eighth
        blocks |= {"BLOCK_M": min(32, blocks["BLOCK_M"]), "BLOCK_N": 32, "BLOCK_K": 32}
        return {"WIDE": ranks > 64, **blocks}, {"num_warps": 8, "num_stages": 2, "maxnreg": 255, **FUSING}
    if ranks > 64 and gated:
        blocks |= {"BLOCK_N": 32, "BLOCK_K": 32}
    warps = 8 if ranks > 64 and not gated else 4
    return {"WIDE": ranks > 64, **blocks}, {"num_warps": warps, "num_stages": 3, "maxnreg": 255, **FUSING}


def bank_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_bank_kernel``."""
    return {
        **dict.fromkeys(("x", "h", "y", "down", "value", "up", "bias", "value_bias"), f"*{dtype}"),
        **{"alpha": "*fp32", "owner": "*i32", "seats": "*i32", "spans": "*i32", "z": "*fp32", "suspect": "*u8"},
        **dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "groups", "parts"), "i32"),
        **dict.fromkeys(("x_row", "h_row", "y_row", "z_row"), "i64"),
    }


def _bank(dtype: str, act: int, gated: bool, ranks: int, rows: int, aligned: bool) -> tuple[object, ...]:
    constants, options = bank_blocks(dtype, ranks, rows, gated, aligned)
    kind = {"ACT": act, "GATED": gated, "BIASED": act != 0, "ALIGNED": aligned, "EMULATE": False, "SEATS": 64}
    return graft_bank_kernel, bank_signature(dtype), kind | constants, options


#: Every dtype, activation kind, width and alignment once, not every combination: each takes seconds to compile. Then
#: what, of all that the forge ships, has the fewest registers left.
AOT = [
    _bank("bf16", 0, False, 64, 8192, True),
    _bank("bf16", 6, True, 256, 8192, True),
    _bank("fp16", 2, False, 16, 8192, False),
    _bank("fp32", 6, True, 64, 8192, True),
    _bank("fp32", 0, False, 64, 8192, True),
    _bank("fp16", 2, True, 64, 8192, True),
    _bank("fp16", 0, False, 256, 8192, True),
    _bank("fp32", 6, True, 256, 8192, False),
    _bank("fp32", 0, False, 256, 8192, False),
]
