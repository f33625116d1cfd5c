"""The blend of stacked contributions, with containment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.ops.registry import define

__all__ = ["graft_blend", "graft_blend_backward"]


def _fake_blend(
    h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], alpha: Tensor, places: Sequence[int], dim: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty(len(parts), dtype=torch.uint8, device=h.device)


def _fake_backward(
    gy: Tensor, alpha: Tensor, blamed: Tensor, places: Sequence[int], dim: int
) -> tuple[Tensor, list[Tensor]]:
    widths = [end - begin for begin, end in zip(places[1::4], places[2::4], strict=True)]
    return torch.empty_like(gy), [gy.new_empty((*gy.shape[:dim], w, *gy.shape[dim + 1 :])) for w in widths]


#: y and faults.
#:
#: - ``h``: float16, bfloat16, float32 or float64, any shape, C features along ``dim`` (not negative).
#: - ``parts``: per seed k, as h but with the seed's own features along ``dim``.
#: - ``trusted``: per seed bool, as h but 1 along ``dim`` and 1 or the full size elsewhere: where the tap was finite.
#: - ``alpha``: float32, one a seed of the layer, read on the device.
#: - ``places``: four numbers a seed: its row of alpha, first feature, one past the last, 1 for mode replace.
#:
#: ``y`` is the blend, or h in full if a seed is at fault; ``faults`` uint8 [len(parts)] says which. Sums are float32 at
#: least. docs/grafts.md has the rules.
graft_blend = define(
    "graft_blend",
    "(Tensor h, Tensor[] parts, Tensor[] trusted, Tensor alpha, int[] places, int dim) -> (Tensor y, Tensor faults)",
    doc="blend the seeds' contributions into a layer's output and contain faults",
    fake=_fake_blend,
)

#: Gradients of y for h and the parts: the factors of the forward, or after a fault gy for h and 0 for the parts.
graft_blend_backward = define(
    "graft_blend_backward",
    "(Tensor gy, Tensor alpha, Tensor faults, int[] places, int dim) -> (Tensor gh, Tensor[] gparts)",
    doc="gradients of graft_blend",
    fake=_fake_backward,
)
