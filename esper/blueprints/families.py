"""Recognise the shapes of sub-network that have fused kernels.

=========== =========================================================================================================
family      what ``k(v)`` is; ``[...]`` may be missing
=========== =========================================================================================================
lowrank     ``up down v``, no bias
bottleneck  ``up act(down [norm] v [+ b])``, where norm, act or b may be missing, but not all of them
gated       ``up (act(gate [norm] v [+ b]) * (value [norm] v [+ b]))``
dense       ``[act] (linear v [+ b])``
elementwise ``[shift +] scale * [act] v``
conv        ``pointwise [act] (depthwise v [+ b]) [+ b]``
graph       everything else: runs node by node on PyTorch ops
=========== =========================================================================================================
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.blueprints.ir import Blueprint, Node
from esper.blueprints.nodes import Attributes
from esper.blueprints.sizes import Size

__all__ = ["Family", "FamilyName", "Geometry", "match"]


class FamilyName(enum.StrEnum):
    """The families, by name."""

    LOWRANK = "lowrank"
    BOTTLENECK = "bottleneck"
    GATED = "gated"
    DENSE = "dense"
    ELEMENTWISE = "elementwise"
    CONV = "conv"
    GRAPH = "graph"


@dataclass(frozen=True)
class Geometry:
    """How a depthwise convolution walks over the image, (height, width) each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Family:
    """What :func:`match` found.

    Attributes:
        name: The family; compares equal to its name as a string.
        roles: Node name by role: ``down``, ``up``, ``gate``, ``value``, ``linear``, ``scale``, ``shift``,
            ``depthwise``, ``pointwise``. A role's tensors are ``<node>.weight`` and, if there is one, ``<node>.bias``.
            Empty for ``graph``.
        biases: The roles whose linear, pointwise or depthwise node has a bias.
        activation: Its kind, or None.
        norm: Kind of the norm before the first linear nodes, or None.
        eps: The norm's epsilon, or None.
        rank: The inner width as the blueprint writes it (``lowrank``, ``bottleneck``, ``gated``), or None.
        geometry: Of the depthwise node (``conv``), or None.
    """

    name: FamilyName
    roles: Mapping[str, str] = field(default_factory=Attributes)
    biases: frozenset[str] = frozenset()
    activation: str | None = None
    norm: str | None = None
    eps: float | None = None
    rank: Size | None = None
    geometry: Geometry | None = None

    @property
    def execution(self) -> Literal["fused", "graph"]:
        """``fused`` where the family has kernels of its own, ``graph`` where the nodes run one by one."""
        return "graph" if self.name is FamilyName.GRAPH else "fused"

    def tensor(self, role: str, kind: str = "weight") -> str:
        """The name of a role's tensor, such as ``down.weight``; ``KeyError`` for a role the family has not."""
        return f"{self.roles[role]}.{kind}"


_GRAPH = Family(FamilyName.GRAPH)


def match(blueprint: Blueprint) -> Family:
    """The family the blueprint belongs to; ``graph`` when it is none of the fused ones."""
    nodes = {node.name: node for node in blueprint.order}
    last = nodes[blueprint.order[-1].inputs[0]]
    # A pattern is read from the output back to the input. It accounts for every node, because one that it did not meet
    # would not reach the output.
    for pattern in (_elementwise, _conv, _gated, _bottleneck, _dense):
        found = pattern(last, nodes)
        if found is not None:
            return found
    return _GRAPH


def _bottleneck(up: Node, nodes: Mapping[str, Node]) -> Family | None:
    if not _is_linear(up) or up.attrs["bias"]:
        return None
    activation, down = _peel(nodes[up.inputs[0]], "activation", nodes)
    if not _is_linear(down):
        return None
    norm, start = _peel(nodes[down.inputs[0]], "norm", nodes)
    if start.op != "input":
        return None
    plain = activation is None and norm is None and not down.attrs["bias"]
    name = FamilyName.LOWRANK if plain else FamilyName.BOTTLENECK
    return _family(name, {"down": down, "up": up}, activation, norm, rank=down.attrs["out"])


def _gated(up: Node, nodes: Mapping[str, Node]) -> Family | None:
    if not _is_linear(up) or up.attrs["bias"]:
        return None
    product = nodes[up.inputs[0]]
    if product.op != "mul":
        return None
    # The gate is the input that goes through the activation; which of the two comes first is not meaning.
    sides = sorted((nodes[source] for source in product.inputs), key=lambda node: node.op != "activation")
    activation, gate = _peel(sides[0], "activation", nodes)
    value = sides[1]
    if activation is None or not _is_linear(gate) or not _is_linear(value) or gate is value:
        return None
    if gate.inputs != value.inputs:
        return None
    norm, start = _peel(nodes[gate.inputs[0]], "norm", nodes)
    if start.op != "input":
        return None
    return _family(FamilyName.GATED, {"gate": gate, "value": value, "up": up}, activation, norm, rank=gate.attrs["out"])


def _dense(last: Node, nodes: Mapping[str, Node]) -> Family | None:
    activation, linear = _peel(last, "activation", nodes)
    if not _is_linear(linear) or nodes[linear.inputs[0]].op != "input":
        return None
    return _family(FamilyName.DENSE, {"linear": linear}, activation)


def _elementwise(last: Node, nodes: Mapping[str, Node]) -> Family | None:
    shift, scale = _peel(last, "shift", nodes)
    if scale.op != "scale":
        return None
    activation, start = _peel(nodes[scale.inputs[0]], "activation", nodes)
    if start.op != "input":
        return None
    roles = {"scale": scale} if shift is None else {"scale": scale, "shift": shift}
    return _family(FamilyName.ELEMENTWISE, roles, activation)


def _conv(pointwise: Node, nodes: Mapping[str, Node]) -> Family | None:
    if not _is_linear(pointwise):
        return None
    activation, depthwise = _peel(nodes[pointwise.inputs[0]], "activation", nodes)
    if depthwise.op != "depthwise" or nodes[depthwise.inputs[0]].op != "input":
        return None
    geometry = Geometry(*(depthwise.attrs[key] for key in ("kernel_size", "stride", "padding", "dilation")))
    return _family(FamilyName.CONV, {"depthwise": depthwise, "pointwise": pointwise}, activation, geometry=geometry)


def _family(
    name: FamilyName, roles: Mapping[str, Node], activation: Node | None, norm: Node | None = None, **details: Any
) -> Family:
    return Family(
        name=name,
        roles=Attributes({role: node.name for role, node in roles.items()}),
        biases=frozenset(role for role, node in roles.items() if node.attrs.get("bias")),
        activation=None if activation is None else activation.attrs["kind"],
        norm=None if norm is None else norm.attrs["kind"],
        eps=None if norm is None else norm.attrs["eps"],
        **details,
    )


def _peel(node: Node, op: str, nodes: Mapping[str, Node]) -> tuple[Node | None, Node]:
    """Take an optional ``op`` off: (that node, the one below it), or (None, ``node``)."""
    return (node, nodes[node.inputs[0]]) if node.op == op else (None, node)


def _is_linear(node: Node) -> bool:
    return node.op in ("linear", "pointwise")
