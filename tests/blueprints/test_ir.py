"""Reading and writing blueprints: round trips, strictness, and hostile input."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import Blueprint, Node, blueprint_hash, from_json, get, match, names, to_json, validate
from esper.contracts.errors import BlueprintError, EsperError
from tests.blueprints.strategies import blueprints


def lowrank() -> dict[str, Any]:
    return get("lowrank").to_dict()


@given(blueprints(images=True))
def test_round_trips(blueprint: Blueprint) -> None:
    text = to_json(blueprint)
    assert from_json(text) == from_json(text.encode()) == from_json(blueprint.to_dict()) == blueprint
    assert from_json(to_json(blueprint, indent=2)) == blueprint
    assert hash(from_json(text)) == hash(blueprint)
    assert pickle.loads(pickle.dumps(blueprint)) == copy.deepcopy(blueprint) == blueprint
    assert pickle.loads(pickle.dumps(blueprint)).order == blueprint.order


@given(blueprints())
def test_order_follows_the_edges(blueprint: Blueprint) -> None:
    seen: set[str] = set()
    for node in blueprint.order:
        assert seen.issuperset(node.inputs)
        seen.add(node.name)
    assert len(seen) == len(blueprint.nodes)
    assert blueprint.order[0].op == "input"
    assert blueprint.order[-1].op == "output"


def test_defaults_need_not_be_written() -> None:
    short = from_json(
        {
            "schema": 1,
            "name": "short",
            "nodes": [
                {"name": "x", "op": "input"},
                {"name": "d", "op": "depthwise", "inputs": ["x"], "kernel_size": 3},
                {"name": "y", "op": "output", "inputs": ["d"]},
            ],
        }
    )
    assert (short.tap, short.mode, short.scope) == ("input", "residual", "layer")
    assert dict(short.node("d").attrs) == {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "bias": False,
    }


def _with(**changes: Any) -> dict[str, Any]:
    return {**lowrank(), **changes}


def _node(index: int, **changes: Any) -> dict[str, Any]:
    data = lowrank()
    data["nodes"][index] = {k: v for k, v in {**data["nodes"][index], **changes}.items() if v is not ...}
    return data


@pytest.mark.parametrize(
    ("data", "node", "complaint"),
    [
        (_with(schema=2), None, "schema version 2; this Esper knows: 1"),
        (_with(schema="1"), None, "schema version '1'"),
        (_with(schema=True), None, "schema version True"),
        (_with(colour="red"), None, "no key 'colour'; known: schema, name, nodes, tap"),
        (_with(name=""), None, "name must be"),
        (_with(name="../etc"), None, "name must be"),
        (_with(name=7), None, "name must be"),
        (_with(tap="side"), None, "tap must be input or output, not 'side'"),
        (_with(mode=["residual"]), None, "mode must be"),
        (_with(scope=None), None, "scope must be"),
        (_with(nodes={}), None, "nodes must be a list"),
        (_with(nodes=[]), None, "exactly one input node, not 0"),
        (_with(nodes=[1]), None, "node number 0 must be a JSON object"),
        (_with(nodes=lowrank()["nodes"] * 20), None, "80 nodes are more than 64"),
        (_with(parameters={"rank": 8, "extra": 1}), None, "'extra' is declared but no size uses it"),
        (_with(parameters={}), "down", "names rank; known: d_in, d_out"),
        (_with(parameters={"rank": True}), None, "parameter 'rank' must be an integer"),
        (_with(parameters={"rank": -1}), None, "not -1"),
        (_with(parameters={"rank": 1.5}), None, "not 1.5"),
        (_with(parameters={"d_in": 3}), None, "cannot be called 'd_in'"),
        (_with(parameters={"architectures": 3}), None, "cannot be called 'architectures'"),
        (_with(parameters={"sign_with": 3}), None, "cannot be called 'sign_with'"),
        (_with(parameters={"a b": 3}), None, "cannot be called 'a b'"),
        (_with(parameters=[8]), None, "parameters must be an object"),
        (_with(parameters={f"p{i}": 1 for i in range(17)}), None, "17 parameters"),
        (_node(1, op="conv4d"), "down", "unknown op 'conv4d'; known: input, output, linear"),
        (_node(1, op=["linear"]), "down", "unknown op"),
        (_node(1, op=...), None, "key 'op' is missing"),
        (_node(1, name=...), None, "key 'name' is missing"),
        (_node(1, name="a.b"), None, "node number 1: a node's name must be an identifier"),
        (_node(1, name="d" * 65), None, "node number 1: .* must be an identifier"),
        (_node(2, name=["up"]), None, "node number 2: .* must be an identifier"),
        (_node(1, name="x"), "x", "two nodes have this name"),
        (_node(1, inputs=["z"]), "down", "reads 'z', which no node is called"),
        (_node(1, inputs=["y"]), "down", "reads the output node"),
        (_node(1, inputs=["up"]), "down", "cycle"),
        (_node(1, inputs=["down"]), "down", "cycle"),
        (_node(1, inputs="x"), "down", "inputs must be a list"),
        (_node(1, inputs=[1]), "down", "inputs must be a list"),
        (_node(1, inputs=[]), "down", r"takes 1 input\(s\), not 0"),
        (_node(2, inputs=["x"]), "down", "does not reach the output"),
        (_node(1, out=...), "down", "'out' is missing"),
        (_node(1, out=float("nan")), "down", "not nan"),
        (_node(1, out=-3), "down", "not -3"),
        (_node(1, out="rank rank"), "down", "unexpected 'rank'"),
        (_node(1, bias=1), "down", "bias must be true or false, not 1"),
        (_node(1, weight=3), "down", "unknown attribute 'weight'; linear takes: out, bias"),
        (_node(0, op="output", inputs=["up"]), None, "exactly one input node, not 0"),
        ([], None, "a blueprint must be a JSON object"),
        ({}, None, "schema version None"),
        ({"schema": 1, "name": "a"}, None, "needs the key 'nodes'"),
    ],
)
def test_what_is_refused(data: Any, node: str | None, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint) as caught:
        from_json(data)
    assert caught.value.node == node
    assert isinstance(caught.value, EsperError)
    if node is not None:
        assert str(caught.value).startswith(f"node '{node}': ")


@pytest.mark.parametrize(
    ("op", "attrs", "complaint"),
    [
        ("activation", {}, "'kind' is missing"),
        ("activation", {"kind": "swish"}, "one of relu, gelu, gelu_tanh"),
        ("activation", {"kind": ["relu"]}, "one of"),
        ("norm", {"kind": "layernorm", "eps": float("nan")}, r"in \[1e-12, 1\], not nan"),
        ("norm", {"kind": "layernorm", "eps": 0}, "not 0"),
        ("norm", {"kind": "layernorm", "eps": True}, "not True"),
        ("norm", {"kind": "layernorm", "eps": 10**400}, "eps must be"),
        ("depthwise", {"kernel_size": 0}, r"in \[1, 127\], not 0"),
        ("depthwise", {"kernel_size": [3, 3, 3]}, "one or two integers"),
        ("depthwise", {"kernel_size": [3, True]}, "one or two integers"),
        ("depthwise", {"kernel_size": 3, "padding": -1}, "not -1"),
        ("depthwise", {"kernel_size": "3"}, "not '3'"),
        ("scale", {"out": 3}, "unknown attribute 'out'; scale takes: none"),
    ],
)
def test_attributes_that_are_refused(op: str, attrs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint) as caught:
        Node("n", op, ("x",), attrs)
    assert caught.value.node == "n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("{", "not JSON"),
        ('{"schema": NaN}', "NaN is not a JSON value"),
        ('{"schema": -Infinity}', "-Infinity is not a JSON value"),
        ('{"schema": 1, "schema": 1}', "'schema' stands twice"),
        ('{"schema": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (" " * (1 << 19), "longer than"),
    ],
)
def test_text_that_is_refused(text: str | bytes, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        from_json(text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["d_in", "rank", "linear", "add", "input", "x", "residual", 1 << 70, -1, 0, 1e999, "__class__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _everything(data: Any) -> None:
    """All that a service does with a blueprint it was sent; only BlueprintError may come out."""
    try:
        blueprint = from_json(data)
        blueprint_hash(blueprint)
        match(blueprint)
        validate(blueprint, 16, 16)
    except BlueprintError as error:
        assert len(str(error)) < 1000


@given(st.binary(max_size=200) | st.text(max_size=200) | json_values | json_values.map(json.dumps))
def test_any_input_is_read_or_refused(data: Any) -> None:
    _everything(data)


@given(st.data())
def test_any_altered_blueprint_is_read_or_refused(data: st.DataObject) -> None:
    blueprint = data.draw(st.sampled_from(names()).map(lambda name: get(name).to_dict()))
    for _ in range(data.draw(st.integers(1, 3))):
        spot: Any = blueprint
        while True:
            key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
            if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.integers(0, 4)) == 0:
                break
            spot = spot[key]
        if data.draw(st.booleans()):
            spot[key] = data.draw(json_values)
        else:
            del spot[key]
            if not spot:
                break
    _everything(blueprint)
