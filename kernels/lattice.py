"""Triton kernels of the lattice: one launch for all seeds of a model.

The state machine's numbers arrive as compile-time constants, so that this module holds no second copy of the table.
The layout of the storage (fields in order, each padded to 64 bytes) is computed here from the number of rows, as it is
in the C++ header; the tests compare both with ``esper.ops.lattice.layout``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["AOT", "lattice_compact_kernel", "lattice_crc_kernel", "lattice_step_kernel"]


@triton.jit
def _pad(size):
    return (size + 63) // 64 * 64


@triton.jit
def _in_set(state, MEMBERS: tl.constexpr):
    # A state is one of 0 to 7; a corrupt one belongs to no set.
    return (state < 8) & (((MEMBERS >> (state & 7)) & 1) != 0)


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
    """One step of ``rows`` seeds; a program takes ``BLOCK`` of them. See ``docs/lattice.md``."""
    n = rows.to(tl.int64)
    words = _pad(n * 4)
    cursor = storage + _pad(n * 8)  # active_kernel_id is not touched
    alpha_at = cursor.to(tl.pointer_type(tl.float32))
    target_at = (cursor + words).to(tl.pointer_type(tl.float32))
    stride_at = (cursor + words * 2).to(tl.pointer_type(tl.float32))
    health_at = (cursor + words * 3).to(tl.pointer_type(tl.float32))
    epoch_at = (cursor + words * 4).to(tl.pointer_type(tl.int32))
    # exec_latency_us is not touched
    error_at = (cursor + words * 6).to(tl.pointer_type(tl.int32))
    timer_at = (cursor + words * 7).to(tl.pointer_type(tl.int32))
    state_at = cursor + words * 8
    fallback_at = state_at + _pad(n)
    sample_bytes = fallback_at + _pad(n)
    sample_at = sample_bytes.to(tl.pointer_type(tl.float32))
    flag_at = sample_bytes + words

    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    state = tl.load(state_at + row, mask=inside, other=DORMANT).to(tl.int32)
    flag = tl.load(flag_at + row, mask=inside, other=0).to(tl.int32)
    sample = tl.load(sample_at + row, mask=inside, other=float("nan"))
    awake = _in_set(state, AWAKE)
    timed = _in_set(state, TIMED)
    # Rows with nothing to do read no more than these three fields.
    work = awake | timed | (flag != 0)

    errors = tl.load(error_at + row, mask=work, other=0)
    fallback = tl.load(fallback_at + row, mask=work, other=0).to(tl.int32)
    fault = awake & (flag != 0)
    counted = errors + tl.where(errors < 2147483647, 1, 0)
    streak = tl.where(fault, counted, 0)
    dead = fault & (streak >= MAX_FAULTS)
    new_errors = tl.where(awake, streak, errors)
    new_fallback = tl.where(awake, fault.to(tl.int32), fallback)

    alpha = tl.load(alpha_at + row, mask=work, other=0.0)
    target = tl.load(target_at + row, mask=work, other=0.0)
    stride = tl.abs(tl.load(stride_at + row, mask=work, other=0.0))
    distance = target - alpha
    moved = tl.where(distance > 0.0, alpha + stride, alpha - stride)
    # False for NaN, so that a damaged alpha goes to its target.
    reached = tl.where(tl.abs(distance) > 1.5 * stride, moved, target)
    new_alpha = tl.where(dead, 0.0, tl.where(awake, reached, alpha))
    new_target = tl.where(dead, 0.0, target)

    timer = tl.load(timer_at + row, mask=work, other=0)
    new_timer = tl.where(dead, 0, timer - tl.where(timed & (timer > 0), 1, 0))
    arrived = (state == GRAFTING) & (new_alpha == new_target)
    expired = timed & (timer == 1)
    new = tl.where(arrived, tl.where(timer > 0, TRAINING, ACTIVE), state)
    new = tl.where(expired, tl.where(state == TRAINING, ACTIVE, DORMANT), new)
    new = tl.where(dead, ERROR_RECOVERY, new)

    present = inside & (sample == sample)
    floored = tl.where(sample > 0.0, sample, 0.0)
    score = tl.where(floored < 1.0, floored, 1.0)
    health = tl.load(health_at + row, mask=present, other=0.0)
    new_health = health + (score - health) * HEALTH_RATE

    tl.store(alpha_at + row, new_alpha, mask=work & awake)
    tl.store(target_at + row, new_target, mask=dead)
    tl.store(stride_at + row, tl.zeros([BLOCK], tl.float32), mask=dead)
    tl.store(error_at + row, new_errors, mask=work & (new_errors != errors))
    tl.store(fallback_at + row, new_fallback.to(tl.uint8), mask=work & (new_fallback != fallback))
    tl.store(timer_at + row, new_timer, mask=work & (new_timer != timer))
    tl.store(state_at + row, new.to(tl.uint8), mask=work & (new != state))
    tl.store(flag_at + row, tl.zeros([BLOCK], tl.uint8), mask=inside & (flag != 0))
    tl.store(health_at + row, new_health, mask=present)
    tl.store(sample_at + row, tl.full([BLOCK], float("nan"), tl.float32), mask=present)
    stamp = tl.zeros([BLOCK], tl.int32) + epoch
    tl.store(epoch_at + row, stamp, mask=present | fault | (new != state))


@triton.jit(do_not_specialize=["rows"])
def lattice_compact_kernel(storage, rows, indices, count, AWAKE: tl.constexpr, BLOCK: tl.constexpr):
    """Ascending awake rows to ``indices[rows]``, -1 behind them, their number to ``count[1]``.

    Every program counts the awake rows before its own and in all by itself: a state is one byte, so that a million come
    out of the second-level cache in microseconds, and no program waits for another.
    """
    n = rows.to(tl.int64)
    states = storage + _pad(n * 8) + _pad(n * 4) * 8
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    start = first * 0
    while start < n:
        state = tl.load(states + start + lane, mask=start + lane < n, other=0).to(tl.int32)
        awake = _in_set(state, AWAKE).to(tl.int32)
        total += awake
        before += tl.where(start < first, awake, 0)
        start += BLOCK
    all_awake = tl.sum(total)
    row = first + lane
    inside = row < n
    state = tl.load(states + row, mask=inside, other=0).to(tl.int32)
    awake = _in_set(state, AWAKE)
    rank = tl.sum(before) + tl.cumsum(awake.to(tl.int32), 0)  # awake rows up to and with this one
    # Row r has r + 1 - rank sleeping rows up to and with it, and each places one -1.
    place = tl.where(awake, rank - 1, all_awake + row - rank)
    tl.store(indices + place, tl.where(awake, row, -1).to(tl.int32), mask=inside)
    tl.store(count, all_awake, mask=first == 0)


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
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
AOT = [
    (lattice_step_kernel, {"storage": "*u8", "rows": "i64", "epoch": "i32"}, _STEP, _OPTIONS),
    (
        lattice_compact_kernel,
        {"storage": "*u8", "rows": "i64", "indices": "*i32", "count": "*i32"},
        {"AWAKE": 0b01110100, "BLOCK": 4096},
        _OPTIONS,
    ),
    (
        lattice_crc_kernel,
        {"data": "*i32", "words": "i64", "powers": "*i32", "places": "*i32", "partials": "*i32"},
        {"POLYNOMIAL": 0x82F63B78, "BLOCK": 1024},
        _OPTIONS,
    ),
]
