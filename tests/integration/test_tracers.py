"""Those who look on while a model runs: fake tensors, graphs of operations, traces, counters of operations.

They see every operation or none of its result: what went past PyTorch's dispatcher would read memory that a fake
tensor does not have, and leave memory that nobody filled in a graph.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import esper

D, ROWS, RANK = 8, 6, 2
#: Two linear layers, and the two products of a seed.
FLOPS = 2 * ROWS * D * (2 * D + 2 * RANK)


def grown(reserve_rank: int, family: str) -> esper.MorphableModel:
    """A model with one seed awake whose contribution is not zero."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    model = esper.wrap(host, reserve_rank=reserve_rank, telemetry_enabled=False)
    options = {"rank": RANK} if family == "lowrank" else {}
    artifact_id = esper.compile(family, d_in=D, d_out=D, registry=None, **options)
    assert asyncio.run(model.load_kernel("0", 0, artifact_id, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[(0, "lowrank"), (4, "lowrank"), (0, "dense")], ids=["elastic", "reserved", "dense"])
def model(request: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> esper.MorphableModel:
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    return grown(*request.param)


@pytest.fixture(params=[False, True], ids=["first call", "later call"])
def x(request: Any, model: esper.MorphableModel) -> Tensor:
    given = torch.randn(ROWS, D)
    if request.param:  # eager calls go another way once the seeds lie side by side
        model(given)
    return given


def same(found: Tensor, model: esper.MorphableModel, x: Tensor) -> None:
    expected = model(x)
    assert model.original_model is not None
    assert not torch.allclose(expected, model.original_model(x), atol=1e-3), "the seed contributes"
    torch.testing.assert_close(found, expected)


def test_fake_tensors_have_the_shape_and_no_memory(model: esper.MorphableModel, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
    assert y.shape == (ROWS, D) and y.dtype is x.dtype
    assert not model.layer("0").state_layout.fault_flags.any(), "nothing was computed, so nobody is at fault"


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_graph_of_operations_gives_the_numbers(model: esper.MorphableModel, x: Tensor, tracing_mode: str) -> None:
    graph = make_fx(model, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    same(graph(x), model, x)
    other = torch.randn_like(x)
    same(graph(other), model, other)


def test_a_trace_gives_the_numbers(model: esper.MorphableModel, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traces in general, and of shapes that are compared
        trace = torch.jit.trace(model, (x,))
    other = torch.randn_like(x)
    same(trace(other), model, other)


def test_operations_are_counted(model: esper.MorphableModel, x: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    same(y, model, x)
    assert counter.get_total_flops() >= FLOPS


def test_steps_are_counted(model: esper.MorphableModel, x: Tensor) -> None:
    """Forward and backward, the same layers twice before the backward, in the dtype in which alphas are kept."""
    expected = torch.autograd.grad(2 * model(x).square().sum(), list(model.parameters()), allow_unused=True)
    with FlopCounterMode(display=False) as counter:
        total = model(x).square().sum() + model(x).square().sum()
        got = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    for one, two in zip(got, expected, strict=True):
        if two is None:
            assert one is None or not one.any(), "reserved memory that no seed uses yet"
        else:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))  # other orders of sums
    assert counter.get_total_flops() >= 4 * FLOPS
