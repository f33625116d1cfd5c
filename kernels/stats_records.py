"""Records of statistics in float64: of a few rows at once, several joined into one, and what a seed's health is.

``window_kernel`` reads few rows of one seed's chunk and reduces them in registers, in two passes (mean, then squared
deviations), so that a mean far larger than the spread costs no digits; what a probe takes is this one launch. Its sums
are float32 (float64 for float64 tensors); a spread above 1.8e19 overflows the squares there and gives an infinite M2.
``reduce_kernel`` joins records in float64, many at a time and in a fixed order.
"""

import triton
import triton.language as tl

from .stats_math import activate, put_chunk, put_column, row_moments

#: Rows of a window, and features taken at a time; of float64 half as many fit in registers.
WINDOW_ROWS = 64
WINDOW_FEATURES = 32
WINDOW_FEATURES_DOUBLE = 16
#: Features of a chunk at most: a program takes them one block after the other.
WINDOW_WIDTH = 1024
#: Records that one program of ``reduce_kernel`` joins, of so many features or seeds.
FAN_IN = 64
REDUCE_COLUMNS = 16
#: How the two are launched.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def window_kernel(
    x,
    y,
    features,
    chunks,
    rows,
    channels,
    inner,
    x_outer,
    x_channel,
    x_inner,
    y_outer,
    y_channel,
    y_inner,
    seeds,
    ACT: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All of a few rows, at most BLOCK_R, of one seed's chunk.

    Grid: ``seeds``. ``x`` (and ``y`` when ACT is not 0): any strides. ``features`` ``[5, channels]`` and ``chunks``
    ``[4, seeds]``, float64, are merged into.
    """
    acc = tl.float64 if DOUBLE else tl.float32
    largest = 1.7976931348623157e308 if DOUBLE else 3.4028234663852886e38
    coarse: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    seed = tl.program_id(0).to(tl.int64)
    begin = seed * channels // seeds
    end = (seed + 1) * channels // seeds
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_rows = r < rows
    present = tl.sum(in_rows.to(tl.int32), 0).to(tl.float64)
    outer_index = r // inner
    inner_index = r % inner
    x_row = outer_index * x_outer + inner_index * x_inner
    y_row = outer_index * y_outer + inner_index * y_inner
    row_sum = tl.zeros([BLOCK_R], acc)
    row_bad = tl.zeros([BLOCK_R], tl.int32)
    offset = tl.zeros([BLOCK_C], tl.float64)

    for first in range(begin, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        in_chunk = c < end
        mask = in_rows[:, None] & in_chunk[None, :]
        value = tl.load(x + x_row[:, None] + c[None, :] * x_channel, mask=mask, other=0.0).to(acc)
        if ACT != 0:
            stored = activate(value, ACT, DOUBLE, coarse).to(y.dtype.element_ty)
            tl.store(y + y_row[:, None] + c[None, :] * y_channel, stored, mask=mask)
            value = stored.to(acc)
        ok = (tl.abs(value) <= largest) & mask
        value = tl.where(ok, value, 0.0)
        count = tl.sum(ok.to(tl.int32), 0)
        some = tl.maximum(count, 1).to(acc)
        shift = tl.sum(value / some[None, :], 0)
        d = tl.where(ok, value - shift[None, :], 0.0)
        rest = tl.sum(d, 0)
        m2 = tl.sum(d * d, 0).to(tl.float64) - rest.to(tl.float64) * rest.to(tl.float64) / some.to(tl.float64)
        mean = shift.to(tl.float64) + rest.to(tl.float64) / some.to(tl.float64)
        n = count.to(tl.float64)
        put_column(
            features + c,
            channels,
            in_chunk,
            n,
            mean,
            tl.maximum(m2, 0.0),
            tl.max(tl.abs(value), 0).to(tl.float64),
            present - n,
            True,
        )
        row_sum += tl.sum(d, 1)
        row_bad += tl.sum((mask & (ok == 0)).to(tl.int32), 1)
        offset += tl.where(in_chunk, shift.to(tl.float64), 0.0)

    if end > begin:
        row_n, row_mean, row_m2 = row_moments(row_sum.to(tl.float64), in_rows & (row_bad == 0))
        middle = tl.where(row_n > 0.0, row_mean + tl.sum(offset, 0), 0.0)
        put_chunk(chunks + seed, seeds, None, row_n, middle, row_m2, present - row_n, True)


@triton.jit
def _join(at, stride, mask):
    """Count, mean and M2 of the columns of a tile of records, about the first one's mean.

    That one's distance is 0: a record that is alone stays as it is, bit for bit.
    """
    n = tl.load(at, mask=mask, other=0.0)
    mean = tl.load(at + stride, mask=mask, other=0.0)
    m2 = tl.load(at + 2 * stride, mask=mask, other=0.0)
    first = (tl.arange(0, mask.shape[0]) == 0)[:, None]
    pivot = tl.sum(tl.where(first, mean, 0.0), 0)
    count = tl.sum(n, 0)
    away = tl.where(n > 0.0, mean - pivot[None, :], 0.0)
    drift = tl.sum(n * away, 0) / tl.maximum(count, 1.0)
    e = tl.where(n > 0.0, away - drift[None, :], 0.0)
    return count, pivot + drift, tl.sum(m2 + n * e * e, 0)


@triton.jit
def reduce_kernel(
    features,
    chunks,
    into_features,
    into_chunks,
    channels,
    seeds,
    count,
    step,
    feature_programs,
    chunk_programs,
    LAST: tl.constexpr,
    FAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Joins up to FAN records, ``step`` apart, into the first of them, or with LAST into the accumulators.

    Grid: ``groups * (feature_programs + chunk_programs)``. Each program joins its records in one way, so there is one
    result.
    """
    pid = tl.program_id(0).to(tl.int64)
    programs = feature_programs + chunk_programs
    group = pid // programs
    part = pid % programs
    slot = (group * FAN + tl.arange(0, FAN).to(tl.int64)) * step
    there = (slot < count)[:, None]
    if part < feature_programs:
        c = part * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = there & (c < channels)[None, :]
        at = features + slot[:, None] * 5 * channels + c[None, :]
        n, mean, m2 = _join(at, channels, mask)
        absmax = tl.max(tl.load(at + 3 * channels, mask=mask, other=0.0), 0)
        bad = tl.sum(tl.load(at + 4 * channels, mask=mask, other=0.0), 0)
        to = (into_features if LAST else features + group * FAN * step * 5 * channels) + c
        put_column(to, channels, c < channels, n, mean, m2, absmax, bad, LAST)
    else:
        s = (part - feature_programs) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = there & (s < seeds)[None, :]
        at = chunks + slot[:, None] * 4 * seeds + s[None, :]
        n, mean, m2 = _join(at, seeds, mask)
        skipped = tl.sum(tl.load(at + 3 * seeds, mask=mask, other=0.0), 0)
        to = (into_chunks if LAST else chunks + group * FAN * step * 4 * seeds) + s
        put_chunk(to, seeds, s < seeds, n, mean, m2, skipped, LAST)


@triton.jit
def health_kernel(features, chunks, eps, out, channels, seeds, BLOCK_C: tl.constexpr):
    """The health of one seed: ``out`` is ``[7, seeds]``. Grid: ``seeds``.

    ``eps`` is the 64 bits of a float64 as an integer: Triton would make a float32 of a Python float, and a tensor of
    one number would have to be uploaded.
    """
    seed = tl.program_id(0).to(tl.int64)
    begin = seed * channels // seeds
    end = (seed + 1) * channels // seeds
    limit = tl.cast(eps, tl.int64).to(tl.float64, bitcast=True)
    zero = tl.zeros([BLOCK_C], tl.float64)
    total, weighted, within, sum_variance, bad, dead = zero, zero, zero, zero, zero, zero
    for first in range(begin, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = c < end
        n = tl.load(features + c, mask=mask, other=0.0)
        m2 = tl.load(features + 2 * channels + c, mask=mask, other=0.0)
        total += n
        weighted += n * tl.load(features + channels + c, mask=mask, other=0.0)
        within += m2
        sum_variance += m2 / tl.where(n > 0.0, n, 1.0)
        peak = tl.load(features + 3 * channels + c, mask=mask, other=0.0)
        dead += tl.where((n > 0.0) & (peak <= limit), 1.0, 0.0)
        bad += tl.load(features + 4 * channels + c, mask=mask, other=0.0)
    samples = tl.sum(total, 0)
    some = tl.where(samples > 0.0, samples, 1.0)
    level = tl.sum(weighted, 0) / some
    # About the level, so that it costs no digits.
    offset, squares = zero, zero
    for first in range(begin, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = c < end
        n = tl.load(features + c, mask=mask, other=0.0)
        delta = tl.load(features + channels + c, mask=mask, other=0.0) - level
        offset += n * delta
        squares += n * delta * delta
    drift = tl.sum(offset, 0) / some
    mean = level + drift
    inside = tl.sum(within, 0)
    variance = (inside + tl.maximum(tl.sum(squares, 0) - samples * drift * drift, 0.0)) / some
    width = (end - begin).to(tl.float64)
    pairs = tl.maximum(width - 1.0, 1.0)
    rows = tl.load(chunks + seed)
    row_variance = tl.load(chunks + 2 * seeds + seed) / tl.where(rows > 0.0, rows, 1.0)
    separate = tl.sum(sum_variance, 0)
    defined = (width > 1.0) & (rows > 0.0) & (separate > 0.0)
    correlation = (row_variance - separate) / (pairs * tl.where(defined, separate, 1.0))
    correlation = tl.where(defined, tl.minimum(tl.maximum(correlation, -1.0 / pairs), 1.0), 0.0)
    dead_ratio = tl.sum(dead, 0) / tl.maximum(width, 1.0)
    broken = tl.sum(bad, 0)
    w = inside / some
    floor = w + 1e-4 * (variance + mean * mean)
    moving = tl.where(w > 0.0, w / tl.where(w > 0.0, floor, 1.0), 0.0)
    score = (1.0 - dead_ratio) * (1.0 - tl.maximum(correlation, 0.0)) * moving
    score = tl.where(broken > 0.0, 0.0, tl.where(samples > 0.0, score, float("nan")))
    tl.store(out + seed, samples)
    tl.store(out + seeds + seed, mean)
    tl.store(out + 2 * seeds + seed, variance)
    tl.store(out + 3 * seeds + seed, dead_ratio)
    tl.store(out + 4 * seeds + seed, correlation)
    tl.store(out + 5 * seeds + seed, broken)
    tl.store(out + 6 * seeds + seed, score)


_SIZES = ("rows", "channels", "inner", "x_outer", "x_channel", "x_inner", "y_outer", "y_channel", "y_inner", "seeds")


def _window_case(dtype: str, act: int) -> tuple[object, ...]:
    pointers = {"x": f"*{dtype}", "y": f"*{dtype}", "features": "*fp64", "chunks": "*fp64"}
    double = dtype == "fp64"
    columns = WINDOW_FEATURES_DOUBLE if double else WINDOW_FEATURES
    constants = {"ACT": act, "DOUBLE": double, "BLOCK_R": WINDOW_ROWS, "BLOCK_C": columns}
    return window_kernel, pointers | dict.fromkeys(_SIZES, "i64"), constants, OPTIONS


_RECORDS = dict.fromkeys(("features", "chunks", "into_features", "into_chunks"), "*fp64")
_REDUCE = ("channels", "seeds", "count", "step", "feature_programs", "chunk_programs")

AOT = [
    *(_window_case(dtype, 0) for dtype in ("fp32", "fp64", "bf16", "fp16")),
    *(_window_case(dtype, 2) for dtype in ("fp32", "fp64", "bf16")),
    *(
        (
            reduce_kernel,
            _RECORDS | dict.fromkeys(_REDUCE, "i64"),
            {"LAST": last, "FAN": FAN_IN, "BLOCK_C": REDUCE_COLUMNS},
            OPTIONS,
        )
        for last in (False, True)
    ),
    (
        health_kernel,
        {"features": "*fp64", "chunks": "*fp64", "eps": "i64", "out": "*fp64", "channels": "i64", "seeds": "i64"},
        {"BLOCK_C": 128},
        {"num_warps": 4, "enable_fp_fusion": False},
    ),
]
