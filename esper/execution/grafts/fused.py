"""Seeds of one kind as one operation, products included: what a layer runs on a GPU where its seeds allow it.

Two kinds have such an operation: banks (``lowrank``, ``bottleneck``, ``gated``) and elementwise seeds. All seeds of the
layer must be of one kind and share tap, activation and norm: the operation also decides who is at fault, and a fault of
any seed gives the host's output for the whole layer, so two operations for the two halves of a layer would each have to
know the other's faults. A mixed layer takes the traced way.

The weights stand side by side in two forms. In eager code a :class:`~esper.execution.grafts.device_bank.DeviceBank`
keeps them in one buffer. Here, for compilers and wherever there is no such buffer, they are joined at every call by
differentiable concatenation, which a compiler turns into one kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.blueprints import interpret
from esper.execution.grafts.seed import BoundSeed
from esper.ops.graft.autograd import blend_bank, blend_elementwise
from esper.ops.graft.bank import bank_layout
from esper.ops.graft.triton import tables
from esper.ops.graft.triton_blend import seats_on
from esper.ops.graft.variants import BANK_FAMILIES, SEATS

__all__ = [
    "BankPlan",
    "ElementwisePlan",
    "Plan",
    "bank_weights",
    "elementwise_weights",
    "plan_of",
    "prepared",
    "raise_flags",
    "rows_of",
    "run",
    "runs_of",
    "serves",
    "upload",
]

#: Stretches of neighbouring seeds: first seed of the layer, one past the last, position of the first among the bound.
Runs = tuple[tuple[int, int, int], ...]


def serves(device: torch.device) -> bool:
    """Whether the operations are for this device. On a CPU the native bank and PyTorch's operations are faster."""
    return device.type == "cuda"


@dataclass(frozen=True)
class BankPlan:
    """Seeds that are one bank.

    Attributes:
        seeds: In the order of the bank's rows.
        ranks: Rows of each.
        seats: As :data:`esper.ops.graft.graft_bank` has them.
        gated: Whether there are two products down.
        biased: Whether any seed has a bias on its way down; the others' is 0.
        d_in: Features of the tap.
        d_out: Features of the layer.
    """

    seeds: tuple[BoundSeed, ...]
    ranks: tuple[int, ...]
    seats: tuple[int, ...]
    gated: bool
    biased: bool
    d_in: int
    d_out: int

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the products down, in the operation's order."""
        return ("gate", "value") if self.gated else ("down",)


@dataclass(frozen=True)
class ElementwisePlan:
    """Elementwise seeds.

    Attributes:
        seeds: In order.
        places: As :data:`esper.ops.graft.graft_elementwise` has them.
        shifted: Whether any seed has a shift; the others' is 0.
        d_out: Features of the layer.
    """

    seeds: tuple[BoundSeed, ...]
    places: tuple[int, ...]
    shifted: bool
    d_out: int


Plan = BankPlan | ElementwisePlan


def plan_of(
    seeds: Sequence[BoundSeed], tensors: Sequence[Mapping[str, Tensor]], d_in: int | None, d_out: int
) -> Plan | None:
    """How the seeds run as one operation, or None where they do not.

    Args:
        seeds: All that are bound.
        tensors: Their parameters by the blueprints' names.
        d_in: Features of the layer's input.
        d_out: Of its output.
    """
    if not 0 < len(seeds) <= SEATS or any(s.strided != (1, 1) for s in seeds):
        return None
    first = seeds[0].family
    kinds = {(s.family.activation, s.family.norm, s.family.eps, s.reads_input) for s in seeds}
    if len(kinds) != 1:
        return None
    if all(s.family.name == "elementwise" for s in seeds):
        places = [int(n) for s in seeds for n in (s.place.index, s.place.begin, s.place.end, s.place.replace)]
        shifted = any("shift" in s.family.roles for s in seeds)
        return ElementwisePlan(tuple(seeds), tuple(places), shifted, d_out)
    gated = first.name == "gated"
    d_tap = d_in if seeds[0].reads_input else d_out
    if d_tap is None or any(s.family.name not in BANK_FAMILIES or (s.family.name == "gated") != gated for s in seeds):
        return None
    role = "gate" if gated else "down"
    ranks = [t[s.family.tensor(role)].shape[0] for s, t in zip(seeds, tensors, strict=True)]
    ends = list(itertools.accumulate(ranks))
    seats = [
        int(n)
        for s, rank, end in zip(seeds, ranks, ends, strict=True)
        for n in (s.place.index, s.place.begin, s.place.end, s.place.replace, end - rank, end)
    ]
    biased = any(s.family.biases for s in seeds)
    return BankPlan(tuple(seeds), tuple(ranks), tuple(seats), gated, biased, d_tap, d_out)


def runs_of(seeds: Sequence[int]) -> Runs:
    """Ascending indices as stretches of neighbours."""
    runs: list[tuple[int, int, int]] = []
    for position, seed in enumerate(seeds):
        if runs and runs[-1][1] == seed:
            runs[-1] = (runs[-1][0], seed + 1, runs[-1][2])
        else:
            runs.append((seed, seed + 1, position))
    return tuple(runs)


def upload(plan: Plan, device: torch.device) -> None:
    """Have the tables that a plan's kernels read on their device, before its first call; nobody waits for them.

    That call may be a compiled one which PyTorch makes a CUDA graph of, and in which all memory is the graph's own.
    """
    if isinstance(plan, ElementwisePlan):
        seats_on(plan.places, device)
    else:
        tables(bank_layout(plan.seats, plan.d_out, sum(plan.ranks)), plan.seats, device)


def raise_flags(flags: Tensor, runs: Runs, faults: Tensor) -> None:
    """Add ``faults``, one a bound seed, to the layer's flags: a launch a stretch, and nothing copied from the host."""
    for begin, end, at in runs:
        flags[begin:end].bitwise_or_(faults[at : at + end - begin])


def rows_of(t: Tensor, dim: int) -> Tensor | None:
    """``t`` with its features last where that costs no copy, else None.

    That is, rows of features, and images in ``channels_last``. Images in PyTorch's default format take the traced way,
    whose 1x1 convolutions read them as they are: two transposed copies in front of the operation, and a result in the
    other format behind it, would cost the rest of the network more than the operation saves.
    """
    if dim == t.dim() - 1:
        return t
    if dim == 1 and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1)
    return None


def run(
    plan: Plan, tensors: Sequence[Mapping[str, Tensor]], tap: Tensor, h: Tensor, alpha: Tensor, dim: int
) -> tuple[Tensor, Tensor] | None:
    """Blend the seeds into ``h``.

    Args:
        plan: From :func:`plan_of`.
        tensors: The seeds' parameters.
        tap: What they read.
        h: The host's output.
        alpha: The layer's alphas.
        dim: Dimension of the features, not negative.

    Returns:
        y and the faults, or None where these tensors need the traced way.
    """
    if tap.dim() != h.dim() or h.shape[dim] != plan.d_out:
        return None
    if isinstance(plan, ElementwisePlan):
        if tap.shape != h.shape:
            return None
        scale, shift = elementwise_weights(plan, tensors, h.dtype)
        return blend_elementwise(
            tap.to(h.dtype), h, alpha, scale, shift, plan.places, plan.seeds[0].family.activation, dim
        )
    x, rows = rows_of(tap, dim), rows_of(h, dim)
    if x is None or rows is None or x.shape[:-1] != rows.shape[:-1] or x.shape[-1] != plan.d_in:
        return None
    y, faults = blend_bank(
        prepared(plan, x, rows.dtype), rows, alpha, *bank_weights(plan, tensors, rows.dtype), plan.seats,
        plan.seeds[0].family.activation,
    )  # fmt: skip
    return (y if rows is h else y.permute(0, 3, 1, 2)), faults


def prepared(plan: BankPlan, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tap as the bank reads it: through the seeds' norm, in the dtype of the host's output.

    Under autocast the host gives halves while the tap may be float32; the seeds follow the host.
    """
    family = plan.seeds[0].family
    if family.norm is not None:
        assert family.eps is not None
        x = interpret.normalise(family.norm, x, family.eps)
    return x.to(dtype)


def bank_weights(
    plan: BankPlan, tensors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """down, value, up, bias and value_bias, differentiable in the parameters."""
    pairs = list(zip(plan.seeds, tensors, strict=True))
    down = [torch.cat([t[s.family.tensor(role)].to(dtype) for s, t in pairs]) for role in plan.roles]
    ups = [_widened(t[s.family.tensor("up")].t().to(dtype), s, plan.d_out) for s, t in pairs]
    biases: list[Tensor | None] = [None, None]
    if plan.biased:
        for i, role in enumerate(plan.roles):
            biases[i] = torch.cat(
                [
                    t[s.family.tensor(role, "bias")].to(dtype) if role in s.family.biases else down[0].new_zeros(rank)
                    for (s, t), rank in zip(pairs, plan.ranks, strict=True)
                ]
            )
    return down[0], down[1] if plan.gated else None, torch.cat(ups), biases[0], biases[1]


def elementwise_weights(
    plan: ElementwisePlan, tensors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The scales and the shifts, ``[seeds, d_out]``."""
    pairs = list(zip(plan.seeds, tensors, strict=True))
    scale = torch.stack([_widened(t[s.family.tensor("scale")].to(dtype), s, plan.d_out) for s, t in pairs])
    if not plan.shifted:
        return scale, None
    # Minus zero adds nothing to any number, the sign of zero included.
    rows = [
        _widened(t[s.family.tensor("shift", "bias")].to(dtype), s, plan.d_out)
        if "shift" in s.family.roles
        else torch.full_like(scale[0], -0.0)
        for s, t in pairs
    ]
    return scale, torch.stack(rows)


def _widened(t: Tensor, seed: BoundSeed, d_out: int) -> Tensor:
    """The seed's own features in their places among all of the layer's, 0 elsewhere."""
    place = seed.place
    return t if place.end - place.begin == d_out else F.pad(t, (place.begin, d_out - place.end))
