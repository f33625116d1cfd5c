"""Low-rank seeds in graphs that ``torch.compile`` makes for a CPU: one operation a layer, see `esper.ops.graft.seeds`.

Left to the compiler, every seed is two products, an activation and a look at what came out, each a call of its own or a
loop over memory. The operation does all of it in one pass, as eager code does, and contains faults in C++.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.execution.grafts.bank_kernel import bank_eligible
from esper.execution.grafts.seed import BoundSeed
from esper.ops.graft.seeds import ACTIVATIONS, Plan, blend_seeds, compiled_here
from esper.ops.graft.variants import SEATS

__all__ = ["Sheet", "fits", "run", "serves", "sheet_of"]

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sheet:
    """Seeds that run as the operation.

    This is all that a traced layer reads of them: whatever it reads is compared again before every call of its graph.

    Attributes:
        plan: See :class:`esper.ops.graft.seeds.Plan`; on the CPU. Not to be written to: like layers share it.
        homes: Where the weights are, in the operation's order: a module's parameters by kind, as they are replaced
            under ``functional_call``. None for a bias that a seed does not have.
        reads_input: Whether they read what the host read.
        rows_alone: Whether the features are the last dimension only where there are two.
        replaces: Whether any has mode replace.
    """

    plan: Tensor
    homes: tuple[dict[str, Tensor | None] | None, ...]
    reads_input: bool
    rows_alone: bool
    replaces: bool


def sheet_of(
    seeds: Sequence[BoundSeed], weights: Sequence[nn.Module], dtype: torch.dtype, channel_dim: int
) -> Sheet | None:
    """How the seeds run as the operation, or None where they do not.

    Args:
        seeds: All that are bound.
        weights: Their parameters.
        dtype: Of the layer.
        channel_dim: Where the features are: -1, or 1 which is the last dimension of rows alone.
    """
    if not 0 < len(seeds) <= SEATS or not compiled_here() or not bank_eligible(seeds, dtype, torch.device("cpu")):
        return None
    lines = []
    downs: list[dict[str, Tensor | None] | None] = []
    ups: list[dict[str, Tensor | None] | None] = []
    biases: list[dict[str, Tensor | None] | None] = []
    for seed, module in zip(seeds, weights, strict=True):
        nodes = [_home(module, seed.family.tensor(role)) for role in ("down", "up")]
        biased = "down" in seed.family.biases
        downs.append(nodes[0])
        ups.append(nodes[1])
        biases.append(_home(module, seed.family.tensor("down", "bias")) if biased else None)
        down = nodes[0]["weight"]
        assert down is not None
        line = [0] * len(Plan)
        line[Plan.CODE] = 1 + ACTIVATIONS.index(seed.family.activation)
        line[Plan.RANK] = down.shape[0]
        line[Plan.BEGIN], line[Plan.END] = seed.place.begin, seed.place.end
        line[Plan.REPLACE] = int(seed.place.replace)
        line[Plan.BIASED] = int(biased)
        line[Plan.ROW] = seed.place.index
        lines.append(tuple(line))
    return Sheet(
        _plan_of(tuple(lines)),
        (*downs, *ups, *(biases if any(biases) else ())),
        seeds[0].reads_input,
        channel_dim != -1,
        any(seed.place.replace for seed in seeds),
    )


@functools.lru_cache(maxsize=1024)
def _plan_of(lines: tuple[tuple[int, ...], ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(lines, dtype=torch.int32, device="cpu")


def _home(weights: nn.Module, name: str) -> dict[str, Tensor | None]:
    home: dict[str, Tensor | None] = weights.get_submodule(name.rpartition(".")[0])._parameters  # type: ignore[assignment]
    return home


def serves(h: Tensor) -> bool:
    """Whether a graph is made now, for a CPU, and to be run by this process: an exported one must do without Esper."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and h.device.type == "cpu"


def fits(tap: Tensor, h: Tensor, dim: int) -> bool:
    """Whether these tensors are rows of features in a dtype of the operation."""
    return (
        dim == h.dim() - 1
        and not h.is_nested
        and h.dtype in _DTYPES
        and tap.dtype is h.dtype
        and tap.shape[:-1] == h.shape[:-1]
        and not hasattr(h, "device_mesh")  # spread over a mesh of devices: the operation knows nothing of that
    )


def run(sheet: Sheet, x: Tensor, h: Tensor, alpha: Tensor, flags: Tensor, first_row: int) -> Tensor | None:
    """Blend the seeds into ``h``.

    Args:
        sheet: From :func:`sheet_of`.
        x: What the host read.
        h: Its output.
        alpha: Of all seeds that share a lattice.
        flags: Their faults, which those of this call are added to.
        first_row: Where the layer's are among them.

    Returns:
        y, or None where these tensors need the traced way.
    """
    tap = x if sheet.reads_input else h
    if not fits(tap, h, 1 if sheet.rows_alone else h.dim() - 1):
        return None
    weights = []
    first_bias = 2 * sheet.plan.shape[0]
    for i, home in enumerate(sheet.homes):
        if home is None:
            weights.append(h.new_empty(0))
            continue
        weight = home.get("weight" if i < first_bias else "bias")
        if weight is None or weight.dtype is not h.dtype:
            return None
        weights.append(weight)
    if weights[0].shape[-1] != tap.shape[-1]:  # an activation lets any shape through
        return None
    return blend_seeds(tap, h, alpha, flags, sheet.plan, weights, first_row, sheet.replaces)
