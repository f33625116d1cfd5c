"""One hash for one meaning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import Blueprint, Node, blueprint_hash, canonical_form, canonical_order, from_json, get, names
from esper.blueprints import canonical as canonical_module
from esper.contracts.errors import BlueprintError
from tests.blueprints.strategies import blueprints, rewritten


@given(st.data(), blueprints(images=True, max_nodes=12))
def test_rewriting_keeps_form_and_hash(data: st.DataObject, blueprint: Blueprint) -> None:
    other = data.draw(rewritten(blueprint))
    assert canonical_form(other) == canonical_form(blueprint)
    assert blueprint_hash(other) == blueprint_hash(blueprint)


@given(blueprints(max_nodes=12))
def test_form_is_the_graph(blueprint: Blueprint) -> None:
    form, order = canonical_form(blueprint), canonical_order(blueprint)
    number = {name: i for i, name in enumerate(order)}
    assert sorted(order) == sorted(node.name for node in blueprint.nodes)
    for name, (op, _, inputs) in zip(order, form["nodes"], strict=True):
        node = blueprint.node(name)
        assert op == node.op
        assert sorted(inputs) == sorted(number[source] for source in node.inputs)
        assert all(source < number[name] for source in inputs)
    json.dumps(form, allow_nan=False)


def test_key_order_and_spelling_are_not_meaning() -> None:
    data = get("gated").to_dict()
    backwards = json.loads(json.dumps(data), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    backwards["name"] = "another"
    backwards["nodes"][1]["out"] = " (rank) "
    assert blueprint_hash(from_json(backwards)) == blueprint_hash(get("gated"))


def test_every_library_entry_and_way_to_join_differs() -> None:
    hashes = {
        blueprint_hash(get(name, tap=tap, mode=mode, scope=scope))
        for name in names()
        for tap in ("input", "output")
        for mode in ("residual", "replace")
        for scope in ("layer", "chunk")
    }
    assert len(hashes) == 8 * len(names())


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lowrank", {}, {"rank": 9}),
    ("bottleneck", {}, {"activation": "gelu_tanh"}),
    ("bottleneck", {}, {"bias": False}),
    ("normed_bottleneck", {}, {"eps": 2e-5}),
    ("normed_bottleneck", {}, {"norm": "rmsnorm"}),
    ("conv", {"stride": 1, "padding": 1}, {"stride": 2, "padding": 1}),
    ("conv", {"kernel_size": [3, 1]}, {"kernel_size": [1, 3]}),
    ("elementwise", {}, {"shift": False}),
]


@pytest.mark.parametrize(("name", "before", "after"), CHANGES)
def test_changed_meaning_changes_the_hash(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert blueprint_hash(get(name, **before)) != blueprint_hash(get(name, **after))


#: For each attribute a value other than the one given, always legal.
OTHER: dict[str, Callable[[Any], Any]] = {
    "bias": lambda value: not value,
    "eps": lambda value: value * 2,
    "kind": lambda value: {"layernorm": "rmsnorm", "rmsnorm": "layernorm", "relu": "tanh"}.get(value, "relu"),
    "kernel_size": lambda value: (value[0] + 1, value[1]),
    "stride": lambda value: (value[0], value[1] + 1),
    "padding": lambda value: (value[0] + 1, value[1]),
    "dilation": lambda value: (value[0], value[1] + 1),
    "out": lambda value: f"({value}) + 1",
}


@given(st.data(), blueprints(images=True, max_nodes=12))
def test_any_other_attribute_is_another_hash(data: st.DataObject, blueprint: Blueprint) -> None:
    places = [(node.name, key) for node in blueprint.nodes for key in node.attrs]
    name, key = data.draw(st.sampled_from(places))
    nodes = tuple(
        replace(node, attrs={**node.attrs, key: OTHER[key](node.attrs[key])}) if node.name == name else node
        for node in blueprint.nodes
    )
    assert blueprint_hash(replace(blueprint, nodes=nodes)) != blueprint_hash(blueprint)


@given(st.data(), blueprints(images=True, max_nodes=12))
def test_another_edge_is_another_hash(data: st.DataObject, blueprint: Blueprint) -> None:
    """An activation put into any edge, or one whose node is read where it was bypassed before."""
    edges = [(node.name, place) for node in blueprint.nodes for place in range(len(node.inputs))]
    name, place = data.draw(st.sampled_from(edges))
    node = blueprint.node(name)
    extra = Node("extra", "activation", (node.inputs[place],), {"kind": "silu"})
    inputs = tuple("extra" if i == place else source for i, source in enumerate(node.inputs))
    nodes = tuple(replace(node, inputs=inputs) if each is node else each for each in blueprint.nodes)
    assert blueprint_hash(replace(blueprint, nodes=(*nodes, extra))) != blueprint_hash(blueprint)


def _linear(name: str, source: str = "x") -> Node:
    return Node(name, "linear", (source,), {"out": "d_out"})


def _graph(*nodes: Node, end: str) -> Blueprint:
    return Blueprint("graph", (Node("x", "input"), *nodes, Node("y", "output", (end,))))


def test_sharing_is_meaning() -> None:
    shared = _graph(_linear("a"), Node("s", "add", ("a", "a")), end="s")
    apart = _graph(_linear("a"), _linear("b"), Node("s", "add", ("a", "b")), end="s")
    assert blueprint_hash(shared) != blueprint_hash(apart)


def test_order_of_twins_is_not_meaning() -> None:
    """Two equal linear nodes, read by three pairs: from the second pair on both are numbered already."""
    pairs = (("a", "b"), ("b", "a"))
    hashes = {
        blueprint_hash(
            _graph(
                _linear("a"),
                _linear("b"),
                Node("s", "add", first),
                Node("m", "mul", second),
                Node("r", "add", third),
                Node("g", "activation", ("r",), {"kind": "tanh"}),
                Node("t", "add", ("s", "m")),
                Node("u", "add", ("t", "g")),
                end="u",
            )
        )
        for first in pairs
        for second in pairs
        for third in pairs
    }
    assert len(hashes) == 1


def test_order_of_operations_is_meaning() -> None:
    act = {"kind": "tanh"}
    before = _graph(Node("t", "activation", ("x",), act), _linear("a", "t"), end="a")
    after = _graph(_linear("a"), Node("t", "activation", ("a",), act), end="t")
    assert blueprint_hash(before) != blueprint_hash(after)


def _lopsided(units: int) -> Blueprint:
    """Sums whose terms look alike from above but differ below: p + q beside r + r. Each doubles the orders to try."""
    nodes: list[Node] = []
    tops: list[str] = []
    for u in range(units):
        nodes += [_linear(f"p{u}"), _linear(f"q{u}"), _linear(f"r{u}")]
        nodes += [Node(f"a{u}", "add", (f"p{u}", f"q{u}")), Node(f"b{u}", "add", (f"r{u}", f"r{u}"))]
        nodes.append(Node(f"s{u}", "add", (f"a{u}", f"b{u}")))
        tops.append(f"s{u}")
    while len(tops) > 1:
        nodes.append(Node(f"j{len(nodes)}", "add", (tops.pop(0), tops.pop(0))))
        tops.append(nodes[-1].name)
    return _graph(*nodes, end=tops[0])


@given(st.data(), st.integers(1, 8))
def test_near_symmetric_graphs(data: st.DataObject, units: int) -> None:
    blueprint = _lopsided(units)
    assert blueprint_hash(data.draw(rewritten(blueprint))) == blueprint_hash(blueprint)


def test_too_many_orders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical_module, "_MAX_WALKS", 3)
    canonical_module._numbering.cache_clear()
    with pytest.raises(BlueprintError, match="too alike"):
        blueprint_hash(_lopsided(4))


def test_the_hash_is_fixed() -> None:
    """Ids of published artifacts contain this hash: if it changes, the schema version must change with it."""
    assert blueprint_hash(get("lowrank")) == "d959a255045aa840f5271ccc119e1676eefd62f9a421217bdd8d8e81aced12b6"
