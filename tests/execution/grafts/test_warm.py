"""What is compiled beside the training is what the training launches."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from esper.execution.grafts import fused, warm
from esper.execution.grafts.warm import warm_up
from esper.ops import registry
from esper.ops.graft import triton as launcher
from esper.ops.graft import triton_elementwise

from .helpers import Kernel, graft_set, kernel

D = 8
DTYPE = torch.bfloat16
Launches = set[tuple[Any, ...]]


@dataclass(frozen=True)
class Loaded(Kernel):
    """One that a cache gave."""

    def wait_on_current_stream(self) -> None:
        """It is here."""


def loaded(name: str, seed: int = 0, **params: Any) -> Loaded:
    made = kernel(name, D, D, seed=seed, dtype=DTYPE, **params)
    return Loaded(**{field: getattr(made, field) for field in made.__dataclass_fields__})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launches]:
    """Which kernels were launched with which constants, in the last set of the list."""
    if not registry.triton_interprets():
        pytest.skip("the CPU has Triton's kernels in its interpreter only: TRITON_INTERPRET=1")
    found: list[Launches] = [set()]
    real = launcher.choose

    def choose(kernel: Any, dtype: str, device: Any, constants: Any, options: Any, **more: Any) -> Any:
        found[-1].add((kernel.__name__, dtype, *sorted(constants.items()), *sorted(options.items())))
        # Which is asked for is what matters; the interpreter would take seconds for a thousand rows.
        return real(kernel, dtype, device, constants, options, **more)[0], lambda *_: None

    for module in (launcher, triton_elementwise):
        monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setattr(fused, "serves", lambda device: True)
    monkeypatch.setattr(warm, "_done", set())
    return found


@pytest.mark.parametrize("name", ["lowrank", "bottleneck", "gated", "normed_bottleneck", "elementwise"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_training_launches_nothing_else(launches: list[Launches], name: str, mode: str) -> None:
    options = {} if name == "elementwise" else {"rank": 3}
    first, second = (loaded(name, seed, mode=mode, **options) for seed in (0, 1))
    grafts = graft_set(nn.Linear(D, D, dtype=DTYPE), (0.5, 0.5), {0: first})
    with registry.use_backend("triton"):
        assert warm_up(grafts, 1, second)
    launches.append(set())
    grafts.bind(1, second)
    for rows in (3, 1030):
        for wanted in (False, True):
            x = torch.randn(rows, D, dtype=DTYPE, requires_grad=wanted)
            h = torch.randn(rows, D, dtype=DTYPE, requires_grad=True)
            with registry.use_backend("triton"):
                grafts(x, h).sum().backward()
    compiled, launched = launches
    assert launched and launched <= compiled
    launches.append(set())
    with registry.use_backend("triton"):
        assert not warm_up(grafts, 1, second), "it ran already"
    assert launches[-1] == set()


def test_nothing_is_compiled_where_nothing_is_launched(launches: list[Launches], monkeypatch: Any) -> None:
    lone = graft_set(nn.Linear(D, D), (0.5, 0.5), {0: loaded("lowrank")})
    assert not warm_up(lone, 1, loaded("dense")), "two kinds are not one operation"
    image = graft_set(nn.Conv2d(D, D, 1), (0.5,), {})
    assert not warm_up(image, 0, loaded("lowrank"))
    monkeypatch.setattr(fused, "serves", lambda device: device.type == "cuda")
    assert not warm_up(lone, 1, loaded("lowrank"))
    assert launches == [set()]


def test_what_goes_wrong_costs_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no registers left")

    monkeypatch.setattr(fused, "serves", lambda device: True)
    monkeypatch.setattr(warm, "_done", set())
    monkeypatch.setattr(warm, "graft_bank", broken)
    with caplog.at_level(logging.WARNING, warm.__name__):
        assert not warm_up(graft_set(nn.Linear(D, D), (0.5,), {}), 0, loaded("lowrank"))
    assert "could not compile beforehand for lowrank-0: MemoryError: no registers left" in caplog.text
