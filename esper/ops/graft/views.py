"""Tensors as the native kernels see them: contiguous, [outer, features, inner]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DTYPE_CODES", "MAX_SEEDS", "check_parts", "extents", "positions"]

#: As ``csrc/graft.cpp`` numbers them.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#: Seeds of one call: a CUDA kernel takes their addresses by value, 4 KiB at most.
MAX_SEEDS = 64


def extents(t: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, features, inner) of a tensor with its features along ``dim``."""
    outer = inner = 1
    for size in t.shape[:dim]:
        outer *= size
    for size in t.shape[dim + 1 :]:
        inner *= size
    return outer, t.shape[dim], inner


def check_parts(h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], places: Sequence[int], dim: int) -> None:
    """Raise ValueError unless the native kernels may trust these tensors."""
    if h.dtype not in DTYPE_CODES:
        raise ValueError(f"h is {h.dtype}; graft_blend takes {', '.join(map(str, DTYPE_CODES))}")
    if len(places) != 4 * len(parts) or len(trusted) != len(parts):
        raise ValueError(
            f"{len(parts)} parts need {4 * len(parts)} numbers in places and {len(parts)} masks, "
            f"got {len(places)} and {len(trusted)}"
        )
    if len(parts) > MAX_SEEDS:
        raise ValueError(f"{len(parts)} seeds in one call; at most {MAX_SEEDS}")
    for i, part in enumerate(parts):
        begin, end = places[4 * i + 1], places[4 * i + 2]
        expected = (*h.shape[:dim], end - begin, *h.shape[dim + 1 :])
        if not 0 <= begin <= end <= h.shape[dim] or tuple(part.shape) != expected or part.dtype is not h.dtype:
            raise ValueError(
                f"part {i} is {part.dtype} {tuple(part.shape)}, "
                f"but features {begin} to {end} of h need {h.dtype} {expected}"
            )


def positions(mask: Tensor, h: Tensor, dim: int) -> Tensor:
    """The mask as contiguous uint8 [outer, inner]."""
    shape = (*h.shape[:dim], 1, *h.shape[dim + 1 :])
    return mask.expand(shape).contiguous().view(torch.uint8)
