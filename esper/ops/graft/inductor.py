"""What Inductor writes in a graph for a CPU where it calls the seeds: a function in C instead of the operation.

A call through ``torch.ops`` costs 4 us before the kernel begins; the function reads its tensors where they are
(``csrc/graft_seeds_call.cpp``). How Inductor writes a call is not public. So this asks for nothing that may not be
there: with another Inductor, or with an extension that is missing, it writes the operation as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from esper.ops import native
from esper.ops.registry import Op

__all__ = ["call_directly", "offer"]

#: Attribute of the operation's packet under which the code that Inductor writes finds the function.
_NAME = "direct"


def offer(forward: Op, backward: Op) -> None:
    """Put the functions beside the operations, where code of this and of other processes finds them."""
    ops = [op.overload for op in (forward, backward)]
    module = native.load()
    make = getattr(module, "direct_seeds", None)
    functions = ops if make is None else make(torch.Tensor, torch.nn.Parameter, *ops)
    for name, function in zip((forward.name, backward.name), functions, strict=True):
        setattr(getattr(torch.ops.esper, name), _NAME, function)


@functools.cache
def call_directly(op: Any) -> bool:
    """Have Inductor write the function for ``op``; False where that cannot be. Only the first call does something.

    Not when the package is imported: it would bring in Inductor, which takes seconds.
    """
    if not hasattr(getattr(getattr(torch.ops, op.namespace), op._opname), _NAME):
        return False
    try:
        from torch._inductor import ir, lowering
        from torch._inductor.virtualized import V

        name = f"torch.ops.{op.namespace}.{op._opname}.{_NAME}"
        plain = lowering.fallback_handler(op, add_to_fallback_set=False)
        register: Callable[..., Any] = lowering.register_lowering(op, type_promotion_kind=None)
    except (ImportError, AttributeError, TypeError):
        return False

    def lower(*args: Any, **kwargs: Any) -> Any:
        before = len(V.graph.operations)
        result = plain(*args, **kwargs)
        if not V.graph.cpp_wrapper:  # code in C++ calls by other means
            for node in V.graph.operations[before:]:
                if isinstance(node, ir.FallbackKernel) and node.op_overload is op:
                    node.python_kernel_name = name
        return result

    register(lower)
    return True
