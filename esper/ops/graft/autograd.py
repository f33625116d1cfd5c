"""The graft operations as differentiable functions, in eager code and under a compiler.

In eager code an ``autograd.Function`` goes around the operation and skips PyTorch's dispatcher. While something traces
(``torch.compile``, fake tensors, ``torch.jit.trace``), the call goes through the operation's overload, which has the
same derivative. ``create_graph=True`` works in eager code: the gradient is then computed by the reference, whose
operations PyTorch can differentiate again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.ops.graft import bank_reference, elementwise_reference
from esper.ops.graft.bank import graft_bank, graft_bank_backward
from esper.ops.graft.elementwise import graft_elementwise, graft_elementwise_backward
from esper.ops.registry import Backend, Op, define, implements

__all__ = [
    "Gradients",
    "aligned",
    "blend_bank",
    "blend_elementwise",
    "check_versions",
    "graft_alpha",
    "through",
    "traced_through",
    "twice",
]

_compiling: Callable[[], bool] = torch.compiler.is_compiling
Gradients = tuple[Tensor | None, ...]

#: Alpha as it is now. A compiler recomputes a plain copy in the backward from what alpha is by then; an operation that
#: it knows nothing of is kept.
graft_alpha = define(
    "graft_alpha",
    "(Tensor alpha) -> Tensor",
    doc="a copy of alpha that a compiled backward finds as it was in the forward",
    fake=lambda alpha: torch.empty_like(alpha),
)


def _copied(alpha: Tensor) -> Tensor:
    return alpha.clone()


# A copy is PyTorch's on every backend: a forced one must not lack it.
for _backend in Backend:
    implements("graft_alpha", _backend)(_copied)


def traced_through(t: Tensor) -> bool:
    """Whether something follows the operations on ``t``, so that they must go through PyTorch's dispatcher."""
    return (
        _compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or type(t) not in (Tensor, torch.nn.Parameter)
    )


def blend_bank(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    down: Tensor,
    value: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    value_bias: Tensor | None,
    seats: Sequence[int],
    activation: str | None,
    versions: Callable[[], bytes] | None = None,
) -> tuple[Tensor, Tensor]:
    """:data:`graft_bank` with a derivative for x, h and the weights.

    Args:
        x: As :data:`graft_bank` has it, like all up to ``activation``.
        h: See ``x``.
        alpha: See ``x``; the backward uses it as it is now.
        down: See ``x``.
        value: See ``x``.
        up: See ``x``.
        bias: See ``x``.
        value_bias: See ``x``.
        seats: See ``x``.
        activation: See ``x``.
        versions: For weights whose changes PyTorch cannot see, because they alias parameters: something that differs
            after a change. The backward then refuses, as PyTorch does for tensors it has saved.

    Returns:
        y and the faults, uint8 ``[seeds]``.
    """
    if traced_through(h):
        assert graft_bank.overload is not None and graft_alpha.overload is not None
        kept = graft_alpha.overload(alpha)
        y, faults = graft_bank.overload(x, h, kept, down, value, up, bias, value_bias, list(seats), activation)
    elif torch.is_grad_enabled():
        weights = (down, value, up, bias, value_bias)
        y, faults = _Bank.apply(versions, seats, activation, alpha, x, h, *weights)
    else:
        y, faults = graft_bank(x, h, aligned(alpha), down, value, up, bias, value_bias, seats, activation)
    return y, faults


def blend_elementwise(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """:data:`graft_elementwise` with a derivative for x, h, scale and shift.

    The arguments are those of the operation; the backward uses alpha as it is now.

    Returns:
        y and the faults, uint8 ``[seeds]``.
    """
    if traced_through(h):
        assert graft_elementwise.overload is not None and graft_alpha.overload is not None
        kept = graft_alpha.overload(alpha)
        y, faults = graft_elementwise.overload(x, h, kept, scale, shift, list(places), activation, dim)
    elif torch.is_grad_enabled():
        y, faults = _Elementwise.apply(places, activation, dim, alpha, x, h, scale, shift)
    else:
        y, faults = graft_elementwise(x, h, aligned(alpha), scale, shift, places, activation, dim)
    return y, faults


def aligned(alpha: Tensor) -> Tensor:
    """The same numbers at an address that kernels are compiled for; a layer's rows may begin anywhere."""
    return alpha if alpha.data_ptr() % 16 == 0 else alpha.clone()


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        versions: Callable[[], bytes] | None,
        seats: Sequence[int],
        activation: str | None,
        alpha: Tensor,
        x: Tensor,
        h: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # A copy because alpha moves; and a row of the lattice need not lie where kernels load fastest.
        alpha = alpha.clone()
        y, faults = graft_bank(x, h, alpha, *weights, seats, activation)
        ctx.save_for_backward(x, alpha, faults, *weights)
        ctx.seats, ctx.activation = seats, activation
        ctx.versions = None if versions is None else (versions, versions())
        ctx.mark_non_differentiable(faults)
        ctx.set_materialize_grads(False)
        return y, faults

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Gradients:
        check_versions(ctx.versions)
        return (None, None, None, None, *_bank_gradients(ctx, gy, ctx.needs_input_grad[4:]))


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        places: Sequence[int],
        activation: str | None,
        dim: int,
        alpha: Tensor,
        x: Tensor,
        h: Tensor,
        scale: Tensor,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        alpha = alpha.clone()
        y, faults = graft_elementwise(x, h, alpha, scale, shift, places, activation, dim)
        ctx.save_for_backward(x, alpha, faults, scale, shift)
        ctx.places, ctx.activation, ctx.dim = places, activation, dim
        ctx.mark_non_differentiable(faults)
        ctx.set_materialize_grads(False)
        return y, faults

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Gradients:
        return (None, None, None, None, *_elementwise_gradients(ctx, gy, ctx.needs_input_grad[4:]))


def check_versions(kept: tuple[Callable[[], bytes], bytes] | None) -> None:
    """Raise RuntimeError if weights that alias parameters changed since ``kept``."""
    if kept is not None and kept[0]() != kept[1]:
        raise RuntimeError(
            "a seed's parameters were modified in place between forward and backward, so its gradient cannot be "
            "computed; call the optimizer after backward"
        )


def _bank_gradients(ctx: Any, gy: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """For x, h and the five weights; None where not needed."""
    if gy is None:
        return (None,) * 7
    x, alpha, faults, *weights = ctx.saved_tensors
    seats = list(ctx.seats)
    if torch.is_grad_enabled():
        found = twice(
            lambda x, h, d, v, u, b, c: bank_reference.bank_blend(
                x, h, alpha, d, v, u, b, c, seats, ctx.activation
            )[0],
            gy, (x, torch.zeros_like(gy), *weights), needs,
        )  # fmt: skip
        return _contained(found, gy, faults)
    # Without a replace seed h's gradient is y's, faults or not: nothing to compute.
    replaces = any(seats[3::6])
    wants = needs[0], needs[1] and replaces, any(needs[2:])
    gx, gh, *rest = through(graft_bank_backward, gy)(gy, x, alpha, faults, *weights, seats, ctx.activation, *wants)
    return _needed((gx, gh if replaces else gy, *rest), needs)


def _elementwise_gradients(ctx: Any, gy: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """For x, h, scale and shift; None where not needed."""
    if gy is None:
        return (None,) * 4
    x, alpha, faults, scale, shift = ctx.saved_tensors
    places = list(ctx.places)
    kind = places, ctx.activation, ctx.dim
    if torch.is_grad_enabled():
        found = twice(
            lambda x, h, a, b: elementwise_reference.elementwise_blend(x, h, alpha, a, b, *kind),
            gy, (x, torch.zeros_like(gy), scale, shift), needs,
        )  # fmt: skip
        return _contained(found, gy, faults)
    replaces = any(places[3::4])
    wants = needs[0], needs[1] and replaces, any(needs[2:])
    run = through(graft_elementwise_backward, gy)
    gx, gh, *rest = run(gy, x, alpha, faults, scale, shift, *kind, *wants)
    return _needed((gx, gh if replaces else gy, *rest), needs)


def through(op: Op, t: Tensor) -> Callable[..., Any]:
    """The operation, or its overload where something follows what happens to ``t``."""
    return op.overload if op.overload is not None and traced_through(t) else op


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    return tuple(g if wanted else None for g, wanted in zip(gradients, needs, strict=True))


def twice(
    blend: Callable[..., Tensor], gy: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> Gradients:
    """The gradients of ``blend(*inputs)`` for what needs one, and such that they can be differentiated again."""
    # Aliases: one input may have been computed from another, and that path is not this operation's.
    aliases = [None if t is None else t.view_as(t).requires_grad_() for t in inputs]
    wanted = [t for t, needed in zip(aliases, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(blend(*aliases), wanted, gy, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed and t is not None else None for t, needed in zip(aliases, needs, strict=True))


def _contained(gradients: Gradients, gy: Tensor, faults: Tensor) -> Gradients:
    """After a fault h, the second, gets y's gradient and the rest 0."""
    fault = (faults != 0).any()
    return tuple(None if g is None else torch.where(fault, gy if i == 1 else 0.0, g) for i, g in enumerate(gradients))


def _register() -> None:
    """Give the overloads their derivatives."""

    def bank_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, alpha, *weights, seats, activation = inputs
        ctx.save_for_backward(x, alpha, output[1], *weights)
        ctx.seats, ctx.activation = seats, activation
        ctx.set_materialize_grads(False)

    def bank_backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Gradients:
        needs = ctx.needs_input_grad
        gx, gh, *rest = _bank_gradients(ctx, gy, (*needs[:2], *needs[3:8]))
        return (gx, gh, None, *rest, None, None)

    def elementwise_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, alpha, scale, shift, places, activation, dim = inputs
        ctx.save_for_backward(x, alpha, output[1], scale, shift)
        ctx.places, ctx.activation, ctx.dim = places, activation, dim
        ctx.set_materialize_grads(False)

    def elementwise_backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Gradients:
        needs = ctx.needs_input_grad
        gx, gh, *rest = _elementwise_gradients(ctx, gy, (*needs[:2], *needs[3:5]))
        return (gx, gh, None, *rest, None, None, None)

    register = torch.library.register_autograd
    register("esper::graft_bank", bank_backward, setup_context=bank_context)
    register("esper::graft_elementwise", elementwise_backward, setup_context=elementwise_context)


_register()
