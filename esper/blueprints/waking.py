"""Which weights a sub-network must start with so that waking it leaves the network's function as it was.

*Residual*: ``k = 0``. The weights nearest to the output are set to zero, as LoRA does with its up-projection, wherever
zero can be had without killing the gradient: a linear or scale node gives it at once; ``gelu``, ``tanh`` and ``silu``
pass it on (and have a slope there); ``relu`` has none at 0 and ``sigmoid(0)`` is 1/2, so nothing is zeroed behind them;
nor behind a norm, whose slope at 0 is ``1 / sqrt(eps)``; of two factors one is zeroed, of two terms both.

*Replace*: ``k(v) = v``. Square linear nodes become the identity matrix, scales one, shifts zero, depthwise kernels the
kernel that picks their own pixel; of a sum one term is the identity and the other zero. A last ``relu`` is let through,
since it changes nothing behind a ReLU (Chen et al. 2015, "Net2Net"). With the tap on the layer's output this keeps the
function; with the tap on the input it starts as if the layer were not there.

Where neither can be had, the weights are drawn at random and the ramp of alpha covers the rest.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.blueprints.canonical import canonical_order
from esper.blueprints.ir import Blueprint, Node
from esper.blueprints.nodes import Attributes
from esper.blueprints.validation import Resolved, SpatialMap, validate

__all__ = ["Start", "WakingPlan", "plan_waking", "preserves_function"]


class Start(enum.StrEnum):
    """How the tensors of one node begin."""

    ZERO = "zero"
    IDENTITY = "identity"
    RANDOM = "random"


@dataclass(frozen=True)
class WakingPlan:
    """The start of every node that is not random, and whether waking the seed then keeps the network's function.

    Attributes:
        starts: By node name.
        preserving: True if ``k`` is exactly 0 (residual), or exactly its input with the tap on the output (replace).
    """

    starts: Mapping[str, Start] = field(default_factory=Attributes)
    preserving: bool = False


def preserves_function(blueprint: Blueprint, d_in: int, d_out: int, **params: int) -> bool:
    """Whether waking a seed initialised by :func:`esper.blueprints.initialise` leaves the network's function unchanged.

    Args:
        blueprint: What the seed would become.
        d_in: Features of the tap.
        d_out: Features the seed changes.
        **params: Values for the blueprint's parameters.

    Returns:
        True if at any alpha the layer gives what it gave before (in exact arithmetic for ``replace``, bit for bit for
        ``residual``). A chunk in ``replace`` mode never does: it cannot pick its own features out of the whole tap,
        unless the layer has one chunk only.

    Raises:
        BlueprintError: as :func:`esper.blueprints.validate`.
    """
    return plan_waking(blueprint, validate(blueprint, d_in, d_out, **params)).preserving


def plan_waking(blueprint: Blueprint, resolved: Resolved) -> WakingPlan:
    """Choose how each node starts; the choice does not depend on the names or the order of the nodes."""
    planner = _Planner(blueprint, resolved)
    last = planner.nodes[blueprint.order[-1].inputs[0]]
    if blueprint.mode == "residual":
        found = planner.zero(last, {})
        return WakingPlan() if found is None else WakingPlan(Attributes(found), True)
    found = planner.identity(last, {})
    if found is not None:
        return WakingPlan(Attributes(found), blueprint.tap == "output")
    if last.op == "activation" and last.attrs["kind"] == "relu":
        found = planner.identity(planner.nodes[last.inputs[0]], {})
    return WakingPlan() if found is None else WakingPlan(Attributes(found), False)


_Starts = dict[str, Start]


class _Planner:
    """Search for starts that make a node zero or the identity; None where the algebra does not allow it."""

    def __init__(self, blueprint: Blueprint, resolved: Resolved) -> None:
        self.nodes = {node.name: node for node in blueprint.order}
        self.widths = resolved.widths
        self.rank = {name: index for index, name in enumerate(canonical_order(blueprint))}

    def zero(self, node: Node, starts: _Starts) -> _Starts | None:
        if node.op in ("linear", "pointwise", "depthwise", "scale"):
            return _with(starts, node, Start.ZERO)
        if node.op == "activation" and node.attrs["kind"] in ("gelu", "gelu_tanh", "tanh", "silu"):
            return self.zero(self._inputs(node)[0], starts)
        if node.op == "shift":
            begun = _with(starts, node, Start.ZERO)
            return None if begun is None else self.zero(self._inputs(node)[0], begun)
        if node.op == "add":
            first, second = self._inputs(node)
            begun = self.zero(first, starts)
            return None if begun is None else self.zero(second, begun)
        if node.op == "mul":
            first, second = self._inputs(node)
            for zeroed, kept in ((first, second), (second, first)):
                found = self.zero(zeroed, starts)
                # A factor that is zero because the other one is has no slope either: nothing would ever move.
                if found is not None and not self._upstream(kept).intersection(found.keys() - starts.keys()):
                    return found
        return None

    def identity(self, node: Node, starts: _Starts) -> _Starts | None:
        if node.op == "input":
            return starts
        if node.op in ("linear", "pointwise", "depthwise", "scale", "shift"):
            if not self._can_copy(node):
                return None
            begun = _with(starts, node, Start.IDENTITY)
            return None if begun is None else self.identity(self._inputs(node)[0], begun)
        if node.op == "add":
            first, second = self._inputs(node)
            for copy, nothing in ((first, second), (second, first)):
                begun = self.identity(copy, starts)
                found = None if begun is None else self.zero(nothing, begun)
                if found is not None:
                    return found
        return None

    def _can_copy(self, node: Node) -> bool:
        if node.op in ("linear", "pointwise"):
            return self.widths[node.name] == self.widths[node.inputs[0]]
        return node.op != "depthwise" or own_pixel(node) is not None

    def _upstream(self, node: Node) -> set[str]:
        """The names of ``node`` and of everything it depends on."""
        return {node.name}.union(*(self._upstream(self.nodes[name]) for name in set(node.inputs)))

    def _inputs(self, node: Node) -> list[Node]:
        return [self.nodes[name] for name in sorted(node.inputs, key=self.rank.__getitem__)]


def own_pixel(depthwise: Node) -> tuple[int, int] | None:
    """Where a depthwise kernel holds the weight of the output's own pixel; None if it has none or sizes change."""
    where: list[int] = []
    keys = ("kernel_size", "stride", "padding", "dilation")
    for kernel, stride, padding, dilation in zip(*(depthwise.attrs[key] for key in keys), strict=True):
        index, remainder = divmod(padding, dilation)
        moved = not SpatialMap.of_convolution(kernel, stride, padding, dilation).is_identity
        if moved or remainder or index >= kernel:
            return None
        where.append(index)
    return (where[0], where[1])


def _with(starts: _Starts, node: Node, start: Start) -> _Starts | None:
    """``starts`` and one more, or None if the node was already to begin otherwise."""
    return {**starts, node.name: start} if starts.get(node.name, start) is start else None
