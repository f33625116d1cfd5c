"""Optimizers whose kernels walk a parameter's memory from end to end train seeds as those that go by its strides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

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
