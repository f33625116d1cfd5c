"""One form and one hash for all blueprints that mean the same.

Names of nodes and of the blueprint, the order of nodes and of JSON keys, defaults left out or written down, the order
of the inputs of ``add`` and ``mul``, and the spelling of sizes are not meaning. Operations, attributes, sharing (one
node read twice is not two equal nodes), tap, mode, scope, and the parameters with their defaults are.

The graph is rooted at its output and the inputs of most nodes are ordered, so a depth-first walk from the output
numbers it in one way only. What is left open is the order of the two inputs of a commutative node. A digest of what
lies below each input settles nearly all of them; inputs with equal digests are mostly mirror images, which is seen from
both orders giving the same form. Where they do not, both orders are followed and the smaller form is taken.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.blueprints.ir import SCHEMA_VERSION, Blueprint, Node
from esper.blueprints.nodes import OPS
from esper.blueprints.sizes import normal_form
from esper.contracts.errors import BlueprintError

__all__ = ["blueprint_hash", "canonical_form", "canonical_order"]

#: Walks of the graph before a blueprint is refused; real ones need fewer than a hundred.
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
        "nodes": json.loads(_numbering(blueprint).form),
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
class _Numbering:
    form: str
    order: tuple[str, ...]
    ties: int


@functools.lru_cache(maxsize=256)
def _numbering(blueprint: Blueprint) -> _Numbering:
    nodes = {node.name: node for node in blueprint.order}
    digests = _digests(blueprint)
    best: _Numbering | None = None
    walks = 0
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        choices = pending.pop()
        here = _walk(blueprint.order[-1], nodes, digests, choices)
        walks += 1
        if here.ties == len(choices):
            best = here if best is None or here.form < best.form else best
            continue
        # Equal forms prove that an isomorphism leads from one order to the other: following one is enough.
        other = _walk(blueprint.order[-1], nodes, digests, (*choices, True))
        walks += 1
        pending.append((*choices, False))
        if other.form != here.form:
            pending.append((*choices, True))
        if walks > _MAX_WALKS:
            raise BlueprintError(
                f"the nodes are too alike to be told apart in {_MAX_WALKS} walks; use fewer add and mul nodes"
            )
    assert best is not None  # the walk that takes no choice at all ends
    return best


def _walk(root: Node, nodes: Mapping[str, Node], digests: Mapping[str, bytes], choices: tuple[bool, ...]) -> _Numbering:
    """Number the nodes depth first from ``root``; ``choices`` says at which ties to take the second input first."""
    numbers: dict[str, int] = {}
    form: list[list[object]] = []
    ties = 0

    def visit(node: Node) -> None:
        nonlocal ties
        inputs = list(node.inputs)
        commutative = OPS[node.op].commutative
        if commutative:
            inputs.sort(key=digests.__getitem__)
            first, second = inputs
            open_choice = first != second and first not in numbers and second not in numbers
            if open_choice and digests[first] == digests[second]:
                if ties < len(choices) and choices[ties]:
                    inputs.reverse()
                ties += 1
        for source in inputs:
            if source not in numbers:
                visit(nodes[source])
        sources = [numbers[source] for source in inputs]
        numbers[node.name] = len(form)
        form.append([node.op, _attributes(node), sorted(sources) if commutative else sources])

    visit(root)
    return _Numbering(json.dumps(form, separators=(",", ":")), tuple(numbers), ties)


def _digests(blueprint: Blueprint) -> dict[str, bytes]:
    """For each node a digest of everything below it, blind to names and to sharing."""
    digests: dict[str, bytes] = {}
    for node in blueprint.order:
        below = [digests[source] for source in node.inputs]
        if OPS[node.op].commutative:
            below.sort()
        label = json.dumps([node.op, _attributes(node)], separators=(",", ":")).encode("ascii")
        digests[node.name] = hashlib.sha256(label + b"".join(below)).digest()
    return digests


def _attributes(node: Node) -> list[list[object]]:
    return [[key, normal_form(value) if key == "out" else value] for key, value in node.attrs.items()]
