"""Statistics of activations, with the activation itself if there is one to apply.

``stats_kernel`` reads a block of rows of one seed's chunk and reduces it in registers, in two passes (mean, then
squared deviations), so that a mean far larger than the spread costs no digits. ``reduce_kernel`` joins the blocks in a
fixed order by Chan's formula in float64: the result does not depend on the order in which blocks ran. Sums within a
block are float32 (float64 for float64 tensors); a spread above 1.8e19 overflows the squares there and gives an
infinite M2.
"""

import triton
import triton.language as tl

#: Rows and features of a tile; rows of one block are reduced together. Of float64 half as many fit in registers.
BLOCK_ROWS = 64
BLOCK_FEATURES = 32
BLOCK_FEATURES_DOUBLE = 16
#: Blocks that one program of ``reduce_kernel`` joins.
FAN_IN = 64


@triton.jit
def _merge(n0, mean0, m20, n1, mean1, m21):
    """Chan's formula; an empty side changes nothing."""
    n = n0 + n1
    weight = tl.where(n > 0.0, n1 / tl.where(n > 0.0, n, 1.0), 0.0)
    delta = mean1 - mean0
    return n, mean0 + delta * weight, m20 + m21 + delta * delta * (n0 * weight)


@triton.jit
def _tanh(x, DOUBLE: tl.constexpr):
    # Near 0 the quotient cancels; there the odd series has the digits: its next term is 7e-11 of the sum at 0.3, and
    # 2e-27 at 0.02.
    near_zero = 0.02 if DOUBLE else 0.3
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
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
    return tl.where(tl.abs(x) < near_zero, x * near, tl.where(x < 0.0, -far, far))


@triton.jit
def _activate(x, ACT: tl.constexpr, DOUBLE: tl.constexpr):
    if ACT == 1:  # relu; a NaN stays
        return tl.where(x <= 0.0, 0.0, x)
    elif ACT == 2:  # gelu
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == 3:  # gelu, tanh form: 0.5 (1 + tanh u) is sigmoid(2 u)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == 4:  # tanh
        return _tanh(x, DOUBLE)
    elif ACT == 5:  # sigmoid
        return 1.0 / (1.0 + tl.exp(-x))
    else:  # silu
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _put_column(at, stride, mask, n, mean, m2, absmax, bad, DIRECT: tl.constexpr):
    """Write one block's features, or merge them where there are no others."""
    if DIRECT:
        n, mean, m2 = _merge(
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
def _put_chunk(at, stride, n, mean, m2, skipped, DIRECT: tl.constexpr):
    if DIRECT:
        n, mean, m2 = _merge(tl.load(at), tl.load(at + stride), tl.load(at + 2 * stride), n, mean, m2)
        skipped += tl.load(at + 3 * stride)
    tl.store(at, n)
    tl.store(at + stride, mean)
    tl.store(at + 2 * stride, m2)
    tl.store(at + 3 * stride, skipped)


@triton.jit
def stats_kernel(
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
    DIRECT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of rows of one seed's chunk.

    Grid: ``cdiv(rows, BLOCK_R) * seeds``. ``x`` (and ``y`` when ACT is not 0): any strides. Without DIRECT,
    ``features`` is ``[blocks, 5, channels]`` and ``chunks`` ``[blocks, 4, seeds]``, float64, written; with it (one
    block only), ``[5, channels]`` and ``[4, seeds]``, merged into.
    """
    acc = tl.float64 if DOUBLE else tl.float32
    largest = 1.7976931348623157e308 if DOUBLE else 3.4028234663852886e38
    pid = tl.program_id(0).to(tl.int64)
    block = pid // seeds
    seed = pid % seeds
    begin = seed * channels // seeds
    end = (seed + 1) * channels // seeds
    r = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    in_rows = r < rows
    present = tl.sum(in_rows.to(tl.int32), 0).to(tl.float64)
    outer_index = r // inner
    inner_index = r % inner
    x_row = outer_index * x_outer + inner_index * x_inner
    y_row = outer_index * y_outer + inner_index * y_inner
    row_sum = tl.zeros([BLOCK_R], acc)
    row_bad = tl.zeros([BLOCK_R], tl.int32)
    offset = tl.zeros([BLOCK_C], tl.float64)
    column = features + block * 5 * channels

    for first in range(begin, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        in_chunk = c < end
        mask = in_rows[:, None] & in_chunk[None, :]
        value = tl.load(x + x_row[:, None] + c[None, :] * x_channel, mask=mask, other=0.0).to(acc)
        if ACT != 0:
            stored = _activate(value, ACT, DOUBLE).to(y.dtype.element_ty)
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
        _put_column(
            column + c,
            channels,
            in_chunk,
            n,
            mean,
            tl.maximum(m2, 0.0),
            tl.max(tl.abs(value), 0).to(tl.float64),
            present - n,
            DIRECT,
        )
        row_sum += tl.sum(d, 1)
        row_bad += tl.sum((mask & (ok == 0)).to(tl.int32), 1)
        offset += tl.where(in_chunk, shift.to(tl.float64), 0.0)

    if end > begin:
        whole = in_rows & (row_bad == 0)
        row_count = tl.sum(whole.to(tl.int32), 0)
        row_n = row_count.to(tl.float64)
        row_some = tl.maximum(row_count, 1).to(tl.float64)
        sums = tl.where(whole, row_sum.to(tl.float64), 0.0)
        row_mean = tl.sum(sums, 0) / row_some
        row_d = tl.where(whole, sums - row_mean, 0.0)
        row_m2 = tl.sum(row_d * row_d, 0)
        middle = tl.where(row_count > 0, row_mean + tl.sum(offset, 0), 0.0)
        _put_chunk(chunks + block * 4 * seeds + seed, seeds, row_n, middle, row_m2, present - row_n, DIRECT)
    elif not DIRECT:
        zero = tl.sum(tl.zeros([BLOCK_C], tl.float64), 0)
        _put_chunk(chunks + block * 4 * seeds + seed, seeds, zero, zero, zero, zero, False)


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
    """Joins up to FAN blocks, ``step`` apart, into the first of them, or with LAST into the accumulators.

    Grid: ``groups * (feature_programs + chunk_programs)``. Blocks are joined in order, so there is one result.
    """
    pid = tl.program_id(0).to(tl.int64)
    programs = feature_programs + chunk_programs
    group = pid // programs
    part = pid % programs
    first = group * FAN * step
    zero = tl.zeros([BLOCK_C], tl.float64)
    n, mean, m2, absmax, bad = zero, zero, zero, zero, zero
    if part < feature_programs:
        c = part * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = c < channels
        for i in range(FAN):
            slot = first + i * step
            here = mask & (slot + 0 * c < count)  # a vector: the interpreter cannot mask by a scalar
            at = features + slot * 5 * channels + c
            n, mean, m2 = _merge(
                n,
                mean,
                m2,
                tl.load(at, mask=here, other=0.0),
                tl.load(at + channels, mask=here, other=0.0),
                tl.load(at + 2 * channels, mask=here, other=0.0),
            )
            absmax = tl.maximum(absmax, tl.load(at + 3 * channels, mask=here, other=0.0))
            bad += tl.load(at + 4 * channels, mask=here, other=0.0)
        if LAST:
            _put_column(into_features + c, channels, mask, n, mean, m2, absmax, bad, True)
        else:
            _put_column(features + first * 5 * channels + c, channels, mask, n, mean, m2, absmax, bad, False)
    else:
        s = (part - feature_programs) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = s < seeds
        for i in range(FAN):
            slot = first + i * step
            here = mask & (slot + 0 * s < count)  # a vector: the interpreter cannot mask by a scalar
            at = chunks + slot * 4 * seeds + s
            n, mean, m2 = _merge(
                n,
                mean,
                m2,
                tl.load(at, mask=here, other=0.0),
                tl.load(at + seeds, mask=here, other=0.0),
                tl.load(at + 2 * seeds, mask=here, other=0.0),
            )
            bad += tl.load(at + 3 * seeds, mask=here, other=0.0)
        if LAST:
            at = into_chunks + s
            n, mean, m2 = _merge(
                tl.load(at, mask=mask, other=0.0),
                tl.load(at + seeds, mask=mask, other=0.0),
                tl.load(at + 2 * seeds, mask=mask, other=0.0),
                n,
                mean,
                m2,
            )
            bad += tl.load(at + 3 * seeds, mask=mask, other=0.0)
        else:
            at = chunks + first * 4 * seeds + s
        tl.store(at, n, mask=mask)
        tl.store(at + seeds, mean, mask=mask)
        tl.store(at + 2 * seeds, m2, mask=mask)
        tl.store(at + 3 * seeds, bad, mask=mask)


@triton.jit
def health_kernel(features, chunks, eps, out, channels, seeds, BLOCK_C: tl.constexpr):
    """The health of one seed: ``out`` is ``[7, seeds]``, ``eps`` one float64 on the device. Grid: ``seeds``."""
    seed = tl.program_id(0).to(tl.int64)
    begin = seed * channels // seeds
    end = (seed + 1) * channels // seeds
    limit = tl.load(eps)
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


_SIZES = (
    "rows",
    "channels",
    "inner",
    "x_outer",
    "x_channel",
    "x_inner",
    "y_outer",
    "y_channel",
    "y_inner",
    "seeds",
)


def _stats_variant(dtype: str, act: int, direct: bool) -> tuple[object, ...]:
    pointers = {"x": f"*{dtype}", "y": f"*{dtype}", "features": "*fp64", "chunks": "*fp64"}
    constants = {
        "ACT": act,
        "DOUBLE": dtype == "fp64",
        "DIRECT": direct,
        "BLOCK_R": BLOCK_ROWS,
        "BLOCK_C": BLOCK_FEATURES_DOUBLE if dtype == "fp64" else BLOCK_FEATURES,
    }
    return stats_kernel, pointers | dict.fromkeys(_SIZES, "i64"), constants, {"num_warps": 4, "enable_fp_fusion": False}


_REDUCE = {
    "features": "*fp64",
    "chunks": "*fp64",
    "into_features": "*fp64",
    "into_chunks": "*fp64",
    "channels": "i64",
    "seeds": "i64",
    "count": "i64",
    "step": "i64",
    "feature_programs": "i64",
    "chunk_programs": "i64",
}

AOT = [
    *(_stats_variant(dtype, 0, False) for dtype in ("fp32", "fp64", "bf16", "fp16")),
    *(_stats_variant(dtype, 0, True) for dtype in ("fp32", "fp64")),
    *(_stats_variant("fp32", act, False) for act in range(1, 7)),
    *(_stats_variant(dtype, 2, False) for dtype in ("fp64", "bf16")),
    *(
        (
            reduce_kernel,
            _REDUCE,
            {"LAST": last, "FAN": FAN_IN, "BLOCK_C": 64},
            {"num_warps": 2, "enable_fp_fusion": False},
        )
        for last in (False, True)
    ),
    (
        health_kernel,
        {"features": "*fp64", "chunks": "*fp64", "eps": "*fp64", "out": "*fp64", "channels": "i64", "seeds": "i64"},
        {"BLOCK_C": 128},
        {"num_warps": 4, "enable_fp_fusion": False},
    ),
]

#: float64 activations are for gradcheck and references; a few bytes of spill do not slow what waits for float64 units.
AOT_SPILLS = {"stats_kernel fp64": "16 bytes a thread on sm_100 in float64 GELU, which is no speed path"}
