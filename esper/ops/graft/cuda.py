"""CUDA through the extension, by raw address, on PyTorch's current stream. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.ops import native
from esper.ops.graft import reference
from esper.ops.graft.views import DTYPE_CODES, MAX_SEEDS, check_parts, extents, positions
from esper.ops.registry import implements, unavailable

__all__: list[str] = []


def _stream(t: Tensor) -> int:
    return int(torch.cuda.current_stream(t.device).cuda_stream)


def _register(module: Any) -> None:
    @implements("graft_blend", "cuda")
    def graft_blend(
        h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], alpha: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, Tensor]:
        if len(parts) > MAX_SEEDS:
            plain: tuple[Tensor, Tensor] = reference.graft_blend(h, parts, trusted, alpha, places, dim)
            return plain
        check_parts(h, parts, trusted, places, dim)
        h = h.contiguous()
        flat = [p.contiguous() for p in parts]
        masks = [positions(m, h, dim) for m in trusted]
        y = torch.empty_like(h)
        blamed = torch.empty(len(parts), dtype=torch.uint8, device=h.device)
        with torch.cuda.device(h.device):
            module.graft_blend_cuda(
                DTYPE_CODES[h.dtype],
                *extents(h, dim),
                h.data_ptr(),
                y.data_ptr(),
                [p.data_ptr() for p in flat],
                [m.data_ptr() for m in masks],
                alpha.contiguous().data_ptr(),
                list(places),
                blamed.data_ptr(),
                _stream(h),
            )
        return y, blamed

    @implements("graft_blend_backward", "cuda")
    def graft_blend_backward(
        gy: Tensor, alpha: Tensor, blamed: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, list[Tensor]]:
        if len(places) > 4 * MAX_SEEDS:
            plain: tuple[Tensor, list[Tensor]] = reference.graft_blend_backward(gy, alpha, blamed, places, dim)
            return plain
        gy = gy.contiguous()
        gh = torch.empty_like(gy)
        widths = [end - begin for begin, end in zip(places[1::4], places[2::4], strict=True)]
        gparts = [gy.new_empty((*gy.shape[:dim], w, *gy.shape[dim + 1 :])) for w in widths]
        with torch.cuda.device(gy.device):
            module.graft_blend_backward_cuda(
                DTYPE_CODES[gy.dtype],
                *extents(gy, dim),
                gy.data_ptr(),
                gh.data_ptr(),
                [g.data_ptr() for g in gparts],
                alpha.contiguous().data_ptr(),
                blamed.data_ptr(),
                list(places),
                _stream(gy),
            )
        return gh, gparts


_reason = native.cuda_reason()
_module = native.load()
if not _reason and _module is not None and hasattr(_module, "graft_blend_cuda"):
    _register(_module)
else:
    for _name in ("graft_blend", "graft_blend_backward"):
        unavailable(_name, "cuda", _reason or "esper._native is older than this package; build it again")
