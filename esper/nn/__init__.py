"""Layers and grafts for direct import: drop-ins for ``torch.nn``'s that bring their own seeds, and single grafts.

    from esper.nn import SeededLinear, SeededGELU, BottleneckGraft, FusedLinearAct

See docs/nn.md. Nothing is loaded before it is used: an exported network that holds a :class:`GraftedAttention` needs
that module and torch, and nothing else of Esper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.nn.attention import GraftedAttention
    from esper.nn.fused import FusedLinearAct
    from esper.nn.grafts import BottleneckGraft, LowRankGraft
    from esper.nn.layers import (
        SeededConv2d,
        SeededGELU,
        SeededLayerNorm,
        SeededLinear,
        SeededReLU,
        SeededSigmoid,
        SeededTanh,
    )
    from esper.nn.seeded import Seeded, step

__all__ = [
    "BottleneckGraft",
    "FusedLinearAct",
    "GraftedAttention",
    "LowRankGraft",
    "Seeded",
    "SeededConv2d",
    "SeededGELU",
    "SeededLayerNorm",
    "SeededLinear",
    "SeededReLU",
    "SeededSigmoid",
    "SeededTanh",
    "step",
]

_HOMES = {
    "BottleneckGraft": "grafts",
    "FusedLinearAct": "fused",
    "GraftedAttention": "attention",
    "LowRankGraft": "grafts",
    "Seeded": "seeded",
    "step": "seeded",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'layers')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
