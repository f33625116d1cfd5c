"""Which family a blueprint belongs to: every form, every near miss, whatever the names and the order."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import Blueprint, FamilyName, Geometry, Node, describe, get, match, names
from tests.blueprints.strategies import blueprints, rewritten

X = Node("x", "input")


def graph(*nodes: Node) -> Blueprint:
    rank = {"rank": 4} if any(node.attrs.get("out") == "rank" for node in nodes) else {}
    return Blueprint("graph", (X, *nodes, Node("y", "output", (nodes[-1].name,))), parameters=rank)


def linear(name: str, source: str, out: str = "d_out", *, bias: bool = False) -> Node:
    return Node(name, "linear", (source,), {"out": out, "bias": bias})


def act(name: str, source: str, kind: str = "relu") -> Node:
    return Node(name, "activation", (source,), {"kind": kind})


def norm(name: str, source: str) -> Node:
    return Node(name, "norm", (source,), {"kind": "rmsnorm", "eps": 1e-3})


DOWN = linear("d", "x", "rank")
DEPTHWISE = Node("dw", "depthwise", ("x",), {"kernel_size": 3})


@pytest.mark.parametrize("name", names())
@given(data=st.data())
def test_library_entries_match_their_family(name: str, data: st.DataObject) -> None:
    blueprint = get(name)
    family = match(blueprint)
    assert family.name == describe(name).family
    assert family.execution == ("graph" if family.name == "graph" else "fused")
    other = data.draw(rewritten(blueprint))
    renamed = match(other)
    assert (renamed.name, renamed.activation, renamed.norm, renamed.eps) == (
        family.name,
        family.activation,
        family.norm,
        family.eps,
    )
    assert (renamed.biases, renamed.rank, renamed.geometry) == (family.biases, family.rank, family.geometry)
    assert {role: other.node(node).op for role, node in renamed.roles.items()} == {
        role: blueprint.node(node).op for role, node in family.roles.items()
    }


def test_roles_and_attributes() -> None:
    family = match(get("normed_gated", norm="layernorm", eps=1e-4, activation="gelu", bias=True))
    assert family.name is FamilyName.GATED
    assert dict(family.roles) == {"gate": "gate", "value": "value", "up": "up"}
    assert (family.activation, family.norm, family.eps, family.rank) == ("gelu", "layernorm", 1e-4, "rank")
    assert family.biases == {"gate", "value"}
    assert family.tensor("gate") == "gate.weight"
    assert family.tensor("value", "bias") == "value.bias"
    with pytest.raises(KeyError):
        family.tensor("down")
    assert pickle.loads(pickle.dumps(family)) == family

    conv = match(get("conv_relu", kernel_size=(3, 5), stride=2, dilation=(1, 2)))
    assert conv.geometry == Geometry((3, 5), (2, 2), (1, 4), (1, 2))
    assert conv.activation == "relu"
    assert conv.biases == {"pointwise"}


def test_gate_is_the_activated_side_whatever_the_order() -> None:
    sides = (linear("p", "x", "rank"), linear("q", "x", "rank"), act("a", "q"))
    for inputs in (("a", "p"), ("p", "a")):
        family = match(graph(*sides, Node("m", "mul", inputs), linear("u", "m")))
        assert family.name == "gated"
        assert dict(family.roles) == {"gate": "q", "value": "p", "up": "u"}


@pytest.mark.parametrize(
    ("nodes", "family"),
    [
        ((DOWN, linear("u", "d")), "lowrank"),
        ((linear("d", "x", "rank", bias=True), linear("u", "d")), "bottleneck"),
        ((norm("n", "x"), linear("d", "n", "rank"), linear("u", "d")), "bottleneck"),
        ((DOWN, act("a", "d", "sigmoid"), linear("u", "a")), "bottleneck"),
        ((Node("u", "pointwise", ("x",), {"out": "d_out"}),), "dense"),
        ((linear("w", "x"), act("a", "w")), "dense"),
        ((Node("s", "scale", ("x",)),), "elementwise"),
        ((act("a", "x"), Node("s", "scale", ("a",)), Node("t", "shift", ("s",))), "elementwise"),
        ((DEPTHWISE, linear("p", "dw")), "conv"),
        ((DEPTHWISE, act("a", "dw"), Node("p", "pointwise", ("a",), {"out": "d_out"})), "conv"),
    ],
)
def test_forms(nodes: tuple[Node, ...], family: str) -> None:
    assert match(graph(*nodes)).name == family


@pytest.mark.parametrize(
    "nodes",
    [
        (DOWN, linear("u", "d", bias=True)),
        (DOWN, act("a", "d"), linear("u", "a", bias=True)),
        (DOWN, act("a", "d"), act("b", "a"), linear("u", "b")),
        (DOWN, norm("n", "d"), linear("u", "n")),
        (act("a", "x"), linear("d", "a", "rank"), linear("u", "d")),
        (norm("n", "x"), norm("m", "n"), linear("d", "m", "rank"), linear("u", "d")),
        (DOWN, linear("e", "d", "rank"), linear("u", "e")),
        (DOWN, linear("u", "d"), act("a", "u")),
        (DOWN, linear("u", "d"), Node("s", "scale", ("u",))),
        (DOWN, Node("m", "mul", ("d", "d")), linear("u", "m")),
        (DOWN, act("a", "d"), Node("m", "mul", ("a", "d")), linear("u", "m")),
        (DOWN, linear("v", "x", "rank"), Node("m", "mul", ("d", "v")), linear("u", "m")),
        (DOWN, linear("v", "x", "rank"), act("a", "d"), act("b", "v"), Node("m", "mul", ("a", "b")), linear("u", "m")),
        (DOWN, linear("v", "x", "rank"), act("a", "d"), Node("m", "add", ("a", "v")), linear("u", "m")),
        (DOWN, norm("n", "x"), linear("v", "n", "rank"), act("a", "d"), Node("m", "mul", ("a", "v")), linear("u", "m")),
        (DOWN, norm("n", "x"), linear("v", "n", "rank"), act("a", "v"), Node("m", "mul", ("a", "d")), linear("u", "m")),
        (
            norm("n", "x"),
            norm("k", "x"),
            linear("g", "n", "rank"),
            linear("v", "k", "rank"),
            act("a", "g"),
            Node("m", "mul", ("a", "v")),
            linear("u", "m"),
        ),
        (norm("n", "x"), linear("w", "n")),
        (act("a", "x"), linear("w", "a")),
        (Node("t", "shift", ("x",)),),
        (Node("t", "shift", ("x",)), Node("s", "scale", ("t",))),
        (Node("s", "scale", ("x",)), act("a", "s")),
        (Node("s", "scale", ("x",)), Node("r", "scale", ("s",))),
        (norm("n", "x"), Node("s", "scale", ("n",))),
        (DEPTHWISE,),
        (linear("p", "x"), Node("dw", "depthwise", ("p",), {"kernel_size": 3})),
        (DEPTHWISE, linear("p", "dw"), act("a", "p")),
        (DEPTHWISE, norm("n", "dw"), linear("p", "n")),
        (linear("w", "x"), Node("s", "add", ("w", "x"))),
        (act("a", "x"),),
    ],
)
def test_near_misses_run_as_graphs(nodes: tuple[Node, ...]) -> None:
    family = match(graph(*nodes))
    assert family.name == "graph"
    assert family.execution == "graph"
    assert not family.roles


def test_nothing_but_the_input() -> None:
    assert match(Blueprint("skip", (X, Node("y", "output", ("x",))))).name == "graph"


@given(blueprints(images=True))
def test_a_family_accounts_for_every_weight(blueprint: Blueprint) -> None:
    family = match(blueprint)
    if family.execution == "fused":
        weighted = {node.name for node in blueprint.nodes if node.op in ("linear", "depthwise", "scale", "shift")}
        assert set(family.roles.values()) == weighted
