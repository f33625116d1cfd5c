"""A linear layer with everything that follows it in the epilogue of its product.

    p = x @ weight.T + bias
    h = act(p)
    y = host * h + (c * z) @ up         z = graft_act(x @ down.T + graft_bias), R <= 64 rows for all seeds together

A program computes tiles of y one after the other. With Z_INLINE it accumulates z beside p, from the tiles of x that are
on the chip anyway: no memory for z and no launch, but every tile of y computes z of its rows again, R / BLOCK_N of the
host's own work. With Z_GIVEN z comes from a product in front of it, R / d_in of the host's work and one more read of x.
h never reaches memory, so a fault cannot be undone here: ``graft_blame_kernel`` and ``graft_contain_kernel`` follow,
and in front of them this kernel once more with GUARDED, which writes h, if there was one.

With STATS each tile leaves its features' count, mean, M2, largest size and count of non-finite values behind, which
``stats_records.reduce_kernel`` joins in a fixed order.
"""

import triton
import triton.language as tl

from .graft_math import (
    FUSING,
    activate,
    any_awake,
    coefficients,
    finite,
    host_factor,
    live_rows,
    operand,
    product,
    replace_sum,
)

#: z of the seeds: there is none, computed beside the product, or given.
NO_GRAFT, Z_INLINE, Z_GIVEN = (tl.constexpr(i) for i in range(3))
#: Numbers a feature has in the statistics, as ``stats_records.py`` has them.
FIELDS = tl.constexpr(5)

SIZES = ["rows", "d_in", "d_out", "ranks", "seeds", "groups", "x_row", "w_row", "y_row", "z_row"]


@triton.jit
def _store_stats(features, block, col, in_n, in_m, stored, d_out):
    """Count, mean, M2, largest size and bad values of some columns; deviations from a mean cost no digits."""
    ok = finite(stored) & in_m[:, None] & in_n[None, :]
    v = tl.where(ok, stored, 0.0)
    count = tl.sum(ok.to(tl.int32), 0)
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    # Scaled before they are added: a sum of large values would overflow.
    shift = tl.sum(v * each[None, :], 0)
    at = features + block.to(tl.int64) * FIELDS * d_out + col
    present = tl.sum(in_m.to(tl.int32), 0)
    tl.store(at, count.to(tl.float64), mask=in_n)
    tl.store(at + 3 * d_out, tl.max(tl.abs(v), 0).to(tl.float64), mask=in_n)
    tl.store(at + 4 * d_out, (present - count).to(tl.float64), mask=in_n)
    d = tl.where(ok, v - shift[None, :], 0.0)
    rest = tl.sum(d, 0)
    tl.store(at + d_out, shift.to(tl.float64) + (rest * each).to(tl.float64), mask=in_n)
    tl.store(at + 2 * d_out, tl.maximum(tl.sum(d * d, 0) - rest * rest * each, 0.0).to(tl.float64), mask=in_n)


@triton.jit
def _finish(
    p,
    hidden,
    col,
    m,
    in_m,
    block,
    awake,
    bias,
    y,
    before,
    up,
    alpha,
    owner,
    seats,
    spans,
    features,
    suspect,
    d_out,
    ranks,
    seeds,
    groups,
    y_row,
    ACT: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    STATS: tl.constexpr,
    GRAFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What follows the product, for some columns of a tile: few at a time, since all of them would not fit."""
    dtype: tl.constexpr = y.dtype.element_ty
    in_n = col < d_out
    mask = in_m[:, None] & in_n[None, :]
    at = m[:, None] * y_row + col[None, :]
    if BIASED:
        p += tl.load(bias + col, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(before + at, p.to(dtype), mask=mask)
    result = activate(p, ACT)
    if GRAFT != NO_GRAFT:
        if awake != 0:
            rank = tl.arange(0, BLOCK_R)
            for g in range(0, groups):
                begin = tl.load(spans + 2 * g)
                end = tl.load(spans + 2 * g + 1)
                if ALIGNED:  # said so that the compiler sees it
                    begin, end = begin // 16 * 16, end // 16 * 16
                mine = (col >= begin) & (col < end)
                replaced = replace_sum(alpha, seats, seeds, begin, end, SEATS)
                host = host_factor(replaced)
                c = coefficients(alpha, seats, owner, rank, rank < ranks, begin, end, replaced)
                rows_up = tl.load(
                    up + rank.to(tl.int64)[:, None] * d_out + col[None, :],
                    mask=(c != 0.0)[:, None] & (in_n & mine)[None, :],
                    other=0.0,
                )
                # 0 * NaN is NaN: a seed that does not count here is left out rather than multiplied.
                scaled = operand(tl.where((c != 0.0)[None, :], hidden * c[None, :], 0.0), dtype, EMULATE)
                # A host whose factor is 0 may hold anything. Its -0 becomes +0 beside a seed that adds nothing.
                own = tl.where(host == 0.0, 0.0, host * result)
                # The product is of the whole tile, and inf * 0 is NaN: columns of other segments stay as they are.
                result = tl.where(mine[None, :], product(scaled, operand(rows_up, dtype, EMULATE), own), result)
            bad = mask & (finite(result.to(dtype).to(tl.float32)) == 0)
            if tl.max(tl.max(bad.to(tl.int32), 1), 0) != 0:
                tl.store(suspect, tl.full([], 1, tl.uint8))
    stored = result.to(dtype)
    tl.store(y + at, stored, mask=mask)
    if STATS:
        _store_stats(features, block, col, in_n, in_m, stored.to(tl.float32), d_out)


@triton.jit
def _halves(t, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """The left and the right columns."""
    return tl.split(tl.permute(tl.reshape(t, [BLOCK_M, 2, HALF]), (0, 2, 1)))


@triton.jit
def _tile(
    tile,
    tiles_m,
    tiles_n,
    awake,
    x,
    weight,
    bias,
    y,
    before,
    down,
    up,
    graft_bias,
    z,
    alpha,
    owner,
    seats,
    spans,
    features,
    suspect,
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    groups,
    x_row,
    w_row,
    y_row,
    z_row,
    ACT: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    STATS: tl.constexpr,
    GRAFT: tl.constexpr,
    GRAFT_ACT: tl.constexpr,
    GRAFT_BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of y."""
    dtype: tl.constexpr = y.dtype.element_ty
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    block = group * GROUP_M + (tile % (GROUP_M * tiles_n)) % height
    first = (tile % (GROUP_M * tiles_n)) // height * BLOCK_N
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < rows
    col = first + tl.arange(0, BLOCK_N)
    lane_k = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    live = rank < 0
    if GRAFT != NO_GRAFT:
        live = live_rows(alpha, seats, owner, rank, rank < ranks)
    x_at = x + m[:, None] * x_row
    w_at = weight + col.to(tl.int64)[None, :] * w_row
    for k in range(0, d_in, BLOCK_K):
        c = k + lane_k
        in_k = c < d_in
        a = tl.load(x_at + c[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(w_at + c[:, None], mask=in_k[:, None] & (col < d_out)[None, :], other=0.0)
        a = operand(a, dtype, EMULATE)
        acc = product(a, operand(b, dtype, EMULATE), acc)
        if GRAFT == Z_INLINE:
            at = down + rank.to(tl.int64)[None, :] * d_in + c[:, None]
            d = tl.load(at, mask=live[None, :] & in_k[:, None], other=0.0)
            hidden = product(a, operand(d, dtype, EMULATE), hidden)
    if GRAFT == Z_GIVEN:
        at = z + m[:, None] * z_row + rank[None, :]
        hidden = tl.load(at, mask=in_m[:, None] & live[None, :], other=0.0).to(tl.float32)
    if GRAFT_BIASED:
        hidden += tl.load(graft_bias + rank, mask=live, other=0.0).to(tl.float32)[None, :]
    hidden = activate(hidden, GRAFT_ACT)
    if SPLITS == 1:
        _finish(
            acc, hidden, col, m, in_m, block, awake, bias, y, before, up, alpha, owner, seats, spans, features,
            suspect, d_out, ranks, seeds, groups, y_row, ACT, BIASED, KEEP, STATS, GRAFT, ALIGNED, EMULATE, SEATS,
            BLOCK_R,
        )  # fmt: skip
    else:
        half: tl.constexpr = BLOCK_N // 2
        left, right = _halves(acc, BLOCK_M, half)
        if SPLITS == 2:
            for i in tl.static_range(2):
                _finish(
                    left if i == 0 else right, hidden, first + i * half + tl.arange(0, half), m, in_m, block, awake,
                    bias, y, before, up, alpha, owner, seats, spans, features, suspect, d_out, ranks, seeds, groups,
                    y_row, ACT, BIASED, KEEP, STATS, GRAFT, ALIGNED, EMULATE, SEATS, BLOCK_R,
                )  # fmt: skip
        else:
            quarter: tl.constexpr = BLOCK_N // 4
            for i in tl.static_range(2):
                one, other = _halves(left if i == 0 else right, BLOCK_M, quarter)
                for j in tl.static_range(2):
                    _finish(
                        one if j == 0 else other, hidden, first + (2 * i + j) * quarter + tl.arange(0, quarter), m,
                        in_m, block, awake, bias, y, before, up, alpha, owner, seats, spans, features, suspect, d_out,
                        ranks, seeds, groups, y_row, ACT, BIASED, KEEP, STATS, GRAFT, ALIGNED, EMULATE, SEATS, BLOCK_R,
                    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def fused_linear_kernel(
    x,
    weight,
    bias,
    y,
    before,
    down,
    up,
    graft_bias,
    z,
    alpha,
    owner,
    seats,
    spans,
    features,
    suspect,
    rows,
    d_in,
    d_out,
    ranks,
    seeds,
    groups,
    x_row,
    w_row,
    y_row,
    z_row,
    ACT: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    STATS: tl.constexpr,
    GRAFT: tl.constexpr,
    GRAFT_ACT: tl.constexpr,
    GRAFT_BIASED: tl.constexpr,
    GUARDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
    SEATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y, tile by tile. Grid: as many programs as tiles; with GUARDED any number, each takes every so many-th tile.

    Args:
        x: ``[rows, d_in]``, ``x_row`` from row to row.
        weight: ``[d_out, d_in]``, ``w_row`` from row to row.
        bias: ``[d_out]`` when BIASED; any pointer of its type otherwise, as for all that follows.
        y: ``[rows, d_out]``, written.
        before: p, as y, written when KEEP.
        down: ``[ranks, d_in]`` when Z_INLINE.
        up: ``[ranks, d_out]`` when there is a graft.
        graft_bias: ``[ranks]`` when GRAFT_BIASED.
        z: ``x @ down.T``, ``[rows, z_row]`` of y's dtype, when Z_GIVEN.
        alpha: float32, one a seed of the layer.
        owner: int32 ``[ranks]``: which line of ``seats`` a row of the bank belongs to.
        seats: See ``graft_math``.
        spans: int32 ``[groups, 2]``: the segments.
        features: float64 ``[blocks of rows, 5, d_out]``, written when STATS.
        suspect: uint8: set to 1 when some y is not finite and there is a graft; with GUARDED read instead.
        rows: Rows of x.
        d_in: Features of x.
        d_out: Features of y.
        ranks: Rows of the bank, at most BLOCK_R.
        seeds: Lines of ``seats``, at most SEATS.
        groups: Lines of ``spans``.
        x_row: Distance of rows, as the following.
        w_row: See ``x_row``.
        y_row: See ``x_row``; that of ``before`` too.
        z_row: See ``x_row``.
        ACT: The host's activation, see ``activate``.
        BIASED: Whether the host has a bias.
        KEEP: Whether p is wanted.
        STATS: Whether statistics are.
        GRAFT: NO_GRAFT, Z_INLINE or Z_GIVEN.
        GRAFT_ACT: The seeds' activation.
        GRAFT_BIASED: Whether z has a bias.
        GUARDED: Return at once unless ``suspect``.
        ALIGNED: Whether widths, distances of rows and borders are multiples of 16.
        EMULATE: For the interpreter, see ``operand``.
        SEATS: Lanes for the seeds.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Features of a tile.
        BLOCK_K: Features of x taken at a time.
        BLOCK_R: Lanes for the rows of the bank.
        GROUP_M: Blocks of rows that go through all features together, so that both stay in the cache.
        SPLITS: 1, 2 or 4: parts of a tile that are finished one after the other.
    """
    if GUARDED:
        if tl.load(suspect) == 0:
            return
    if ALIGNED:  # said so that the compiler sees it
        d_in, d_out = d_in // 16 * 16, d_out // 16 * 16
        x_row, w_row, y_row, z_row = x_row // 16 * 16, w_row // 16 * 16, y_row // 16 * 16, z_row // 16 * 16
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    awake = 0
    if GRAFT != NO_GRAFT:
        awake = any_awake(alpha, seats, seeds, SEATS)
    if GUARDED:
        for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
            _tile(
                tile, tiles_m, tiles_n, awake, x, weight, bias, y, before, down, up, graft_bias, z, alpha, owner, seats,
                spans, features, suspect, rows, d_in, d_out, ranks, seeds, groups, x_row, w_row, y_row, z_row,
                ACT, BIASED, KEEP, STATS, GRAFT, GRAFT_ACT, GRAFT_BIASED, ALIGNED, EMULATE, SEATS,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, SPLITS,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), tiles_m, tiles_n, awake, x, weight, bias, y, before, down, up, graft_bias, z, alpha,
            owner, seats, spans, features, suspect, rows, d_in, d_out, ranks, seeds, groups, x_row, w_row, y_row, z_row,
            ACT, BIASED, KEEP, STATS, GRAFT, GRAFT_ACT, GRAFT_BIASED, ALIGNED, EMULATE, SEATS,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, SPLITS,
        )  # fmt: skip


def linear_blocks(
    dtype: str, rows: int, ranks: int, inline: bool, aligned: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time constants and launch options that depend on sizes.

    Args:
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        rows: Rows of x.
        ranks: Rows of the bank, 0 without a graft.
        inline: Whether z is computed beside the product: its sums take registers.
        aligned: As ALIGNED.
    """
    blocks = {"BLOCK_R": 16 if ranks <= 16 else 32 if ranks <= 32 else 64, "GROUP_M": 8, "SPLITS": 1}
    if dtype == "fp32":  # each product is three, from twice the bytes
        tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
        return blocks | tile, {"num_warps": 8, "num_stages": 2, "maxnreg": 255, **FUSING}
    if not aligned:  # an address for every element instead of every eighth
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
        return blocks | tile, {"num_warps": 8, "num_stages": 2, "maxnreg": 255, **FUSING}
    if rows <= 64:
        tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
        return blocks | tile, {"num_warps": 4, "num_stages": 3, "maxnreg": 255, **FUSING}
    wide = 64 if inline and ranks > 32 else 128
    return blocks | {"BLOCK_M": 128, "BLOCK_N": wide, "BLOCK_K": 64, "SPLITS": 4}, {
        "num_warps": 8,
        "num_stages": 3,
        "maxnreg": 255,
        **FUSING,
    }


def linear_signature(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``fused_linear_kernel``."""
    return {
        **dict.fromkeys(("x", "weight", "bias", "y", "before", "down", "up", "graft_bias", "z"), f"*{dtype}"),
        **{"alpha": "*fp32", "owner": "*i32", "seats": "*i32", "spans": "*i32"},
        **{"features": "*fp64", "suspect": "*u8"},
        **dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "groups"), "i32"),
        **dict.fromkeys(("x_row", "w_row", "y_row", "z_row"), "i64"),
    }


def _case(
    dtype: str, act: int, graft: int, *, ranks: int = 64, rows: int = 8192, aligned: bool = True, guarded: bool = False
) -> tuple[object, ...]:
    tiles, options = linear_blocks(dtype, rows, ranks, graft == 1, aligned)
    kind = {"ACT": act, "BIASED": True, "KEEP": act != 0 and not guarded, "STATS": not guarded}
    kind |= {"GRAFT": graft, "GRAFT_ACT": act if graft else 0, "GRAFT_BIASED": act != 0 and graft != 0}
    fixed = {"GUARDED": guarded, "ALIGNED": aligned, "EMULATE": False, "SEATS": 64}
    return fused_linear_kernel, linear_signature(dtype), kind | fixed | tiles, options


#: Every dtype, way, width and alignment once: each takes many seconds to compile.
AOT = [
    _case("bf16", 0, 1),
    _case("bf16", 1, 2),
    _case("bf16", 0, 0, guarded=True),
    _case("fp16", 6, 1, rows=64, ranks=32),
    _case("fp16", 1, 2, aligned=False),
    _case("fp32", 2, 1),
]
