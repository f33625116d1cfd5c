"""A linear layer with its activation, its statistics and its seeds in one kernel, where that is the fastest way."""

# After the schema: each adds its functions to it.
from esper.ops.linear import reference, triton  # isort: split

from esper.ops.linear.autograd import Graft, linear
from esper.ops.linear.measure import kept_way, tune_linear
from esper.ops.linear.schema import WAYS, fused_linear

__all__ = ["WAYS", "Graft", "fused_linear", "kept_way", "linear", "reference", "triton", "tune_linear"]
