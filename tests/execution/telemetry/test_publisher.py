"""A published model: what its training thread does, what arrives, and that every message is accounted for."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.bus import BusError
from esper.contracts.messages import MessageError
from esper.contracts.telemetry import EventKind, RunEvent, read_payload
from esper.execution.telemetry import publisher as publisher_module
from esper.execution.telemetry.counts import Counts
from esper.execution.telemetry.options import TelemetryOptions
from esper.execution.telemetry.spool import Spool
from tests.artifacts.forks import in_forked_child
from tests.execution.telemetry.fakes import FakeBus, add_up, host, is_a_bus, published, settled
from tests.servers import wait_until

LAYERS = 2


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


def telemetry_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "esper-telemetry"]


def in_order(bus: FakeBus) -> None:
    """Windows of each layer come in order, whatever came twice."""
    for layer in {window.layer_name for window in bus.windows()}:
        numbers = [window.sequence for window in bus.windows() if window.layer_name == layer]
        first = list(dict.fromkeys(numbers))
        assert first == sorted(first)


def test_windows_and_events_arrive_and_add_up(bus: FakeBus, tmp_path: Path) -> None:
    model = published(is_a_bus(bus), tmp_path, run_id="test-windows")
    for _ in range(10):
        model(torch.randn(2, 8))
        model.step()
    model.report_epoch(loss=0.5, accuracy=0.25, values={"lr": 0.1})
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["delivered"] == stats["produced"] == 10 * LAYERS + 3
    assert [event.kind for event in bus.events()] == ["run_started", "epoch_ended", "run_ended"]
    assert bus.events()[1].loss == 0.5
    assert [event.epoch for event in bus.events()] == [0, 1, 1]
    assert [window.step for window in bus.windows() if window.layer_name == "0"] == list(range(1, 11))
    assert [window.sequence for window in bus.windows() if window.layer_name == "2"] == list(range(10))
    assert {window.run_id for window in bus.windows()} == {stats["run_id"]}
    assert stats["run_id"].startswith("test-windows")
    assert bus.threads == {"esper-telemetry"}, "no call to the bus on the thread that trains"
    assert not bus.closed, "a bus that was handed in is its owner's"
    assert list(tmp_path.rglob("*.seg")) == []


def test_nothing_is_due_between_windows(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path, every_steps=100)
    model.step()
    due = model._clock.due
    assert due == 101
    for _ in range(50):
        model.step()
    assert model._clock.due == due
    model.close()


def test_without_a_bus_there_is_no_thread_and_nothing_to_count() -> None:
    model = esper.wrap(host())
    model.step()
    model.report_epoch(loss=1.0)
    assert telemetry_threads() == []
    stats = model.telemetry_stats()
    assert (stats["enabled"], stats["produced"]) == (False, 0)
    model.close()


def test_the_thread_starts_with_the_first_step(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    assert telemetry_threads() == []
    model.step()
    assert len(telemetry_threads()) == 1
    model.close()
    assert telemetry_threads() == []
    model.close()
    model.step()
    assert telemetry_threads() == []


def test_an_outage_is_spooled_and_replayed_in_order(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    model.step()
    settled(model, lambda stats: stats["in_flight"] == 0)
    bus.fail = BusError("gone")
    for _ in range(30):
        model.step()
    stats = settled(model, lambda stats: stats["in_flight"] == 0)
    add_up(stats)
    assert stats["spooled"] == 30 * LAYERS
    assert stats["away_s"] > 0
    assert "gone" in stats["last_error"]
    bus.fail = None
    stats = settled(model, lambda stats: stats["spooled"] == 0)
    model.step()
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["dropped"] == 0
    assert stats["delivered"] == stats["produced"]
    in_order(bus)
    sent = [window.sequence for window in bus.windows() if window.layer_name == "0"]
    assert list(dict.fromkeys(sent)) == list(range(32))


class Moody(FakeBus):
    """Fails at random, half of the times after it has taken the messages: its answer was lost."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.rate = 0.4

    def publish_many(self, messages: Any) -> list[str]:
        if self.random.random() < self.rate:
            if self.random.random() < 0.5:
                super().publish_many(messages)
            raise BusError("lost")
        return super().publish_many(messages)


@pytest.mark.parametrize("seed", range(4))
def test_what_may_have_been_sent_comes_again_under_the_same_id(seed: int, tmp_path: Path) -> None:
    bus = Moody(seed)
    model = published(bus, tmp_path)
    for _ in range(60):
        model.step()
        time.sleep(0.001)
    bus.rate = 0.0
    settled(model, lambda stats: stats["spooled"] == stats["in_flight"] == 0)
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["dropped"] == 0
    assert stats["delivered"] == stats["produced"] == 60 * LAYERS + 2
    ids = {message.event_id for message in bus.messages}
    assert len(ids) == stats["produced"], "each arrived, and a duplicate has the id of what it duplicates"
    by_place: dict[Any, set[str]] = {}
    for message in bus.messages:
        if message.payload["type"] == "health_window":
            place = message.payload["layer_name"], message.payload["sequence"]
            by_place.setdefault(place, set()).add(message.event_id)
    assert all(len(found) == 1 for found in by_place.values())
    in_order(bus)


def test_a_full_spool_drops_the_oldest_and_says_so_in_the_next_window(bus: FakeBus, tmp_path: Path) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)), seeds_per_layer=8000, monitor_budget=0.0)
    model.publish_to(bus, TelemetryOptions(every_steps=1, spool_dir=tmp_path, spool_mb=2.0))
    bus.fail = BusError("gone")
    for _ in range(12):
        model.step()
        settled(model, lambda stats: stats["in_flight"] == 0)
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["dropped"] > 0
    assert stats["spool_bytes"] <= 2 << 20
    bus.fail = None
    settled(model, lambda stats: stats["spooled"] == 0)
    model.step()
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    windows = bus.windows()
    numbers = sorted({window.sequence for window in windows})
    missing = 13 - len(numbers)
    assert missing > 0
    assert windows[-1].sequence == 12
    assert windows[-1].dropped_windows == missing
    assert numbers[-(13 - missing) :] == list(range(missing, 13)), "the oldest went"


def test_without_a_spool_an_outage_is_counted(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path, spool_mb=0)
    bus.fail = BusError("gone")
    for _ in range(5):
        model.step()
    stats = settled(model, lambda stats: stats["in_flight"] == 0)
    assert stats["dropped"] == stats["produced"] == 5 * LAYERS + 1
    bus.fail = None
    settled(model, lambda stats: model.step() or stats["delivered"] > 0)
    model.close()
    add_up(model.telemetry_stats())
    assert bus.windows()[-1].dropped_windows >= 5
    assert bus.events()[-1].dropped_events == 1
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_cannot_be_made_is_reported_and_not_fatal(bus: FakeBus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = published(bus, tmp_path / "file")
    bus.fail = BusError("gone")
    model.step()
    stats = settled(model, lambda stats: stats["in_flight"] == 0 and stats["last_error"])
    assert stats["dropped"] == stats["produced"]
    model.close()
    add_up(model.telemetry_stats())


def test_a_full_queue_drops_the_oldest_window_and_keeps_its_health(bus: FakeBus, tmp_path: Path) -> None:
    bus.hold = threading.Event()
    model = published(bus, tmp_path, queue_mb=0.001)
    x = torch.randn(4, 8)
    model.step()
    settled(model, lambda _: bus.calls)  # the thread hangs in its first call
    for _ in range(model.monitor.window):
        model.monitor.sample_now()
        model(x)
        model.step()
    for _ in range(40):
        model.step()
    stats = model.telemetry_stats()
    add_up(stats, produced=(1 + model.monitor.window + 40) * LAYERS + 1)
    assert stats["dropped"] > 0
    assert stats["queued_windows"] < 40
    bus.hold.set()
    settled(model, lambda stats: stats["in_flight"] == 0)
    model.close()
    add_up(model.telemetry_stats())
    last = [window for window in bus.windows() if window.layer_name == "0"][-1]
    assert last.window_samples == model.monitor.window
    assert last.dropped_windows == stats["dropped"] // LAYERS
    numbers = {window.sequence for window in bus.windows()}
    assert last.sequence + 1 - len(numbers) == last.dropped_windows, "gaps are what was dropped"


def test_a_bus_that_hangs_neither_stops_training_nor_closing(bus: FakeBus, tmp_path: Path) -> None:
    bus.hold = threading.Event()
    model = published(bus, tmp_path)
    began = time.monotonic()
    for _ in range(20):
        model.step()
    model.close(timeout_s=0.4)
    assert time.monotonic() - began < 5
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["dropped"] > 0
    assert "did not end within 0.4 s" in stats["last_error"]
    bus.hold.set()
    for thread in telemetry_threads():
        thread.join(30)
    add_up(model.telemetry_stats())


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("odd"), RuntimeError("odd"), KeyError("odd")])
def test_whatever_a_bus_raises_the_run_goes_on(error: Exception, bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    bus.fail = error
    for _ in range(5):
        model.step()
    settled(model, lambda stats: stats["spooled"] == 5 * LAYERS + 1)
    bus.fail = None
    settled(model, lambda stats: stats["spooled"] == 0)
    model.close()
    add_up(model.telemetry_stats())


class Picky(FakeBus):
    """Calls the first windows of the second layer, and the event that begins a run, no messages."""

    def publish_many(self, messages: Any) -> list[str]:
        for message in messages:
            payload = message.payload
            if payload.get("kind") == "run_started" or (payload.get("layer_name") == "2" and payload["sequence"] < 2):
                raise MessageError("not this one")
        return super().publish_many(messages)


REFUSED = 2 + 1


@pytest.mark.parametrize("spooled", [False, True])
def test_what_a_bus_calls_no_message_is_left_out_alone(spooled: bool, tmp_path: Path) -> None:
    bus = Picky()
    model = published(bus, tmp_path)
    bus.fail = BusError("gone") if spooled else None
    for _ in range(2):
        model.step()
    stats = settled(model, lambda stats: stats["in_flight"] == 0)
    assert (stats["spooled"] > 0) is spooled
    bus.fail = None
    settled(model, lambda stats: stats["spooled"] == stats["in_flight"] == 0)
    model.step()
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    assert (stats["delivered"], stats["dropped"]) == (3 * LAYERS + 2 - REFUSED, REFUSED)
    assert "not this one" in stats["last_error"]
    assert [window.sequence for window in bus.windows() if window.layer_name == "0"] == [0, 1, 2]
    last = {window.layer_name: (window.sequence, window.dropped_windows) for window in bus.windows()}
    assert last == {"0": (2, 0), "2": (2, 2)}
    assert [(event.kind, event.dropped_events) for event in bus.events()] == [("run_ended", 1)]


def test_what_a_bus_refuses_of_an_earlier_process_is_not_this_ones_loss(tmp_path: Path) -> None:
    bus = Picky()
    bus.fail = BusError("gone")
    first = published(bus, tmp_path)
    for _ in range(3):
        first.step()
    first.close()
    left = first.telemetry_stats()["spooled"]
    root = next(tmp_path.rglob("*.seg")).parent.parent
    stranger = Spool(root, 8 << 20)  # takes over what is there
    stranger.append(1, b"of a version that is not known yet")
    stranger.close()
    bus.fail = None
    second = published(bus, tmp_path)
    second.step()
    stats = settled(second, lambda stats: stats["recovered"] + stats["recovered_dropped"] == left + 1)
    assert (stats["recovered"], stats["recovered_dropped"]) == (left - REFUSED, REFUSED + 1)
    bus.messages.clear()
    for _ in range(2):
        second.step()
        settled(second, lambda stats: stats["in_flight"] == 0)
    second.close()
    stats = second.telemetry_stats()
    add_up(stats)
    # Its own first windows are refused as well.
    assert stats["dropped"] == REFUSED
    assert {window.layer_name: window.dropped_windows for window in bus.windows()} == {"0": 0, "2": 2}


def test_no_message_is_counted_twice_for_a_moment(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(Counts):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if hasattr(self, "events_dropped_late"):  # all there
                seen.append(self.snapshot()["in_flight"])

    monkeypatch.setattr(publisher_module, "Counts", Watched)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)), seeds_per_layer=8000, monitor_budget=0.0)
    model.publish_to(bus, TelemetryOptions(every_steps=1, spool_dir=tmp_path, spool_mb=2.0))
    bus.fail = BusError("gone")
    for _ in range(12):
        model.step()
        settled(model, lambda stats: stats["in_flight"] == 0)
    assert model.telemetry_stats()["dropped"] > 0
    bus.fail = None
    settled(model, lambda stats: stats["spooled"] == stats["in_flight"] == 0)
    model.close()
    add_up(model.telemetry_stats())
    assert min(seen) == 0, "never less than none"


def test_messages_that_nobody_accounts_for_are_not_called_dropped(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        pass

    model = published(bus, tmp_path)
    model.step()
    settled(model, lambda stats: stats["in_flight"] == 0)
    monkeypatch.setattr("esper.execution.telemetry.sender.Sender._ship", lose)
    model.step()
    model.close()
    stats = model.telemetry_stats()
    assert (stats["in_flight"], stats["dropped"]) == (LAYERS + 1, 0)
    assert stats["last_error"] == f"{LAYERS + 1} messages are unaccounted for"


def test_a_fault_of_ours_ends_telemetry_and_not_training(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("esper.execution.telemetry.packing.Packer.pack", fail)
    model = published(bus, tmp_path)
    for _ in range(5):
        model.step()
    settled(model, lambda stats: "ours" in stats["last_error"])
    for _ in range(5):
        model.step()
    model.close()
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["dropped"] >= 10 * LAYERS


def test_an_error_while_capturing_does_not_reach_the_loop(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("no memory")

    model = published(bus, tmp_path)
    model.step()
    monkeypatch.setattr("esper.execution.telemetry.publisher.Capturer.take", fail)
    model.step()
    assert "no memory" in model.telemetry_stats()["last_error"]
    monkeypatch.undo()
    model.step()
    model.close()
    add_up(model.telemetry_stats())
    assert model.telemetry_stats()["delivered"] == 2 * LAYERS + 2


def test_epochs(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    model.report_epoch(loss=1.0)  # before the first step: kept until there is a thread
    model.step()
    model.report_epoch(loss=math.nan, accuracy=1.0)
    for wrong in ({"accuracy": 1.5}, {"loss": "low"}, {"values": {"x": math.inf}}, {"loss": torch.tensor(1.0)}):
        with pytest.raises(ValueError):
            model.report_epoch(**wrong)  # type: ignore[arg-type]
    model.step()
    model.close()
    ended = [event for event in bus.events() if event.kind is EventKind.EPOCH_ENDED]
    assert [(event.epoch, event.loss, event.reason) for event in ended] == [
        (1, 1.0, None),
        (2, None, "the loss is nan"),
    ]
    assert {window.epoch for window in bus.windows()} == {1, 2}


def test_an_event_goes_before_a_window_that_was_taken_after_it(bus: FakeBus, tmp_path: Path) -> None:
    """Also where both come while the sender is in the middle of an earlier window."""
    model = esper.wrap(host(), seeds_per_layer=5000, monitor_budget=0.0)  # a layer's part fills a call
    model.publish_to(bus, TelemetryOptions(every_steps=1, spool_dir=tmp_path))
    bus.hold = threading.Event()
    model.step()
    wait_until(lambda: bool(bus.calls), "the sender is publishing the first layer")
    model.report_epoch(loss=0.5)
    model.step()
    bus.hold.set()
    model.close()
    sent = [read_payload(message) for message in bus.messages]
    kinds = [each.kind.value if isinstance(each, RunEvent) else f"window of epoch {each.epoch}" for each in sent]
    assert kinds == [
        "run_started",
        *["window of epoch 0"] * LAYERS,
        "epoch_ended",
        *["window of epoch 1"] * LAYERS,
        "run_ended",
    ]


def test_what_happens_to_seeds_is_told(bus: FakeBus, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    kernel = esper.compile("lowrank", d_in=8, d_out=8, rank=2, registry=registry)
    wrong = esper.compile("lowrank", d_in=5, d_out=5, rank=2, registry=registry)
    model = esper.wrap(host(), seeds_per_layer=3, registry=registry, monitor_budget=0.0)
    model.publish_to(bus, TelemetryOptions(every_steps=1, spool_dir=tmp_path / "spool"))

    def load(seed: int, artifact: str) -> bool:
        future = model.request_kernel("0", seed, artifact, alpha=1.0)
        settled(model, lambda _: model.step() or future.done())
        return future.result()

    assert load(0, kernel)
    assert not load(1, wrong)
    model.fossilize("0", 0)
    assert load(2, kernel)
    model.cull("0", 2)
    model.layer("0").state_layout.reset_seed(2)
    assert load(2, kernel)
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.fill_(math.nan)
    for _ in range(5):
        model(torch.randn(2, 8))
        model.step()
    model.close()
    told = [(event.kind.value, event.seed_idx) for event in bus.events() if event.layer_name == "0"]
    expected = [
        ("seed_loading", 0),
        ("seed_woken", 0),
        ("seed_loading", 1),
        ("seed_refused", 1),
        ("seed_fossilized", 0),
        ("seed_loading", 2),
        ("seed_woken", 2),
        ("seed_culled", 2),
        ("seed_loading", 2),
        ("seed_woken", 2),
        ("seed_fault", 2),
    ]
    assert [entry for entry in told if entry != ("seed_fault", 0)] == expected
    refused = next(event for event in bus.events() if event.kind is EventKind.SEED_REFUSED)
    assert wrong in str(refused.reason)
    fault = next(event for event in bus.events() if event.kind is EventKind.SEED_FAULT and event.seed_idx == 2)
    assert fault.artifact_id == kernel
    assert "non-finite" in str(fault.reason)
    numbers = [event.sequence for event in bus.events()]
    assert numbers == list(range(len(numbers)))


def test_monitoring_off_stops_windows_and_nothing_else(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    model.step()
    model.enable_telemetry(False)
    for _ in range(5):
        model.step()
    model.report_epoch(loss=1.0)
    model.enable_telemetry()
    model.step()
    model.close()
    assert [window.step for window in bus.windows() if window.layer_name == "0"] == [1, 7]
    assert "epoch_ended" in [event.kind for event in bus.events()]


def test_a_copy_publishes_nothing(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    model.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.telemetry_stats()["enabled"] is False
        twin.step()
        twin.close()
    model.close()
    assert model.telemetry_stats()["delivered"] == LAYERS + 2


def test_publishing_twice_or_after_the_end_is_refused(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    with pytest.raises(RuntimeError, match="published already"):
        model.publish_to(bus)
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.publish_to(bus)


def test_a_model_that_is_let_go_of_sends_what_it_has(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    gone = weakref.ref(model)
    for _ in range(3):
        model.step()
    del model
    gc.collect()
    assert gone() is None, "the thread does not keep the model alive"
    for thread in telemetry_threads():
        thread.join(30)
    assert telemetry_threads() == []
    assert len(bus.windows()) == 3 * LAYERS


def test_names_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.execution.telemetry.identity import this_process

    monkeypatch.setattr("esper.execution.telemetry.identity._taken", Counter())  # whatever ran before
    monkeypatch.delenv("ESPER_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert this_process().run_id != this_process().run_id
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not this_process().run_id.startswith("none")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert [this_process().run_id for _ in range(3)] == ["job-17", "job-17.2", "job-17.3"]
    monkeypatch.setenv("ESPER_RUN_ID", "mine")
    assert this_process().run_id == "mine"
    assert this_process("x" * 64).run_id == "x" * 64
    assert len(this_process("x" * 64).run_id) <= 64
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    who = this_process("ranked")
    assert (who.rank, who.world_size) == (3, 8)
    assert who.sender_id.endswith("rank3of8")
    monkeypatch.setenv("RANK", "9")
    assert this_process("odd").world_size == 1


@pytest.mark.parametrize("name", ["job 17", "proj/job", ".hidden", "x" * 65])
def test_a_bad_name_in_the_environment_is_refused_by_wrap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RUN_ID", name)
    with pytest.raises(ValueError, match=rf"ESPER_RUN_ID is '{re.escape(name)}'.*letters"):
        esper.wrap(host(), bus="memory://")
    esper.wrap(host()).step()  # no bus, no name needed


@pytest.mark.parametrize(
    ("given", "name"), [("proj/job:1", "proj-job-1"), ("_a b", "a-b"), ("y" * 70, "y" * 64), ("größe", "gr--e")]
)
def test_torchruns_id_becomes_a_name(given: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.contracts import payload
    from esper.execution.telemetry.identity import this_process

    monkeypatch.setattr("esper.execution.telemetry.identity._taken", Counter())
    monkeypatch.delenv("ESPER_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", given)
    assert this_process().run_id == name
    payload.run_id("run_id", name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "/")
    payload.run_id("run_id", this_process().run_id)


def test_ranks_of_torch_distributed(tmp_path: Path, bus: FakeBus, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the environment it would be 3 of 8.
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    model = published(bus, tmp_path / "spool")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model.step()
        model.close()
    finally:
        torch.distributed.destroy_process_group()
    assert {(window.rank, window.world_size) for window in bus.windows()} == {(0, 1)}


def test_a_forked_child_has_a_sender_of_its_own(bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = published(bus, tmp_path, run_id="forked")
    model.step()
    settled(model, lambda stats: stats["in_flight"] == 0)
    bus.fail = BusError("gone")
    model.step()
    run_id = settled(model, lambda stats: stats["spooled"] == LAYERS)["run_id"]

    def trains_on() -> bool:
        assert telemetry_threads() == []
        bus.fail = None
        bus.messages.clear()
        assert model.telemetry_stats()["produced"] == 0
        for _ in range(3):
            model.step()
        model.close()
        stats = model.telemetry_stats()
        add_up(stats)
        assert stats["delivered"] == 3 * LAYERS + 2
        assert stats["recovered"] == 0, "the parent's spool is the parent's"
        run_ids = {window.run_id for window in bus.windows()}
        assert len(run_ids) == 1
        assert run_ids.pop().startswith(f"{run_id}.f")
        return [window.sequence for window in bus.windows() if window.layer_name == "0"] == [0, 1, 2]

    assert in_forked_child(trains_on)

    def has_a_rank() -> bool:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        bus.fail = None
        bus.messages.clear()
        model.step()
        model.close()
        window = bus.windows()[0]
        return window.rank == 1

    assert in_forked_child(has_a_rank)
    bus.fail = None
    settled(model, lambda stats: stats["spooled"] == 0)
    model.close()
    add_up(model.telemetry_stats())
    assert {window.run_id for window in bus.windows()} == {run_id}


EXITS = """
import atexit, sys
from pathlib import Path
from esper.execution.telemetry.publisher import _send_at_exit
from tests.execution.telemetry.fakes import FakeBus, published
bus = FakeBus()
model = published(bus, Path(sys.argv[1]))
for _ in range(5):
    model.step()
# What is registered last runs first.
atexit.unregister(_send_at_exit)
atexit.register(lambda: print(len(bus.windows())))
atexit.register(_send_at_exit)
"""


def test_what_an_unclosed_model_has_is_sent_at_exit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(5 * LAYERS)


def test_the_next_run_sends_what_the_last_one_left(bus: FakeBus, tmp_path: Path) -> None:
    bus.fail = BusError("gone")
    first = published(bus, tmp_path, run_id="first")
    for _ in range(4):
        first.step()
    first.close()
    stats = first.telemetry_stats()
    add_up(stats)
    assert stats["spooled"] == 4 * LAYERS + 2
    bus.fail = None
    second = published(bus, tmp_path, run_id="second")
    second.step()
    stats = settled(second, lambda stats: stats["recovered"] == 4 * LAYERS + 2 and stats["in_flight"] == 0)
    second.close()
    add_up(second.telemetry_stats())
    assert second.telemetry_stats()["spooled"] == 0
    names = [run for run, _ in itertools.groupby(message.trace_id for message in bus.messages)]
    assert names == [model.telemetry_stats()["run_id"] for model in (first, second)], "in order"


def test_the_default_spool_is_in_the_cache_folder(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path))
    model = esper.wrap(host())
    model.publish_to(bus, TelemetryOptions(every_steps=1))
    bus.fail = BusError("gone")
    model.step()
    settled(model, lambda stats: stats["spooled"] > 0)
    assert list(tmp_path.glob("telemetry/*/*/*.seg"))
    model.close()


def test_stats_of_a_model_without_a_bus_have_the_same_keys(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    assert model.telemetry_stats().keys() == publisher_module.NO_TELEMETRY.keys()
    model.step()
    assert model.telemetry_stats().keys() == publisher_module.NO_TELEMETRY.keys()
    model.close()


def test_the_key_for_commands_is_not_shown() -> None:
    options = TelemetryOptions(control_key="SECRET-SECRET-SECRET")
    assert "SECRET" not in repr(options) + str(options)
    assert options.control_key == "SECRET-SECRET-SECRET"
