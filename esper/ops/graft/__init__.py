"""Grafts: blending the contributions of seeds into their layer."""

from esper.ops.graft.schema import graft_blend, graft_blend_backward  # isort: split

# After the schema: each adds its functions to it.
from esper.ops.graft import cpu, cuda, reference

__all__ = ["cpu", "cuda", "graft_blend", "graft_blend_backward", "reference"]
