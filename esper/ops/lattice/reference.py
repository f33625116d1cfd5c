"""The lattice in plain PyTorch: the oracle for the other backends, on any device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from esper.ops import registry
from esper.ops.lattice import crc32c, table
from esper.ops.lattice.layout import layout_of, views

__all__ = ["compact", "crc", "snapshot", "step"]

_INT32_MAX = 2**31 - 1


def _member(states: Tensor, members: int) -> Tensor:
    """Mask of the rows whose state is in the bit set ``members``; a corrupt state is in none."""
    inside = torch.zeros_like(states, dtype=torch.bool)
    for state in range(len(table.TRANSITIONS)):
        if members >> state & 1:
            inside |= states == state
    return inside


@registry.implements("lattice_step", "reference")
def step(storage: Tensor, rows: int, epoch: int) -> int:
    """One step of every seed, in place. Returns how many rows changed state, or -1 on a device it would wait for."""
    f = views(storage, rows)
    state = f["lifecycle_states"].clone()
    timer, alpha, stride = f["state_timer"].clone(), f["alpha_blend"], f["alpha_step"].abs()
    awake, timed = _member(state, table.AWAKE), _member(state, table.TIMED)

    fault = awake & (f["fault_flags"] != 0)
    errors = f["error_count"]
    streak = torch.where(fault, errors + (errors < _INT32_MAX), 0)
    dead = fault & (streak >= table.MAX_FAULTS)
    errors.copy_(torch.where(awake, streak, errors))
    f["fallback_active"].copy_(torch.where(awake, fault, f["fallback_active"]))
    f["fault_flags"].zero_()

    distance = f["alpha_target"] - alpha
    moved = torch.where(distance > 0, alpha + stride, alpha - stride)
    # False for NaN, so that a damaged alpha goes to its target.
    travelling = distance.abs() > stride * 1.5
    alpha.copy_(torch.where(awake, torch.where(travelling, moved, f["alpha_target"]), alpha))
    for name in ("alpha_blend", "alpha_target", "alpha_step"):
        f[name].masked_fill_(dead, 0.0)

    f["state_timer"].sub_((timed & (timer > 0)).to(torch.int32)).masked_fill_(dead, 0)
    arrived = (state == table.GRAFTING) & (alpha == f["alpha_target"])
    expired = timed & (timer == 1)
    new = torch.where(arrived, torch.where(timer > 0, table.TRAINING, table.ACTIVE).to(torch.uint8), state)
    after = torch.where(state == table.TRAINING, table.ACTIVE, table.DORMANT).to(torch.uint8)
    new = torch.where(expired, after, new).masked_fill_(dead, table.ERROR_RECOVERY)
    f["lifecycle_states"].copy_(new)
    changed = new != state

    sample, health = f["health_sample"], f["health_accumulator"]
    present = ~sample.isnan()
    # A product and a sum as two operations: one fused multiply-add would round differently.
    change = (sample.clamp(0.0, 1.0) - health) * table.HEALTH_RATE
    health.copy_(torch.where(present, health + change, health))
    sample.fill_(torch.nan)

    f["last_update_epoch"].masked_fill_(fault | changed | present, epoch)
    return int(changed.sum()) if storage.device.type == "cpu" else -1


@registry.implements("lattice_compact", "reference")
def compact(storage: Tensor, rows: int, indices: Tensor, count: Tensor) -> None:
    """Ascending awake rows, then -1, by a running count: fixed shapes, so nothing waits for the device."""
    awake = _member(views(storage, rows)["lifecycle_states"], table.AWAKE)
    rank = awake.cumsum(0)
    count.copy_(awake.sum().reshape(1))
    row = torch.arange(rows, dtype=torch.int64, device=storage.device)
    place = torch.where(awake, rank - 1, count + row - rank)
    indices.scatter_(0, place, torch.where(awake, row, -1).to(indices.dtype))


@registry.implements("lattice_snapshot", "reference")
def snapshot(storage: Tensor, rows: int, out: Tensor) -> None:
    """One copy of the persistent range into ``out`` (uint8 ``[persistent_bytes]``).

    The storage is packed already, so that PyTorch's copy (memcpy, or the copy engine) is the best kernel everywhere,
    and the other backends register this same function. Into pinned memory the copy is asynchronous: record an event
    behind it, and read ``out`` when the event has passed.
    """
    size = layout_of(rows).persistent_bytes
    out[:size].copy_(storage[:size], non_blocking=True)


@lru_cache(maxsize=64)
def _shift_tables(words: int) -> Tensor:
    """Four tables ``[256]`` (int64): the product of byte k's value with x^(32 words), for k from 0 to 3."""
    factor = crc32c.power(32 * words)
    return torch.tensor([[crc32c.multiply(b << 8 * k, factor) for b in range(256)] for k in range(4)], device="cpu")


def _times_power(values: Tensor, words: int) -> Tensor:
    tables = _shift_tables(words).to(values.device)
    product = tables[0][values & 0xFF]
    for k in range(1, 4):
        product = product ^ tables[k][values >> 8 * k & 0xFF]
    return product


@registry.implements("lattice_crc", "reference")
def crc(storage: Tensor, rows: int) -> int:
    """CRC-32C of the persistent range: neighbours are merged pairwise, ``left * x^(32 length) + right``."""
    size = layout_of(rows).persistent_bytes
    words = storage[:size].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    length = 1
    while words.numel() > 1:
        if words.numel() % 2:  # zero words in front of a message leave its raw remainder as it is
            words = torch.cat((words.new_zeros(1), words))
        words = _times_power(words[0::2], length) ^ words[1::2]
        length *= 2
    raw = int(_times_power(words, 1)) if size else 0
    return crc32c.finish(raw, size)
