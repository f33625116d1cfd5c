"""Low-rank seeds in graphs that ``torch.compile`` makes for a CPU: one operation a layer, see `esper.ops.graft.seeds`.

Left to the compiler, every seed is two products, an activation and a look at what came out, each a call of its own or a
loop over memory. The operation does all of it in one pass, as eager code does, and contains faults in C++.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.execution.grafts.bank_kernel import bank_eligible
from esper.execution.grafts.seed import BoundSeed
from esper.ops.graft.seeds import ACTIVATIONS, Plan, blend_seeds, compiled_here
from esper.ops.graft.variants import SEATS

__all__ = ["Sheet", "fits", "run", "serves", "sheet_of"]

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sheet:
    """Seeds that run as the operation.

    Attributes:
        plan: See :class:`esper.ops.graft.seeds.Plan`; on the CPU.
        rows: Their rows of alpha.
        roles: Per seed the names of its parameters: down, up, and the bias or None.
        reads_input: Whether they read what the host read.
        replaces: Whether any has mode replace.
    """

    plan: Tensor
    rows: tuple[int, ...]
    roles: tuple[tuple[str, str, str | None], ...]
    reads_input: bool
    replaces: bool


def sheet_of(seeds: Sequence[BoundSeed], tensors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> Sheet | None:
    """How the seeds run as the operation, or None where they do not.

    Args:
        seeds: All that are bound.
        tensors: Their parameters by the blueprints' names.
        dtype: Of the layer.
    """
    if not 0 < len(seeds) <= SEATS or not compiled_here() or not bank_eligible(seeds, dtype, torch.device("cpu")):
        return None
    lines, roles = [], []
    for seed, named in zip(seeds, tensors, strict=True):
        down, up = seed.family.tensor("down"), seed.family.tensor("up")
        bias = seed.family.tensor("down", "bias") if "down" in seed.family.biases else None
        roles.append((down, up, bias))
        line = [0] * len(Plan)
        line[Plan.CODE] = 1 + ACTIVATIONS.index(seed.family.activation)
        line[Plan.RANK] = named[down].shape[0]
        line[Plan.BEGIN], line[Plan.END] = seed.place.begin, seed.place.end
        line[Plan.REPLACE] = int(seed.place.replace)
        line[Plan.BIASED] = int(bias is not None)
        lines.append(line)
    with torch.inference_mode(False):
        plan = torch.tensor(lines, dtype=torch.int32, device="cpu")
    rows = tuple(seed.place.index for seed in seeds)
    return Sheet(plan, rows, tuple(roles), seeds[0].reads_input, any(seed.place.replace for seed in seeds))


def serves(h: Tensor) -> bool:
    """Whether a graph is made now, for a CPU, and to be run by this process: an exported one must do without Esper."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and h.device.type == "cpu"


def fits(tap: Tensor, h: Tensor, dim: int) -> bool:
    """Whether these tensors are rows of features in a dtype of the operation."""
    return (
        dim == h.dim() - 1
        and h.dtype in _DTYPES
        and tap.dtype is h.dtype
        and tap.shape[:-1] == h.shape[:-1]
        and not hasattr(h, "device_mesh")  # spread over a mesh of devices: the operation knows nothing of that
    )


def run(
    sheet: Sheet, tensors: Sequence[Mapping[str, Tensor]], x: Tensor, h: Tensor, alpha: Tensor, dim: int
) -> tuple[Tensor, Tensor] | None:
    """Blend the seeds into ``h``.

    Args:
        sheet: From :func:`sheet_of`.
        tensors: The seeds' parameters.
        x: What the host read.
        h: Its output.
        alpha: The layer's alphas.
        dim: Dimension of the features, not negative.

    Returns:
        y and the faults, or None where these tensors need the traced way.
    """
    tap = x if sheet.reads_input else h
    if not fits(tap, h, dim) or any(t.dtype is not h.dtype for named in tensors for t in named.values()):
        return None
    downs = [named[roles[0]] for named, roles in zip(tensors, sheet.roles, strict=True)]
    ups = [named[roles[1]] for named, roles in zip(tensors, sheet.roles, strict=True)]
    biases: list[Tensor] = []
    if any(roles[2] is not None for roles in sheet.roles):
        biases = [
            h.new_empty(0) if roles[2] is None else named[roles[2]]
            for named, roles in zip(tensors, sheet.roles, strict=True)
        ]
    if sheet.rows != tuple(range(alpha.shape[0])):
        alpha = torch.stack([alpha[row] for row in sheet.rows])
    return blend_seeds(tap, h, alpha, sheet.plan, downs, ups, biases, sheet.replaces)
