"""Blueprints put to sizes: widths, shapes, image sizes, and every way not to fit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import Blueprint, Node, SpatialMap, get, initialise, run, validate
from esper.blueprints.validation import MAX_PARAMETER_COUNT
from esper.contracts.errors import BlueprintError, BlueprintShapeError, ShapeMismatchError
from tests.blueprints.strategies import blueprints

X = Node("x", "input")


def graph(*nodes: Node, end: str, **parameters: int) -> Blueprint:
    return Blueprint("graph", (X, *nodes, Node("y", "output", (end,))), parameters=parameters)


def linear(name: str, source: str, out: int | str = "d_out") -> Node:
    return Node(name, "linear", (source,), {"out": out})


def test_shapes_of_a_bottleneck() -> None:
    resolved = validate(get("normed_bottleneck", rank=3), d_in=5, d_out=7)
    assert dict(resolved.tensors) == {"down.weight": (3, 5), "down.bias": (3,), "up.weight": (7, 3)}
    assert list(resolved.tensors) == ["down.weight", "down.bias", "up.weight"]
    assert dict(resolved.widths) == {"x": 5, "norm": 5, "down": 3, "act": 3, "up": 7, "y": 7}
    assert resolved.parameter_count == 15 + 3 + 21
    assert dict(resolved.parameters) == {"rank": 3}
    assert all(axis.is_identity for axis in resolved.spatial)
    assert not resolved.images_only
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_parameters_given_replace_defaults() -> None:
    resolved = validate(get("lowrank"), 5, 7, rank=2)
    assert resolved.tensors["down.weight"] == (2, 5)


def test_shapes_of_a_convolution() -> None:
    resolved = validate(get("conv", kernel_size=(3, 5), stride=2, padding=1), d_in=4, d_out=6)
    assert dict(resolved.tensors) == {"depthwise.weight": (4, 3, 5), "pointwise.weight": (6, 4), "pointwise.bias": (6,)}
    assert resolved.images_only
    assert [axis(9) for axis in resolved.spatial] == [5, 4]


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2)), min_size=1, max_size=3
    ),
    st.integers(20, 60),
)
def test_image_sizes_are_those_of_torch(steps: list[tuple[int, int, int, int]], size: int) -> None:
    x = torch.zeros(1, 1, size, size)
    total = SpatialMap()
    for kernel, stride, padding, dilation in steps:
        total = total.then(SpatialMap.of_convolution(kernel, stride, padding, dilation))
        if min(x.shape[2:]) + 2 * padding <= dilation * (kernel - 1):
            return
        x = torch.nn.functional.conv2d(x, torch.zeros(1, 1, kernel, kernel), None, stride, padding, dilation)
    assert x.shape[2:] == (total(size), total(size))


@given(blueprints(images=True), st.integers(1, 6), st.integers(1, 6))
def test_resolved_is_what_runs(blueprint: Blueprint, d_in: int, d_out: int) -> None:
    resolved = validate(blueprint, d_in, d_out)
    tensors = initialise(blueprint, d_in, d_out, seed=1)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(resolved.tensors)
    k = run(blueprint, tensors, torch.randn(2, d_in, 5, 4), channel_dim=1)
    assert k.shape == (2, d_out, *(axis(size) for axis, size in zip(resolved.spatial, (5, 4), strict=True)))


def test_pointwise_nodes_need_images() -> None:
    blueprint = graph(Node("p", "pointwise", ("x",), {"out": "d_out"}), end="p")
    assert validate(blueprint, 4, 3).images_only
    assert not validate(graph(linear("p", "x"), end="p"), 4, 3).images_only
    tensors = initialise(blueprint, 4, 3)
    assert run(blueprint, tensors, torch.zeros(2, 4, 5, 5), channel_dim=1).shape == (2, 3, 5, 5)
    with pytest.raises(BlueprintShapeError, match=r"pointwise needs \[N, C, H, W\]"):
        run(blueprint, tensors, torch.zeros(2, 4))


def test_paths_of_equal_size_may_join() -> None:
    wide = Node("wide", "depthwise", ("x",), {"kernel_size": 5, "padding": 2})
    once = Node("once", "depthwise", ("x",), {"kernel_size": 3, "padding": 1})
    twice = Node("twice", "depthwise", ("once",), {"kernel_size": 3, "padding": 1})
    resolved = validate(graph(wide, once, twice, Node("s", "add", ("wide", "twice")), end="s"), 4, 4)
    assert all(axis.is_identity for axis in resolved.spatial)


def test_paths_of_unequal_image_size_are_refused() -> None:
    small = Node("small", "depthwise", ("x",), {"kernel_size": 3})
    with pytest.raises(
        BlueprintShapeError, match=r"'x' gives floor\(\(H\+0\)/1\).* 'small' gives floor\(\(H-2\)/1\)"
    ) as caught:
        validate(graph(small, Node("s", "add", ("x", "small")), end="s"), 4, 4)
    assert caught.value.node == "s"


def test_unequal_widths_are_refused_with_both() -> None:
    blueprint = graph(linear("a", "x", 3), Node("s", "mul", ("a", "x")), end="s")
    with pytest.raises(BlueprintShapeError, match="'a' has 3 features and 'x' has 4") as caught:
        validate(blueprint, 4, 4)
    assert (caught.value.node, caught.value.expected, caught.value.got) == ("s", (3,), (4,))
    assert validate(blueprint, 3, 3).d_out == 3


def test_wrong_output_width_is_refused_with_both() -> None:
    with pytest.raises(ShapeMismatchError, match="gives 4 features, but d_out is 5") as caught:
        validate(get("elementwise"), 4, 5)
    assert isinstance(caught.value, BlueprintError)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, None, "4", 1 << 20 | 1, 10**9, float("nan")])
def test_bad_sizes_are_refused(value: Any) -> None:
    with pytest.raises(BlueprintError, match="d_in must be an integer"):
        validate(get("lowrank"), value, 4)
    with pytest.raises(BlueprintError, match="d_out must be an integer"):
        validate(get("lowrank"), 4, value)
    with pytest.raises(BlueprintError, match="'rank' must be an integer"):
        validate(get("lowrank"), 4, 4, rank=value)


def test_unknown_parameter_is_refused_with_the_known() -> None:
    with pytest.raises(BlueprintError, match="has no parameter 'rnak'; it has: rank"):
        validate(get("lowrank"), 4, 4, rnak=3)
    with pytest.raises(BlueprintError, match="it has: none"):
        validate(get("dense"), 4, 4, rank=3)


def test_other_things_than_blueprints_are_refused() -> None:
    with pytest.raises(BlueprintError, match="expected a Blueprint"):
        validate(get("dense").to_dict(), 4, 4)  # type: ignore[arg-type]


def test_sizes_that_do_not_work_out_name_the_node() -> None:
    with pytest.raises(BlueprintError, match="7 / 2 is not whole") as caught:
        validate(graph(linear("half", "x", "d_in / 2"), linear("up", "half"), end="up"), 7, 4)
    assert caught.value.node == "half"


def test_too_many_weights_are_refused() -> None:
    side = 1 << 14
    assert side * side == MAX_PARAMETER_COUNT
    assert validate(get("dense", bias=False), side, side).parameter_count == MAX_PARAMETER_COUNT
    with pytest.raises(BlueprintError, match=f"beyond {MAX_PARAMETER_COUNT}") as caught:
        validate(get("dense", bias=True), side, side)
    assert caught.value.node == "linear"


def test_absurd_strides_are_refused() -> None:
    nodes = [
        Node(f"d{i}", "depthwise", (f"d{i - 1}" if i else "x",), {"kernel_size": 1, "stride": 64}) for i in range(4)
    ]
    with pytest.raises(BlueprintError, match="strides multiply"):
        validate(graph(*nodes, end="d3"), 4, 4)
