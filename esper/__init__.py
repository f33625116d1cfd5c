"""Esper lets a PyTorch network grow while it trains.

import esper

model = esper.wrap(network, registry="runs/registry")   # a copy with dormant seeds: same function, no cost
kernel = esper.compile("bottleneck", d_in=64, d_out=64, rank=16, registry="runs/registry")
model.request_kernel("0", 0, kernel)                    # fetched in the background; a future
model.step()                                            # once per training step; wakes the seed when its kernel is here
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper import (
        artifacts,
        blueprints,
        contracts,
        core,
        distributed,
        execution,
        grow,
        nn,
        oona,
        ops,
        optim,
        services,
        watch,
    )
    from esper.artifacts.artifact import Artifact
    from esper.contracts.errors import (
        ArtifactError,
        BlueprintError,
        EsperError,
        ShapeMismatchError,
    )
    from esper.contracts.registry import KernelNotFoundError, RegistryUnavailableError
    from esper.core.checkpoint import load, restore, save
    from esper.core.export import export
    from esper.core.model_wrapper import MorphableModel, unwrap, wrap
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.execution.kernel_cache import KernelCache
    from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
    from esper.execution.state_layout import KasminaStateLayout
    from esper.execution.telemetry.options import TelemetryOptions
    from esper.services.tezzeret.forge import compile

# Loaded when first used: `import esper` stays fast, and tools that only read artifacts do not load all of torch.
_HOMES = {
    "Artifact": "esper.artifacts.artifact",
    "ArtifactError": "esper.contracts.errors",
    "BlueprintError": "esper.contracts.errors",
    "EsperError": "esper.contracts.errors",
    "KasminaLayer": "esper.execution.kasmina_layer",
    "KasminaStateLayout": "esper.execution.state_layout",
    "KernelCache": "esper.execution.kernel_cache",
    "KernelNotFoundError": "esper.contracts.registry",
    "LifecycleError": "esper.execution.lifecycle",
    "MorphableModel": "esper.core.model_wrapper",
    "RegistryUnavailableError": "esper.contracts.registry",
    "SeedLifecycleState": "esper.execution.lifecycle",
    "ShapeMismatchError": "esper.contracts.errors",
    "TelemetryOptions": "esper.execution.telemetry.options",
    "compile": "esper.services.tezzeret.forge",
    "export": "esper.core.export",
    "load": "esper.core.checkpoint",
    "restore": "esper.core.checkpoint",
    "save": "esper.core.checkpoint",
    "unwrap": "esper.core.model_wrapper",
    "wrap": "esper.core.model_wrapper",
}
_PACKAGES = (
    "artifacts",
    "blueprints",
    "contracts",
    "core",
    "distributed",
    "execution",
    "grow",
    "nn",
    "oona",
    "ops",
    "optim",
    "services",
    "watch",
)

__all__ = [
    "Artifact",
    "ArtifactError",
    "BlueprintError",
    "EsperError",
    "KasminaLayer",
    "KasminaStateLayout",
    "KernelCache",
    "KernelNotFoundError",
    "LifecycleError",
    "MorphableModel",
    "RegistryUnavailableError",
    "SeedLifecycleState",
    "ShapeMismatchError",
    "TelemetryOptions",
    "__version__",
    "artifacts",
    "blueprints",
    "compile",
    "contracts",
    "core",
    "distributed",
    "execution",
    "export",
    "grow",
    "load",
    "nn",
    "oona",
    "ops",
    "optim",
    "restore",
    "save",
    "services",
    "unwrap",
    "watch",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"esper.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("esper")
    else:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
