"""What may be woken where: ready-made blueprints, compiled for a host's layers into the registry."""

from __future__ import annotations

from torch import nn

from esper import blueprints
from esper.grow.grower import Catalogue
from esper.services.tezzeret.forge import compile_blueprint

__all__ = ["BLUEPRINTS", "build_catalogue"]

#: Tried in this order in one place: name in the library, and its parameters.
BLUEPRINTS: tuple[tuple[str, dict[str, int]], ...] = (("bottleneck", {"rank": 16}), ("gated", {"rank": 8}))


def build_catalogue(host: nn.Module, registry: str, *, seeds_per_layer: int, seed: int) -> Catalogue:
    """Compile every blueprint for every seed of every Linear layer of ``host``.

    An artifact's id follows from its contents, so one that is in the registry already is found, not stored again. Each
    seed has weights of its own: two seeds that start equal would learn the same.

    Returns:
        Artifact ids by layer, blueprint and seed index.
    """
    catalogue: dict[str, dict[str, list[str]]] = {}
    for number, (name, layer) in enumerate((n, m) for n, m in host.named_modules() if isinstance(m, nn.Linear)):
        catalogue[name] = {
            blueprint: [
                compile_blueprint(
                    blueprints.get(blueprint, **parameters),
                    d_in=layer.in_features,
                    d_out=layer.out_features,
                    registry=registry,
                    seed=(seed * 1009 + number) * 64 + index,
                )
                for index in range(seeds_per_layer)
            ]
            for blueprint, parameters in BLUEPRINTS
        }
    return catalogue
