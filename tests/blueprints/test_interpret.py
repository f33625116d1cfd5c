"""The interpreter against formulas written out in NumPy; gradients, dtypes, layouts and compilation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from esper.blueprints import ACTIVATIONS, Blueprint, Node, get, initialise, names, run, validate
from esper.contracts.errors import BlueprintError, BlueprintShapeError
from tests.blueprints.strategies import blueprints

D_IN, D_OUT = 6, 4

Array = np.ndarray
_erf = np.vectorize(math.erf)

ACTIVATE = {
    "relu": lambda v: np.maximum(v, 0),
    "gelu": lambda v: v * 0.5 * (1 + _erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "tanh": np.tanh,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


def layernorm(v: Array, eps: float) -> Array:
    return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + eps)


def rmsnorm(v: Array, eps: float) -> Array:
    return v / np.sqrt((v**2).mean(-1, keepdims=True) + eps)


def random_tensors(
    blueprint: Blueprint, d_in: int, d_out: int, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    shapes = validate(blueprint, d_in, d_out).tensors
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def close(got: torch.Tensor, wanted: Array) -> None:
    # Sums of at most 50 products of numbers of order 1 to 10 in float64: errors stay far below 1e-12 of the largest
    # value.
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_bottleneck(kind: str) -> None:
    blueprint = get("normed_bottleneck", rank=3, activation=kind)
    w = {name: t.numpy() for name, t in random_tensors(blueprint, D_IN, D_OUT).items()}
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    hidden = ACTIVATE[kind](layernorm(x.numpy(), 1e-5) @ w["down.weight"].T + w["down.bias"])
    close(run(blueprint, {k: torch.from_numpy(v) for k, v in w.items()}, x), hidden @ w["up.weight"].T)


def test_gated() -> None:
    blueprint = get("normed_gated", rank=3, activation="silu", bias=True, eps=1e-2)
    tensors = random_tensors(blueprint, D_IN, D_OUT)
    w = {name: t.numpy() for name, t in tensors.items()}
    x = torch.randn(5, D_IN, dtype=torch.float64)
    v = rmsnorm(x.numpy(), 1e-2)
    gate = ACTIVATE["silu"](v @ w["gate.weight"].T + w["gate.bias"])
    close(run(blueprint, tensors, x), (gate * (v @ w["value.weight"].T + w["value.bias"])) @ w["up.weight"].T)


def test_elementwise_on_rows_and_images() -> None:
    blueprint = get("activated_elementwise", activation="tanh")
    tensors = random_tensors(blueprint, D_IN, D_IN)
    w = {name: t.numpy() for name, t in tensors.items()}
    x = torch.randn(3, D_IN, 4, 5, dtype=torch.float64)
    wanted = np.tanh(x.numpy()) * w["scale.weight"][:, None, None] + w["shift.bias"][:, None, None]
    close(run(blueprint, tensors, x, channel_dim=1), wanted)
    close(run(blueprint, tensors, x.movedim(1, -1)).movedim(-1, 1), wanted)


def depthwise(
    x: Array, w: Array, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    kh, kw = w.shape[1:]
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            window = x[:, :, i * stride[0] :, j * stride[1] :][
                :, :, : dilation[0] * kh : dilation[0], : dilation[1] * kw : dilation[1]
            ]
            y[:, :, i, j] = (window * w).sum((2, 3))
    return y


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 2), (1, 2)), ((1, 1), (3, 2), (0, 0), (1, 1))],
)
def test_convolution(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    blueprint = get("conv_relu", kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
    tensors = random_tensors(blueprint, D_IN, D_OUT)
    w = {name: t.numpy() for name, t in tensors.items()}
    x = torch.randn(2, D_IN, 7, 8, dtype=torch.float64)
    hidden = np.maximum(depthwise(x.numpy(), w["depthwise.weight"], stride, padding, dilation), 0)
    wanted = np.einsum("oc,nchw->nohw", w["pointwise.weight"], hidden) + w["pointwise.bias"][:, None, None]
    close(run(blueprint, tensors, x, channel_dim=1), wanted)
    close(run(blueprint, tensors, x[0], channel_dim=-3), wanted[0])
    close(run(blueprint, tensors, x.to(memory_format=torch.channels_last), channel_dim=1), wanted)


def test_sums_and_products_of_shared_nodes() -> None:
    blueprint = Blueprint(
        "graph",
        (
            Node("x", "input"),
            Node("a", "linear", ("x",), {"out": "d_out", "bias": True}),
            Node("m", "mul", ("a", "a")),
            Node("s", "add", ("m", "a")),
            Node("y", "output", ("s",)),
        ),
    )
    tensors = random_tensors(blueprint, D_IN, D_OUT)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    a = x.numpy() @ tensors["a.weight"].numpy().T + tensors["a.bias"].numpy()
    close(run(blueprint, tensors, x), a * a + a)


@given(blueprints())
def test_where_the_features_are_does_not_matter(blueprint: Blueprint) -> None:
    tensors = random_tensors(blueprint, D_IN, D_OUT)
    for shape in [(2, D_IN), (2, 3, D_IN), (2, 3, 2, D_IN), (2, 1, 2, 2, D_IN), (2, 1, 2, 1, 2, D_IN), (D_IN,)]:
        x = torch.randn(shape, dtype=torch.float64)
        rows = run(blueprint, tensors, x)
        assert rows.shape == (*shape[:-1], D_OUT)
        # Convolutions and matrix products add in another order; norms divide by small numbers at times.
        for dim in range(len(shape)):
            moved = run(blueprint, tensors, x.movedim(-1, dim), channel_dim=dim)
            torch.testing.assert_close(moved.movedim(dim, -1), rows, rtol=1e-7, atol=1e-7 * float(rows.abs().max() + 1))


@pytest.mark.parametrize("name", names())
def test_gradients(name: str) -> None:
    blueprint = get(name, **({"activation": "tanh"} if "relu" in name else {}))
    d_out = D_IN if "elementwise" in name or name == "residual_block" else D_OUT
    tensors = {key: t.requires_grad_() for key, t in random_tensors(blueprint, D_IN, d_out).items()}
    images = validate(blueprint, D_IN, d_out).images_only
    x = torch.randn((1, D_IN, 3, 3) if images else (3, D_IN), dtype=torch.float64, requires_grad=True)

    def k(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return run(blueprint, dict(zip(tensors, values, strict=True)), x, channel_dim=1 if images else -1)

    assert torch.autograd.gradcheck(k, (x, *tensors.values()))
    if not images:
        assert torch.autograd.gradgradcheck(k, (x, *tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", names())
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    blueprint = get(name, mode="replace")
    exact = initialise(blueprint, D_IN, D_IN, dtype=torch.float64)
    tensors = {key: t.to(dtype) for key, t in exact.items()}
    images = validate(blueprint, D_IN, D_IN).images_only
    x = torch.randn((2, D_IN, 5, 4) if images else (9, D_IN)).to(dtype)
    dim = 1 if images else -1
    k = run(blueprint, tensors, x, channel_dim=dim)
    wanted = run(blueprint, {key: t.double() for key, t in tensors.items()}, x.double(), channel_dim=dim)
    assert k.dtype == dtype
    # Weights keep the variance, so values stay of order 1 to 10. At most six nodes, each rounding its result once
    # (relative eps/2) and summing at most 9 products in this dtype at worst (9 eps/2): below 6 * 10 / 2 eps of the
    # largest value seen.
    bound = 30 * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()), float(x.abs().max()))
    assert float((k.double() - wanted).abs().max()) <= bound


@pytest.mark.parametrize("name", ["normed_gated", "conv_relu", "residual_block", "activated_elementwise"])
def test_traces_as_one_graph(name: str) -> None:
    blueprint = get(name)
    torch._dynamo.reset()
    compilations = 0

    def count(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return module

    images = validate(blueprint, D_IN, D_IN).images_only
    dim = 1 if images else -1

    def k(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return run(blueprint, tensors, x, channel_dim=dim)

    compiled = torch.compile(k, fullgraph=True, backend=count)
    for _ in range(3):
        tensors = random_tensors(blueprint, D_IN, D_IN)
        x = torch.randn((2, D_IN, 5, 4) if images else (9, D_IN), dtype=torch.float64)
        assert torch.equal(compiled(tensors, x), k(tensors, x))
    assert compilations == 1


def test_runs_without_data() -> None:
    """On the meta device nothing can be read back: whatever runs there does not synchronise."""
    for name in names():
        blueprint = get(name)
        tensors = {key: t.to("meta") for key, t in random_tensors(blueprint, D_IN, D_IN).items()}
        images = validate(blueprint, D_IN, D_IN).images_only
        x = torch.empty((2, D_IN, 5, 4) if images else (9, D_IN), dtype=torch.float64, device="meta")
        assert run(blueprint, tensors, x, channel_dim=1 if images else -1).shape == x.shape


def test_missing_tensor_names_the_node() -> None:
    blueprint = get("bottleneck")
    tensors = random_tensors(blueprint, D_IN, D_OUT)
    del tensors["down.bias"]
    with pytest.raises(BlueprintError, match=r"node 'down': tensor 'down\.bias' is missing") as caught:
        run(blueprint, tensors, torch.randn(2, D_IN, dtype=torch.float64))
    assert caught.value.node == "down"


@pytest.mark.parametrize(
    ("name", "x", "dim", "complaint"),
    [
        ("lowrank", torch.zeros(2, 5), -1, r"node 'down': its weights take 6 features, .*\(2, 5\) has 5"),
        ("elementwise", torch.zeros(2, 1), -1, "node 'scale': its weights take 6 features"),
        ("conv", torch.zeros(2, 6), -1, r"node 'depthwise': depthwise needs \[N, C, H, W\]"),
        ("conv", torch.zeros(2, 6, 4), 1, r"node 'depthwise': depthwise needs"),
        ("conv", torch.zeros(2, 5, 4, 4), 1, "node 'depthwise': its weights take 6 features"),
    ],
)
def test_inputs_that_do_not_fit(name: str, x: torch.Tensor, dim: int, complaint: str) -> None:
    blueprint = get(name)
    with pytest.raises(BlueprintShapeError, match=complaint):
        run(blueprint, random_tensors(blueprint, D_IN, D_IN, torch.float32), x, channel_dim=dim)


@settings(max_examples=20)
@given(blueprints())
def test_empty_batches(blueprint: Blueprint) -> None:
    assert run(blueprint, random_tensors(blueprint, D_IN, D_OUT), torch.zeros(0, D_IN, dtype=torch.float64)).shape == (
        0,
        D_OUT,
    )
