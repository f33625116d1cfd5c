"""All low-rank seeds of a layer as one operation: what a compiler calls on a CPU.

A compiler sees nothing but operations, and pays a microsecond or two for each that it does not write itself. So one
operation takes the seeds' parameters as they are, and what changes while a network grows (which seeds are awake, their
ranks, activations, places and alphas) comes in small tensors that it reads: the graph stays as it is. Its CPU kernel is
C++ in PyTorch's dispatcher (``csrc/graft_seeds.cpp``), with no Python between a compiled graph and it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from esper.ops import native
from esper.ops.graft.inductor import call_directly, offer
from esper.ops.graft.variants import ACTIVATION_CODES
from esper.ops.registry import Backend, BackendUnavailableError, define, implements, route, unavailable

__all__ = [
    "ACTIVATIONS",
    "ALPHA",
    "Plan",
    "blend_seeds",
    "check_rows",
    "check_seeds",
    "compiled_here",
    "gradients_for",
    "graft_seeds",
    "graft_seeds_backward",
    "groups_of",
    "results_for",
]


class Plan(IntEnum):
    """Columns of a plan, int32 ``[S, 7]``; a line of zeros is a seed that sleeps."""

    #: 0 while the seed sleeps, else 1 + the activation's place in :data:`ACTIVATIONS`.
    CODE = 0
    #: Rows that the kernel occupies.
    RANK = 1
    #: First feature that it changes.
    BEGIN = 2
    #: One past the last.
    END = 3
    #: 1 for mode ``replace``.
    REPLACE = 4
    #: 1 where the kernel has a bias.
    BIASED = 5
    #: Its place in its layer.
    ROW = 6


#: The column that what took effect has beyond the plan's: the bits of alpha.
ALPHA = len(Plan)

#: What a seed's code stands for, from 1.
ACTIVATIONS: tuple[str | None, ...] = tuple(ACTIVATION_CODES)


def groups_of(weights: Sequence[Tensor], seeds: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ways down, ways up and biases.

    Raises:
        ValueError: the list is not made of two or three for each seed.
    """
    if len(weights) not in (2 * seeds, 3 * seeds):
        raise ValueError(
            f"{len(weights)} weights for {seeds} seeds: each has a way down and one up, and all a bias or none"
        )
    return list(weights[:seeds]), list(weights[seeds : 2 * seeds]), list(weights[2 * seeds :])


def check_rows(alpha: Tensor, flags: Tensor, plan: Tensor, first_row: int) -> None:
    """Raise ValueError unless every line of the plan has an alpha and a flag."""
    if alpha.dtype is not torch.float32 or alpha.dim() != 1:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)}, not a row of float32")
    if flags.dtype is not torch.uint8 or flags.shape != alpha.shape:
        raise ValueError(f"flags are {flags.dtype} {tuple(flags.shape)}, not uint8 {tuple(alpha.shape)}")
    rows = [first_row + row for row in plan[:, Plan.ROW].tolist()]
    if not all(0 <= row < alpha.shape[0] for row in rows):
        raise ValueError(f"the plan's seeds are in rows {rows}, of {alpha.shape[0]}")


def check_seeds(x: Tensor, h: Tensor, plan: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise ValueError unless the tensors fit; ``h`` may be its gradient."""
    if x.dim() == 0 or x.shape[:-1] != h.shape[:-1] or x.dtype is not h.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and h {h.dtype} {tuple(h.shape)}; "
            "dtype and all but the last dimension must agree"
        )
    if plan.dtype is not torch.int32 or plan.dim() != 2 or plan.shape[1] != len(Plan):
        raise ValueError(f"plan is {plan.dtype} {tuple(plan.shape)}, not int32 {('seeds', len(Plan))}")
    downs, ups, _ = groups_of(weights, plan.shape[0])
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] != x.shape[-1] or up.shape[1] != down.shape[0]:
            raise ValueError(f"seed {i}: down is {tuple(down.shape)} and up {tuple(up.shape)} for x {tuple(x.shape)}")


def _fake_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    flags: Tensor,
    plan: Tensor,
    weights: Sequence[Tensor],
    first_row: int,
    y: Tensor,
    effect: Tensor,
) -> None:
    """Everything is written to what is there."""
    _compiler_is_here()


def results_for(h: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for y and the effect."""
    return h.new_empty(h.shape), plan.new_empty(plan.shape[0], len(Plan) + 1)


def gradients_for(
    gy: Tensor, x: Tensor, weights: Sequence[Tensor], want_x: bool, want_h: bool, want_weights: bool
) -> list[Tensor]:
    """Memory for the gradients that are wanted."""
    gx, gh = [x.new_empty(x.shape)] if want_x else [], [gy.new_empty(gy.shape)] if want_h else []
    return [*gx, *gh, *(gradient_like(t) for t in weights if want_weights)]


def gradient_like(parameter: Tensor) -> Tensor:
    """Memory for a parameter's gradient, laid out as the parameter is: an optimizer then reads both in order."""
    if parameter.dim() == 2 and min(parameter.shape) > 1 and parameter.stride(0) < parameter.stride(1):
        return parameter.new_empty_strided(parameter.shape, (1, parameter.shape[0]))
    return parameter.new_empty(parameter.shape)


def _fake_backward(
    gy: Tensor,
    x: Tensor,
    effect: Tensor,
    weights: Sequence[Tensor],
    want_x: bool,
    want_h: bool,
    want_weights: bool,
    grads: Sequence[Tensor],
) -> None:
    """Everything is written to what is there."""
    _compiler_is_here()


def _compiler_is_here() -> None:
    if torch.compiler.is_compiling():
        for op in _OPS:
            assert op.overload is not None
            call_directly(op.overload)


#: The blend into ``y``, and what took effect into ``effect``, for the backward.
#:
#: Seed s contributes ``act_s(x @ down_s.T + bias_s) @ up_s.T`` with its coefficient; docs/grafts.md has the formula.
#:
#: - ``x``: ``[..., d_in]``, ``h``: ``[..., d_out]``, float32 or float64; nothing rounds in between.
#: - ``alpha``: float32, of all seeds of a lattice: those of several layers come into a graph as one tensor. ``flags``:
#:   uint8, as many; that of a seed at fault is set to 1.
#: - ``plan``: int32 ``[S, 7]``, see :class:`Plan`. Its rows count from ``first_row``, so that like layers share one.
#: - ``weights``: S ways down, ``[R, d_in]`` each, S ways up, ``[d_out, R]`` or ``[its own features, R]``, and S biases
#:   ``[R]`` or none at all. R may differ from seed to seed and be larger than the plan's rank: what is beyond is not
#:   read.
#:
#: - ``y``: as h, contiguous: the blend, or h in full if a seed is at fault.
#: - ``effect``: int32 ``[S, 8]``, the plan with :data:`ALPHA` as one more column; after a fault all seeds sleep in it.
#:
#: Whatever comes into a graph, crosses the dispatcher or comes out of an operation costs tenths of a microsecond,
#: results most of all: a compiler checks their shapes, and allocates faster than an operation can. Hence one list of
#: weights, results in memory that is given, and tensors that layers share.
graft_seeds = define(
    "graft_seeds",
    "(Tensor x, Tensor h, Tensor alpha, Tensor(a!) flags, Tensor plan, Tensor[] weights, int first_row, Tensor(b!) y, "
    "Tensor(c!) effect) -> ()",
    doc="a layer's low-rank seeds from their own parameters, for compiled graphs on a CPU",
    fake=_fake_seeds,
    cpu_route=False,
)

#: Gradients of y into ``grads``, those that are wanted: for x, for h, and for each of the weights. After a fault gy for
#: h and 0 for the rest.
graft_seeds_backward = define(
    "graft_seeds_backward",
    "(Tensor gy, Tensor x, Tensor effect, Tensor[] weights, bool want_x, bool want_h, bool want_weights, "
    "Tensor(a!)[] grads) -> ()",
    doc="gradients of graft_seeds",
    fake=_fake_backward,
    cpu_route=False,
)


_OPS = (graft_seeds, graft_seeds_backward)


def compiled_here() -> bool:
    """Whether the operation is native on this machine's CPU, and not told to stand back (``ESPER_BACKEND``)."""
    try:
        return graft_seeds.select("cpu").backend is Backend.CPU
    except BackendUnavailableError:  # another was asked for, which has no such operation
        return False


def _install() -> str:
    """Put the C++ kernels into the dispatcher; why not, or ""."""
    module = native.load()
    if module is None or not hasattr(module, "install_torch_kernels"):
        return native.reason() or "esper._native is older than this package; build it again"
    reason: str = module.install_torch_kernels(native.torch_library(), {op.name: op.schema for op in _OPS})
    return reason


_reason = _install()
if not _reason:
    offer(*_OPS)
for _op in _OPS:
    if _reason:
        route(_op, "CPU")
        unavailable(_op.name, Backend.CPU, _reason)
    else:
        assert _op.overload is not None
        implements(_op.name, Backend.CPU)(_op.overload)


# -- in the graph -----------------------------------------------------------------------------------------------------


class _Seeds(torch.autograd.Function):
    """The derivative, traced into the graph. Registered with the operation it would be called at run time: 5 us."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        alpha: Tensor,
        flags: Tensor,
        plan: Tensor,
        first_row: int,
        replaces: bool,
        *weights: Tensor,
    ) -> Tensor:
        assert graft_seeds.overload is not None
        y, effect = results_for(h, plan)
        graft_seeds.overload(x, h, alpha, flags, plan, list(weights), first_row, y, effect)
        ctx.save_for_backward(x, effect, *weights)
        ctx.replaces = replaces
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, effect, *weights = ctx.saved_tensors
        want_x, want_h = ctx.needs_input_grad[:2]
        want_weights = any(ctx.needs_input_grad[7:])
        want_h = want_h and ctx.replaces  # without a replace seed h's gradient is y's, faults or not
        assert graft_seeds_backward.overload is not None
        found = gradients_for(gy, x, weights, want_x, want_h, want_weights)
        graft_seeds_backward.overload(gy, x, effect, weights, want_x, want_h, want_weights, found)
        gx = found.pop(0) if want_x else None
        gh = found.pop(0) if want_h else gy
        return gx, gh, None, None, None, None, None, *(found if want_weights else [None] * len(weights))


def blend_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    flags: Tensor,
    plan: Tensor,
    weights: Sequence[Tensor],
    first_row: int,
    replaces: bool,
) -> Tensor:
    """:data:`graft_seeds` with a derivative for x, h and the parameters, for code that a compiler traces.

    Args:
        x: As :data:`graft_seeds` has it, like all up to ``first_row``.
        h: See ``x``.
        alpha: See ``x``.
        flags: See ``x``.
        plan: See ``x``.
        weights: See ``x``.
        first_row: See ``x``.
        replaces: Whether any seed may have mode replace; without, h's gradient is y's.

    Returns:
        y.
    """
    if x is h:  # a compiler does not follow one tensor in two roles
        x = h.view_as(h)
    if torch.is_grad_enabled():
        found: Tensor = _Seeds.apply(x, h, alpha, flags, plan, first_row, replaces, *weights)
        return found
    assert graft_seeds.overload is not None
    y, effect = results_for(h, plan)
    graft_seeds.overload(x, h, alpha, flags, plan, list(weights), first_row, y, effect)
    return y
