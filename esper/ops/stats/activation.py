"""An activation that gathers the statistics of its output on the way, with a derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.ops.stats.schema import act_stats

__all__ = ["activate_with_stats"]

_aten = torch.ops.aten
#: Activations whose derivative is a function of the output; the others need the input.
_FROM_OUTPUT = frozenset(("relu", "tanh", "sigmoid"))


class _ActivateWithStats(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        y, features, chunks = act_stats(x, activation, seeds, channel_dim)
        return y, features, chunks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, activation, _, _ = inputs
        y, features, chunks = output
        ctx.activation = activation
        ctx.save_for_backward(y if activation in _FROM_OUTPUT else x)
        ctx.mark_non_differentiable(features, chunks)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        gradient = gradients[0]
        if gradient is None:
            return None, None, None, None
        (saved,) = ctx.saved_tensors
        return _derivative(ctx.activation, gradient, saved), None, None, None


def _derivative(activation: str, gradient: Tensor, saved: Tensor) -> Tensor:
    # PyTorch's own derivatives, which can be differentiated again.
    result: Tensor
    match activation:
        case "relu":
            result = _aten.threshold_backward(gradient, saved, 0)
        case "gelu":
            result = _aten.gelu_backward(gradient, saved)
        case "gelu_tanh":
            result = _aten.gelu_backward(gradient, saved, approximate="tanh")
        case "tanh":
            result = _aten.tanh_backward(gradient, saved)
        case "sigmoid":
            result = _aten.sigmoid_backward(gradient, saved)
        case _:
            if torch.is_grad_enabled():  # this derivative is to be differentiated, which PyTorch's kernel cannot be
                s = torch.sigmoid(saved)
                return gradient * s * (1 + saved * (1 - s))
            result = _aten.silu_backward(gradient, saved)
    return result


def activate_with_stats(x: Tensor, activation: str, seeds: int, channel_dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Apply an activation and gather the statistics of what it gives, in one pass over memory.

    Args:
        x: float32, float64, bfloat16 or float16; any shape with a channel dimension, any strides.
        activation: relu, gelu, gelu_tanh, tanh, sigmoid or silu.
        seeds: Into how many chunks the features are divided.
        channel_dim: -1, or 1 for NCHW.

    Returns:
        The result (shape and dtype of ``x``, differentiable, also twice), ``features`` float64 ``[5, C]`` and
        ``chunks`` float64 ``[4, seeds]`` (see :mod:`esper.ops.stats.schema`), which have no derivative.

    Raises:
        ValueError: unknown activation, bad ``channel_dim``, or no seed.
        TypeError: a dtype that has no statistics.
    """
    y, features, chunks = _ActivateWithStats.apply(x, activation, seeds, channel_dim)
    return y, features, chunks
