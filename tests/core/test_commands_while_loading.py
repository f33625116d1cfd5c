"""A command that a seed gets while a kernel is on its way to it stands; so does what a copy knows of that load."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
import esper.nn as enn
from esper.contracts.errors import ArtifactError
from esper.contracts.telemetry import EventKind
from esper.core.model_wrapper import MorphableModel
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from tests.nn.cases import kernel

State = SeedLifecycleState
A, B = kernel("lowrank", 8, 8, rank=2), kernel("lowrank", 8, 8, rank=3)


class Slow:
    """The fetches of all layers, each of which ends when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, asyncio.Future[LoadedKernel | None]] = {}

        async def fetch(layer: KasminaLayer, seed_idx: int, artifact_id: str) -> LoadedKernel | None:
            answer = self.answers[artifact_id] = asyncio.get_running_loop().create_future()
            return await answer

        monkeypatch.setattr(KasminaLayer, "fetch", fetch)

    def give(self, artifact_id: str, answer: LoadedKernel | Exception | None) -> None:
        deadline = time.monotonic() + 30
        while artifact_id not in self.answers:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        waiting = self.answers[artifact_id]

        def end() -> None:
            if waiting.cancelled():
                return
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

        waiting.get_loop().call_soon_threadsafe(end)


@pytest.fixture
def model(tmp_path: Path) -> MorphableModel:
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), registry=str(tmp_path), telemetry_enabled=False)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


def finish(model: MorphableModel, future: Future[bool]) -> bool:
    deadline = time.monotonic() + 30
    while not future.done():
        assert time.monotonic() < deadline, "the request did not finish"
        model.step()
        time.sleep(0.001)
    return future.result(timeout=0)


def settle(model: MorphableModel) -> None:
    """Steps enough, and time, for a fetch that was answered to be looked at."""
    for _ in range(20):
        model.step()
        time.sleep(0.002)


def unload(model: MorphableModel) -> None:
    assert asyncio.run(model.unload_kernel("0", 0)) is True


COMMANDS: dict[str, tuple[Callable[[MorphableModel], None], State]] = {
    "unloaded": (unload, State.DORMANT),
    "culled": (lambda model: model.cull("0", 0), State.CULLED),
    "fossilized": (lambda model: model.fossilize("0", 0), State.FOSSILIZED),
}
LATE: dict[str, LoadedKernel | Exception | None] = {
    "fetched": B,
    "not to be had": None,
    "bad": ArtifactError("the hash is wrong"),
    "broken": OSError("no route"),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_stands_whatever_the_fetch_brings(
    command: str, late: str, model: MorphableModel, slow: Slow
) -> None:
    act, state = COMMANDS[command]
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    trained = dict(layer.grafts.seed_parameters(0))
    future = model.request_kernel("0", 0, "late")
    assert layer.loading == (0,)
    act(model)
    assert layer.loading == ()
    # It is known at once, and whoever waits hears of it at the next step, not when the fetch ends.
    assert layer.failure_of(0) == f"late: the seed was {command} while it was loading"
    model.step()
    assert future.result(timeout=0) is False
    slow.give("late", LATE[late])
    settle(model)
    assert layer.state_layout.state_of(0) is state
    assert layer.failure_of(0) == f"late: the seed was {command} while it was loading"
    if command == "fossilized":
        assert layer.grafts.seed_parameters(0) == trained
        assert layer.get_layer_stats()["artifacts"] == {0: A.artifact_id}
        assert layer.state_layout.alpha_of(0) == 0.5
    else:
        assert not layer.grafts.bound and not layer.get_layer_stats()["artifacts"]


@pytest.mark.parametrize("late", LATE)
def test_a_sleeping_seed_that_is_unloaded_while_loading(late: str, model: MorphableModel, slow: Slow) -> None:
    future = model.request_kernel("0", 0, "late")
    unload(model)
    assert model.layer("0").state_layout.state_of(0) is State.DORMANT
    slow.give("late", LATE[late])
    assert finish(model, future) is False
    settle(model)
    assert model.layer("0").state_layout.state_of(0) is State.DORMANT
    assert not model.graft_parameters()


def test_a_culled_seed_keeps_its_cooldown(model: MorphableModel, slow: Slow) -> None:
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    future = model.request_kernel("0", 0, "late")
    model.cull("0", 0, cooldown_steps=3)
    slow.give("late", B)
    model.step()
    assert future.result(timeout=0) is False
    assert int(layer.state_layout.state_timer[0]) == 2
    model.step()
    model.step()
    assert layer.state_layout.state_of(0) is State.DORMANT


@pytest.mark.parametrize("first", ["A", "B"])
def test_only_the_later_of_two_requests_with_an_unload_between(first: str, model: MorphableModel, slow: Slow) -> None:
    one = model.request_kernel("0", 0, "A")
    unload(model)
    two = model.request_kernel("0", 0, "B", alpha=0.25)
    for artifact_id in (first, "B" if first == "A" else "A"):
        slow.give(artifact_id, A if artifact_id == "A" else B)
        settle(model)
    assert (one.result(timeout=0), two.result(timeout=0)) == (False, True)
    layer = model.layer("0")
    assert layer.state_layout.state_of(0) is State.ACTIVE
    assert layer.get_layer_stats()["artifacts"] == {0: B.artifact_id}
    assert layer.failure_of(0) is None


def test_the_coroutine_gives_up_too(model: MorphableModel, slow: Slow) -> None:
    async def run(act: Callable[[], Any]) -> bool:
        loading = asyncio.ensure_future(model.load_kernel("0", 0, "late"))
        await asyncio.sleep(0)
        result = act()
        if asyncio.iscoroutine(result):
            await result
        slow.answers["late"].set_result(B)
        return await loading

    layer = model.layer("0")
    assert asyncio.run(run(lambda: model.unload_kernel("0", 0))) is False
    assert layer.state_layout.state_of(0) is State.DORMANT and not layer.grafts.bound
    assert layer.commit(0, A, alpha=0.5)
    assert asyncio.run(run(lambda: model.fossilize("0", 0))) is False
    assert layer.state_layout.state_of(0) is State.FOSSILIZED
    assert layer.get_layer_stats()["artifacts"] == {0: A.artifact_id}
    assert asyncio.run(run_closed(model, slow)) is False
    assert layer.state_layout.state_of(1) is State.DORMANT


async def run_closed(model: MorphableModel, slow: Slow) -> bool:
    loading = asyncio.ensure_future(model.load_kernel("0", 1, "late"))
    await asyncio.sleep(0)
    model.close()
    slow.answers["late"].set_result(B)
    return await loading


def test_a_state_that_came_by_hand_stands_too(model: MorphableModel, slow: Slow) -> None:
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    future = model.request_kernel("0", 0, "late")
    layer.state_layout.transition_seed_state(0, State.FOSSILIZED)
    slow.give("late", B)
    assert finish(model, future) is False
    assert layer.get_layer_stats()["artifacts"] == {0: A.artifact_id}
    assert "fossilized while it was loading" in str(layer.failure_of(0))


def test_an_awake_seed_loads_one_kernel_at_a_time(model: MorphableModel, slow: Slow) -> None:
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    future = model.request_kernel("0", 0, "late")
    with pytest.raises(LifecycleError, match="ACTIVE: wait for the load under way"):
        model.request_kernel("0", 0, "another")
    slow.give("late", B)
    assert finish(model, future) is True
    assert layer.get_layer_stats()["artifacts"] == {0: B.artifact_id}
    # The seed that faults meanwhile still gets the kernel that was asked for.
    future = model.request_kernel("0", 0, "again")
    for _ in range(3):
        layer.state_layout.raise_fault(0)
        model.step()
    assert layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    slow.give("again", A)
    assert finish(model, future) is True
    assert layer.state_layout.state_of(0) is State.ACTIVE


def test_a_kernel_that_came_after_the_fault_limit_stays(model: MorphableModel) -> None:
    """The lattice was stepped by hand, and so the model hears of the limit when the seed has another kernel."""
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    for _ in range(3):
        layer.state_layout.raise_fault(0)
        model.lattice.step(model.lattice.epoch + 1)
    assert layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert layer.commit(0, B, alpha=0.5)
    model.step()
    assert layer.get_layer_stats()["artifacts"] == {0: B.artifact_id}
    assert layer.failure_of(0) is None


def test_who_watches_hears_of_the_refusal_before_the_command(
    model: MorphableModel, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model.layer("0")
    assert layer.commit(0, A, alpha=0.5)
    told: list[EventKind] = []
    monkeypatch.setattr(layer, "_on_lifecycle", lambda kind, *_: told.append(kind))
    future = model.request_kernel("0", 0, "late")
    model.cull("0", 0)
    slow.give("late", B)
    assert finish(model, future) is False
    settle(model)
    assert told == [EventKind.SEED_REFUSED, EventKind.SEED_CULLED]
    with pytest.raises(LifecycleError, match="CULLED"):
        model.request_kernel("0", 0, "late")
    assert layer.loading == ()


def by_state_dict(model: MorphableModel) -> MorphableModel:
    again = esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), telemetry_enabled=False)
    again.load_state_dict(model.state_dict())
    return again


def by_state_dict_of_another(model: MorphableModel) -> MorphableModel:
    """Into a model that has a wrapper around it, as in distributed training."""
    again = esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), telemetry_enabled=False)
    nn.ModuleDict({"module": again}).load_state_dict(nn.ModuleDict({"module": model}).state_dict())
    return again


COPIES: dict[str, Callable[[MorphableModel], MorphableModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": by_state_dict,
    "state_dict of a wrapper": by_state_dict_of_another,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_while_a_seed_loads_may_load_it(how: str, model: MorphableModel, slow: Slow) -> None:
    future = model.request_kernel("0", 0, "late")
    again = COPIES[how](model)
    layer = again.layer("0")
    assert layer.state_layout.state_of(0) is State.DORMANT and not layer.loading
    assert again.lattice.crc() != model.lattice.crc()
    layer.begin_load(0)
    # The one that was copied goes on with its own.
    assert model.layer("0").state_layout.state_of(0) is State.LOADING
    slow.give("late", B)
    assert finish(model, future) is True
    assert not again.graft_parameters()


def test_a_state_dict_leaves_loads_that_are_under_way_here(model: MorphableModel, slow: Slow) -> None:
    asleep = model.state_dict()
    future = model.request_kernel("0", 0, "late")
    for state in (model.state_dict(), asleep):
        model.load_state_dict(state)
        assert model.layer("0").loading == (0,)
        with pytest.raises(LifecycleError, match="wait for the load under way"):
            model.request_kernel("0", 0, "late")
    slow.give("late", B)
    assert finish(model, future) is True
    assert model.layer("0").state_layout.state_of(0) is State.ACTIVE


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_layer_with_seeds_of_its_own_is_copied_while_it_loads(how: str) -> None:
    layer = enn.SeededLinear(8, 8)
    layer.seeds.begin_load(1)
    again = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert again.state_layout.state_of(1) is State.DORMANT and not again.seeds.loading
    assert layer.state_layout.state_of(1) is State.LOADING
    assert again.seeds.commit(1, A, alpha=0.5)


def test_a_layer_with_seeds_of_its_own_takes_a_state_of_one_that_loads() -> None:
    layers = enn.SeededLinear(8, 8), enn.SeededLinear(8, 8)
    for layer in layers:
        assert layer.seeds.commit(0, A, alpha=0.5)
    layers[0].seeds.begin_load(1)
    layers[1].load_state_dict(layers[0].state_dict())
    assert layers[1].state_layout.state_of(1) is State.DORMANT
    assert layers[1].state_layout.state_of(0) is State.ACTIVE
