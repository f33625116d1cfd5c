"""Grafts: the awake seeds of a layer, blended into it. :class:`GraftSet` is what a layer holds."""

from esper.execution.grafts.graft_set import GraftSet, SeedState
from esper.ops.graft.layout import BlendLayout, Place, chunk_span

__all__ = ["BlendLayout", "GraftSet", "Place", "SeedState", "chunk_span"]
