"""Statistics of activations, with the activation itself if there is one to apply, at the speed of memory.

``stats_kernel`` takes a stripe of many rows times a tile of features inside one seed's chunk, a block of rows at a
time. All that it adds up a feature it keeps apart in every thread and adds across threads once, behind the loop; a
row's sum over the tile takes a few shuffles within a warp. It leaves behind, of float32 (float64 for float64 tensors):

- ``columns``: per stripe and feature the count of finite values, a shift, the sum and the sum of squares of the
  deviations from it, and the largest absolute value;
- ``sums``: per tile and row the sum of the deviations, NaN where a value was not finite;
- ``bases``: per tile and stripe the sum of the shifts, float64.

``join_kernel`` turns these into the records that ``stats_records.py`` joins, in float64 and in a fixed order: the
result depends neither on the order in which programs ran, nor on anything but the tensor.

What is lost. The shift is the mean of the first block in which the feature has a finite value, so a mean far above the
spread costs no digits. Let u be the unit roundoff (2^-24, or 2^-53), n the values of a stripe, D their largest
deviation from the shift, at most twice that from their mean, and h = ``DEPTH`` the additions that one value goes
through. Sums of deviations d are off by at most (h + 1) u sum|d|, sums of squares by (h + 3) u S, S = sum d^2. With
e = mean - shift, M2 = S - n e^2, so that

    |error of the mean| <= (h + 1) u D          |error of M2| <= 3 (h + 3) u S <= 3 (h + 3) u n D^2

and since the n0 values whose mean the shift is are values of the stripe themselves, M2 >= n0 e^2 and S <= (1 + n / n0)
M2: the relative error of M2 is below 3 (h + 3) (1 + n / n0) u even if those n0 are nothing like the rest; where they
are like it, S is M2 (1 + 1 / n0). A row's sum over a tile is off by (log2 COLS + 1) u times the sum of its |d|.

A deviation above 1.8e19 overflows the squares of float32 and gives an infinite M2; a row the sum of whose deviations
overflows counts as one that has a value which is not finite.
"""

import triton
import triton.language as tl

from .stats_math import activate, put_chunk, put_column, row_moments, widen

#: Warps of a program, and as many registers as let two of them share a multiprocessor.
WARPS = 8
OPTIONS = {"num_warps": WARPS, "maxnreg": 128, "enable_fp_fusion": True}
#: Blocks of rows in a stripe at most, and additions that a value's share in a stripe's sum goes through: one a block,
#: and fewer than 16 for all the tree within a block.
MOST_TURNS = tl.constexpr(64)
DEPTH = MOST_TURNS.value + 16
#: Constants of ``join_kernel``, and how it is launched.
JOIN = {"FAN": 64, "BLOCK_C": 16, "BLOCK_P": 256, "BLOCK_T": 8}
JOIN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Which elements lie side by side: none, features, or rows.
APART, FEATURES, ROWS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _by_thread(t, UNIT: tl.constexpr, KEPT: tl.constexpr):
    """A block with its rows in two dimensions, of which one lies in a thread and the other has KEPT.

    Of rows that lie side by side a thread has some that follow each other, and of others some that are KEPT apart.
    """
    each: tl.constexpr = t.shape[0] // KEPT
    cols: tl.constexpr = t.shape[1]
    return tl.reshape(t, [KEPT, each, cols] if UNIT == ROWS else [each, KEPT, cols])


@triton.jit
def _over_rows(value, d, UNIT: tl.constexpr, KEPT: tl.constexpr):
    """Sum and sum of squares of d, and the largest size of value, of what lies in one thread."""
    axis: tl.constexpr = 1 if UNIT == ROWS else 0
    d = _by_thread(d, UNIT, KEPT)
    return tl.sum(d, axis), tl.sum(d * d, axis), tl.max(_by_thread(tl.abs(value), UNIT, KEPT), axis)


@triton.jit
def _offsets(r, c, row_stride, channel_stride, UNIT: tl.constexpr):
    """Of a block's elements from its first row's first feature; what is 1 is said so that the compiler sees it."""
    if UNIT == FEATURES:
        return r[:, None] * row_stride + c[None, :]
    elif UNIT == ROWS:
        return r[:, None] + c[None, :] * channel_stride
    else:
        return r[:, None] * row_stride + c[None, :] * channel_stride


@triton.jit
def _step(wraps, far_stride, near, near_stride, FLAT: tl.constexpr, BLOCK_R: tl.constexpr):
    """From a block to the next, which may be the first of the next far."""
    if FLAT:
        return BLOCK_R * near_stride
    else:
        back = (tl.cdiv(near, BLOCK_R) - 1) * BLOCK_R * near_stride
        return tl.where(wraps, far_stride - back, BLOCK_R * near_stride)


@triton.jit
def _stored(raw, dtype: tl.constexpr, ACT: tl.constexpr, DOUBLE: tl.constexpr):
    """What the activation makes of loaded values, rounded as it will be stored."""
    if ACT == 0:
        return raw
    else:
        value = widen(raw, tl.float64 if DOUBLE else tl.float32)
        return activate(value, ACT, DOUBLE, dtype.primitive_bitwidth == 16).to(dtype)


@triton.jit
def stats_kernel(
    x,
    y,
    columns,
    sums,
    bases,
    far,
    near,
    channels,
    x_far,
    x_near,
    x_channel,
    y_far,
    y_near,
    y_channel,
    seeds,
    tiles,
    turns,
    ACT: tl.constexpr,
    DOUBLE: tl.constexpr,
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    VECTOR: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLS: tl.constexpr,
):
    """One stripe of one tile. Grid: ``stripes * seeds * tiles``, tiles fastest.

    Args:
        x: ``[far, near, channels]`` of any strides; a row is one (far, near).
        y: The same, written when ACT is not 0; any pointer of its type otherwise.
        columns: ``[stripes, 5, channels]``, written.
        sums: ``[seeds * tiles, far * near]``, written.
        bases: float64 ``[seeds * tiles, stripes]``, written.
        far: Sizes of x, and the following two.
        near: A block of rows lies within one ``far``.
        channels: As above.
        x_far: Strides of x in elements, and the following two.
        x_near: As above.
        x_channel: As above.
        y_far: Strides of y.
        y_near: As above.
        y_channel: As above.
        seeds: Chunks of channels.
        tiles: That the widest chunk has.
        turns: Blocks of rows in a stripe, a power of two, at most MOST_TURNS.
        ACT: See ``activate``; 0 is none.
        DOUBLE: Whether x is float64.
        UNIT: APART, FEATURES or ROWS.
        FLAT: Whether ``far`` is 1.
        VECTOR: By how many elements strides, the borders of chunks (or, with ROWS, ``near``) are divisible.
        KEPT: Rows that sums are kept for, in different threads.
        BLOCK_R: Rows of a block.
        COLS: Features of a tile.
    """
    acc = tl.float64 if DOUBLE else tl.float32
    largest = 1.7976931348623157e308 if DOUBLE else 3.4028234663852886e38
    axis: tl.constexpr = 1 if UNIT == ROWS else 0
    pid = tl.program_id(0).to(tl.int64)
    # Products of these with a block's rows may need 64 bits.
    far, near = tl.cast(far, tl.int64), tl.cast(near, tl.int64)
    x_near, y_near = tl.cast(x_near, tl.int64), tl.cast(y_near, tl.int64)
    tile = pid % (seeds * tiles)
    stripe = pid // (seeds * tiles)
    stripes = tl.num_programs(0).to(tl.int64) // (seeds * tiles)
    seed = tile // tiles
    begin = seed * channels // seeds + tile % tiles * COLS
    end = (seed + 1) * channels // seeds
    if begin >= end:  # this chunk is narrower than the widest
        return
    # Said so that the compiler sees it: what it then knows to be aligned it reads 16 bytes at a time.
    x_far, y_far = x_far // VECTOR * VECTOR, y_far // VECTOR * VECTOR
    if UNIT == FEATURES:
        x_near, y_near = x_near // VECTOR * VECTOR, y_near // VECTOR * VECTOR
        begin, end = begin // VECTOR * VECTOR, end // VECTOR * VECTOR
    elif UNIT == ROWS:
        x_channel, y_channel = x_channel // VECTOR * VECTOR, y_channel // VECTOR * VECTOR
        near = near // VECTOR * VECTOR

    lane_r = tl.arange(0, BLOCK_R)
    lane_c = tl.arange(0, COLS)
    in_chunk = begin + lane_c < end
    x_first = x + (begin if UNIT == FEATURES else begin * x_channel)
    y_first = y + (begin if UNIT == FEATURES else begin * y_channel)
    x_lanes = _offsets(lane_r.to(tl.int64), lane_c.to(tl.int64), x_near, x_channel, UNIT)
    y_lanes = _offsets(lane_r.to(tl.int64), lane_c.to(tl.int64), y_near, y_channel, UNIT)
    blocks = tl.cdiv(near, BLOCK_R)
    start = stripe * turns
    stop = tl.minimum(start + turns, far * blocks)

    # Outside the chunk the shift is what a zero becomes, so that nothing is added to a row's sum.
    nothing = tl.zeros([COLS], x.dtype.element_ty)
    shift = widen(_stored(nothing, y.dtype.element_ty, ACT, DOUBLE), acc)
    seen = tl.where(in_chunk, 0, 1)
    lacking = tl.full([], 1, tl.int32)
    turn = start
    while (lacking != 0) & (turn < stop):  # once, unless a feature's values are all not finite
        first = turn % blocks * BLOCK_R
        mask = (first + lane_r < near)[:, None] & in_chunk[None, :]
        raw = tl.load(x_first + (turn // blocks * x_far + first * x_near) + x_lanes, mask=mask, other=0.0)
        value = widen(_stored(raw, y.dtype.element_ty, ACT, DOUBLE), acc)
        ok = (tl.abs(value) <= largest) & mask
        found = tl.sum(ok.to(tl.int32), 0)
        # Scaled before they are added: a sum of large values would overflow.
        each = 1.0 / tl.maximum(found, 1).to(acc)
        mean = tl.sum(tl.where(ok, value, 0.0) * each[None, :], 0)
        shift = tl.where(seen == 0, mean, shift)
        seen += found
        lacking = tl.max((seen == 0).to(tl.int32), 0)
        turn += 1

    total = tl.zeros([KEPT, COLS], acc)
    squares = tl.zeros([KEPT, COLS], acc)
    peak = tl.zeros([KEPT, COLS], acc)
    lost = tl.zeros([KEPT, COLS], tl.int32)
    count = (stop - start).to(tl.int32)
    outer = start // blocks
    block = start % blocks
    x_at = x_first + (outer * x_far + block * BLOCK_R * x_near)
    y_at = y_first + (outer * y_far + block * BLOCK_R * y_near)
    sums_at = sums + (tile * far * near + outer * near + block * BLOCK_R)
    left = tl.minimum(near - block * BLOCK_R, MOST_TURNS * BLOCK_R).to(tl.int32)
    raw = tl.load(x_at + x_lanes, mask=(lane_r < left)[:, None] & in_chunk[None, :], other=0.0)
    for i in range(count):
        in_rows = lane_r < left
        mask = in_rows[:, None] & in_chunk[None, :]
        stored = _stored(raw, y.dtype.element_ty, ACT, DOUBLE)
        if ACT != 0:
            tl.store(y_at + y_lanes, stored, mask=mask)
        row_at = sums_at
        # The next block is on its way while this one is added up.
        wraps = False
        if FLAT:
            left -= BLOCK_R
        else:
            block = tl.where(block + 1 == blocks, 0, block + 1)
            left = tl.minimum(near - block * BLOCK_R, BLOCK_R).to(tl.int32)
            wraps = block == 0
        x_at += _step(wraps, x_far, near, x_near, FLAT, BLOCK_R)
        y_at += _step(wraps, y_far, near, y_near, FLAT, BLOCK_R)
        sums_at += _step(wraps, near, near, 1, FLAT, BLOCK_R)
        ahead = lane_r < tl.where(i + 1 < count, left, 0)
        raw = tl.load(x_at + x_lanes, mask=ahead[:, None] & in_chunk[None, :], other=0.0)

        value = widen(stored, acc)
        d = value - shift[None, :]
        row = tl.sum(d, 1)
        # A value that is not finite makes the sum so.
        fine = tl.abs(row) <= largest
        tl.store(row_at + lane_r, tl.where(fine, row, float("nan")), mask=in_rows)
        some, more, most = _over_rows(value, d, UNIT, KEPT)
        if tl.max((fine & in_rows).to(tl.int32) ^ 1, 0) != 0:  # seldom: only then is every value looked at
            value = widen(stored, acc)
            ok = (tl.abs(value) <= largest) & mask
            d = tl.where(ok, value - shift[None, :], 0.0)
            some, more, most = _over_rows(tl.where(ok, value, 0.0), d, UNIT, KEPT)
            lost += tl.sum(_by_thread(ok.to(tl.int32) ^ 1, UNIT, KEPT), axis)
        total += some
        squares += more
        peak = tl.maximum(peak, most)

    at = columns + stripe * 5 * channels + begin + lane_c
    tl.store(at, ((stop - start) * BLOCK_R - tl.sum(lost, 0)).to(acc), mask=in_chunk)
    tl.store(at + channels, shift, mask=in_chunk)
    tl.store(at + 2 * channels, tl.sum(total, 0), mask=in_chunk)
    tl.store(at + 3 * channels, tl.sum(squares, 0), mask=in_chunk)
    tl.store(at + 4 * channels, tl.max(peak, 0), mask=in_chunk)
    tl.store(bases + tile * stripes + stripe, tl.sum(tl.where(in_chunk, shift, 0.0).to(tl.float64), 0))


@triton.jit
def _row_of(turn, near, blocks, BLOCK_R: tl.constexpr):
    """Number of a turn's first row."""
    return turn // blocks * near + turn % blocks * BLOCK_R


@triton.jit
def _join_columns(
    columns, features, group, part, far, near, channels, turns, stripes,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, FAN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """FAN stripes of some features."""
    blocks = tl.cdiv(near, BLOCK_R)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    in_columns = c < channels
    slot = group * FAN + tl.arange(0, FAN).to(tl.int64)
    mask = (slot < stripes)[:, None] & in_columns[None, :]
    at = columns + slot[:, None] * 5 * channels + c[None, :]
    n = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    shift = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
    total = tl.load(at + 2 * channels, mask=mask, other=0.0).to(tl.float64)
    squares = tl.load(at + 3 * channels, mask=mask, other=0.0).to(tl.float64)
    peak = tl.max(tl.load(at + 4 * channels, mask=mask, other=0.0), 0).to(tl.float64)
    # About the first stripe's shift, so that a large common mean costs no digits here either.
    pivot = tl.load(columns + (group * FAN * 5 + 1) * channels + c, mask=in_columns, other=0.0).to(tl.float64)
    count = tl.sum(n, 0)
    mean = pivot + tl.sum(n * (shift - pivot[None, :]) + total, 0) / tl.maximum(count, 1.0)
    e = mean[None, :] - shift
    m2 = tl.maximum(tl.sum(squares + e * (n * e - 2.0 * total), 0), 0.0)
    mean = tl.where(count > 0.0, mean, 0.0)
    begin = _row_of(group * FAN * turns, near, blocks, BLOCK_R)
    end = _row_of(tl.minimum((group + 1) * FAN * turns, far * blocks), near, blocks, BLOCK_R)
    bad = (end - begin).to(tl.float64) - count
    put_column(features + group * 5 * channels + c, channels, in_columns, count, mean, m2, peak, bad, LAST)


@triton.jit
def _join_rows(
    sums, bases, chunks, slot, seed, far, near, channels, seeds, tiles, turns, stripes, parts,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_P rows over one seed's chunk."""
    blocks = tl.cdiv(near, BLOCK_R)
    stripe = slot // parts
    begin = _row_of(stripe * turns, near, blocks, BLOCK_R)
    end = _row_of(tl.minimum(stripe * turns + turns, far * blocks), near, blocks, BLOCK_R)
    width = (seed + 1) * channels // seeds - seed * channels // seeds
    end = tl.where(width > 0, end, begin)  # an empty chunk has no rows
    r = begin + slot % parts * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    mine = tl.cdiv(width, COLS)
    there = r < end
    lane = tl.arange(0, BLOCK_T).to(tl.int64)
    total = tl.zeros([BLOCK_P], tl.float64)
    base = tl.zeros([BLOCK_T], tl.float64)
    for first in range(0, mine, BLOCK_T):
        t = first + lane
        at = (seed * tiles + t)[:, None] * far * near + r[None, :]
        total += tl.sum(tl.load(sums + at, mask=(t < mine)[:, None] & there[None, :], other=0.0).to(tl.float64), 0)
        base += tl.load(bases + (seed * tiles + t) * stripes + stripe, mask=t < mine, other=0.0)
    n, mean, m2 = row_moments(total, there & (total == total))
    mean = tl.where(n > 0.0, mean + tl.sum(base, 0), 0.0)
    skipped = tl.sum(there.to(tl.int32), 0).to(tl.float64) - n
    put_chunk(chunks + slot * 4 * seeds + seed, seeds, None, n, mean, m2, skipped, LAST)


@triton.jit
def join_kernel(
    columns,
    sums,
    bases,
    features,
    chunks,
    far,
    near,
    channels,
    seeds,
    tiles,
    turns,
    stripes,
    feature_programs,
    parts,
    LAST_FEATURES: tl.constexpr,
    LAST_CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLS: tl.constexpr,
    FAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Records of what ``stats_kernel`` left behind: of features per FAN stripes, of chunks per BLOCK_P rows.

    Grid: ``cdiv(stripes, FAN) * feature_programs + stripes * parts * seeds``.

    Args:
        columns: As ``stats_kernel`` wrote it, as the next two.
        sums: As above.
        bases: As above.
        features: ``[groups, 5, channels]``, float64, written, or with LAST_FEATURES ``[5, channels]``, merged into.
        chunks: ``[stripes * parts, 4, seeds]``, or with LAST_CHUNKS ``[4, seeds]``, in the same way.
        far: As ``stats_kernel`` had it, as the following five.
        near: As above.
        channels: As above.
        seeds: As above.
        tiles: As above.
        turns: As above.
        stripes: How many there are.
        feature_programs: Programs for the features of one group.
        parts: Programs for the rows of one stripe and seed.
        LAST_FEATURES: Whether there is one group.
        LAST_CHUNKS: Whether there is one part of one stripe.
        BLOCK_R: As ``stats_kernel`` had it.
        COLS: As above.
        FAN: Stripes joined.
        BLOCK_C: Features of a program.
        BLOCK_P: Rows of a program.
        BLOCK_T: Tiles read at a time.
    """
    pid = tl.program_id(0).to(tl.int64)
    far, near = tl.cast(far, tl.int64), tl.cast(near, tl.int64)
    of_features = tl.cdiv(stripes, FAN) * feature_programs
    if pid < of_features:
        _join_columns(
            columns, features, pid // feature_programs, pid % feature_programs, far, near, channels, turns, stripes,
            LAST_FEATURES, BLOCK_R, FAN, BLOCK_C,
        )  # fmt: skip
    else:
        _join_rows(
            sums, bases, chunks, (pid - of_features) // seeds, (pid - of_features) % seeds, far, near, channels, seeds,
            tiles, turns, stripes, parts, LAST_CHUNKS, BLOCK_R, COLS, BLOCK_P, BLOCK_T,
        )  # fmt: skip


def stripe_blocks(dtype: str, unit: int, aligned: bool, width: int, near: int) -> dict[str, int]:
    """Compile-time sizes of ``stats_kernel``.

    Args:
        dtype: ``fp32``, ``fp64``, ``bf16`` or ``fp16``.
        unit: As UNIT.
        aligned: Whether all that VECTOR speaks of is divisible by 16 bytes' elements.
        width: Features of the widest chunk.
        near: As ``stats_kernel`` has it.
    """
    vector = {"fp32": 4, "fp64": 2}.get(dtype, 8) if aligned else 1
    threads = 32 * WARPS
    each = 2 if vector == 8 else 4  # reads of a thread in a block: 32 to 64 bytes where they are wide
    if unit == ROWS.value:
        # A row's sum is a number to be written for every COLS values, so that they may not be few.
        cols = min(32, _power_of_two(width))
        kept = max(1, min(_power_of_two(near) // vector, threads * each // cols))
        cols = min(_power_of_two(width), max(32, threads * each // kept))
        return {"VECTOR": vector, "KEPT": kept, "BLOCK_R": kept * vector, "COLS": cols}
    # A row of a tile is what a warp reads at once, or less.
    cols = min(32 * vector, max(vector, _power_of_two(width)))
    kept = vector * threads // cols
    return {"VECTOR": vector, "KEPT": kept, "BLOCK_R": kept * (each if aligned else 8), "COLS": cols}


def _power_of_two(n: int) -> int:
    """The smallest that is no less."""
    return 1 << max(n - 1, 0).bit_length()


_STRIDES = ("x_far", "x_near", "x_channel", "y_far", "y_near", "y_channel")
_SIZES = ("far", "near", "channels")


def _stats_case(dtype: str, act: int, unit: int = 1, *, aligned: bool = True) -> tuple[object, ...]:
    acc = "*fp64" if dtype == "fp64" else "*fp32"
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "columns": acc, "sums": acc, "bases": "*fp64"}
    signature |= dict.fromkeys((*_SIZES, *_STRIDES, "seeds", "tiles", "turns"), "i64")
    constants = {"ACT": act, "DOUBLE": dtype == "fp64", "UNIT": unit, "FLAT": unit == 1}
    constants |= stripe_blocks(dtype, unit, aligned, 1024, 4096)
    return stats_kernel, signature, constants, OPTIONS


def _join_case(dtype: str, last: bool) -> tuple[object, ...]:
    signature = {"columns": f"*{dtype}", "sums": f"*{dtype}", "bases": "*fp64", "features": "*fp64", "chunks": "*fp64"}
    names = (*_SIZES, "seeds", "tiles", "turns", "stripes", "feature_programs", "parts")
    blocks = stripe_blocks(dtype, 1, True, 1024, 4096)
    constants = {"LAST_FEATURES": last, "LAST_CHUNKS": False, "BLOCK_R": blocks["BLOCK_R"], "COLS": blocks["COLS"]}
    return join_kernel, signature | dict.fromkeys(names, "i64"), constants | JOIN, JOIN_OPTIONS


AOT = [
    *(_stats_case(dtype, 0) for dtype in ("fp32", "fp64", "bf16", "fp16")),
    *(_stats_case("fp32", act) for act in range(1, 7)),
    *(_stats_case("bf16", act) for act in (1, 2, 6)),
    *(_stats_case(dtype, 2) for dtype in ("fp64", "fp16")),
    *(_stats_case(dtype, act, 2) for dtype, act in (("fp32", 0), ("bf16", 1))),
    *(_stats_case("fp32", 2, unit, aligned=False) for unit in range(3)),
    *(_join_case(dtype, last) for dtype, last in (("fp32", True), ("fp32", False), ("fp64", True))),
]

#: float64 activations are for gradcheck and references; a few bytes of spill do not slow what waits for float64 units.
AOT_SPILLS = {"stats_kernel fp64": "4 bytes a thread in front of the loop, of float64, which is no speed path"}
