"""Single grafts against the formula they are documented with."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.nn import BottleneckGraft, LowRankGraft
from tests.nn.cases import DTYPES, bits

ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def randomised(graft: LowRankGraft) -> LowRankGraft:
    """With weights away from zero: a graft starts with none of its own effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in graft.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return graft


def composition(graft: LowRankGraft, x: Tensor, h: Tensor, alpha: float, activation: str | None = None) -> Tensor:
    """The documented formula on torch's functions."""
    p = dict(graft.named_parameters())
    z = ACTIVATIONS[activation](F.linear(x, p["down.weight"], p.get("down.bias")))
    return h + alpha * F.linear(z, p["up.weight"])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 3, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_formula_and_gradients(shape: tuple[int, ...], activation: str | None, bias: bool) -> None:
    graft = randomised(LowRankGraft(5, 7, 3, activation=activation, bias=bias, alpha=0.75, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    h = torch.randn((*shape[:-1], 7), dtype=torch.float64, requires_grad=True)
    tensors = [x, h, *graft.parameters()]
    results = []
    for y in (graft(x, h), composition(graft, x, h, 0.75, activation)):
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        results.append((y, *torch.autograd.grad(y, tensors, upstream, retain_graph=True)))
    for got, expected in zip(*results, strict=True):
        # Sums of at most 7 float64 products of size one, in another order, and activations of two or three ulp: all
        # of it stays within 100 times 2**-53.
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_gradcheck(activation: str | None, mode: Any) -> None:
    graft = randomised(LowRankGraft(3, 4, 2, activation=activation, mode=mode, alpha=0.3, dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(graft, dict(zip(names, weights, strict=True)), (x, h))

    names = [name for name, _ in graft.named_parameters()]
    assert torch.autograd.gradcheck(run, (x, h, *graft.parameters()))
    assert torch.autograd.gradcheck(graft, (x, h))
    assert torch.autograd.gradgradcheck(graft, (x, h))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("strided", [False, True])
def test_types_and_strides(dtype: torch.dtype, strided: bool) -> None:
    graft = randomised(BottleneckGraft(33, 17, 5, dtype=dtype))
    x, h = torch.randn(9, 66).to(dtype)[:, ::2], torch.randn(17, 9).to(dtype).t()
    if not strided:
        x, h = x.contiguous(), h.contiguous()
    exact = composition(copy.deepcopy(graft).double(), x.double(), h.double(), 1.0, "gelu")
    y = graft(x, h)
    assert y.dtype is dtype and y.shape == h.shape
    # z (33 products) and k (5) are rounded to the type, y once more; the terms are of size 3 at most, so the error is
    # below (33 + 5 + 3) * 3 units, and a dozen of them in practice. Sums themselves are float32 at least.
    unit = torch.finfo(dtype).eps
    assert (y.double() - exact).abs().max() <= 120 * unit


def test_ends() -> None:
    graft = LowRankGraft(4, 4, 2)
    x = torch.randn(3, 4)
    assert torch.equal(graft(x), x), "it begins with no effect"
    randomised(graft)
    assert not torch.equal(graft(x), x)
    graft.set_alpha(0.0)
    x[0, 0] = -0.0
    assert torch.equal(bits(graft(x)), bits(x))
    replace = randomised(LowRankGraft(4, 3, 2, mode="replace"))
    h = torch.full((3, 3), float("nan"))
    p = dict(replace.named_parameters())
    torch.testing.assert_close(replace(x, h), x @ p["down.weight"].t() @ p["up.weight"].t(), rtol=1e-5, atol=1e-5)


def test_alpha_of_one_call() -> None:
    graft = randomised(LowRankGraft(4, 6, 2, activation="relu", alpha=0.5))
    x, h = torch.randn(3, 4), torch.randn(3, 6)
    for alpha in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        torch.testing.assert_close(graft(x, h, alpha), composition(graft, x, h, 0.25, "relu"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(graft(x, h), composition(graft, x, h, 0.5, "relu"), rtol=1e-5, atol=1e-5)
    for bad in (float("nan"), 7.0, -0.1):
        with pytest.raises(ValueError, match="alpha is"):
            graft(x, h, bad)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_normed(norm: Any) -> None:
    graft = randomised(BottleneckGraft(6, 4, 3, norm=norm, eps=1e-3, activation="silu", dtype=torch.float64))
    x, h = torch.randn(5, 6, dtype=torch.float64) * 3 + 1, torch.randn(5, 4, dtype=torch.float64)
    normed = F.layer_norm(x, (6,), eps=1e-3) if norm == "layernorm" else F.rms_norm(x, (6,), eps=1e-3)
    torch.testing.assert_close(graft(x, h), composition(graft, normed, h, 1.0, "silu"), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images(memory_format: torch.memory_format) -> None:
    graft = randomised(BottleneckGraft(4, 6, 3, channel_dim=1, dtype=torch.float64))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    h = torch.randn(2, 6, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    moved = composition(graft, x.movedim(1, -1), h.movedim(1, -1), 1.0, "gelu").movedim(-1, 1)
    torch.testing.assert_close(graft(x, h), moved, rtol=1e-13, atol=1e-13)


def test_trains_as_an_adapter() -> None:
    layer, graft = nn.Linear(6, 6), BottleneckGraft(6, 6, 3)
    layer.requires_grad_(False)
    optimizer = torch.optim.Adam(graft.parameters(), lr=0.05)
    x = torch.randn(64, 6)
    target = layer(x) + torch.tanh(x[:, :1]) * 0.5
    losses = []
    for _ in range(40):
        loss = F.mse_loss(graft(x, layer(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_state_copies_and_conversion() -> None:
    graft = randomised(BottleneckGraft(5, 7, 2, alpha=0.1))
    assert list(graft.state_dict()) == ["alpha", "down.weight", "down.bias", "up.weight"]
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    y = graft(x, h)
    buffer = io.BytesIO()
    torch.save(graft, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(graft), pickle.loads(pickle.dumps(graft)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x, h), y)
        with torch.no_grad():
            twin.up.weight.zero_()
        assert torch.equal(twin(x, h), h) and torch.equal(graft(x, h), y)
    buffer = io.BytesIO()
    torch.save(graft.state_dict(), buffer)
    buffer.seek(0)
    fresh = BottleneckGraft(5, 7, 2)
    fresh(x, h)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x, h), y)
    assigned = BottleneckGraft(5, 7, 2)
    assigned(x, h)
    assigned.load_state_dict(graft.state_dict(), assign=True)
    assert torch.equal(assigned(x, h), y)
    # alpha is not rounded to the weights' type on the way.
    there_and_back = copy.deepcopy(graft).half().float()
    assert torch.equal(there_and_back.alpha, graft.alpha) and graft.half().alpha.dtype is torch.float32
    assert {p.dtype for p in graft.parameters()} == {torch.float16}


def test_reset_and_the_meta_device() -> None:
    torch.manual_seed(5)
    graft = LowRankGraft(5, 7, 2, activation="tanh", alpha=0.25)
    first = {name: p.clone() for name, p in graft.named_parameters()}
    torch.manual_seed(5)
    again = LowRankGraft(5, 7, 2, activation="tanh", alpha=0.25, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    again.reset_parameters()
    assert all(torch.equal(p, first[name]) for name, p in again.named_parameters())
    assert float(again.alpha) == 0.25
    x, h = torch.randn(3, 5), torch.randn(3, 7)
    assert torch.equal(again(x, h), graft(x, h))
    again.set_alpha(1.0)
    randomised(again).reset_parameters()
    assert torch.equal(again(x, h), graft(x, h))


def test_compiled() -> None:
    graft = randomised(BottleneckGraft(5, 7, 3))
    x, h = torch.randn(4, 5), torch.randn(4, 7)
    graft(x, h)
    torch._dynamo.reset()
    compiled = torch.compile(graft, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), graft(x, h), rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        graft.set_alpha(0.2)
        torch.testing.assert_close(compiled(x, h), graft(x, h), rtol=1e-5, atol=1e-5)


def test_vmap_and_inference_mode() -> None:
    graft = randomised(LowRankGraft(5, 5, 2, activation="gelu"))
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.vmap(graft)(x), graft(x), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        y = graft(x)
    torch.testing.assert_close(y, graft(x), rtol=1e-5, atol=1e-5)


def test_a_fault_is_contained_and_told() -> None:
    graft = randomised(LowRankGraft(4, 4, 2))
    x = torch.randn(3, 4)
    assert not graft.faults.any()
    with torch.no_grad():
        graft.up.weight[0, 0] = float("inf")
    h = x.clone().requires_grad_()
    y = graft(x, h)
    assert torch.equal(y, x) and graft.faults.any()
    (gradient,) = torch.autograd.grad(y.sum(), h)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"rank": 0}, "rank"), ({"activation": "swish"}, "swish"), ({"mode": "add"}, "add"), ({"d_in": 0}, "d_in"),
    ({"alpha": 1.5}, "alpha is 1.5"), ({"alpha": float("nan")}, "alpha is nan"),
    ({"channel_dim": 2}, "channel_dim is 2"),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankGraft(**{"d_in": 4, "d_out": 4, "rank": 2, **arguments})


def test_bad_calls() -> None:
    graft = LowRankGraft(4, 6, 2)
    for x, h in (((3, 5), (3, 6)), ((3, 4), (3, 4)), ((3, 4), (2, 6)), ((3, 4), (1, 3, 6)), ((), (6,))):
        with pytest.raises(ValueError, match="this graft maps 4 features of dimension -1 to 6"):
            graft(torch.zeros(x), torch.zeros(h))
    with pytest.raises(ValueError, match="this graft maps"):
        graft(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="no gradient"):
        graft(torch.zeros(3, 4), torch.zeros(3, 6), torch.ones(1, requires_grad=True))
    images = LowRankGraft(4, 6, 2, channel_dim=1)
    with pytest.raises(ValueError, match="dimension 1"):
        images(torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 3, 2))


def test_what_it_says_of_itself() -> None:
    assert repr(LowRankGraft(4, 6, 2)).startswith("LowRankGraft(\n  4, 6, rank=2, bias=False, mode='residual'")
    text = repr(BottleneckGraft(4, 6, 2, norm="rmsnorm"))
    assert "4, 6, rank=2, norm='rmsnorm', activation='gelu', bias=True, mode='residual'" in text
