"""Blueprints: small sub-networks as data.

    bp = esper.blueprints.get("bottleneck", rank=16)    # or from_json(text)
    resolved = validate(bp, d_in=64, d_out=128)         # every shape, or a BlueprintError that names the node
    weights = initialise(bp, 64, 128, seed=0)           # the same bits for the same seed
    k = run(bp, weights, x)                             # node by node on PyTorch operations

Reading, validating, hashing and matching need no PyTorch; :func:`initialise` and :func:`run` import it when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.blueprints.canonical import blueprint_hash, canonical_form, canonical_order
from esper.blueprints.families import Family, FamilyName, Geometry, match
from esper.blueprints.ir import SCHEMA_VERSION, Blueprint, Mode, Node, Scope, Tap, from_json, to_json
from esper.blueprints.library import Entry, describe, get, names
from esper.blueprints.nodes import ACTIVATIONS, NORMS
from esper.blueprints.validation import Resolved, SpatialMap, validate
from esper.blueprints.waking import preserves_function

if TYPE_CHECKING:
    from esper.blueprints.init import initialise
    from esper.blueprints.interpret import run

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SCHEMA_VERSION",
    "Blueprint",
    "Entry",
    "Family",
    "FamilyName",
    "Geometry",
    "Mode",
    "Node",
    "Resolved",
    "Scope",
    "SpatialMap",
    "Tap",
    "blueprint_hash",
    "canonical_form",
    "canonical_order",
    "describe",
    "from_json",
    "get",
    "initialise",
    "match",
    "names",
    "preserves_function",
    "run",
    "to_json",
    "validate",
]

_NEEDS_TORCH = {"initialise": "esper.blueprints.init", "run": "esper.blueprints.interpret"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    globals()[name] = value
    return value
