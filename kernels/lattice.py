"""Triton kernels of the lattice: one launch for all seeds of a model.

The state machine's numbers arrive as compile-time constants, so that this module holds no second copy of the table.
The layout of the storage (fields in order, each padded to 64 bytes) is computed here from the number of rows, as it is
in the C++ header; the tests compare both with ``esper.ops.lattice.layout``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "AOT",
    "OPTIONS",
    "STEP_OPTIONS",
    "lattice_compact_kernel",
    "lattice_count_kernel",
    "lattice_crc_kernel",
    "lattice_step_kernel",
]

#: Counts of other programs that a program takes at once: those of a million rows.
_COUNTS = tl.constexpr(512)
#: Bit-equal results need every product and sum rounded by itself.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
#: By itself the compiler takes a few registers more, and an eighth of the threads do not fit any more.
STEP_OPTIONS = OPTIONS | {"maxnreg": 64}


@triton.jit
def _pad(size):
    return (size + 63) // 64 * 64


@triton.jit
def _in_set(state, MEMBERS: tl.constexpr):
    # 1 or 0. No set has a bit above 7, so that a corrupt state belongs to none.
    return (MEMBERS >> tl.minimum(state, 31)) & 1


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["rows", "epoch"])
def lattice_step_kernel(
    storage,
    rows,
    epoch,
    AWAKE: tl.constexpr,
    TIMED: tl.constexpr,
    MAX_FAULTS: tl.constexpr,
    HEALTH_RATE: tl.constexpr,
    DORMANT: tl.constexpr,
    ACTIVE: tl.constexpr,
    ERROR_RECOVERY: tl.constexpr,
    GRAFTING: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of ``rows`` seeds; a program takes ``BLOCK`` of them. See ``docs/lattice.md``.

    A thread reads four neighbouring rows of a field at once. For that no load may ask about a single row: a program
    whose rows have nothing to do reads three fields and ends, any other reads the rest of all its rows. What the last
    one reads behind row ``rows`` is padding, which is zero and stays so.
    """
    n = rows.to(tl.int64)
    words = _pad(n * 4)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    cursor = storage + _pad(n * 8)  # active_kernel_id is not touched
    bytes_at = cursor + words * 8 + first
    cursor += first * 4
    alpha_at = cursor.to(tl.pointer_type(tl.float32))
    target_at = (cursor + words).to(tl.pointer_type(tl.float32))
    stride_at = (cursor + words * 2).to(tl.pointer_type(tl.float32))
    health_at = (cursor + words * 3).to(tl.pointer_type(tl.float32))
    epoch_at = (cursor + words * 4).to(tl.pointer_type(tl.int32))
    # exec_latency_us is not touched
    error_at = (cursor + words * 6).to(tl.pointer_type(tl.int32))
    timer_at = (cursor + words * 7).to(tl.pointer_type(tl.int32))
    state_at = bytes_at
    fallback_at = bytes_at + _pad(n)
    sample_at = (cursor + words * 8 + _pad(n) * 2).to(tl.pointer_type(tl.float32))
    flag_at = bytes_at + _pad(n) * 2 + words

    row = tl.arange(0, BLOCK)
    left = tl.minimum(n - first, BLOCK).to(tl.int32)
    inside = row < left
    # Fields are padded to 64 bytes, which is 16 rows of the wide ones.
    readable = row < (left + 15) // 16 * 16
    state = tl.load(state_at + row, mask=readable, other=DORMANT).to(tl.int32)
    flag = tl.load(flag_at + row, mask=readable, other=0).to(tl.int32)
    sample = tl.load(sample_at + row, mask=readable, other=float("nan"))
    # With these three nothing happens to a row, and so to none of the padding.
    state = tl.where(inside, state, DORMANT)
    flag = tl.where(inside, flag, 0)
    present = inside & (sample == sample)
    work = tl.reduce(_in_set(state, AWAKE | TIMED) | flag | tl.where(present, 256, 0), 0, _or)

    if (work & 256) != 0:
        floored = tl.where(sample > 0.0, sample, 0.0)
        score = tl.where(floored < 1.0, floored, 1.0)
        health = tl.load(health_at + row, mask=readable, other=0.0)
        new_health = health + (score - health) * HEALTH_RATE
        tl.store(health_at + row, new_health, mask=present)
        tl.store(sample_at + row, tl.full([BLOCK], float("nan"), tl.float32), mask=present)
        tl.store(epoch_at + row, tl.zeros([BLOCK], tl.int32) + epoch, mask=present)

    if (work & 255) != 0:
        errors = tl.load(error_at + row, mask=readable, other=0)
        fallback = tl.load(fallback_at + row, mask=readable, other=0).to(tl.int32)
        timer = tl.load(timer_at + row, mask=readable, other=0)
        alpha = tl.load(alpha_at + row, mask=readable, other=0.0)
        target = tl.load(target_at + row, mask=readable, other=0.0)
        stride = tl.abs(tl.load(stride_at + row, mask=readable, other=0.0))

        awake = _in_set(state, AWAKE) != 0
        timed = _in_set(state, TIMED) != 0
        fault = awake & (flag != 0)
        counted = errors + tl.where(errors < 2147483647, 1, 0)
        streak = tl.where(fault, counted, 0)
        dead = fault & (streak >= MAX_FAULTS)
        new_errors = tl.where(awake, streak, errors)
        new_fallback = tl.where(awake, fault.to(tl.int32), fallback)

        distance = target - alpha
        moved = tl.where(distance > 0.0, alpha + stride, alpha - stride)
        # False for NaN, so that a damaged alpha goes to its target.
        reached = tl.where(tl.abs(distance) > 1.5 * stride, moved, target)
        new_alpha = tl.where(dead, 0.0, tl.where(awake, reached, alpha))
        new_target = tl.where(dead, 0.0, target)

        new_timer = tl.where(dead, 0, timer - tl.where(timed & (timer > 0), 1, 0))
        arrived = (state == GRAFTING) & (new_alpha == new_target)
        expired = timed & (timer == 1)
        new = tl.where(arrived, tl.where(timer > 0, TRAINING, ACTIVE), state)
        new = tl.where(expired, tl.where(state == TRAINING, ACTIVE, DORMANT), new)
        new = tl.where(dead, ERROR_RECOVERY, new)

        # Where a field is written whole, a row with nothing new gets the bits it had.
        tl.store(alpha_at + row, new_alpha, mask=readable)
        tl.store(timer_at + row, new_timer, mask=new_timer != timer)
        # Alphas and timers move for many steps; all else happens once in a while.
        if tl.reduce(flag | (new_errors ^ errors) | (new_fallback ^ fallback) | (new ^ state), 0, _or) != 0:
            tl.store(error_at + row, new_errors, mask=readable)
            tl.store(fallback_at + row, new_fallback.to(tl.uint8), mask=readable)
            tl.store(state_at + row, new.to(tl.uint8), mask=readable)
            tl.store(flag_at + row, tl.zeros([BLOCK], tl.uint8), mask=flag != 0)
            tl.store(target_at + row, tl.zeros([BLOCK], tl.float32), mask=dead)
            tl.store(stride_at + row, tl.zeros([BLOCK], tl.float32), mask=dead)
            tl.store(epoch_at + row, tl.zeros([BLOCK], tl.int32) + epoch, mask=fault | (new != state))


@triton.jit
def _awake_here(storage, n, first, AWAKE: tl.constexpr, BLOCK: tl.constexpr):
    """1 for each awake row of the ``BLOCK`` from ``first``, else 0."""
    lane = tl.arange(0, BLOCK)
    left = tl.minimum(n - first, BLOCK).to(tl.int32)
    states = storage + _pad(n * 8) + _pad(n * 4) * 8 + first
    # The padding behind the last row may be read, so that a thread takes many states at once.
    state = tl.load(states + lane, mask=lane < (left + 63) // 64 * 64, other=0).to(tl.int32)
    return tl.where(lane < left, _in_set(state, AWAKE), 0)


@triton.jit(do_not_specialize=["rows"])
def lattice_count_kernel(storage, rows, counts, AWAKE: tl.constexpr, BLOCK: tl.constexpr):
    """How many of each ``BLOCK`` rows are awake: ``counts[programs]``."""
    block = tl.program_id(0)
    awake = _awake_here(storage, rows.to(tl.int64), block.to(tl.int64) * BLOCK, AWAKE, BLOCK)
    tl.store(counts + block, tl.sum(awake, 0))


@triton.jit(do_not_specialize=["rows"])
def lattice_compact_kernel(storage, rows, counts, indices, count, AWAKE: tl.constexpr, BLOCK: tl.constexpr):
    """Ascending awake rows to ``indices[rows]``, -1 behind them, their number to ``count[1]``.

    Args:
        storage: The lattice.
        rows: Of it.
        counts: ``[programs]``, from :func:`lattice_count_kernel`. Every program adds up those of the others, so none
            waits for another; a single program reads none.
        indices: ``[rows]``, written.
        count: ``[1]``, written.
        AWAKE: The set of states.
        BLOCK: Rows per program.
    """
    n = rows.to(tl.int64)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    first = block.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    awake = _awake_here(storage, n, first, AWAKE, BLOCK)
    before = tl.zeros([_COUNTS], tl.int32)
    after = tl.zeros([_COUNTS], tl.int32)
    for start in range(0, blocks, _COUNTS):
        other = start + tl.arange(0, _COUNTS)
        awake_there = tl.load(counts + other, mask=(other < blocks) & (other != block), other=0)
        before += tl.where(other < block, awake_there, 0)
        after += tl.where(other > block, awake_there, 0)
    rows_before = tl.sum(before, 0)
    all_awake = rows_before + tl.sum(awake, 0) + tl.sum(after, 0)
    rank = rows_before + tl.cumsum(awake, 0)  # awake rows up to and with this one
    row = first.to(tl.int32) + lane
    # Row r has r + 1 - rank sleeping rows up to and with it, and each places one -1.
    place = tl.where(awake != 0, rank - 1, all_awake + row - rank)
    tl.store(indices + place, tl.where(awake != 0, row, -1), mask=lane < n - first)
    tl.store(count, all_awake, mask=block == 0)


@triton.jit
def _times(a, b, POLYNOMIAL: tl.constexpr):
    """Product of polynomials over GF(2), bit-reflected, modulo the checksum's."""
    product = a ^ a
    for i in range(32):
        product ^= tl.where(((a >> (31 - i)) & 1) != 0, b, 0)
        b = (b >> 1) ^ tl.where((b & 1) != 0, POLYNOMIAL, 0).to(tl.uint32)
    return product


@triton.jit(do_not_specialize=["words"])
def lattice_crc_kernel(data, words, powers, places, partials, POLYNOMIAL: tl.constexpr, BLOCK: tl.constexpr):
    """Raw remainder of each block of words, moved to its place in the message: ``partials[programs]``.

    Blocks are counted from the end, because zero words in front of a message leave its remainder as it is.

    Args:
        data: The message as 32-bit words.
        words: Their number.
        powers: ``[BLOCK]``, x^(32 (BLOCK - lane)).
        places: ``[programs]``, x^(32 words behind the block).
        partials: ``[programs]``, written.
        POLYNOMIAL: Of the checksum, bit-reflected.
        BLOCK: Words per program.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    ahead = tl.num_programs(0).to(tl.int64) * BLOCK - words
    index = block.to(tl.int64) * BLOCK + lane - ahead
    word = tl.load(data + index, mask=index >= 0, other=0).to(tl.uint32, bitcast=True)
    power = tl.load(powers + lane).to(tl.uint32, bitcast=True)
    remainder = tl.xor_sum(_times(word, power, POLYNOMIAL), 0)
    place = tl.load(places + block).to(tl.uint32, bitcast=True)
    tl.store(partials + block, _times(remainder, place, POLYNOMIAL).to(tl.int32, bitcast=True))


#: Values that only choose code, not meaning: the real ones come from ``esper.ops.lattice.table``.
_STEP = {
    "AWAKE": 0b01110100,
    "TIMED": 0b11000000,
    "MAX_FAULTS": 3,
    "HEALTH_RATE": 0.1,
    "DORMANT": 0,
    "ACTIVE": 2,
    "ERROR_RECOVERY": 3,
    "GRAFTING": 5,
    "TRAINING": 6,
    "BLOCK": 512,
}
_COMPACT = {"AWAKE": 0b01110100, "BLOCK": 2048}
AOT = [
    (lattice_step_kernel, {"storage": "*u8", "rows": "i64", "epoch": "i32"}, _STEP, STEP_OPTIONS),
    (lattice_count_kernel, {"storage": "*u8", "rows": "i64", "counts": "*i32"}, _COMPACT, OPTIONS),
    (
        lattice_compact_kernel,
        {"storage": "*u8", "rows": "i64", "counts": "*i32", "indices": "*i32", "count": "*i32"},
        _COMPACT,
        OPTIONS,
    ),
    (
        lattice_crc_kernel,
        {"data": "*i32", "words": "i64", "powers": "*i32", "places": "*i32", "partials": "*i32"},
        {"POLYNOMIAL": 0x82F63B78, "BLOCK": 1024},
        OPTIONS,
    ),
]
