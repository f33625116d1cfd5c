"""Edges from a model's outputs to parameters that take no part in them.

DistributedDataParallel counts the parameters whose gradients have arrived, and waits for the rest. Reserved memory of
seeds that sleep is part of the model but not of its forward, so the count would never be complete. An edge in the graph
is enough: its gradient is undefined, which DDP takes for "ready, and zero".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Tether"]


class _Anchor(torch.autograd.Function):
    """One node in front of all the parameters. Nothing is saved in it, so it serves any number of backwards."""

    @staticmethod
    def forward(ctx: Any, zeros: bool, *parameters: Tensor) -> Tensor:
        ctx.zeros, ctx.parameters = zeros, parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros_like(parameter) if ctx.zeros else None for parameter in ctx.parameters)


class _Tie(torch.autograd.Function):
    """Identity on y, with an edge to the anchor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        # A view may not be changed in place, and a single number is what losses are scaled in.
        return y.clone() if y.dim() == 0 else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TracedTie(torch.autograd.Function):
    """The same for compilers, which leave out inputs that nothing reads, and gradients that nobody computes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.anchor_dtype = anchor.dtype
        return y - anchor  # the anchor is +0: this leaves every y as it is, -0 too

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_zeros((), dtype=ctx.anchor_dtype)


class Tether:
    """Ties parameters to whatever outputs pass through it.

    Args:
        parameters: Gives the parameters that are there now.
    """

    def __init__(self, parameters: Callable[[], Sequence[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._anchor: Tensor | None = None
        #: Whether the parameters get gradients of zero, not undefined ones: a DDP with ``static_graph=True`` takes
        #: a parameter without a gradient in its first backward for one that never has any.
        self.zeros = False
        self.renew()

    def renew(self) -> None:
        """Make the edges anew: the parameters were converted, moved, or are others."""
        found = self._parameters()
        # FSDP2 counts nothing, and its parameters are others in every forward.
        sharded = any(hasattr(parameter, "device_mesh") for parameter in found)
        self._anchor = None
        if found and not sharded and any(parameter.requires_grad for parameter in found):
            with torch.inference_mode(False), torch.enable_grad():
                self._anchor = _Anchor.apply(self.zeros, *found)

    def __call__(self, output: Any) -> Any:
        """The output again; every tensor in it that has a gradient is tied."""
        if self._anchor is None or not torch.is_grad_enabled():
            return output
        if isinstance(output, Tensor):
            return self._tie(output)
        return pytree.tree_map_only(Tensor, self._tie, output)

    def _tie(self, y: Tensor) -> Tensor:
        if not y.requires_grad:
            return y
        tied: Tensor = (_TracedTie if torch.compiler.is_compiling() else _Tie).apply(y, self._anchor)
        return tied
