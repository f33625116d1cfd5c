"""One form and one hash for all blueprints that mean the same.

Names of nodes and of the blueprint, the order of nodes and of JSON keys, defaults left out or written down, the order
of the inputs of ``add`` and ``mul``, and the spelling of sizes are not meaning. Operations, attributes, sharing (one
node read twice is not two equal nodes), tap, mode, scope, and the parameters with their defaults are.

The graph is rooted at its output and the inputs of most nodes are ordered, so a depth-first walk from the output
numbers it in one way only. What is left open is the order of the two inputs of a commutative node. A digest of what
lies below each input settles nearly all of these; where the digests are equal both orders are followed, and the smaller
form wins. Mirror images are followed once (equal forms prove that an isomorphism leads from one walk to the other), and
a walk is dropped as soon as the part of its form that no later choice can change is larger than another's.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from esper.blueprints.ir import SCHEMA_VERSION, Blueprint, Node
from esper.blueprints.nodes import OPS
from esper.blueprints.sizes import normal_form
from esper.contracts.errors import BlueprintError

__all__ = ["blueprint_hash", "canonical_form", "canonical_order"]

#: Walks of the graph before a blueprint is refused; real ones need a few.
_MAX_WALKS = 2000


def canonical_form(blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint's meaning as JSON values: nodes by number, inputs first, without names.

    Raises:
        BlueprintError: for a graph so symmetric that its form cannot be found in reasonable time.
    """
    return {
        "schema": SCHEMA_VERSION,
        "tap": blueprint.tap,
        "mode": blueprint.mode,
        "scope": blueprint.scope,
        "parameters": dict(blueprint.parameters),
        "nodes": [json.loads(line) for line in _numbering(blueprint).form],
    }


def canonical_order(blueprint: Blueprint) -> tuple[str, ...]:
    """The names of the nodes in the order of :func:`canonical_form`, which does not depend on the names.

    Nodes that are mirror images of each other may change places when a blueprint is renamed or reordered; nothing else
    can.
    """
    return _numbering(blueprint).order


def blueprint_hash(blueprint: Blueprint) -> str:
    """SHA-256 of the canonical form, 64 hexadecimal digits."""
    text = json.dumps(canonical_form(blueprint), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(b"esper blueprint\n" + text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class _Walk:
    """One numbering of the nodes.

    Attributes:
        form: One line for each node, inputs first.
        order: The nodes' names, in the same order.
        settled: For each tie met, how many lines stood before it: no choice from there on changes them.
    """

    form: tuple[str, ...]
    order: tuple[str, ...]
    settled: tuple[int, ...]

    def fixed(self, choices: _Choices) -> tuple[str, ...]:
        """The lines that ``choices`` determine, whatever is chosen after them."""
        return self.form if self.complete(choices) else self.form[: self.settled[len(choices)]]

    def complete(self, choices: _Choices) -> bool:
        """Whether ``choices`` settle every tie."""
        return len(self.settled) == len(choices)


#: At each tie in the order of the walk: whether the input declared second is visited first.
_Choices = tuple[bool, ...]


@functools.lru_cache(maxsize=256)
def _numbering(blueprint: Blueprint) -> _Walk:
    nodes = {node.name: node for node in blueprint.order}
    digests = _digests(blueprint)
    walks: dict[_Choices, _Walk] = {}

    def walk(choices: _Choices) -> _Walk:
        if choices not in walks:
            if len(walks) >= _MAX_WALKS:
                raise BlueprintError(f"the nodes are too alike to be told apart in {_MAX_WALKS} walks of the graph")
            walks[choices] = _walk(blueprint.order[-1], nodes, digests, choices)
        return walks[choices]

    pending: list[_Choices] = [()]
    while True:
        grown: dict[tuple[int, tuple[str, ...]], _Choices] = {}
        for choices in pending:
            done = walk(choices).complete(choices)
            for longer in [choices] if done else [(*choices, False), (*choices, True)]:
                grown.setdefault((len(longer), walk(longer).form), longer)
        pending = [mine for mine in grown.values() if not any(_beats(walk, other, mine) for other in grown.values())]
        if all(walk(choices).complete(choices) for choices in pending):
            return min((walk(choices) for choices in pending), key=lambda found: found.form)


def _beats(walk: Callable[[_Choices], _Walk], one: _Choices, other: _Choices) -> bool:
    """Whether everything that ``one`` can lead to is smaller than everything that ``other`` can lead to."""
    mine, theirs = walk(one).fixed(one), walk(other).fixed(other)
    common = min(len(mine), len(theirs))
    return mine[:common] < theirs[:common]


def _walk(root: Node, nodes: Mapping[str, Node], digests: Mapping[str, bytes], choices: _Choices) -> _Walk:
    """Number the nodes depth first from ``root``; where ``choices`` end, ties are taken as declared."""
    numbers: dict[str, int] = {}
    form: list[str] = []
    settled: list[int] = []

    def visit(node: Node) -> None:
        inputs = list(node.inputs)
        commutative = OPS[node.op].commutative
        if commutative:
            inputs.sort(key=digests.__getitem__)
            first, second = inputs
            unvisited = first != second and first not in numbers and second not in numbers
            if unvisited and digests[first] == digests[second]:
                if len(settled) < len(choices) and choices[len(settled)]:
                    inputs.reverse()
                settled.append(len(form))
        for source in inputs:
            if source not in numbers:
                visit(nodes[source])
        sources = [numbers[source] for source in inputs]
        numbers[node.name] = len(form)
        form.append(_line(node, sorted(sources) if commutative else sources))

    visit(root)
    return _Walk(tuple(form), tuple(numbers), tuple(settled))


def _line(node: Node, sources: list[int]) -> str:
    attributes = {key: normal_form(value) if key == "out" else value for key, value in node.attrs.items()}
    return json.dumps([node.op, attributes, sources], sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digests(blueprint: Blueprint) -> dict[str, bytes]:
    """For each node a digest of everything below it, blind to names and to sharing."""
    digests: dict[str, bytes] = {}
    for node in blueprint.order:
        below = [digests[source] for source in node.inputs]
        if OPS[node.op].commutative:
            below.sort()
        digests[node.name] = hashlib.sha256(_line(node, []).encode("ascii") + b"".join(below)).digest()
    return digests
