"""FusedLinearAct against nn.Linear followed by torch's activation."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.nn import FusedLinearAct
from esper.ops.choices import Choices
from esper.ops.linear import measure
from esper.ops.linear import triton as launcher
from esper.ops.stats import channel_stats
from tests.nn.cases import DTYPES, bits

MODULES: dict[str, Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
}


def pair(
    activation: str,
    d_in: int = 7,
    d_out: int = 5,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[FusedLinearAct, nn.Sequential]:
    torch.manual_seed(4)
    fused = FusedLinearAct(d_in, d_out, bias, dtype=dtype, activation=activation, **options)
    torch.manual_seed(4)
    return fused, nn.Sequential(nn.Linear(d_in, d_out, bias, dtype=dtype), MODULES[activation]())


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(7,), (1, 7), (9, 7), (2, 3, 7), (0, 7), (2, 0, 3, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_same_bits_as_the_composition(activation: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    # The same library calls on the same numbers, in place or not: there is nothing to round differently.
    fused, composition = pair(activation, bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    for got, expected in zip(run(fused, x), run(composition, x), strict=True):
        assert torch.equal(bits(got), bits(expected))
    with torch.no_grad():
        assert torch.equal(bits(fused(x)), bits(composition(x)))
    with torch.inference_mode():
        assert torch.equal(bits(fused(x)), bits(composition(x)))


@pytest.mark.parametrize("activation", MODULES)
def test_strided_inputs(activation: str) -> None:
    fused, composition = pair(activation, dtype=torch.float64)
    wide = torch.randn(4, 3, 14, dtype=torch.float64)
    for x in (
        wide[..., ::2],
        wide[:, 0, ::2],
        torch.randn(7, 4, dtype=torch.float64).t(),
        wide[:, :, :7].transpose(0, 1),
    ):
        for got, expected in zip(run(fused, x), run(composition, x), strict=True):
            # Torch multiplies some layouts by another routine: 7 products of size one in another order.
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("activation", MODULES)
def test_gradcheck(activation: str, statistics: bool) -> None:
    fused, _ = pair(activation, 3, 4, dtype=torch.float64, statistics=statistics)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(fused, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, fused.weight, fused.bias))
    assert torch.autograd.gradgradcheck(run, (x, fused.weight, fused.bias))


@pytest.mark.parametrize("activation", MODULES)
def test_transforms_and_compiler(activation: str) -> None:
    fused, composition = pair(activation)
    x = torch.randn(3, 4, 7)
    torch.testing.assert_close(torch.vmap(fused)(x), composition(x), rtol=1e-5, atol=1e-6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = torch.func.jvp(fused, (x[0],), (x[1],))
            expected = torch.func.jvp(composition, (x[0],), (x[1],))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x), run(composition, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    fused, composition = pair("tanh")
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
        assert y.dtype is torch.bfloat16 and torch.equal(y, composition(x))


@pytest.mark.parametrize("activation", MODULES)
def test_statistics_come_with_the_output(activation: str) -> None:
    fused, composition = pair(activation, statistics=True, num_seeds=2)
    batches = [torch.randn(6, 7), torch.randn(2, 3, 7)]
    seen = []
    for x in batches:
        seen.append(composition(x).reshape(-1, 5))
        # The activation of the pass that gathers statistics is within half an ulp of the exact one, torch's within a
        # few: of the result, or of what goes in where it cancels.
        torch.testing.assert_close(fused(x).reshape(-1, 5), seen[-1], rtol=1e-6, atol=1e-6)
    features, chunks = channel_stats(torch.cat(seen), 2, -1)
    # Counts are exact; the others follow the activation's own error.
    torch.testing.assert_close(fused.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.chunks, chunks, rtol=1e-4, atol=1e-5)
    health = fused.health()
    assert health.window_samples == 12 and health.samples.tolist() == [24, 36]
    np.testing.assert_allclose(health.activation_mean[0], torch.cat(seen)[:, :2].mean().item(), rtol=1e-4, atol=1e-5)
    fused.reset_statistics()
    assert fused.health().window_samples == 0 and np.isnan(fused.health().health_score).all()


def test_statistics_keep_their_type_and_stay_out_of_the_state() -> None:
    fused, composition = pair("relu", statistics=True)
    fused(torch.randn(4, 7))
    before = fused.features.clone()
    twin = copy.deepcopy(fused).half()
    assert twin.features.dtype is torch.float64 and torch.equal(twin.features, before)
    assert list(fused.state_dict()) == ["weight", "bias"]
    fused.load_state_dict(composition[0].state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, 7))
    assert fused.health().window_samples == 7
    plain, _ = pair("relu")
    for call in (plain.health, plain.reset_statistics):
        with pytest.raises(RuntimeError, match="statistics=True"):
            call()


def test_copies_state_and_repr() -> None:
    fused, _ = pair("gelu")
    x = torch.randn(4, 7)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), fused(x)) and twin.weight is not fused.weight
    linear = nn.Linear(7, 5)
    fused.load_state_dict(linear.state_dict())
    linear.load_state_dict(fused.state_dict())
    assert torch.equal(fused(x), nn.functional.gelu(linear(x)))
    torch.manual_seed(1)
    fused.reset_parameters()
    torch.manual_seed(1)
    linear.reset_parameters()
    assert torch.equal(fused.weight, linear.weight) and torch.equal(fused.bias, linear.bias)
    assert repr(fused) == "FusedLinearAct(in_features=7, out_features=5, bias=True, activation='gelu')"
    assert "bias=False" in repr(FusedLinearAct(2, 2, False))


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: relu"):
        FusedLinearAct(2, 2, activation="swish")
    with pytest.raises(ValueError, match="num_seeds must be at least 1, got 0"):
        FusedLinearAct(2, 2, num_seeds=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FusedLinearAct(3, 2)(torch.randn(2, 4))
    assert FusedLinearAct(3, 2, device="meta").weight.is_meta


@pytest.mark.parametrize("activation", MODULES)
def test_the_way_that_a_gpu_may_take_is_the_same_map(activation: str) -> None:
    # On the CPU the operation has its reference only, with the library's products.
    fused, composition = pair(activation, dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    got, expected = [], []
    for layer, found in ((fused._measured, got), (composition, expected)):
        t = x.clone().requires_grad_()
        y = layer(t)
        parameters = fused.parameters() if layer == fused._measured else composition.parameters()
        found += [y, *torch.autograd.grad(y.square().sum(), [t, *parameters])]
    for a, b in zip(got, expected, strict=True):
        # Seven float64 products of size one in another order, and activations of a few ulp.
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="measured on a GPU"):
        FusedLinearAct(4, 4).tune(8)


def test_statistics_leave_nothing_to_tune() -> None:
    fused, _ = pair("relu", statistics=True)
    with pytest.raises(RuntimeError, match="statistics=True has one way"):
        fused.tune(8)


@pytest.fixture
def chosen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Choices:
    """The process's choices in a folder of their own."""
    own = Choices(tmp_path)
    monkeypatch.setattr(measure, "CHOICES", own)
    monkeypatch.setattr(launcher, "CHOICES", own)
    return own


def key_of(fused: FusedLinearAct, rows: int, keep: bool) -> str:
    x = torch.empty(rows, fused.in_features, dtype=fused.weight.dtype)
    return launcher.choice_key(x, fused.weight, fused.bias, fused.activation, 0, None, keep, False)


def test_tuning_follows_what_is_kept(chosen: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    fused, _ = pair("gelu")

    def tune_linear(rows: int, d_in: int, d_out: int, *, training: bool, **_: Any) -> dict[str, float]:
        measured.append(training)
        chosen.put(key_of(fused, rows, training), "library", fused.weight.device)
        return {"library": 1.0, "inline": 0.99}

    monkeypatch.setattr("esper.nn.fused.tune_linear", tune_linear)
    fused.tune(8)
    assert measured == [False, True] and not fused._tuned  # not worth leaving the library for
    chosen.put(key_of(fused, 8, True), "inline", fused.weight.device)
    chosen.forget()  # as another process has it
    twin = pair("gelu")[0]
    twin.tune(8)
    assert measured == [False, True] and twin._tuned


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", MODULES)
def test_tuned_on_a_gpu(activation: str, grad: bool, chosen: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, composition = (layer.cuda() for layer in pair(activation, 256, 512, dtype=torch.bfloat16))
    for keep in (False, True):
        chosen.put(key_of(fused, 64, keep), "inline", fused.weight.device)
    ways = []
    real = launcher.runs_fused
    monkeypatch.setattr(launcher, "runs_fused", lambda way, *rest: (ways.append(way), real(way, *rest))[1])
    fused.tune(64)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.set_grad_enabled(grad):
        y, expected = fused(x), composition(x)
    assert ways == ["inline"]
    # Both round a float32 sum of values of order one to bfloat16: the composition twice, before the activation too.
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
