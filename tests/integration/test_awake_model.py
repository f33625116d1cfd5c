"""Awake seeds inside whole models: everything that works on the host goes on working."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.core.hosts import BY_NAME, Case
from tests.core.test_dormant_identity import leaves

AWAKE = ("mlp", "conv-same", "batchnorm2d", "attention-batch-first", "attention-sequence-first", "shared", "encoder")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))


def awake(case: Case, *, alpha: float = 0.5) -> tuple[esper.MorphableModel, Tensor]:
    """A model with one low-rank seed awake in every layer whose sizes are known, its weights not zero."""
    torch.manual_seed(0)
    model = esper.wrap(case.build(), case.targets)
    for name, layer in model.kasmina_layers.items():
        spec = layer.spec
        if spec.d_in is None or spec.d_out is None:
            continue
        tap = "output" if spec.geometry is not None else "input"
        d_in = spec.d_out if tap == "output" else spec.d_in
        kernel = esper.compile("lowrank", d_in=d_in, d_out=spec.d_out, registry=None, rank=2, tap=tap)
        assert asyncio.run(model.load_kernel(name, 1, kernel, alpha=alpha)), layer.get_layer_stats()["errors"]
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(std=0.3)
    return model, case.inputs()[0]


def output(model: Any, x: Tensor, case: Case) -> Tensor:
    (y,) = leaves(model(x, **case.kwargs))
    return y


@pytest.mark.parametrize("name", AWAKE)
def test_the_graft_is_on_the_path_and_learns(name: str) -> None:
    case = BY_NAME[name]
    model, x = awake(case)
    model.eval()
    grown = output(model, x, case)
    assert not torch.equal(grown, output(model.original_model.eval(), x, case))
    grown.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.graft_parameters().values())
    for layer in model.get_layer_names():
        model.set_seed_alpha(layer, 1, 0.0)
    assert torch.equal(output(model, x, case), output(model.original_model, x, case))


@pytest.mark.parametrize("name", AWAKE)
def test_copies(name: str) -> None:
    case = BY_NAME[name]
    model, x = awake(case)
    model.eval()
    expected = output(model, x, case)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x, case), expected)
        # The copy is its own: its alphas, weights and shadows are not the first model's.
        with torch.no_grad():
            for parameter in twin.graft_parameters().values():
                parameter.zero_()
        assert torch.equal(output(model, x, case), expected)
        assert not torch.equal(output(twin, x, case), expected)
        layer = next(iter(twin.kasmina_layers))
        asyncio.run(twin.unload_kernel(layer, 1))
        assert model.layer(layer).grafts.bound == (1,)
        twin.step()


@pytest.mark.parametrize("name", ["mlp", "conv-same", "attention-batch-first", "encoder"])
def test_compiled_fullgraph_sees_waking_and_sleeping(name: str) -> None:
    case = BY_NAME[name]
    torch.manual_seed(0)
    model, x = awake(case)
    model.eval()
    # An eager call lays the weights side by side; after that their strides, which graphs depend on, stay.
    output(model, x, case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # float32 sums of at most 32 products in another order: the error is far below 1e-5 of the result.
    torch.testing.assert_close(output(compiled, x, case), output(model, x, case), rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (0.1, 0.7):
            for layer in model.get_layer_names():
                model.set_seed_alpha(layer, 1, alpha)
            torch.testing.assert_close(output(compiled, x, case), output(model, x, case), rtol=1e-5, atol=1e-5)
    for layer in model.get_layer_names():
        asyncio.run(model.unload_kernel(layer, 1))
    assert torch.equal(output(compiled, x, case), output(model, x, case))


def test_conversion_keeps_the_grafts() -> None:
    case = BY_NAME["mlp"]
    model, x = awake(case)
    expected = output(copy.deepcopy(model).double(), x.double(), case)
    # Once through float32 weights, once not: they are the same numbers, so only rounding of the forward differs.
    torch.testing.assert_close(output(model, x, case).double(), expected, rtol=1e-5, atol=1e-5)
    model.to(torch.bfloat16)
    low = output(model, x.bfloat16(), case)
    assert low.dtype is torch.bfloat16
    # Three layers of bfloat16 (8 bits of mantissa, unit roundoff 2^-9) on values of order 1.
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    case = BY_NAME["mlp"]
    model, x = awake(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = output(model, x, case)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), output(model, x, case), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Any) -> None:
    case = BY_NAME["mlp"]
    model, x = awake(case)
    with guard():
        y = output(model, x, case)
    # The fast path is one function with and without a graph.
    assert torch.equal(y, output(model, x, case))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_encoder_fast_path_is_closed_while_awake(padded: bool) -> None:
    case = BY_NAME["encoder"]
    model, x = awake(case)
    model.eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=mask)
    plain = model(x, src_key_padding_mask=mask)
    rows = ~mask
    # The fused path would leave the grafts out; what remains is rounding of two orders of summation.
    torch.testing.assert_close(fused[rows], plain[rows], rtol=1e-5, atol=1e-5)
    for layer in model.get_layer_names():
        asyncio.run(model.unload_kernel(layer, 1))
    with torch.no_grad():
        expected = model.original_model.eval()(x, src_key_padding_mask=mask)
        assert torch.equal(model(x, src_key_padding_mask=mask), expected)
    assert all(not module._forward_hooks for module in model.wrapped_model.modules())


def test_gradients_are_those_of_finite_differences_through_the_whole_model() -> None:
    case = BY_NAME["mlp"]
    model, x = awake(case)
    model.double()
    x = x.double().requires_grad_()
    parameters = list(model.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters), fast_mode=True)


def test_activation_host_takes_a_linear_in_its_place() -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), [nn.ReLU])
    kernel = esper.compile("dense", d_in=5, d_out=5, registry=None, mode="replace")
    assert asyncio.run(model.load_kernel("1", 0, kernel, alpha=1.0))
    x = torch.randn(7, 6)
    weights = model.layer("1").grafts.seed_parameters(0)
    linear = model.wrapped_model[0](x)
    expected = nn.functional.linear(linear, *(weights[name] for name in sorted(weights, reverse=True)))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_kernel_that_does_not_fit_an_activation_is_found_at_the_first_forward() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    model = esper.wrap(host, [nn.ReLU])
    kernel = esper.compile("lowrank", d_in=9, d_out=9, registry=None)
    assert asyncio.run(model.load_kernel("1", 0, kernel, alpha=1.0))
    for _ in range(4):
        x = torch.randn(3, 6)
        assert torch.equal(model(x), host(x))
        model.step()
    layer = model.layer("1")
    assert layer.state_layout.state_of(0) is esper.SeedLifecycleState.ERROR_RECOVERY
    assert "9" in layer.get_layer_stats()["errors"][0] and "5" in layer.get_layer_stats()["errors"][0]


def test_latency_is_measured() -> None:
    case = BY_NAME["mlp"]
    model, x = awake(case)
    for _ in range(64):
        model(x)
        model.step()
    assert model.get_layer_stats("0")["state_stats"]["avg_latency_us"] > 0


def test_health_reaches_the_lattice() -> None:
    case = BY_NAME["mlp"]
    torch.manual_seed(0)
    model = esper.wrap(case.build(), case.targets)
    with torch.no_grad():
        # Every feature of the first layer's last seed is dead.
        model.wrapped_model[0].weight[-4:] = 0
        model.wrapped_model[0].bias[-4:] = 0
    for _ in range(200):
        model.monitor.sample_now()
        model(*case.inputs(seed=_))
        model.step()
    health = model.monitor.health("0")
    assert float(health.dead_neuron_ratio[3]) == 1.0 and float(health.dead_neuron_ratio[0]) == 0.0
    accumulated = model.layer("0").state_layout.health_accumulator
    assert float(accumulated[3]) < float(accumulated[0])
