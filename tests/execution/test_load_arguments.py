"""A load that cannot be carried out is refused before anything changes, and one that fails leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import SeedLifecycleState
from tests.nn.cases import kernel

State = SeedLifecycleState
A = kernel("lowrank", 8, 8, rank=2)


@pytest.mark.parametrize("ramp_steps", [-1, "5", None, float("nan"), 2.5, 5.0, True])
def test_bad_ramp_steps_are_refused_at_once(ramp_steps: Any) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), telemetry_enabled=False)
    layer = model.layer("0")
    calls = [
        lambda: model.request_kernel("0", 0, A.artifact_id, ramp_steps=ramp_steps),
        lambda: asyncio.run(model.load_kernel("0", 0, A.artifact_id, ramp_steps=ramp_steps)),
        lambda: asyncio.run(layer.load_kernel(0, A.artifact_id, ramp_steps=ramp_steps)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"ramp_steps is a whole number of at least 0, got .*layer '0', seed 0"):
            call()
        assert layer.state_layout.state_of(0) is State.DORMANT
        assert not layer.loading and not layer.grafts.bound


@pytest.mark.parametrize(
    ("artifact_id", "alpha", "complaint"),
    [
        (None, 0.5, "artifact_id is None; it is the text"),
        (7, 0.5, "is 7"),
        ("A", None, "alpha is None"),
        ("A", "1", "'1'"),
    ],
)
def test_other_types_are_refused_at_once(artifact_id: Any, alpha: Any, complaint: str) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), telemetry_enabled=False)
    for call in (
        lambda: model.request_kernel("0", 0, artifact_id, alpha=alpha),
        lambda: asyncio.run(model.load_kernel("0", 0, artifact_id, alpha=alpha)),
    ):
        with pytest.raises(TypeError, match=rf"{complaint}.*layer '0', seed 0"):
            call()
        assert model.layer("0").state_layout.state_of(0) is State.DORMANT
        assert not model.layer("0").loading


@pytest.mark.parametrize("ramp_steps", [0, 5, np.int64(5)])
def test_whole_numbers_of_steps(ramp_steps: Any) -> None:
    layer = KasminaLayer(8, 8)
    load = layer.begin_load(0, 0.5, ramp_steps=ramp_steps)
    assert layer.commit(0, A, alpha=0.5, ramp_steps=ramp_steps, load=load)
    assert layer.state_layout.state_of(0) is (State.GRAFTING if ramp_steps else State.ACTIVE)


@pytest.mark.parametrize("reserve_rank", [0, 4])
@pytest.mark.parametrize(
    ("awake", "where"),
    [(False, "bind"), (False, "set_alpha"), (False, "seed_parameters"), (True, "bind"), (True, "set_alpha")],
)
def test_a_commit_that_fails_leaves_the_seed_asleep(
    awake: bool, where: str, reserve_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), telemetry_enabled=False, reserve_rank=reserve_rank)
    layer = model.layer("0")
    events: list[str] = []
    model.on_growth(lambda event, *_: events.append(event))
    if awake:
        assert layer.commit(0, A, alpha=0.5)
    load = layer.begin_load(0)
    told = list(events)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("nothing left")

    with monkeypatch.context() as broken:
        broken.setattr(type(layer.state_layout if where == "set_alpha" else layer.grafts), where, fail)
        assert layer.commit(0, A, alpha=0.5, load=load) is False
    assert layer.state_layout.state_of(0) is State.DORMANT
    assert layer.failure_of(0) == f"{A.artifact_id}: MemoryError: nothing left"
    assert not layer.grafts.bound and not layer.get_layer_stats()["artifacts"] and not layer.loading
    assert not model.graft_parameters()
    assert "forward" not in layer.default_transform.__dict__
    # Who follows the parameters has heard of the old ones' going, and of none that came.
    assert events == told + ["unbound"] * awake
    assert layer.commit(0, A, alpha=0.5)
