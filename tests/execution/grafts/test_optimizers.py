"""Optimizers whose kernels walk a parameter's memory from end to end train seeds as those that go by its strides.

They walk what they keep beside the parameter too, so a seed's parameters must never lie otherwise than they did when
the optimizer first saw them: whichever way the layer took before, and whichever it takes later.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
import esper.optim
from esper.execution.grafts import GraftSet

from .helpers import graft_set, kernel, parameters

D_IN, D_OUT, SEEDS = 10, 12, 3


def layer(scope: str, rank: int) -> GraftSet:
    torch.manual_seed(0)
    width = D_OUT // SEEDS if scope == "chunk" else D_OUT
    kernels = {
        i: kernel("bottleneck", D_IN, width, seed=i, rank=rank + i, scope=scope, bias=True) for i in range(SEEDS)
    }
    grafts = graft_set(nn.Linear(D_IN, D_OUT), (0.3, 0.5, 0.6), kernels)
    with torch.no_grad():
        for parameter in parameters(grafts):
            parameter.normal_()
    return grafts


def train(grafts: GraftSet, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(4):
        x, h = torch.randn(5, D_IN), torch.randn(5, D_OUT)
        optimizer.zero_grad()
        grafts(x, h).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in parameters(grafts)]


@pytest.mark.parametrize("scope", ["layer", "chunk"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.1}),
    ],
)
def test_fused_as_one_by_one(kind: Any, options: dict[str, Any], scope: str, rank: int) -> None:
    plain = layer(scope, rank)
    fused = copy.deepcopy(plain)
    for grafts in (plain, fused):  # seeds are packed at the first call, and the optimizer comes after it
        grafts(torch.randn(1, D_IN), torch.randn(1, D_OUT))
        assert grafts._bank is not None
    want = train(plain, kind(parameters(plain), foreach=False, **options))
    got = train(fused, kind(parameters(fused), fused=True, **options))
    # The same operations in another order: a few roundings a step, which Adam's division by small roots makes larger.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_no_parameter_has_gaps(rank: int) -> None:
    grafts = layer("chunk", rank)
    grafts(torch.randn(1, D_IN), torch.randn(1, D_OUT))
    for parameter in parameters(grafts):
        order = sorted(zip(parameter.stride(), parameter.shape, strict=True))
        expected = 1
        for stride, size in order:
            assert size == 1 or stride == expected
            expected *= size


def test_no_parameter_is_laid_out_anew_by_the_first_call() -> None:
    grafts = layer("layer", 2)
    before = [p.stride() for p in parameters(grafts)]
    grafts(torch.randn(1, D_IN), torch.randn(1, D_OUT))
    assert grafts._bank is not None
    assert [p.stride() for p in parameters(grafts)] == before


def grown(own: bool = True) -> esper.MorphableModel:
    """A network with two seeds that share a bank, or that cannot: they read different tensors."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(D_IN, D_IN), nn.Tanh()), telemetry_enabled=False)
    for seed_idx, tap in enumerate(("input", "input" if own else "output")):
        kernel_id = esper.compile("bottleneck", d_in=D_IN, d_out=D_IN, rank=3, tap=tap, registry=None)
        assert asyncio.run(model.load_kernel("0", seed_idx, kernel_id, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.copy_(torch.randn_like(parameter))
    return model


STEPS, HALF = 6, 3


def compiled_then_evaluated(kind: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    model = grown()
    run = torch.compile(model, backend="aot_eager")
    return steps(model, run, kind(model.parameters(), **options), lambda: model(torch.ones(2, D_IN)))


def apart_then_alone(kind: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    model = grown(own=False)
    return steps(model, model, kind(model.parameters(), **options), lambda: model.cull("0", 1))


def gradients_kept(kind: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    model = grown(own=False)
    optimizer = kind(model.parameters(), **options)
    return steps(model, model, optimizer, lambda: model.cull("0", 1), set_to_none=False)


def through_a_format_without_strides(kind: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    model = grown()
    optimizer = kind(model.parameters(), **options)
    esper.optim.attach(optimizer, model)

    def reload() -> None:
        state = copy.deepcopy(optimizer.state_dict())
        for kept in state["state"].values():
            kept.update({key: value.contiguous() for key, value in kept.items() if isinstance(value, torch.Tensor)})
        optimizer.load_state_dict(state)

    return steps(model, model, optimizer, reload)


def steps(
    model: esper.MorphableModel,
    run: Any,
    optimizer: torch.optim.Optimizer,
    halfway: Callable[[], object],
    set_to_none: bool = True,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if step == HALF:
            halfway()
        optimizer.zero_grad(set_to_none=set_to_none)
        run(torch.randn(5, D_IN, generator=generator)).square().mean().backward()
        optimizer.step()
        model.step()
    model.close()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "train_so", [compiled_then_evaluated, apart_then_alone, gradients_kept, through_a_format_without_strides]
)
@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.AdamW, {"lr": 0.1}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})]
)
def test_fused_as_one_by_one_whatever_ran_before(
    kind: Any, options: dict[str, Any], train_so: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    want = train_so(kind, {**options, "foreach": False})
    torch._dynamo.reset()
    got = train_so(kind, {**options, "fused": True})
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # as above
