"""The blueprint: a small sub-network as data.

A :class:`Blueprint` that exists is well-formed: names, types, operations, attributes and the graph were checked when it
was made. What depends on the sizes it is put to is checked by :func:`esper.blueprints.validate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from esper.blueprints.nodes import OPS, Attributes
from esper.blueprints.sizes import MAX_SIZE, names_in, shown
from esper.contracts.errors import BlueprintError

__all__ = ["MAX_NODES", "SCHEMA_VERSION", "Blueprint", "Mode", "Node", "Scope", "Tap", "from_json", "to_json"]

SCHEMA_VERSION: Final = 1
KNOWN_VERSIONS: Final = (1,)
MAX_NODES: Final = 64
MAX_PARAMETERS: Final = 16
#: Longest JSON text read; the largest legal blueprint is far shorter.
MAX_TEXT: Final = 1 << 18

Tap = Literal["input", "output"]
Mode = Literal["residual", "replace"]
Scope = Literal["layer", "chunk"]

_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "tap": ("input", "output"),
    "mode": ("residual", "replace"),
    "scope": ("layer", "chunk"),
}
_NODE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
#: Names that mean something else where a parameter could stand (in an expression, or as an argument of a function).
RESERVED: Final = frozenset(
    [
        "architectures",
        "blueprint",
        "compute_dtypes",
        "d_in",
        "d_out",
        "dtype",
        "max",
        "min",
        "mode",
        "name",
        "pipeline",
        "provenance",
        "registry",
        "scope",
        "seed",
        "sign_with",
        "tap",
    ]
)


@dataclass(frozen=True)
class Node:
    """One step of a blueprint.

    Attributes:
        name: Unique in the blueprint; an identifier of at most 64 characters. Its tensors are ``<name>.weight`` and
            ``<name>.bias``.
        op: One of :data:`esper.blueprints.nodes.OPS`.
        inputs: Names of the nodes it reads.
        attrs: The operation's attributes; defaults are filled in, pairs are made of single numbers.

    Raises:
        BlueprintError: naming the node, for anything that is not so.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=Attributes)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NODE_NAME.fullmatch(self.name):
            raise BlueprintError(
                f"a node's name must be an identifier of at most 64 characters, not {shown(self.name)}"
            )
        try:
            self._normalise()
        except BlueprintError as error:
            raise BlueprintError(str(error), node=self.name) from None

    def _normalise(self) -> None:
        if not isinstance(self.op, str) or self.op not in OPS:
            raise BlueprintError(f"unknown op {shown(self.op)}; known: {', '.join(OPS)}")
        spec = OPS[self.op]
        if not isinstance(self.inputs, (list, tuple)) or not all(isinstance(source, str) for source in self.inputs):
            raise BlueprintError(f"inputs must be a list of node names, not {shown(self.inputs)}")
        if len(self.inputs) != spec.arity:
            raise BlueprintError(f"{self.op} takes {spec.arity} input(s), not {len(self.inputs)}")
        if not isinstance(self.attrs, Mapping):
            raise BlueprintError(f"attributes must be a mapping, not {shown(self.attrs)}")
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "attrs", spec.normalise(self.op, self.attrs))


@dataclass(frozen=True)
class Blueprint:
    """A seed's sub-network ``k``, and how it joins the layer it grows in.

    Attributes:
        name: For people; not part of the blueprint's identity.
        nodes: The steps, in any order; exactly one ``input`` and one ``output``; every node leads to the output.
        tap: What ``k`` reads: the layer's ``input`` or its ``output``.
        mode: ``residual`` adds ``alpha * k``; ``replace`` blends the layer's output into ``k``.
        scope: ``layer`` changes all features of the layer, ``chunk`` only the seed's own. ``k`` reads the whole tap in
            both.
        parameters: Names and default values that sizes may use.
        order: The nodes, each after its inputs; the input first, the output last (derived).

    Raises:
        BlueprintError: naming the node at fault where there is one.
    """

    name: str
    nodes: tuple[Node, ...]
    tap: Tap = "input"
    mode: Mode = "residual"
    scope: Scope = "layer"
    parameters: Mapping[str, int] = field(default_factory=Attributes)
    order: tuple[Node, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise BlueprintError(f"name must be 1 to 64 letters, digits, '.', '_' or '-', not {shown(self.name)}")
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if not isinstance(value, str) or value not in choices:
                raise BlueprintError(f"{key} must be {' or '.join(choices)}, not {shown(value)}")
        if not isinstance(self.nodes, (list, tuple)) or not all(isinstance(node, Node) for node in self.nodes):
            raise BlueprintError("nodes must be a list of nodes")
        if len(self.nodes) > MAX_NODES:
            raise BlueprintError(f"{len(self.nodes)} nodes are more than {MAX_NODES}")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "parameters", _check_parameters(self.parameters))
        object.__setattr__(self, "order", _topological(self.nodes))
        _check_sizes(self)

    def node(self, name: str) -> Node:
        """The node called ``name``; ``KeyError`` lists the known ones."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"blueprint {self.name!r} has no node {name!r}; known: {', '.join(n.name for n in self.nodes)}")

    def to_dict(self) -> dict[str, Any]:
        """The blueprint as plain JSON values; :func:`from_json` reads it back equal."""
        nodes = [
            {
                "name": node.name,
                "op": node.op,
                "inputs": list(node.inputs),
                **{key: list(value) if isinstance(value, tuple) else value for key, value in node.attrs.items()},
            }
            for node in self.nodes
        ]
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "tap": self.tap,
            "mode": self.mode,
            "scope": self.scope,
            "parameters": dict(self.parameters),
            "nodes": nodes,
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """The blueprint as JSON text, in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @staticmethod
    def from_json(source: str | bytes | Mapping[str, Any]) -> Blueprint:
        """See :func:`from_json`."""
        return from_json(source)


def to_json(blueprint: Blueprint, *, indent: int | None = None) -> str:
    """The blueprint as JSON text, in ASCII."""
    return blueprint.to_json(indent=indent)


def from_json(source: str | bytes | Mapping[str, Any]) -> Blueprint:
    """Read a blueprint, strictly.

    Args:
        source: JSON text, its UTF-8 bytes, or the mapping it stands for.

    Returns:
        The blueprint; sizes are checked later, by :func:`esper.blueprints.validate`.

    Raises:
        BlueprintError: for anything else than a blueprint of a known schema version: bad JSON, NaN or infinity, a key
            that stands twice, an unknown or a missing key, a wrong type, a graph that is none.
    """
    data = _parse(source) if isinstance(source, (str, bytes)) else source
    top = _object(data, "a blueprint")
    version = top.get("schema")
    if isinstance(version, bool) or not isinstance(version, int) or version not in KNOWN_VERSIONS:
        known = ", ".join(map(str, KNOWN_VERSIONS))
        raise BlueprintError(f"unknown blueprint schema version {shown(version)}; this Esper knows: {known}")
    _check_keys(
        top, required=("schema", "name", "nodes"), optional=("tap", "mode", "scope", "parameters"), what="a blueprint"
    )
    if not isinstance(top["nodes"], (list, tuple)):
        raise BlueprintError(f"nodes must be a list, not {shown(top['nodes'])}")
    if len(top["nodes"]) > MAX_NODES:
        raise BlueprintError(f"{len(top['nodes'])} nodes are more than {MAX_NODES}")
    given = {key: top[key] for key in ("tap", "mode", "scope", "parameters") if key in top}
    return Blueprint(name=top["name"], nodes=tuple(_read_node(item, i) for i, item in enumerate(top["nodes"])), **given)


def _read_node(item: object, index: int) -> Node:
    node = _object(item, f"node number {index}")
    for key in ("name", "op"):
        if key not in node:
            raise BlueprintError(f"node number {index}: key {key!r} is missing")
    attrs = {key: value for key, value in node.items() if key not in ("name", "op", "inputs")}
    try:
        return Node(node["name"], node["op"], node.get("inputs", ()), attrs)
    except BlueprintError as error:
        if error.node is not None:
            raise
        # Its name is what is wrong: only its place can say which node it is.
        raise BlueprintError(f"node number {index}: {error}") from None


def _parse(source: str | bytes) -> object:
    if len(source) > MAX_TEXT:
        raise BlueprintError(f"blueprint text of {len(source)} characters is longer than {MAX_TEXT}")
    try:
        text = source.decode("utf-8") if isinstance(source, bytes) else source
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise BlueprintError("blueprint JSON is nested too deeply") from None
    except BlueprintError:
        raise
    except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
        raise BlueprintError(f"blueprint is not JSON: {error}") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise BlueprintError(f"key {shown(key)} stands twice in one JSON object")
        seen[key] = value
    return seen


def _no_constant(text: str) -> object:
    raise BlueprintError(f"{text} is not a JSON value")


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BlueprintError(f"{what} must be a JSON object, not {shown(value)}")
    return value


def _check_keys(found: Mapping[str, Any], *, required: Sequence[str], optional: Sequence[str], what: str) -> None:
    for key in required:
        if key not in found:
            raise BlueprintError(f"{what} needs the key {key!r}")
    for key in found:
        if key not in required and key not in optional:
            raise BlueprintError(f"{what} has no key {shown(key)}; known: {', '.join((*required, *optional))}")


def _check_parameters(parameters: object) -> Attributes:
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise BlueprintError(f"parameters must be an object of names and numbers, not {shown(parameters)}")
    if len(parameters) > MAX_PARAMETERS:
        raise BlueprintError(f"{len(parameters)} parameters are more than {MAX_PARAMETERS}")
    return Attributes({name: check_parameter(name, value) for name, value in parameters.items()})


def check_parameter(name: str, value: object) -> int:
    """Return ``value`` if the parameter ``name`` may have it.

    Raises:
        BlueprintError: for a name that is no identifier or is reserved, or a value that is no integer in [1, 2**20].
    """
    if not _NODE_NAME.fullmatch(name) or name in RESERVED:
        raise BlueprintError(
            f"a parameter cannot be called {shown(name)}; it must be an identifier that is not reserved"
        )
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise BlueprintError(f"parameter {name!r} must be an integer in [1, {MAX_SIZE}], not {shown(value)}")
    return value


def _check_sizes(blueprint: Blueprint) -> None:
    known = {"d_in", "d_out", *blueprint.parameters}
    used: set[str] = set()
    for node in blueprint.nodes:
        if "out" in node.attrs:
            names = names_in(node.attrs["out"])
            if not names <= known:
                unknown = ", ".join(sorted(names - known))
                listed = ", ".join(sorted(known))
                raise BlueprintError(f"size {node.attrs['out']!r} names {unknown}; known: {listed}", node=node.name)
            used |= names
    idle = sorted(set(blueprint.parameters) - used)
    if idle:
        raise BlueprintError(f"parameter {idle[0]!r} is declared but no size uses it")


def _topological(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes, each after its inputs, in an order that follows the declaration where it can."""
    by_name: dict[str, Node] = {}
    for node in nodes:
        if node.name in by_name:
            raise BlueprintError("two nodes have this name", node=node.name)
        by_name[node.name] = node
    for op in ("input", "output"):
        count = sum(node.op == op for node in nodes)
        if count != 1:
            raise BlueprintError(f"a blueprint has exactly one {op} node, not {count}")
    for node in nodes:
        for source in node.inputs:
            if source not in by_name:
                raise BlueprintError(f"reads {shown(source)}, which no node is called", node=node.name)
            if by_name[source].op == "output":
                raise BlueprintError(f"reads the output node {source!r}", node=node.name)

    order: list[Node] = []
    done: set[str] = set()
    waiting = sorted(nodes, key=lambda node: node.op != "input")
    while waiting:
        ready = next((node for node in waiting if all(source in done for source in node.inputs)), None)
        if ready is None:
            names = ", ".join(node.name for node in _cycle(waiting, by_name))
            raise BlueprintError(
                f"the nodes {names} wait for each other in a cycle", node=_cycle(waiting, by_name)[0].name
            )
        waiting.remove(ready)
        order.append(ready)
        done.add(ready.name)
    _check_used(order)
    # Only the output reads nothing further on, so it can stand last without breaking the order.
    return tuple(sorted(order, key=lambda node: node.op == "output"))


def _cycle(waiting: Sequence[Node], by_name: Mapping[str, Node]) -> list[Node]:
    """The nodes of one cycle among those that wait: walk back along waiting inputs until a node comes twice."""
    stuck = {node.name for node in waiting}
    path: list[Node] = []
    node = waiting[0]
    while node not in path:
        path.append(node)
        node = by_name[next(source for source in node.inputs if source in stuck)]
    return path[path.index(node) :]


def _check_used(order: Sequence[Node]) -> None:
    needed: set[str] = set()
    for node in reversed(sorted(order, key=lambda node: node.op == "output")):
        if node.op != "output" and node.name not in needed:
            raise BlueprintError("its result does not reach the output; remove the node", node=node.name)
        needed.update(node.inputs)
