"""The pipelines: which GPU binaries go into an artifact, and how they come about.

========== ==========================================================================================================
fast       none: the package's own kernels run the blueprint
standard   the family's Triton kernels as the package configures them, for every architecture asked for; needs no GPU
aggressive the same, tuned on the GPU of this machine and for that one only
========== ==========================================================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from esper.blueprints.families import Family, match
from esper.blueprints.ir import Blueprint
from esper.blueprints.validation import Resolved
from esper.contracts.binary_entry import BinaryEntry, target_of
from esper.contracts.container import BINARY_PREFIX
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from esper.ops.toolchain import Built

__all__ = [
    "ARCHITECTURES",
    "DTYPE_NAMES",
    "PIPELINES",
    "CompileError",
    "MachineError",
    "binaries_for",
    "check_request",
    "torch_name",
]

#: Every pipeline.
PIPELINES: Final = ("fast", "standard", "aggressive")
#: What can be compiled for; the compiler crashes when it is asked for others.
ARCHITECTURES: Final = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
#: Longest name of a target in an artifact's id.
MAX_TARGET: Final = 32
#: What a dtype may be called, and what torch calls it.
DTYPE_NAMES: Final[Mapping[str, str]] = {
    **{name: name for name in ("float64", "float32", "float16", "bfloat16")},
    **{"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"},
    **{"double": "float64", "float": "float32", "half": "float16"},
}
_KERNEL_DTYPES: Final[Mapping[str, str]] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ARCH: Final = re.compile(r"sm_([0-9]{2,3})")


class CompileError(EsperError, ValueError):
    """An artifact cannot be built as asked: an unknown pipeline, dtype or architecture."""


class MachineError(CompileError):
    """It cannot be built on this machine, which lacks the GPU; on another it can."""


def torch_name(dtype: object) -> str:
    """What torch calls a dtype: ``bfloat16`` for ``bf16``, ``bfloat16`` or ``torch.bfloat16``.

    Raises:
        CompileError: if it is none that is stored.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise CompileError(f"dtype {name!r} cannot be stored; possible: {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def check_request(pipeline: object, architectures: Sequence[str]) -> tuple[int, ...]:
    """The architectures as numbers, in order and each once, if the pipeline takes them.

    Raises:
        CompileError: an unknown pipeline or architecture, or architectures for a pipeline that builds for none.
    """
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise CompileError(f"unknown pipeline {pipeline!r}; known: {', '.join(PIPELINES)}")
    if isinstance(architectures, str) or not all(isinstance(arch, str) for arch in architectures):
        raise CompileError(f"architectures must be a list of names such as 'sm_90', not {architectures!r}")
    numbers = set()
    for arch in architectures:
        found = _ARCH.fullmatch(arch)
        if found is None or int(found[1]) not in ARCHITECTURES:
            known = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
            raise CompileError(f"unknown architecture {arch!r}; known: {known}")
        numbers.add(int(found[1]))
    if numbers and pipeline == "fast":
        raise CompileError("pipeline 'fast' builds no GPU binaries; architectures need pipeline 'standard'")
    target = target_of(f"sm_{number}" for number in numbers)
    if len(target) > MAX_TARGET:
        raise CompileError(
            f"{len(numbers)} architectures are too many for one artifact: its id would have {target!r} in it, and "
            f"there is room for {MAX_TARGET} characters; make several"
        )
    return tuple(sorted(numbers))


def binaries_for(
    pipeline: str, blueprint: Blueprint, resolved: Resolved, dtypes: Sequence[str], architectures: Sequence[int]
) -> dict[str, tuple[BinaryEntry, bytes]]:
    """The GPU binaries that the pipeline puts into an artifact, by the names they have there.

    Args:
        pipeline: One of :data:`PIPELINES`.
        blueprint: With its parameters bound.
        resolved: The same at its sizes.
        dtypes: Types of the values computed with, by torch's names.
        architectures: Compute capabilities times ten; empty for the usual ones (``standard``) or the present one
            (``aggressive``).

    Raises:
        MachineError: the GPU that is needed is not in this machine.
        CompileError: there are no kernels for such a dtype, or they do not compile.
    """
    if pipeline == "fast":
        return {}
    # The one import of esper.ops in the services; see docs/architecture.md.
    from esper.ops import toolchain

    family = match(blueprint)
    request = toolchain.Request(
        family=str(family.name),
        activation=family.activation,
        norm=family.norm,
        rank=_rank(family, resolved),
        aligned=resolved.d_in % 16 == resolved.d_out % 16 == 0,
        biased=bool(family.biases & {"down", "gate"}) or "shift" in family.roles,
        replaces=blueprint.mode == "replace",
        dtypes=tuple(dict.fromkeys(_kernel_dtype(name) for name in dtypes)),
        architectures=tuple(architectures) or toolchain.DEFAULT_ARCHITECTURES,
    )
    try:
        if pipeline == "aggressive":
            built = toolchain.tune_request(
                request, present=tuple(architectures), d_in=resolved.d_in, d_out=resolved.d_out
            )
        else:
            built = toolchain.compile_request(request)
    except toolchain.OtherGpuError as error:
        raise MachineError(f"pipeline {pipeline!r}: {error}") from None
    except toolchain.ToolchainError as error:
        raise CompileError(f"pipeline {pipeline!r}: {error}") from None
    return _named(built)


def _kernel_dtype(name: str) -> str:
    if name not in _KERNEL_DTYPES:
        raise CompileError(
            f"there are no GPU kernels for {name}; possible: {', '.join(_KERNEL_DTYPES)}, or pipeline 'fast'"
        )
    return _KERNEL_DTYPES[name]


def _rank(family: Family, resolved: Resolved) -> int:
    role = next((role for role in ("down", "gate") if role in family.roles), None)
    return resolved.widths[family.roles[role]] if role else 1


def _named(built: Sequence[Built]) -> dict[str, tuple[BinaryEntry, bytes]]:
    """Entries and bytes under the names of the artifact format; the kernel is part of the name where it must be."""
    alone = Counter((item.arch, item.dtype, item.direction) for item in built)
    named = {}
    for item in built:
        name = f"{BINARY_PREFIX}sm_{item.arch}/{item.dtype}/{item.direction}"
        if alone[item.arch, item.dtype, item.direction] > 1:
            name += f"/{item.kernel}"
        entry = BinaryEntry(
            arch=f"sm_{item.arch}",
            dtype=item.dtype,
            direction=item.direction,
            kernel=item.kernel,
            symbol=item.symbol,
            signature=item.signature,
            constants=dict(item.constants),
            num_warps=item.num_warps,
            shared=item.shared,
            registers=item.registers,
            spills=item.spills,
            tools=dict(item.tools),
            sha256=hashlib.sha256(item.cubin).hexdigest(),
            size=len(item.cubin),
        )
        if name in named:
            raise CompileError(f"two variants of {item.kernel} would both be called {name!r}")
        named[name] = entry, item.cubin
    return named
