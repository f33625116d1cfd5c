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

from esper.ops.graft import graft_blend, graft_blend_backward, reference
from esper.ops.graft.layout import BlendLayout
from esper.ops.graft.reference import accumulation_dtype, join, narrow

__all__ = ["blend_eager", "blend_fused", "contain", "gate", "tether"]


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
        here = narrow(h, dim, 0, segment, layout.features)
        total: Tensor | None = None
        if host != 0.0:
            total = here.to(wide) if host == 1.0 else host * here.to(wide)
        for i, c in pairs:
            part = parts[i]
            assert part is not None
            k = narrow(part, dim, layout.places[i].begin, segment, part.shape[dim]).to(wide)
            k = k if c == 1.0 else c * k
            total = k if total is None else total + k
        pieces.append(total)
    return join(pieces, h, dim)


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


class _Tether(torch.autograd.Function):
    """Identity on y that gives the other tensors gradients of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def tether(y: Tensor, others: Sequence[Tensor]) -> Tensor:
    """y, through which the other tensors get gradients of zero."""
    result: Tensor = _Tether.apply(y, *others)
    return result


class _Fused(torch.autograd.Function):
    """One operation forward and one backward, containment and the news for the gate included."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: BlendLayout,
        dim: int,
        alpha: Tensor,
        trusted: Sequence[Tensor],
        h: Tensor,
        signal: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, blamed = graft_blend(h, parts, trusted, alpha, layout.flat, dim)
        ctx.layout, ctx.dim = layout, dim
        ctx.save_for_backward(alpha.clone(), blamed)  # alpha moves between forward and backward
        ctx.mark_non_differentiable(blamed)
        return y, blamed

    @staticmethod
    def backward(ctx: Any, gy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        alpha, blamed = ctx.saved_tensors
        run = reference.graft_blend_backward if torch.is_grad_enabled() else graft_blend_backward
        gh, gparts = run(gy, alpha, blamed, ctx.layout.flat, ctx.dim)
        return None, None, None, None, gh, (blamed != 0).any().to(torch.float32), *gparts


def blend_fused(
    layout: BlendLayout,
    h: Tensor,
    parts: Sequence[Tensor],
    trusted: Sequence[Tensor],
    alpha: Tensor,
    signal: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """The blend for alphas that only the device knows, contained.

    Args:
        layout: Of the seeds.
        h: The host's output.
        parts: Per seed ``k``.
        trusted: Per seed where its tap is finite, bool.
        alpha: The layer's alphas.
        signal: From :func:`gate`.
        dim: Dimension of the features, not negative.

    Returns:
        y, and uint8 [seeds]: 1 for each seed at fault.
    """
    y, blamed = _Fused.apply(layout, dim, alpha, trusted, h, signal, *parts)
    return y, blamed
