"""Grafts: blending the contributions of seeds into their layer."""

from esper.ops.graft.bank import graft_bank, graft_bank_backward
from esper.ops.graft.schema import graft_blend, graft_blend_backward  # isort: split

# After the schema: each adds its functions to it.
from esper.ops.graft import bank_reference, cpu, cuda, reference, triton, triton_blend

__all__ = [
    "bank_reference",
    "cpu",
    "cuda",
    "graft_bank",
    "graft_bank_backward",
    "graft_blend",
    "graft_blend_backward",
    "reference",
    "triton",
    "triton_blend",
]
