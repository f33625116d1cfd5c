"""What the layers of ``esper.nn`` cost beside torch's own.

Seeded layers with sleeping seeds against the torch layer over the same parameters; "again" is a second torch layer over
them, whose distance from 1 is what two instances of one layer differ by. ``FusedLinearAct`` against ``nn.Linear`` with
the activation behind it, in eager and as ``torch.compile`` fuses it. Every row is measured in several fresh processes
(see paired.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models import same_weights
from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record
from esper import nn as enn

#: Promise 1 for a layer by itself.
LIMIT = 1.005
#: The composition must not be the better choice, beyond what two instances of one layer differ by.
FUSED_LIMIT = 1.03

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSES = 3
ROUNDS = 51
#: Longest time for one process's rounds.
SECONDS = 8.0


@dataclass(frozen=True)
class Pair:
    """A torch layer, its seeded twin, and the shape of an input."""

    name: str
    plain: Callable[[], nn.Module]
    seeded: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


PAIRS = (
    Pair("linear-64x8", lambda: nn.Linear(64, 64), lambda: enn.SeededLinear(64, 64), (8, 64)),
    Pair("linear-1024x64", lambda: nn.Linear(1024, 1024), lambda: enn.SeededLinear(1024, 1024), (64, 1024)),
    Pair("conv-16x8", lambda: nn.Conv2d(16, 16, 3), lambda: enn.SeededConv2d(16, 16, 3), (8, 16, 32, 32)),
    Pair("relu-256x32", nn.ReLU, enn.SeededReLU, (32, 256)),
    Pair("gelu-256x32", nn.GELU, enn.SeededGELU, (32, 256)),
    Pair("layernorm-256x32", lambda: nn.LayerNorm(256), lambda: enn.SeededLayerNorm(256), (32, 256)),
)


def measure_dormant(name: str, number: int) -> dict[str, Ratio]:
    """The ratios that process ``number`` finds."""
    torch.set_num_threads(1)
    pair = next(pair for pair in PAIRS if pair.name == name)
    plain, seeded = pair.plain().to(DEVICE), pair.seeded().to(DEVICE)
    for key, parameter in plain.named_parameters():
        setattr(seeded, key, parameter)
    layers = {"bare": plain, "again": same_weights(plain), "seeded": seeded}
    x = torch.randn(pair.shape, device=DEVICE)
    names = list(layers)
    random.Random(number).shuffle(names)
    for key in names:
        layers[key](x)
    calls = {key: (lambda layer=layer: layer(x)) for key, layer in layers.items()}
    return compare(calls, "bare", rounds=ROUNDS, turns=8, seconds=SECONDS, seed=number)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_dormant_layers(pair: Pair, benchmark: Any) -> None:
    ratios = compare_in_processes(measure_dormant, pair.name, processes=PROCESSES)
    layer, x = pair.seeded().to(DEVICE), torch.randn(pair.shape, device=DEVICE)
    benchmark.pedantic(layer, (x,), rounds=5, iterations=20)
    record(benchmark, f"nn/dormant/{pair}", ratios, limits={"seeded": LIMIT})


#: Width and rows.
SIZES = {"64x8": (64, 8), "1024x64": (1024, 64), "128x8192": (128, 8192)}


def fused_candidates(activation: str, width: int, rows: int, train: bool) -> dict[str, Callable[[], Any]]:
    """The same map three ways."""
    torch.manual_seed(0)
    fused = enn.FusedLinearAct(width, width, activation=activation).to(DEVICE)
    linear = nn.Linear(width, width).to(DEVICE)
    linear.weight, linear.bias = fused.weight, fused.bias
    composition = nn.Sequential(linear, {"relu": nn.ReLU, "gelu": nn.GELU}[activation]())
    torch._dynamo.reset()
    layers = {"composition": composition, "fused": fused, "compiled": torch.compile(composition, fullgraph=True)}
    x = torch.randn(rows, width, device=DEVICE, requires_grad=train)
    upstream = torch.randn(rows, width, device=DEVICE)
    return {name: (lambda layer=layer: _run(layer, x, upstream, train)) for name, layer in layers.items()}


def _run(layer: nn.Module, x: Tensor, upstream: Tensor, train: bool) -> object:
    if not train:
        with torch.no_grad():
            return layer(x)
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


def measure_fused(activation: str, size: str, train: bool, number: int) -> dict[str, Ratio]:
    """The ratios that process ``number`` finds."""
    torch.set_num_threads(1)
    calls = fused_candidates(activation, *SIZES[size], train)
    names = list(calls)
    random.Random(number).shuffle(names)
    for name in names:
        calls[name]()
    return compare(calls, "composition", rounds=ROUNDS, turns=4, seconds=SECONDS, seed=number)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_fused_linear(activation: str, size: str, train: bool, benchmark: Any) -> None:
    ratios = compare_in_processes(measure_fused, activation, size, train, processes=PROCESSES)
    benchmark.pedantic(fused_candidates(activation, *SIZES[size], train)["fused"], rounds=5, iterations=5)
    key = f"nn/linear+{activation}/{size}/{'forward+backward' if train else 'forward'}"
    record(benchmark, key, ratios, limits={"fused": FUSED_LIMIT})
