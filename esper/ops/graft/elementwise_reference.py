"""Elementwise seeds in plain PyTorch, and on CUDA without Triton: contributions by PyTorch, the blend by a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.ops.graft import reference
from esper.ops.graft.bank_reference import activate, slope
from esper.ops.graft.elementwise import blank, check_elementwise, is_channels_last
from esper.ops.graft.layout import BlendLayout
from esper.ops.graft.reference import accumulation_dtype, unaffected_by_autocast
from esper.ops.graft.schema import graft_blend
from esper.ops.registry import Backend, implements, unavailable

__all__ = ["elementwise_blend"]


def _along(t: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector shaped to broadcast along ``dim``."""
    return t.reshape(-1, *(1 for _ in range(like.dim() - 1 - dim)))


def _parts(
    layout: BlendLayout,
    x: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    activation: str | None,
    dim: int,
) -> list[Tensor]:
    """What each seed contributes; the weights of one whose alpha is 0 are not read."""
    wide = accumulation_dtype(x.dtype)
    active = activate(x.to(wide), activation)
    found = []
    for s, place in enumerate(layout.places):
        here = reference.narrow(active, dim, 0, (place.begin, place.end), layout.features)
        counts = alpha[place.index] != 0
        k = here * _along(torch.where(counts, scale[s, place.begin : place.end].to(wide), 0.0), here, dim)
        if shift is not None:
            k = k + _along(torch.where(counts, shift[s, place.begin : place.end].to(wide), 0.0), here, dim)
        found.append(k)
    return found


@unaffected_by_autocast
def elementwise_blend(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
) -> Tensor:
    """The blend before containment, differentiable."""
    layout = check_elementwise(x, h, alpha, scale, shift, places, activation, dim)
    parts = _parts(layout, x, alpha, scale, shift, activation, dim)
    return reference.blend(layout, h, parts, alpha, dim)


@implements("graft_elementwise", "reference")
@unaffected_by_autocast
def graft_elementwise(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """See :data:`esper.ops.graft.graft_elementwise`."""
    layout = check_elementwise(x, h, alpha, scale, shift, places, activation, dim)
    parts = _parts(layout, x, alpha, scale, shift, activation, dim)
    y = reference.blend(layout, h, parts, alpha, dim)
    finite = torch.isfinite(x)
    trusted = [reference.narrow(finite, dim, 0, (p.begin, p.end), layout.features) for p in layout.places]
    blamed = reference.faults(layout, h, y, parts, trusted, alpha, dim)
    return blank(h, dim).copy_(torch.where(blamed.any(), h, y)), blamed.to(torch.uint8)


@implements("graft_elementwise_backward", "reference")
@unaffected_by_autocast
def graft_elementwise_backward(
    gy: Tensor,
    x: Tensor,
    alpha: Tensor,
    faults: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
    want_x: bool,
    want_h: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :data:`esper.ops.graft.graft_elementwise_backward`."""
    layout = check_elementwise(x, gy, alpha, scale, shift, places, activation, dim)
    dtype, wide = gy.dtype, accumulation_dtype(gy.dtype)
    gh, _ = reference.graft_blend_backward(gy, alpha, faults, places, dim)
    fault = (faults != 0).any()
    value, gradient = x.to(wide), gy.to(wide)
    active, derivative = activate(value, activation), slope(value, activation)
    others = [d for d in range(gy.dim()) if d != dim]
    gx = torch.zeros_like(gradient)
    gscale, gshift = (torch.zeros(scale.shape, dtype=wide, device=scale.device) for _ in range(2))
    for begin, end in layout.segments:
        _, pairs = layout.tensors(alpha.to(wide), (begin, end))
        here, a, d = (t.narrow(dim, begin, end - begin) for t in (gradient, active, derivative))
        for i, c in pairs:
            off = fault | (c == 0)
            weight = _along(scale[i, begin:end].to(wide), here, dim)
            gx.narrow(dim, begin, end - begin).add_(torch.where(off, 0.0, c * weight * d * here))
            # Summed first: a product that overflows on the way is not one in the kernel.
            gscale[i, begin:end] = torch.where(off, 0.0, c * (here * a).sum(others) if others else c * here * a)
            gshift[i, begin:end] = torch.where(off, 0.0, c * here.sum(others) if others else c * here)
    empty = gy.new_empty(0)
    return (
        blank(gy, dim).copy_(gx) if want_x else empty.clone(),
        blank(gy, dim).copy_(gh) if want_h else empty.clone(),
        gscale.to(dtype) if want_weights else empty.clone(),
        gshift.to(dtype) if want_weights and shift is not None else empty.clone(),
    )


def _on_cuda(blend: Callable[..., Any]) -> None:
    """Without Triton: the blend by its CUDA kernel, the rest by PyTorch."""

    @implements("graft_elementwise", "cuda")
    @unaffected_by_autocast
    def forward(
        x: Tensor,
        h: Tensor,
        alpha: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        places: Sequence[int],
        activation: str | None,
        dim: int,
    ) -> tuple[Tensor, Tensor]:
        layout = check_elementwise(x, h, alpha, scale, shift, places, activation, dim)
        parts = [k.to(h.dtype) for k in _parts(layout, x, alpha, scale, shift, activation, dim)]
        # Its masks are for whole positions.
        trusted = torch.isfinite(x).all(dim, keepdim=True)
        y, faults = blend(h, parts, [trusted] * len(parts), alpha, places, dim)
        return blank(h, dim).copy_(y) if is_channels_last(h, dim) else y, faults

    # Sums and products by features: PyTorch's own kernels.
    implements("graft_elementwise_backward", "cuda")(graft_elementwise_backward)


_reason = graft_blend.reason(Backend.CUDA)
if not _reason:
    _on_cuda(graft_blend.backend(Backend.CUDA))
for _name in ("graft_elementwise", "graft_elementwise_backward"):
    if _reason:
        unavailable(_name, "cuda", _reason)
    unavailable(_name, "cpu", "the CPU runs these seeds on PyTorch's operations and blends with graft_blend")
