"""Launches the Triton kernels of the blend: what the families without kernels of their own end in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from esper.ops.graft import reference
from esper.ops.graft.triton import cdiv, choose, contain, on_device
from esper.ops.graft.uploads import Table
from esper.ops.graft.variants import DTYPE_NAMES, SEATS
from esper.ops.graft.views import check_parts, extents, positions
from esper.ops.registry import implements, unavailable

__all__ = ["seats_on"]

_OPS = ("graft_blend", "graft_blend_backward")


@lru_cache(maxsize=1024)
def _uploaded(places: tuple[int, ...], device: torch.device) -> Table:
    return Table([[*places[i : i + 4], 0, 0] for i in range(0, len(places), 4)], device)


def seats_on(places: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on the device, with two numbers more a seed than ``places``; uploaded once for each set of seeds."""
    return _uploaded(places, device).here()


def _register() -> None:
    from esper.kernels import graft_blend as kernels

    def filled(tensors: Sequence[Tensor], other: Tensor) -> list[Tensor]:
        """As many as the kernel takes; it does not look at the rest."""
        return [*tensors, *[other] * (kernels.PARTS - len(tensors))]

    @implements("graft_blend", "triton")
    def graft_blend(
        h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], alpha: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, Tensor]:
        if not 0 < len(parts) <= kernels.PARTS or h.dtype not in DTYPE_NAMES:
            check_parts(h, parts, trusted, places, dim)
            plain: tuple[Tensor, Tensor] = reference.graft_blend(h, parts, trusted, alpha, places, dim)
            return plain
        check_parts(h, parts, trusted, places, dim)
        h = h.contiguous()
        y = torch.empty_like(h)
        faults = torch.zeros(len(parts), dtype=torch.uint8, device=h.device)
        if h.numel() == 0:
            return y, faults
        outer, features, inner = extents(h, dim)
        constants, launch = choose(
            kernels.graft_blend_kernel,
            DTYPE_NAMES[h.dtype],
            h.device,
            {"SEEDS": len(parts), **kernels.BLEND_BLOCKS},
            kernels.BLEND_OPTIONS,
        )
        ks = filled([p.contiguous() for p in parts], h)
        masks = filled([positions(m, h, dim) for m in trusted], faults)
        with on_device(h):
            launch(
                cdiv(h.numel(), constants["BLOCK"]),
                *(h, y, *ks, *masks, alpha.contiguous(), seats_on(tuple(places), h.device), faults),
                *(h.numel(), features, inner),
            )
            contain(h.view(outer, features * inner), y.view(outer, features * inner), faults)
        return y, faults

    @implements("graft_blend_backward", "triton")
    def graft_blend_backward(
        gy: Tensor, alpha: Tensor, blamed: Tensor, places: Sequence[int], dim: int
    ) -> tuple[Tensor, list[Tensor]]:
        seeds = len(places) // 4
        if not 0 < seeds <= kernels.PARTS or gy.dtype not in DTYPE_NAMES:
            plain: tuple[Tensor, list[Tensor]] = reference.graft_blend_backward(gy, alpha, blamed, places, dim)
            return plain
        gy = gy.contiguous()
        gh = torch.empty_like(gy)
        widths = [end - begin for begin, end in zip(places[1::4], places[2::4], strict=True)]
        gparts = [gy.new_empty((*gy.shape[:dim], w, *gy.shape[dim + 1 :])) for w in widths]
        if gy.numel() == 0:
            return gh, gparts
        _, features, inner = extents(gy, dim)
        constants, launch = choose(
            kernels.graft_blend_backward_kernel,
            DTYPE_NAMES[gy.dtype],
            gy.device,
            {"SEEDS": seeds, "SEATS": SEATS, **kernels.BLEND_BLOCKS},
            kernels.BLEND_OPTIONS,
        )
        with on_device(gy):
            launch(
                cdiv(gy.numel(), constants["BLOCK"]),
                *(gy, gh, *filled(gparts, gh), alpha.contiguous(), seats_on(tuple(places), gy.device), blamed),
                *(gy.numel(), features, inner),
            )
        return gh, gparts


try:
    _register()
except ImportError as error:
    for _name in _OPS:
        unavailable(_name, "triton", f"triton does not import: {error}")
