"""All low-rank seeds of a layer as one operation: what a compiler calls on a CPU.

A compiler sees nothing but operations, and pays a microsecond or two for each that it does not write itself. So one
operation takes the seeds' parameters as they are, and what changes while a network grows (which seeds are awake, their
ranks, activations, places and alphas) comes in small tensors that it reads: the graph stays as it is. Its CPU kernel is
C++ in PyTorch's dispatcher (``csrc/graft_seeds.cpp``), with no Python between a compiled graph and it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.ops import native
from esper.ops.graft.variants import ACTIVATION_CODES
from esper.ops.registry import Backend, BackendUnavailableError, define, implements, route, unavailable

__all__ = [
    "ACTIVATIONS",
    "KEPT",
    "Plan",
    "blend_seeds",
    "check_seeds",
    "compiled_here",
    "gradient_like",
    "graft_seeds",
    "graft_seeds_backward",
]


class Plan(IntEnum):
    """Columns of a plan, int32 ``[S, 6]``; a line of zeros is a seed that sleeps."""

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


#: Columns of what a forward keeps: the plan, and alpha.
KEPT = len(Plan) + 1

#: What a seed's code stands for, from 1.
ACTIVATIONS: tuple[str | None, ...] = tuple(ACTIVATION_CODES)


def check_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    plan: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    """Raise ValueError unless the tensors fit; ``h`` may be its gradient."""
    count = len(downs)
    if x.dim() == 0 or x.shape[:-1] != h.shape[:-1] or x.dtype is not h.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and h {h.dtype} {tuple(h.shape)}; "
            "dtype and all but the last dimension must agree"
        )
    if plan.dtype is not torch.int32 or tuple(plan.shape) != (count, len(Plan)):
        raise ValueError(f"plan is {plan.dtype} {tuple(plan.shape)}; {count} seeds need int32 {(count, len(Plan))}")
    if alpha.dtype is not torch.float32 or alpha.dim() != 1 or alpha.shape[0] < count:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)}; {count} seeds need as many float32")
    if len(ups) != count or len(biases) not in (0, count):
        raise ValueError(f"{count} ways down, {len(ups)} ways up and {len(biases)} biases do not belong together")
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] != x.shape[-1] or up.shape[1] != down.shape[0]:
            raise ValueError(f"seed {i}: down is {tuple(down.shape)} and up {tuple(up.shape)} for x {tuple(x.shape)}")


def _fake_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    plan: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        torch.empty(len(downs), dtype=torch.uint8, device=h.device),
        plan.new_empty(plan.shape[0], KEPT),
    )


def gradient_like(parameter: Tensor, wanted: bool) -> Tensor:
    """Memory for a parameter's gradient, laid out as the parameter is; empty if not wanted."""
    if not wanted:
        return parameter.new_empty(0)
    if parameter.dim() == 2 and min(parameter.shape) > 1 and parameter.stride(0) < parameter.stride(1):
        return parameter.new_empty(parameter.shape[::-1]).t()
    return parameter.new_empty(parameter.shape)


def _fake_backward(
    gy: Tensor,
    x: Tensor,
    effect: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor],
    want_x: bool,
    want_h: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    return (
        x.new_empty(x.shape if want_x else 0),
        gy.new_empty(gy.shape if want_h else 0),
        [gradient_like(t, want_weights) for t in downs],
        [gradient_like(t, want_weights) for t in ups],
        [gradient_like(t, want_weights) for t in biases],
    )


#: y, faults, and what took effect, for the backward.
#:
#: Seed s contributes ``act_s(x @ down_s.T + bias_s) @ up_s.T`` with its coefficient; docs/grafts.md has the formula.
#:
#: - ``x``: ``[..., d_in]``, ``h``: ``[..., d_out]``, float32 or float64; nothing rounds in between.
#: - ``alpha``: float32, one a seed. ``plan``: int32 ``[S, 6]``, see :class:`Plan`.
#: - ``downs``: ``[R, d_in]`` each, ``ups``: ``[d_out, R]`` or ``[its own features, R]``, ``biases``: ``[R]``, or none
#:   at all. R may differ from seed to seed and be larger than the plan's rank: what is beyond is not read.
#:
#: ``y`` is the blend, or h in full if a seed is at fault; ``faults`` uint8 ``[S]`` says which; ``effect`` int32
#: ``[S, 7]`` is the plan with the bits of alpha as one more column, and after a fault all seeds asleep.
graft_seeds = define(
    "graft_seeds",
    "(Tensor x, Tensor h, Tensor alpha, Tensor plan, Tensor[] downs, Tensor[] ups, Tensor[] biases) -> "
    "(Tensor y, Tensor faults, Tensor effect)",
    doc="a layer's low-rank seeds from their own parameters, for compiled graphs on a CPU",
    fake=_fake_seeds,
    cpu_route=False,
)

#: Gradients of y for x, h and the parameters, each laid out as its parameter; after a fault gy for h and 0 for the
#: rest. What is not wanted comes back empty.
graft_seeds_backward = define(
    "graft_seeds_backward",
    "(Tensor gy, Tensor x, Tensor effect, Tensor[] downs, Tensor[] ups, Tensor[] biases, bool want_x, bool want_h, "
    "bool want_weights) -> (Tensor gx, Tensor gh, Tensor[] gdowns, Tensor[] gups, Tensor[] gbiases)",
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
    libraries = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    path = next((libraries / name for name in names if (libraries / name).exists()), libraries / names[0])
    reason: str = module.install_torch_kernels(str(path), {op.name: op.schema for op in _OPS})
    return reason


_reason = _install()
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
        plan: Tensor,
        replaces: bool,
        count: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        assert graft_seeds.overload is not None
        groups = _groups(weights, count)
        y, faults, effect = graft_seeds.overload(x, h, alpha, plan, *groups)
        ctx.save_for_backward(x, effect, *weights)
        ctx.count, ctx.replaces = count, replaces
        ctx.mark_non_differentiable(faults)
        return y, faults

    @staticmethod
    def backward(ctx: Any, gy: Tensor, _: Tensor) -> tuple[Any, ...]:
        x, effect, *weights = ctx.saved_tensors
        want_x, want_h = ctx.needs_input_grad[:2]
        want_weights = any(ctx.needs_input_grad[6:])
        assert graft_seeds_backward.overload is not None
        gx, gh, downs, ups, biases = graft_seeds_backward.overload(
            gy, x, effect, *_groups(weights, ctx.count), want_x, want_h and ctx.replaces, want_weights
        )
        # Without a replace seed h's gradient is y's, faults or not.
        found = [*downs, *ups, *biases] if want_weights else [None] * len(weights)
        return gx if want_x else None, gh if ctx.replaces else gy, None, None, None, None, *found


def _groups(weights: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(weights[:count]), list(weights[count : 2 * count]), list(weights[2 * count :])


def blend_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    plan: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    biases: Sequence[Tensor],
    replaces: bool,
) -> tuple[Tensor, Tensor]:
    """:data:`graft_seeds` with a derivative for x, h and the parameters, for code that a compiler traces.

    Args:
        x: As :data:`graft_seeds` has it, like all up to ``biases``.
        h: See ``x``.
        alpha: See ``x``.
        plan: See ``x``.
        downs: See ``x``.
        ups: See ``x``.
        biases: See ``x``.
        replaces: Whether any seed may have mode replace; without, h's gradient is y's.

    Returns:
        y and the faults, uint8 ``[S]``.
    """
    if x is h:  # a compiler does not follow one tensor in two roles
        x = h.view_as(h)
    if torch.is_grad_enabled():
        y, faults = _Seeds.apply(x, h, alpha, plan, replaces, len(downs), *downs, *ups, *biases)
    else:
        assert graft_seeds.overload is not None
        y, faults, _ = graft_seeds.overload(x, h, alpha, plan, list(downs), list(ups), list(biases))
    return y, faults
