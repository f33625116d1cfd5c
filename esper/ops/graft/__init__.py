"""Grafts: blending the contributions of seeds into their layer."""

from esper.ops.graft.bank import graft_bank, graft_bank_backward
from esper.ops.graft.elementwise import graft_elementwise, graft_elementwise_backward
from esper.ops.graft.schema import graft_blend, graft_blend_backward
from esper.ops.graft.seeds import graft_seeds, graft_seeds_backward  # isort: split

# After the schema: each adds its functions to it.
from esper.ops.graft import bank_reference, cpu, cuda, reference, triton, triton_blend  # isort: split

# After those: it falls back on them.
from esper.ops.graft import bank_composed, elementwise_reference, seeds_reference, triton_elementwise  # isort: split

from esper.ops.graft.autograd import blend_bank, blend_elementwise

__all__ = [
    "bank_composed",
    "bank_reference",
    "blend_bank",
    "blend_elementwise",
    "cpu",
    "cuda",
    "elementwise_reference",
    "graft_bank",
    "graft_bank_backward",
    "graft_blend",
    "graft_blend_backward",
    "graft_elementwise",
    "graft_elementwise_backward",
    "graft_seeds",
    "graft_seeds_backward",
    "reference",
    "seeds_reference",
    "triton",
    "triton_blend",
    "triton_elementwise",
]
