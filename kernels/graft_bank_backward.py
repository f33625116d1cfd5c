"""Gradients of a bank of seeds in three launches, each with one result whatever the order of its programs.

``graft_bank_rows_kernel`` takes blocks of rows: it computes z again (cheaper than to store it), the gradient of z, and
from it gx and gh; the activated z and the gradients of the products down are left behind, rounded to the dtype, for
``graft_bank_weights_kernel``, which sums their products with x and gy over stretches of rows, and
``graft_bank_reduce_kernel``, which adds the stretches in order.

After a fault, and where every seed sleeps, gh is gy bit for bit and the rest is 0.
"""

import triton
import triton.language as tl

from .graft_math import (
    FUSING,
    SEAT,
    activate,
    any_awake,
    any_fault,
    coefficients,
    down_products,
    host_factor,
    live_rows,
    operand,
    product,
    replace_sum,
    slope,
)


@triton.jit
def _gx_tile(tile, weight, row, live, c, in_k, acc, dtype: tl.constexpr, EMULATE: tl.constexpr):
    w = tl.load(weight + row[:, None] + c[None, :], mask=live[:, None] & in_k[None, :], other=0.0)
    return product(tile, operand(w, dtype, EMULATE), acc)


@triton.jit(
    do_not_specialize=[
        "rows",
        "d_in",
        "d_out",
        "ranks",
        "seeds",
        "groups",
        "x_row",
        "gy_row",
        "gx_row",
        "gh_row",
        "z_row",
    ]
)
def graft_bank_rows_kernel(
    x,
    gy,
    gx,
    gh,
    down,
    value,
    up,
    bias,
    value_bias,
    alpha,
    owner,
    seats,
    spans,
    faults,
    hidden_out,
    gz_out,
    gv_out,
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    groups,
    x_row,
    gy_row,
    gx_row,
    gh_row,
    z_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_H: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradients by rows. Grid: ``cdiv(rows, BLOCK_M)``.

    Args:
        x: The tap, ``[rows, d_in]``.
        gy: The gradient of y, ``[rows, d_out]``.
        gx: That of x, written when WANT_X.
        gh: That of h, written when WANT_H.
        down: As in ``graft_bank_kernel``, and so ``value`` to ``spans``.
        value: See ``down``.
        up: See ``down``.
        bias: See ``down``.
        value_bias: See ``down``.
        alpha: As it was in the forward.
        owner: See ``down``.
        seats: See ``down``.
        spans: See ``down``.
        faults: uint8 ``[seeds]``, from the forward.
        hidden_out: ``[rows, z_row]``, written: the activated z, without a coefficient. Sleeping rows of the bank get 0.
        gz_out: The same for the gradient of ``x @ down.T``.
        gv_out: The same for ``x @ value.T`` when GATED.
        rows: Rows of x.
        d_in: Features of x.
        d_out: Features of h.
        ranks: Rows of the bank.
        seeds: Lines of ``seats``.
        groups: Lines of ``spans``.
        x_row: Distance of rows, as the following.
        gy_row: See ``x_row``.
        gx_row: See ``x_row``.
        gh_row: See ``x_row``.
        z_row: See ``x_row``.
        ACT: As in ``graft_bank_kernel``, and so the rest.
        GATED: See ``ACT``.
        BIASED: See ``ACT``.
        WIDE: See ``ACT``.
        WANT_X: Whether gx is wanted.
        WANT_H: Whether gh is wanted.
        ALIGNED: See ``ACT``.
        EMULATE: See ``ACT``.
        SEATS: See ``ACT``.
        BLOCK_M: See ``ACT``.
        BLOCK_N: See ``ACT``.
        BLOCK_K: See ``ACT``.
        BLOCK_R: See ``ACT``.
    """
    if ALIGNED:
        d_in, d_out = d_in // 16 * 16, d_out // 16 * 16
        x_row, gy_row, gx_row = x_row // 16 * 16, gy_row // 16 * 16, gx_row // 16 * 16
        gh_row, z_row = gh_row // 16 * 16, z_row // 16 * 16
    dtype: tl.constexpr = gy.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < rows
    lane_n = tl.arange(0, BLOCK_N)
    lane_k = tl.arange(0, BLOCK_K)
    gy_at = gy + m[:, None] * gy_row
    gh_at = gh + m[:, None] * gh_row
    if (any_fault(faults, seeds, SEATS) != 0) | (any_awake(alpha, seats, seeds, SEATS) == 0):
        if WANT_H:
            for n in range(0, d_out, BLOCK_N):
                mask = in_m[:, None] & (n + lane_n < d_out)[None, :]
                tl.store(gh_at + (n + lane_n)[None, :], tl.load(gy_at + (n + lane_n)[None, :], mask=mask), mask=mask)
        if WANT_X:
            for k in range(0, d_in, BLOCK_K):
                mask = in_m[:, None] & (k + lane_k < d_in)[None, :]
                nothing = tl.zeros([BLOCK_M, BLOCK_K], dtype)
                tl.store(gx + m[:, None] * gx_row + (k + lane_k)[None, :], nothing, mask=mask)
        return

    rank = tl.arange(0, BLOCK_R)
    live = live_rows(alpha, seats, owner, rank, rank < ranks)
    gz = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    gv = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for first in range(0, ranks if WIDE else 1, BLOCK_R):
        r = first + rank
        if WIDE:
            live = live_rows(alpha, seats, owner, r, r < ranks)
        # The gradient of the activated z, segment by segment: the coefficients differ.
        ga = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for g in range(0, groups):
            begin = tl.load(spans + 2 * g)
            end = tl.load(spans + 2 * g + 1)
            if ALIGNED:
                begin, end = begin // 16 * 16, end // 16 * 16
            replaced = replace_sum(alpha, seats, seeds, begin, end, SEATS)
            host = host_factor(replaced)
            c = coefficients(alpha, seats, owner, r, r < ranks, begin, end, replaced)
            part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for n in range(begin, end, BLOCK_N):
                col = n + lane_n
                in_n = col < end
                mask = in_m[:, None] & in_n[None, :]
                tile = tl.load(gy_at + col[None, :], mask=mask, other=0.0)
                rows_up = tl.load(
                    up + r.to(tl.int64)[None, :] * d_out + col[:, None],
                    mask=(c != 0.0)[None, :] & in_n[:, None],
                    other=0.0,
                )
                part = product(operand(tile, dtype, EMULATE), operand(rows_up, dtype, EMULATE), part)
                if WANT_H:
                    # 0 * NaN is NaN: what does not count is left out.
                    own = tl.where(host == 0.0, 0.0, host * tile.to(tl.float32)).to(dtype)
                    if first == 0:
                        tl.store(gh_at + col[None, :], own, mask=mask)
            ga += tl.where((c != 0.0)[None, :], part * c[None, :], 0.0)
        before, second = down_products(
            x, down, value, bias, value_bias, m, in_m, r, live, x_row, d_in,
            dtype, GATED, BIASED, EMULATE, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        hidden = activate(before, ACT)
        gz = ga * slope(before, ACT)
        if GATED:
            gv = ga * hidden
            gz *= second
            hidden *= second
        at = m[:, None] * z_row + r[None, :]
        keep = in_m[:, None] & (r < ranks)[None, :]
        gz = tl.where(live[None, :], gz, 0.0)
        tl.store(hidden_out + at, tl.where(live[None, :], hidden, 0.0).to(dtype), mask=keep)
        tl.store(gz_out + at, gz.to(dtype), mask=keep)
        if GATED:
            gv = tl.where(live[None, :], gv, 0.0)
            tl.store(gv_out + at, gv.to(dtype), mask=keep)

    if WANT_X:
        if WIDE:
            tl.debug_barrier()
        gz_tile = operand(gz, dtype, EMULATE)
        gv_tile = operand(gv, dtype, EMULATE)
        row = rank.to(tl.int64) * d_in
        for k in range(0, d_in, BLOCK_K):
            c = k + lane_k
            in_k = c < d_in
            acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            if WIDE:
                for first in range(0, ranks, BLOCK_R):
                    r = first + rank
                    wide_live = live_rows(alpha, seats, owner, r, r < ranks)
                    wide_row = r.to(tl.int64) * d_in
                    at = m[:, None] * z_row + r[None, :]
                    keep = in_m[:, None] & wide_live[None, :]
                    some = operand(tl.load(gz_out + at, mask=keep, other=0.0), dtype, EMULATE)
                    acc = _gx_tile(some, down, wide_row, wide_live, c, in_k, acc, dtype, EMULATE)
                    if GATED:
                        some = operand(tl.load(gv_out + at, mask=keep, other=0.0), dtype, EMULATE)
                        acc = _gx_tile(some, value, wide_row, wide_live, c, in_k, acc, dtype, EMULATE)
            else:
                acc = _gx_tile(gz_tile, down, row, live, c, in_k, acc, dtype, EMULATE)
                if GATED:
                    acc = _gx_tile(gv_tile, value, row, live, c, in_k, acc, dtype, EMULATE)
            mask = in_m[:, None] & in_k[None, :]
            tl.store(gx + m[:, None] * gx_row + c[None, :], acc.to(dtype), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "d_in", "d_out", "ranks", "seeds", "stretch", "splits", "x_row", "gy_row", "z_row"]
)
def graft_bank_weights_kernel(
    x,
    gy,
    hidden,
    gz,
    gv,
    alpha,
    seats,
    faults,
    partials,
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    stretch,
    splits,
    x_row,
    gy_row,
    z_row,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over stretches of rows: ``partials[splits, ranks, width]``, float32, written.

    The columns are those of gdown, of gvalue when GATED, of gup (without its coefficients), and when BIASED one for
    gbias and one for the bias of ``value``. Grid: ``splits * cdiv(ranks, BLOCK_R) * tiles``, where tiles counts
    BLOCK_N columns each of gdown, gvalue and gup, and one for both biases. ``stretch`` rows a split.
    """
    if (any_fault(faults, seeds, SEATS) != 0) | (any_awake(alpha, seats, seeds, SEATS) == 0):
        return
    if ALIGNED:
        d_in, d_out = d_in // 16 * 16, d_out // 16 * 16
        x_row, gy_row, z_row = x_row // 16 * 16, gy_row // 16 * 16, z_row // 16 * 16
    dtype: tl.constexpr = gy.dtype.element_ty
    tiles_in = tl.cdiv(d_in, BLOCK_N)
    tiles_down = tiles_in * (2 if GATED else 1)
    tiles_wide = tiles_down + tl.cdiv(d_out, BLOCK_N)
    width = d_in * (2 if GATED else 1) + d_out
    line = width + (2 if BIASED else 0)
    tiles = tiles_wide + (1 if BIASED else 0)
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % splits
    r = (pid // tiles // splits) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = r < ranks
    lane = tl.arange(0, BLOCK_M)
    start = split.to(tl.int64) * stretch
    stop = tl.minimum(start + stretch, rows)
    out = partials + (split.to(tl.int64) * ranks + r) * line
    if tile < tiles_wide:
        # Gradient of a weight: what came out of it times what went in.
        left = gz
        right = x
        right_row = x_row
        columns = d_in
        first = tile * BLOCK_N
        offset = 0
        if tile >= tiles_down:
            left = hidden
            right = gy
            right_row = gy_row
            columns = d_out
            first = (tile - tiles_down) * BLOCK_N
            offset = width - d_out
        elif tile >= tiles_in:
            left = gv
            first = (tile - tiles_in) * BLOCK_N
            offset = d_in
        col = first + tl.arange(0, BLOCK_N)
        in_n = col < columns
        acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for begin in range(start, stop, BLOCK_M):
            m = begin + lane
            in_m = m < stop
            a = tl.load(left + m[None, :] * z_row + r[:, None], mask=in_m[None, :] & in_r[:, None], other=0.0)
            b = tl.load(right + m[:, None] * right_row + col[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
            acc = product(operand(a, dtype, EMULATE), operand(b, dtype, EMULATE), acc)
        tl.store(out[:, None] + (offset + col)[None, :], acc, mask=in_r[:, None] & in_n[None, :])
    elif BIASED:
        total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        second = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        for begin in range(start, stop, BLOCK_M):
            m = begin + lane
            at = m[None, :] * z_row + r[:, None]
            mask = (m < stop)[None, :] & in_r[:, None]
            total += tl.load(gz + at, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                second += tl.load(gv + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + width, tl.sum(total, 1), mask=in_r)
        tl.store(out + width + 1, tl.sum(second, 1), mask=in_r)


@triton.jit(do_not_specialize=["d_in", "d_out", "ranks", "seeds", "splits"])
def graft_bank_reduce_kernel(
    partials,
    gdown,
    gvalue,
    gup,
    gbias,
    gvalue_bias,
    alpha,
    owner,
    seats,
    faults,
    d_in,
    d_out,
    ranks,
    seeds,
    splits,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The stretches added in order, times the coefficients where the weights lie behind them. Grid: tiles * ranks.

    A row of the bank whose seed sleeps gets 0, and so does every row after a fault; nothing is read for it.
    """
    width = d_in * (2 if GATED else 1) + d_out
    line = width + (2 if BIASED else 0)
    tiles = tl.cdiv(line, BLOCK_C)
    pid = tl.program_id(0)
    r = pid // tiles
    col = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = seats + tl.load(owner + r) * SEAT
    own = tl.load(alpha + tl.load(at))
    counts = col < tl.where((own != 0.0) & (any_fault(faults, seeds, SEATS) == 0), line, 0)
    total = tl.zeros([BLOCK_C], tl.float32)
    wide = r.to(tl.int64)
    place = partials + wide * line + col
    for _ in range(0, splits):
        total += tl.load(place, mask=counts, other=0.0)
        place += (wide * 0 + ranks) * line
    # gup: the coefficient depends on which replace seeds share the feature.
    feature = col - (width - d_out)
    in_up = (feature >= 0) & (feature < d_out)
    replaced = tl.zeros([BLOCK_C], tl.float32)
    for s in range(0, seeds):
        there = seats + s * SEAT
        a = tl.where(tl.load(there + 3) != 0, tl.load(alpha + tl.load(there)), 0.0)
        replaced += tl.where((feature >= tl.load(there + 1)) & (feature < tl.load(there + 2)), a, 0.0)
    scale = tl.where(tl.load(at + 3) != 0, 1.0 / tl.maximum(replaced, 1.0), 1.0)
    covers = (feature >= tl.load(at + 1)) & (feature < tl.load(at + 2))
    total = tl.where(in_up, tl.where(covers, total * (own * scale), 0.0), total)
    total = tl.where(counts, total, 0.0)
    dtype: tl.constexpr = gup.dtype.element_ty
    result = total.to(dtype)
    tl.store(gup + wide * d_out + feature, result, mask=in_up)
    tl.store(gdown + wide * d_in + col, result, mask=col < d_in)
    if GATED:
        tl.store(gvalue + wide * d_in + (col - d_in), result, mask=(col >= d_in) & (col < 2 * d_in))
    if BIASED:
        tl.store(gbias + r + 0 * col, result, mask=col == width)
        if GATED:
            tl.store(gvalue_bias + r + 0 * col, result, mask=col == width + 1)


def rows_blocks(dtype: str, ranks: int, rows: int, gated: bool, aligned: bool) -> tuple[dict[str, int], dict[str, int]]:
    """As ``graft_bank.bank_blocks``, for ``graft_bank_rows_kernel``."""
    blocks = {"BLOCK_M": 64 if rows > 1024 else 16, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16 if ranks <= 16 else 64}
    if dtype == "fp32":
        blocks |= {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
    elif gated or not aligned:  # two of everything, or an address for every element instead of every eighth
        blocks |= {"BLOCK_M": min(64 if aligned else 32, blocks["BLOCK_M"]), "BLOCK_N": 32, "BLOCK_K": 32}
    # Loads that begin a step early hold registers, and here there is none left: with two stages it spills 60 bytes.
    full = dtype == "fp32" and gated and not aligned and ranks > 64
    return {"WIDE": ranks > 64, **blocks}, {"num_warps": 8, "num_stages": 1 if full else 2, "maxnreg": 255, **FUSING}


def weights_blocks(dtype: str, ranks: int) -> tuple[dict[str, int], dict[str, int]]:
    """The same for ``graft_bank_weights_kernel``."""
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 16 if ranks <= 16 else 64}
    if dtype == "fp32":
        blocks |= {"BLOCK_M": 32, "BLOCK_N": 32}
    return blocks, {"num_warps": 8, "num_stages": 2, "maxnreg": 255, **FUSING}


REDUCE_BLOCKS = {"BLOCK_C": 256}
REDUCE_OPTIONS = {"num_warps": 4, **FUSING}

_TABLES = {"alpha": "*fp32", "owner": "*i32", "seats": "*i32"}
_ROWS_POINTERS = ("x", "gy", "gx", "gh", "down", "value", "up", "bias", "value_bias")
_LEFT_BEHIND = ("hidden_out", "gz_out", "gv_out")


def rows_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_bank_rows_kernel``."""
    return {
        **dict.fromkeys(_ROWS_POINTERS, f"*{dtype}"),
        **_TABLES,
        **{"spans": "*i32", "faults": "*u8"},
        **dict.fromkeys(_LEFT_BEHIND, f"*{dtype}"),
        **dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "groups"), "i32"),
        **dict.fromkeys(("x_row", "gy_row", "gx_row", "gh_row", "z_row"), "i64"),
    }


def weights_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_bank_weights_kernel``."""
    return {
        **dict.fromkeys(("x", "gy", "hidden", "gz", "gv"), f"*{dtype}"),
        **{"alpha": "*fp32", "seats": "*i32", "faults": "*u8", "partials": "*fp32"},
        **dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "stretch", "splits"), "i32"),
        **dict.fromkeys(("x_row", "gy_row", "z_row"), "i64"),
    }


def reduce_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``graft_bank_reduce_kernel``."""
    return {
        "partials": "*fp32",
        **dict.fromkeys(("gdown", "gvalue", "gup", "gbias", "gvalue_bias"), f"*{dtype}"),
        **_TABLES,
        "faults": "*u8",
        **dict.fromkeys(("d_in", "d_out", "ranks", "seeds", "splits"), "i32"),
    }


def _rows(
    dtype: str, act: int, gated: bool, ranks: int, rows: int, aligned: bool, replaces: bool = True
) -> tuple[object, ...]:
    constants, options = rows_blocks(dtype, ranks, rows, gated, aligned)
    kind = {"ACT": act, "GATED": gated, "BIASED": act != 0, "WANT_X": True, "WANT_H": replaces, "ALIGNED": aligned}
    fixed = {"EMULATE": False, "SEATS": 64}
    return graft_bank_rows_kernel, rows_signature(dtype), kind | fixed | constants, options


def _weights(dtype: str, gated: bool, aligned: bool) -> tuple[object, ...]:
    constants, options = weights_blocks(dtype, 64)
    kind = {"GATED": gated, "BIASED": gated, "ALIGNED": aligned, "EMULATE": False, "SEATS": 64}
    return graft_bank_weights_kernel, weights_signature(dtype), kind | constants, options


#: As in ``graft_bank``; the fewest registers are left above 64 rows of the bank.
AOT = [
    _rows("bf16", 0, False, 64, 8192, True),
    _rows("bf16", 6, True, 64, 8192, True),
    _rows("fp16", 2, False, 16, 8192, False),
    _rows("fp32", 6, True, 256, 8192, True),
    _rows("fp32", 6, True, 256, 8192, False),
    _rows("fp32", 2, True, 256, 8192, False, replaces=False),
    _rows("fp32", 0, False, 256, 8192, False, replaces=False),
    _rows("bf16", 2, True, 256, 8192, True),
    _rows("fp16", 2, True, 256, 8192, False, replaces=False),
    _rows("bf16", 0, False, 256, 8192, False, replaces=False),
    _rows("fp16", 2, False, 256, 8192, False, replaces=False),
    _weights("bf16", False, True),
    _weights("fp16", False, False),
    _weights("fp32", True, True),
    *(
        (
            graft_bank_reduce_kernel,
            reduce_signature(dtype),
            {"GATED": True, "BIASED": True, "SEATS": 64, **REDUCE_BLOCKS},
            REDUCE_OPTIONS,
        )
        for dtype in ("bf16", "fp16", "fp32")
    ),
]
