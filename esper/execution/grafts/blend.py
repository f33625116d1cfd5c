"""Blending a host's output with the contributions of its seeds, and containing faults, on PyTorch operations.

Two forms with one meaning. :func:`blend_eager` reads alpha on the CPU, so it can leave a seed out, and look at the
result. :func:`blend_traced` never looks at a value: it runs under CUDA without synchronising and under
``torch.compile(fullgraph=True)``.

Containment: a seed is at fault where its contribution ``c * k`` is not finite although its tap is finite at that
position. If all contributions are finite and only their sum overflows where h is finite, the seeds that are largest
there are at fault. As soon as one seed is at fault, the layer's output is h for this call, the gradient goes to h
alone, and the seed's entry of ``fault_flags`` is raised. A host that is itself not finite is nobody's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.execution.grafts.layout import BlendLayout

__all__ = ["blend_eager", "blend_traced", "contain", "faults", "gate"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 at least."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def blend_eager(
    layout: BlendLayout, h: Tensor, parts: Sequence[Tensor | None], alpha: Sequence[float], dim: int
) -> Tensor:
    """The blend for alphas known on the host.

    Args:
        layout: Of the seeds.
        h: The host's output, ``features`` along ``dim``.
        parts: Per seed ``k``, shaped as h but with the seed's own features along ``dim``; None for one whose alpha
            is 0.
        alpha: One number a seed of the layer.
        dim: Dimension of the features, not negative.

    Returns:
        y, of h's shape and dtype; where no seed counts it is h bit for bit.
    """
    wide = accumulation_dtype(h.dtype)
    pieces = []
    for segment in layout.segments:
        host, pairs = layout.numbers(alpha, segment)
        here = _narrow(h, dim, 0, segment, layout.features)
        total: Tensor | None = None
        if host != 0.0:
            total = here.to(wide) if host == 1.0 else host * here.to(wide)
        for i, c in pairs:
            part = parts[i]
            assert part is not None
            k = _narrow(part, dim, layout.places[i].begin, segment, part.shape[dim]).to(wide)
            k = k if c == 1.0 else c * k
            total = k if total is None else total + k
        pieces.append(total)
    return _join(pieces, h, dim)


def blend_traced(layout: BlendLayout, h: Tensor, parts: Sequence[Tensor], alpha: Tensor, dim: int) -> Tensor:
    """The blend for alphas that only the device knows; arguments as :func:`blend_eager`.

    A factor of 0 must not multiply: 0 * inf is NaN. ``where`` leaves the product out, and -0 stands in its place
    because -0 + k is k, the sign of zero included.
    """
    wide = accumulation_dtype(h.dtype)
    alpha = alpha.to(wide)
    pieces: list[Tensor | None] = []
    for segment in layout.segments:
        host, pairs = layout.tensors(alpha, segment)
        total = _narrow(h, dim, 0, segment, layout.features).to(wide)
        if host is not None:
            total = torch.where(host == 0, -0.0, host * total)
        for i, c in pairs:
            k = _narrow(parts[i], dim, layout.places[i].begin, segment, parts[i].shape[dim]).to(wide)
            total = total + torch.where(c == 0, -0.0, c * k)
        pieces.append(total)
    return _join(pieces, h, dim)


def faults(
    layout: BlendLayout,
    h: Tensor,
    y: Tensor,
    parts: Sequence[Tensor | None],
    trusted: Sequence[Tensor],
    alpha: Tensor,
    dim: int,
) -> Tensor:
    """Which seeds are at fault for what is not finite in y.

    Args:
        layout: Of the seeds.
        h: The host's output.
        y: The blend.
        parts: Per seed ``k``, or None where its alpha is 0.
        trusted: Per seed a bool tensor that broadcasts against its k: where the tap is finite.
        alpha: The layer's alphas, on h's device.
        dim: Dimension of the features, not negative.

    Returns:
        bool [len(parts)] on h's device. Nothing is looked at, nothing synchronises.
    """
    blamed = [h.new_zeros((), dtype=torch.bool) for _ in parts]
    wide = accumulation_dtype(h.dtype)
    alpha = alpha.to(wide)
    for segment in layout.segments:
        _, pairs = layout.tensors(alpha, segment)
        here = _narrow(h, dim, 0, segment, layout.features)
        result = _narrow(y, dim, 0, segment, layout.features)
        # Where the sum broke although the host is sound: an overflow, if no single contribution is broken there.
        overflow = ~torch.isfinite(result) & torch.isfinite(here)
        sizes: list[tuple[int, Tensor]] = []
        for i, c in pairs:
            part = parts[i]
            if part is None:
                continue
            k = _narrow(part, dim, layout.places[i].begin, segment, part.shape[dim])
            # Judged in h's dtype: what the layer would hand on is what must be finite.
            scaled = (c * k.to(wide)).to(h.dtype)
            broken = ~torch.isfinite(scaled) & (c != 0)
            blamed[i] = blamed[i] | (broken & trusted[i]).any()
            overflow = overflow & ~broken & trusted[i]
            sizes.append((i, torch.where(c == 0, 0.0, scaled.abs())))
        if sizes:
            largest = torch.stack([size for _, size in sizes]).amax(0)
            for i, size in sizes:
                blamed[i] = blamed[i] | (overflow & (size == largest) & (size > 0)).any()
    return torch.stack(blamed)


class _Gate(torch.autograd.Function):
    """Identity whose gradient can be switched off by what comes after it.

    Zero times NaN is NaN, so a seed that is masked out of the result would still poison the gradients of what it read.
    Whether there was a fault is known only behind the seeds. The last output, ``signal``, carries the news back: its
    "gradient" is 1 if there was one. Plain data flow, so a compiler can follow it.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (*(t.view_as(t) for t in tensors), tensors[0].new_zeros((), dtype=torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        closed = grads[-1] != 0
        return tuple(torch.where(closed, -0.0, g) for g in grads[:-1])


class _Contain(torch.autograd.Function):
    """y, or h where there was a fault; sends the news back to the gate as the gradient of ``signal``.

    The masked gradients are -0, which leaves what autograd adds them to as it is, the sign of zero included.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, signal: Tensor, fault: Tensor) -> Tensor:
        ctx.save_for_backward(fault)
        return torch.where(fault, h, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (fault,) = ctx.saved_tensors
        return torch.where(fault, -0.0, grad), torch.where(fault, grad, -0.0), fault.to(torch.float32), None


def gate(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors again, and the signal to give to :func:`contain`."""
    *outputs, signal = _Gate.apply(*tensors)
    return outputs, signal


def contain(y: Tensor, h: Tensor, signal: Tensor, fault: Tensor) -> Tensor:
    """Give h if ``fault`` (bool, 0-dimensional), else y; after a fault no gradient passes the gate of ``signal``."""
    result: Tensor = _Contain.apply(y, h, signal, fault)
    return result


def _narrow(t: Tensor, dim: int, origin: int, segment: tuple[int, int], features: int) -> Tensor:
    begin, end = segment
    if end - begin == features:
        return t
    return t.narrow(dim, begin - origin, end - begin)


def _join(pieces: Sequence[Tensor | None], h: Tensor, dim: int) -> Tensor:
    whole = [piece for piece in pieces if piece is not None]
    y = whole[0] if len(whole) == 1 else torch.cat(whole, dim)
    return y.to(h.dtype)
