"""First weights: the same bits for the same seed, and a network whose function waking leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints import (
    Blueprint,
    Node,
    canonical_order,
    describe,
    get,
    initialise,
    names,
    preserves_function,
    run,
    validate,
)
from esper.contracts.errors import BlueprintError
from tests.blueprints.strategies import blueprints, rewritten

D = 6


def images_or_rows(blueprint: Blueprint, features: int = D) -> tuple[torch.Tensor, int]:
    if validate(blueprint, features, features).images_only:
        return torch.randn(2, features, 5, 4, dtype=torch.float64), 1
    return torch.randn(7, features, dtype=torch.float64), -1


def join(blueprint: Blueprint, h: torch.Tensor, k: torch.Tensor, alpha: float) -> torch.Tensor:
    return h + alpha * k if blueprint.mode == "residual" else (1 - alpha) * h + alpha * k


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("name", names())
def test_waking_keeps_the_function_where_it_is_said_to(name: str, tap: str, mode: str, alpha: float) -> None:
    blueprint = get(name, tap=tap, mode=mode)
    x, dim = images_or_rows(blueprint)
    h = torch.tanh(x.flip(0)) * 2
    k = run(
        blueprint, initialise(blueprint, D, D, seed=3, dtype=torch.float64), x if tap == "input" else h, channel_dim=dim
    )
    y = join(blueprint, h, k, alpha)
    if not preserves_function(blueprint, D, D):
        assert not torch.allclose(y, h, atol=1e-3)
    elif mode == "residual":
        assert torch.equal(y, h)
    else:
        # (1 - a) h + a h: three roundings, each at most half an ulp of a number no larger than |h|.
        assert ((y - h).abs() <= 1.5 * torch.finfo(h.dtype).eps * h.abs()).all()


@pytest.mark.parametrize("name", names())
def test_what_the_library_says_of_preserving(name: str) -> None:
    text = describe(name).preserving
    residual, _, replace = text.partition(";")
    assert preserves_function(get(name, mode="residual"), D, D) == residual.startswith("residual: always")
    kept = preserves_function(get(name, mode="replace", tap="output"), D, D)
    assert kept == ("tap=output" in replace and "ReLU" not in replace)
    assert not preserves_function(get(name, mode="replace", tap="input"), D, D)


def test_dense_relu_replaces_a_relu_exactly() -> None:
    blueprint = get("dense_relu", mode="replace", tap="output")
    h = torch.relu(torch.randn(7, D))
    assert torch.equal(run(blueprint, initialise(blueprint, D, D), h), h)


@pytest.mark.parametrize("name", [n for n in names() if preserves_function(get(n, mode="residual"), D, D)])
def test_a_zero_residual_can_learn(name: str) -> None:
    """Zero weights must not cut the gradient: after one step of descent k is no longer zero."""
    blueprint = get(name, mode="residual")
    x, dim = images_or_rows(blueprint)
    tensors = {k: v.requires_grad_() for k, v in initialise(blueprint, D, D, dtype=torch.float64).items()}
    k = run(blueprint, tensors, x, channel_dim=dim)
    assert not k.any()
    gradients = torch.autograd.grad((k * torch.randn_like(k)).sum(), list(tensors.values()))
    assert any(gradient.any() for gradient in gradients)
    stepped = {name: t - g for (name, t), g in zip(tensors.items(), gradients, strict=True)}
    assert run(blueprint, stepped, x, channel_dim=dim).any()


@given(blueprints(images=True), st.integers(0, 3))
def test_any_blueprint_said_to_preserve_does(blueprint: Blueprint, seed: int) -> None:
    if not preserves_function(blueprint, D, D):
        return
    h = torch.randn(2, D, 5, 4, dtype=torch.float64)
    tensors = {k: v.requires_grad_() for k, v in initialise(blueprint, D, D, seed=seed, dtype=torch.float64).items()}
    k = run(blueprint, tensors, h, channel_dim=1)
    if blueprint.mode == "replace":
        assert torch.equal(k, h)
        return
    assert not k.any()
    gradients = torch.autograd.grad((k * torch.randn_like(k)).sum(), list(tensors.values()), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


def _graph(*nodes: Node, **join: Any) -> Blueprint:
    return Blueprint("graph", (Node("x", "input"), *nodes, Node("y", "output", (nodes[-1].name,))), **join)


def _linear(name: str, source: str) -> Node:
    return Node(name, "linear", (source,), {"out": "d_out"})


@pytest.mark.parametrize(
    ("nodes", "preserving"),
    [
        ((_linear("a", "x"), Node("t", "activation", ("a",), {"kind": "tanh"})), True),
        ((_linear("a", "x"), Node("t", "activation", ("a",), {"kind": "relu"})), False),
        ((_linear("a", "x"), Node("t", "activation", ("a",), {"kind": "sigmoid"})), False),
        ((_linear("a", "x"), Node("n", "norm", ("a",), {"kind": "layernorm"})), False),
        ((_linear("a", "x"), Node("s", "add", ("a", "x"))), False),
        ((_linear("a", "x"), Node("s", "mul", ("a", "x"))), True),
        ((_linear("a", "x"), Node("s", "mul", ("a", "a"))), False),
        ((_linear("a", "x"), _linear("b", "a"), Node("s", "mul", ("a", "b"))), True),
        ((_linear("a", "x"), _linear("b", "a"), Node("s", "add", ("a", "b"))), True),
        ((Node("t", "shift", ("x",)),), False),
    ],
)
def test_zero_through_other_graphs(nodes: tuple[Node, ...], preserving: bool) -> None:
    blueprint = _graph(*nodes)
    assert preserves_function(blueprint, D, D) == preserving
    tensors = {name: t.requires_grad_() for name, t in initialise(blueprint, D, D).items()}
    k = run(blueprint, tensors, torch.randn(5, D))
    assert bool(k.any()) != preserving
    gradients = torch.autograd.grad(k.square().sum() + k.sum(), list(tensors.values()))
    assert any(gradient.any() for gradient in gradients)


def test_identity_of_a_convolution_needs_its_own_pixel() -> None:
    h = torch.randn(1, D, 6, 6)
    for params, kept in [
        ({}, True),
        ({"kernel_size": (1, 5), "dilation": (1, 2)}, True),
        ({"kernel_size": 4, "padding": 2, "dilation": 1}, False),
        ({"stride": 2}, False),
        ({"kernel_size": 2, "dilation": 2, "padding": 1}, False),
    ]:
        blueprint = get("conv", mode="replace", tap="output", **params)
        assert preserves_function(blueprint, D, D) == kept
        k = run(blueprint, initialise(blueprint, D, D), h, channel_dim=1)
        assert (k.shape == h.shape and torch.equal(k, h)) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_same_seed_same_bits(dtype: torch.dtype) -> None:
    blueprint = get("gated", mode="replace", rank=5)
    first = initialise(blueprint, 33, 17, seed=11, dtype=dtype)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = initialise(blueprint, 33, 17, seed=11, dtype=dtype)
    finally:
        torch.set_num_threads(threads)
    other = initialise(blueprint, 33, 17, seed=12, dtype=dtype)
    wide = initialise(blueprint, 33, 17, seed=11, dtype=torch.float64)
    for name, tensor in first.items():
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        assert torch.equal(tensor, wide[name].to(dtype))
    assert not torch.equal(first["gate.weight"], first["value.weight"])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialise(get("bottleneck", mode="replace"), 8, 8)
    assert torch.equal(torch.rand(3), expected)


def test_the_bits_are_fixed() -> None:
    """Artifact ids promise that the same inputs give the same bytes, on every machine."""
    weight = initialise(get("lowrank", rank=1), 3, 3, seed=0, dtype=torch.float64)["down.weight"]
    assert [value.hex() for value in weight.flatten().tolist()] == [
        "0x1.4c15f32c88fc8p-2",
        "-0x1.bfd0a23903430p-3",
        "0x1.23e7b79bd783ep-1",
    ]


@given(st.data(), blueprints(max_nodes=6))
def test_names_do_not_change_the_weights(data: st.DataObject, blueprint: Blueprint) -> None:
    other = data.draw(rewritten(blueprint))
    mine, theirs = initialise(blueprint, 4, 3, seed=7), initialise(other, 4, 3, seed=7)
    for name, twin in zip(canonical_order(blueprint), canonical_order(other), strict=True):
        for role in ("weight", "bias"):
            if f"{name}.{role}" in mine:
                assert torch.equal(mine[f"{name}.{role}"], theirs[f"{twin}.{role}"])


def test_order_of_factors_does_not_change_which_is_zero() -> None:
    act = Node("t", "activation", ("b",), {"kind": "tanh"})
    first, second = (
        initialise(_graph(_linear("a", "x"), _linear("b", "x"), act, Node("m", "mul", pair)), D, D)
        for pair in (("a", "t"), ("t", "a"))
    )
    assert torch.equal(first["a.weight"], second["a.weight"])
    assert torch.equal(first["b.weight"], second["b.weight"])
    assert first["a.weight"].any() != first["b.weight"].any()


def test_scale_of_random_weights() -> None:
    """Uniform on [-b, b] with b = gain sqrt(3 / fan_in), which has variance gain^2 / fan_in."""
    fan_in, fan_out = 300, 400
    for activation, gain in [("relu", math.sqrt(2)), ("tanh", 5 / 3), (None, 1.0)]:
        blueprint = get("dense", mode="replace", activation=activation)
        tensors = initialise(blueprint, fan_in, fan_out, dtype=torch.float64)
        weight, bound = tensors["linear.weight"], gain * math.sqrt(3 / fan_in)
        assert weight.abs().max() <= bound
        # The mean of n squares of uniform numbers has relative deviation sqrt(4/5 / n); six of them will not be met by
        # chance.
        n = weight.numel()
        assert abs(weight.square().mean() / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / n)
        assert abs(weight.mean()) < 6 * bound / math.sqrt(3 * n)
        assert not tensors["linear.bias"].any()


@pytest.mark.parametrize("seed", [-1, 1 << 63, True, 1.0, None, "0"])
def test_bad_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(BlueprintError, match=r"seed must be an integer in \[0, 2\*\*63\)"):
        initialise(get("lowrank"), 4, 4, seed=seed)


def test_bad_dtypes_are_refused() -> None:
    with pytest.raises(BlueprintError, match=r"dtype must be one of torch.float32.* not torch.int8"):
        initialise(get("lowrank"), 4, 4, dtype=torch.int8)
    with pytest.raises(BlueprintError, match="dtype must be one of"):
        initialise(get("lowrank"), 4, 4, dtype="float32")  # type: ignore[arg-type]
