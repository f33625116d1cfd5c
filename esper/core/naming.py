"""Names of what Esper adds to a model: all of it under one prefix, beside the host's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["GRAFT_PREFIX", "WRAPPED", "GraftTree", "graft_key"]

#: Attribute of a MorphableModel that holds the host.
WRAPPED = "wrapped_model"

#: First part of the names of all grafts and of the lattice.
GRAFT_PREFIX = "esper"


def graft_key(layer_name: str) -> str:
    """A layer's name as one attribute name: module names cannot contain dots."""
    return layer_name.replace(".", "/")


class GraftTree(nn.Module):
    """The grafts of a model's layers, as ``esper.<layer>.<parameter>``."""

    def __init__(self, layers: Mapping[str, KasminaLayer]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(graft_key(name), layer.grafts)
