"""The fused linear layer as a differentiable function. The backward is the library's products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.ops.graft.autograd import Gradients, aligned, check_versions, graft_alpha, through, traced_through, twice
from esper.ops.graft.bank import graft_bank_backward
from esper.ops.graft.bank_reference import slope_times
from esper.ops.linear.reference import linear_blend
from esper.ops.linear.schema import fused_linear

__all__ = ["Graft", "linear"]


@dataclass(frozen=True)
class Graft:
    """The low-rank or bottleneck seeds of a layer, side by side; see :data:`esper.ops.graft.graft_bank`.

    Attributes:
        alpha: float32, one a seed of the layer.
        down: ``[R, d_in]``.
        up: ``[R, d_out]``.
        bias: ``[R]`` or None.
        seats: Six numbers a seed.
        activation: As blueprints name them, or None.
        versions: For weights whose changes PyTorch cannot see, as :func:`esper.ops.graft.blend_bank` has it.
    """

    alpha: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    seats: Sequence[int]
    activation: str | None = None
    versions: Callable[[], bytes] | None = None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    graft: Graft | None = None,
    *,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(x @ weight.T + bias)`` with seeds blended in, by the way that was measured to be fastest on this device.

    Args:
        x: ``[..., d_in]``, float16, bfloat16, float32 or float64.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or None.
        activation: relu, gelu, gelu_tanh, tanh, sigmoid, silu or None.
        graft: The seeds, or None.
        stats: Whether the statistics of y are wanted.

    Returns:
        y ``[..., d_out]``, differentiable (twice in eager code); the statistics, float64 ``[5, d_out]`` (see
        :mod:`esper.ops.stats.schema`), empty unless wanted; the faults, uint8, one a seed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another.
    """
    host = x, weight, bias
    seeds = (None, None, None) if graft is None else (graft.down, graft.up, graft.bias)
    alpha = None if graft is None else graft.alpha
    seats = [] if graft is None else list(graft.seats)
    kinds = activation, None if graft is None else graft.activation
    tensors = [t for t in (*host, *seeds) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    keep = learns and activation is not None
    if traced_through(x):
        assert fused_linear.overload is not None and graft_alpha.overload is not None
        kept = None if alpha is None else graft_alpha.overload(alpha)
        y, _, features, faults = fused_linear.overload(*host, kinds[0], kept, *seeds, seats, kinds[1], keep, stats)
    elif learns:
        versions = None if graft is None else graft.versions
        y, features, faults = _Linear.apply(versions, kinds, seats, stats, alpha, *host, *seeds)
    else:
        there = None if alpha is None else aligned(alpha)
        y, _, features, faults = fused_linear(*host, kinds[0], there, *seeds, seats, kinds[1], False, stats)
    return y, features, faults


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        versions: Callable[[], bytes] | None,
        kinds: tuple[str | None, str | None],
        seats: Sequence[int],
        stats: bool,
        alpha: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha = None if alpha is None else alpha.clone()  # it moves between forward and backward
        keep = kinds[0] is not None
        y, before, features, faults = fused_linear(
            x, weight, bias, kinds[0], alpha, *seeds, seats, kinds[1], keep, stats
        )
        ctx.save_for_backward(x, weight, bias, alpha, *seeds, before, faults)
        ctx.kinds, ctx.seats = kinds, seats
        ctx.versions = None if versions is None else (versions, versions())
        ctx.mark_non_differentiable(features, faults)
        ctx.set_materialize_grads(False)
        return y, features, faults

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *_: Tensor | None) -> Gradients:
        check_versions(ctx.versions)
        return (None, None, None, None, None, *_gradients(ctx, gy, ctx.needs_input_grad[5:]))


def _gradients(ctx: Any, gy: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """For x, weight, bias, down, up and the seeds' bias; None where not needed."""
    if gy is None:
        return (None,) * 6
    x, weight, bias, alpha, down, up, graft_bias, before, faults = ctx.saved_tensors
    activation, graft_activation = ctx.kinds
    seats = list(ctx.seats)
    if torch.is_grad_enabled():
        return _differentiable(ctx, gy, needs)
    graft: tuple[Tensor, ...] = ()
    g = gy
    if alpha is not None:
        replaces = any(seats[3::6])
        gx, gh, gdown, _, gup, gbias, _ = through(graft_bank_backward, gy)(
            gy, x, alpha, faults, down, None, up, graft_bias, None, seats, graft_activation,
            needs[0], replaces, any(needs[3:]),
        )  # fmt: skip
        graft = gx, gdown, gup, gbias
        g = gh if replaces else gy
    g = slope_times(g, before, activation)
    rows_g, rows_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    found: list[Tensor | None] = [None] * 6
    if needs[0]:
        own = torch.mm(rows_g, weight) if not graft else torch.addmm(graft[0].reshape(rows_x.shape), rows_g, weight)
        found[0] = own.view(x.shape)
    if needs[1]:
        found[1] = torch.mm(rows_g.t(), rows_x)
    if needs[2] and bias is not None:
        found[2] = rows_g.sum(0)
    for i, gradient in enumerate(graft[1:], 3):
        found[i] = gradient if needs[i] else None
    return tuple(found)


def _differentiable(ctx: Any, gy: Tensor, needs: Sequence[bool]) -> Gradients:
    """The same by operations that can be differentiated again."""
    x, weight, bias, alpha, down, up, graft_bias, _, faults = ctx.saved_tensors
    activation, graft_activation = ctx.kinds

    def blend(*inputs: Tensor | None) -> Tensor:
        x, weight, bias, down, up, graft_bias = inputs
        assert x is not None and weight is not None
        kinds = ctx.seats, graft_activation
        return linear_blend(x, weight, bias, activation, alpha, down, up, graft_bias, *kinds)

    def host(*inputs: Tensor | None) -> Tensor:
        x, weight, bias, *_ = inputs
        assert x is not None and weight is not None
        return linear_blend(x, weight, bias, activation, None, None, None, None, [], None)

    inputs = x, weight, bias, down, up, graft_bias
    if alpha is None:
        return twice(host, gy, inputs, needs)
    # After a fault y is the host's, and so are its gradients; which it was is known on the device alone.
    fault = (faults != 0).any()
    grown, bare = twice(blend, gy, inputs, needs), twice(host, gy, inputs, needs)
    return tuple(
        None if g is None else torch.where(fault, 0.0 if b is None else b, g) for g, b in zip(grown, bare, strict=True)
    )


def _register() -> None:
    """Give the overload its derivative."""

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, activation, alpha, down, up, graft_bias, seats, graft_activation, _, _ = inputs
        _, before, _, faults = output
        ctx.save_for_backward(x, weight, bias, alpha, down, up, graft_bias, before, faults)
        ctx.kinds, ctx.seats = (activation, graft_activation), seats
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, gy: Tensor | None, *_: Tensor | None) -> Gradients:
        needs = ctx.needs_input_grad
        gx, gweight, gbias, *rest = _gradients(ctx, gy, (*needs[:3], *needs[5:8]))
        return (gx, gweight, gbias, None, None, *rest, None, None, None, None)

    register: Callable[..., None] = torch.library.register_autograd
    register("esper::fused_linear", backward, setup_context=context)


_register()
