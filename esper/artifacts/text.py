"""Facts about an artifact for people: one line, and the summary that registries list."""

from __future__ import annotations

import math
from typing import Any

from esper.contracts.manifest import Manifest

__all__ = ["describe_manifest", "dtype_of", "parameter_count", "summarise"]


def dtype_of(manifest: Manifest) -> str:
    """The dtype of the weights; ``mixed`` where they differ, ``none`` without weights."""
    kinds = {entry.dtype for entry in manifest.tensors.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none"


def parameter_count(manifest: Manifest) -> int:
    """Number of weights, all tensors together."""
    return sum(math.prod(entry.shape) for entry in manifest.tensors.values())


def summarise(manifest: Manifest) -> dict[str, Any]:
    """The facts of :class:`esper.contracts.registry.ArtifactSummary`."""
    return {
        "name": str(manifest.blueprint.get("name", "")),
        "family": manifest.family,
        "d_in": manifest.d_in,
        "d_out": manifest.d_out,
        "dtype": dtype_of(manifest),
        "parameters": parameter_count(manifest),
        "seed": manifest.seed,
    }


def describe_manifest(manifest: Manifest) -> str:
    """One line: ``lowrank 64 -> 32, 768 float32 weights``."""
    facts = summarise(manifest)
    kind = f"{facts['parameters']} {facts['dtype']} weights" if manifest.tensors else "no weights"
    return f"{facts['name']} {facts['d_in']} -> {facts['d_out']}, {kind}"
