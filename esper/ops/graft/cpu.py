"""C++ on the CPU, by raw address. Shapes are checked here; the kernels trust them."""

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

#: Halves are left to PyTorch, whose conversions are vectorised.
_NATIVE = (torch.float32, torch.float64)


def _register(module: Any) -> None:
    @implements("graft_blend", "cpu")
    def graft_blend(
        h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], alpha: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, Tensor]:
        many = len(parts) > MAX_SEEDS
        if not many:
            check_parts(h, parts, trusted, places, dim)
        if many or h.dtype not in _NATIVE:
            plain: tuple[Tensor, Tensor] = reference.graft_blend(h, parts, trusted, alpha, places, dim)
            return plain
        h = h.contiguous()
        flat = [p.contiguous() for p in parts]
        masks = [positions(m, h, dim) for m in trusted]
        y = torch.empty_like(h)
        blamed = torch.zeros(len(parts), dtype=torch.uint8)
        module.graft_blend(
            DTYPE_CODES[h.dtype],
            *extents(h, dim),
            h.data_ptr(),
            y.data_ptr(),
            [p.data_ptr() for p in flat],
            [m.data_ptr() for m in masks],
            alpha.contiguous().data_ptr(),
            list(places),
            blamed.data_ptr(),
        )
        return y, blamed

    @implements("graft_blend_backward", "cpu")
    def graft_blend_backward(
        gy: Tensor, alpha: Tensor, blamed: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, list[Tensor]]:
        # Products by one number each: PyTorch's own loops do them at the speed of memory.
        plain: tuple[Tensor, list[Tensor]] = reference.graft_blend_backward(gy, alpha, blamed, places, dim)
        return plain


_module = native.load()
if _module is not None and hasattr(_module, "graft_blend"):
    _register(_module)
else:
    for _name in ("graft_blend", "graft_blend_backward"):
        unavailable(_name, "cpu", native.reason() or "esper._native is older than this package; build it again")
