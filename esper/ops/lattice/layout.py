"""Where each field of a lattice lies in its one buffer.

All seeds of a model share one uint8 tensor, the *storage*. A field is an array of ``rows`` elements in it, padded with
zero bytes to a multiple of :data:`ALIGN`; positions follow from ``rows`` alone, so an operation needs one address and
one number. Persistent fields come first: snapshot and checksum are about one contiguous range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["ALIGN", "FIELDS", "PERSISTENT", "Layout", "layout_of", "views"]

#: Fields start at multiples of this many bytes.
ALIGN = 64

#: Fields that a checkpoint keeps, in the order of the storage, of the snapshot and of the checksum.
PERSISTENT: Mapping[str, torch.dtype] = {
    "active_kernel_id": torch.int64,
    "alpha_blend": torch.float32,
    "alpha_target": torch.float32,
    "alpha_step": torch.float32,
    "health_accumulator": torch.float32,
    "last_update_epoch": torch.int32,
    "exec_latency_us": torch.int32,
    "error_count": torch.int32,
    "state_timer": torch.int32,
    "lifecycle_states": torch.uint8,
    "fallback_active": torch.bool,
}

#: All fields; the last two are messages to the next ``lattice_step``, which consumes them.
FIELDS: Mapping[str, torch.dtype] = {**PERSISTENT, "health_sample": torch.float32, "fault_flags": torch.uint8}


@dataclass(frozen=True)
class Layout:
    """Byte positions for one number of rows.

    Attributes:
        rows: Number of seeds.
        offsets: First byte of each field.
        persistent_bytes: Length of the range that snapshot and checksum are about.
        total_bytes: Length of the storage.
    """

    rows: int
    offsets: Mapping[str, int]
    persistent_bytes: int
    total_bytes: int


@lru_cache(maxsize=256)
def layout_of(rows: int) -> Layout:
    """The layout for ``rows`` seeds.

    Raises:
        ValueError: ``rows`` is negative, or more than an int32 can number.
    """
    if not 0 <= rows < 2**31:
        raise ValueError(f"a lattice has between 0 and 2**31 - 1 seeds, not {rows}")
    offsets: dict[str, int] = {}
    cursor = persistent = 0
    for name, dtype in FIELDS.items():
        offsets[name] = cursor
        cursor += -(-rows * dtype.itemsize // ALIGN) * ALIGN
        if name in PERSISTENT:
            persistent = cursor
    return Layout(rows, offsets, persistent, cursor)


def views(storage: Tensor, rows: int) -> dict[str, Tensor]:
    """Every field of ``storage`` as a tensor ``[rows]`` over the same memory.

    Args:
        storage: uint8, at least ``total_bytes`` long: whole for all fields, or a snapshot for the persistent ones.
        rows: Number of seeds.
    """
    layout = layout_of(rows)
    wanted = FIELDS if storage.numel() >= layout.total_bytes else PERSISTENT
    return {
        name: storage[layout.offsets[name] : layout.offsets[name] + rows * dtype.itemsize].view(dtype)
        for name, dtype in wanted.items()
    }
