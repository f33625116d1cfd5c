"""From a lattice and the monitor to messages: every value is the one that was there, in float32 or int32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from esper.contracts.messages import OonaMessage
from esper.contracts.telemetry import COLUMNS, MAX_SEEDS_PER_MESSAGE, HealthWindow, read_payload
from esper.execution.health import ClosedWindow
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.state_layout import Lattice
from esper.execution.telemetry import capture as capture_module
from esper.execution.telemetry.capture import Capturer
from esper.execution.telemetry.identity import Identity
from esper.execution.telemetry.packing import PART_TAG, Packer, parts_of
from esper.ops import native
from esper.ops.stats import HealthField
from tests.execution.pinned import Unpinned, stand_for_cuda

WHO = Identity("run-1", 2, 4, "esper-train-host-1-rank2of4")


class Health:
    def __init__(self) -> None:
        self.closed: dict[int, ClosedWindow] = {}

    def take_closed(self) -> dict[int, ClosedWindow]:
        closed, self.closed = self.closed, {}
        return closed


def table(seeds: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rows = np.empty((len(HealthField), seeds))
    rows[HealthField.SAMPLES] = rng.integers(1, 1000, seeds)
    rows[HealthField.MEAN] = rng.standard_normal(seeds) * 1e3
    rows[HealthField.VARIANCE] = rng.random(seeds) * 1e5
    rows[HealthField.DEAD_RATIO] = rng.random(seeds)
    rows[HealthField.CORRELATION] = rng.random(seeds) * 2 - 1
    rows[HealthField.NON_FINITE] = rng.integers(0, 5, seeds)
    rows[HealthField.SCORE] = rng.random(seeds)
    return torch.from_numpy(rows)


def lattice(layers: int, seeds: int) -> Lattice:
    rng = np.random.default_rng(1)
    made = Lattice(layers, seeds)
    rows = layers * seeds
    made.lifecycle_states.copy_(torch.from_numpy(rng.integers(0, 8, rows).astype(np.uint8)))
    made.alpha_blend.copy_(torch.from_numpy(rng.random(rows)))
    made.error_count.copy_(torch.from_numpy(rng.integers(0, 3, rows)))
    made.exec_latency_us.copy_(torch.from_numpy(rng.integers(0, 2**31, rows)))
    made.notify()
    return made


def windows(found: Any) -> list[HealthWindow]:
    read = [read_payload(OonaMessage.from_bytes(outgoing.message.to_bytes())) for outgoing in found]
    assert all(isinstance(window, HealthWindow) for window in read)
    return read  # type: ignore[return-value]


def test_every_value_is_the_one_that_was_there() -> None:
    layers, seeds = 3, 5
    state, health = lattice(layers, seeds), Health()
    capturer, packer = Capturer(state, health), Packer(WHO, ["a", "b", "c"], seeds)
    tables = {index: table(seeds, index) for index in (0, 2)}
    health.closed = {index: ClosedWindow(16 + index, each) for index, each in tables.items()}
    capture = capturer.take(7, 100, 3)
    capture.wait()
    sent = windows(packer.pack(capture, lambda layer: 10 + layer))
    assert [window.layer_name for window in sent] == ["a", "b", "c"]
    for index, window in enumerate(sent):
        assert (window.run_id, window.rank, window.world_size) == ("run-1", 2, 4)
        assert (window.sequence, window.step, window.epoch, window.num_seeds, window.seed_offset) == (7, 100, 3, 5, 0)
        assert window.dropped_windows == 10 + index
        assert window.window_samples == (16 + index if index in tables else 0)
        assert window.captured_at == capture.captured_at
        rows = slice(index * seeds, (index + 1) * seeds)
        expected = {
            "lifecycle_state": state.lifecycle_states[rows],
            "alpha": state.alpha_blend[rows],
            "error_count": state.error_count[rows],
            "exec_latency_us": state.exec_latency_us[rows],
        }
        for name, tensor in expected.items():
            np.testing.assert_array_equal(window.columns[name], tensor.numpy(), err_msg=name)
        if index not in tables:
            assert np.isnan(window.columns["health_score"]).all()
            assert not window.columns["activation_mean"].any()
            continue
        from_table = {
            "activation_mean": HealthField.MEAN,
            "activation_variance": HealthField.VARIANCE,
            "dead_neuron_ratio": HealthField.DEAD_RATIO,
            "avg_correlation": HealthField.CORRELATION,
            "nonfinite_count": HealthField.NON_FINITE,
            "health_score": HealthField.SCORE,
        }
        for name, row in from_table.items():
            np.testing.assert_array_equal(
                window.columns[name], tables[index][row].numpy().astype(COLUMNS[name]), err_msg=name
            )


def test_health_stays_until_there_is_newer() -> None:
    state, health = Lattice(1, 2), Health()
    capturer, packer = Capturer(state, health), Packer(WHO, ["a"], 2)
    health.closed = {0: ClosedWindow(16, table(2))}
    first, second = (windows(packer.pack(capturer.take(i, i, 0), lambda _: 0))[0] for i in range(2))
    np.testing.assert_array_equal(first.columns["health_score"], second.columns["health_score"])
    assert second.window_samples == 16


def test_values_beyond_the_types_are_held_at_their_ends() -> None:
    wild = table(2)
    wild[HealthField.MEAN] = torch.tensor([-1e300, 1e300], dtype=torch.float64)
    wild[HealthField.VARIANCE] = torch.tensor([torch.inf, torch.nan], dtype=torch.float64)
    wild[HealthField.NON_FINITE] = torch.tensor([2.0**40, 0.0], dtype=torch.float64)
    wild[HealthField.SCORE] = torch.tensor([torch.nan, 1.0], dtype=torch.float64)
    state, health = Lattice(1, 2), Health()
    health.closed = {0: ClosedWindow(1, wild)}
    state.alpha_blend[0] = torch.nan
    (window,) = windows(Packer(WHO, ["a"], 2).pack(Capturer(state, health).take(0, 0, 0), lambda _: 0))
    most = np.finfo(np.float32).max
    assert window.columns["activation_mean"].tolist() == [-most, most]
    assert window.columns["activation_variance"].tolist() == [most, 0.0]
    assert window.columns["nonfinite_count"].tolist() == [2**31 - 1, 0]
    assert np.isnan(window.columns["health_score"][0])
    assert window.columns["alpha"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seeds", [MAX_SEEDS_PER_MESSAGE, MAX_SEEDS_PER_MESSAGE + 1, 3 * MAX_SEEDS_PER_MESSAGE - 1])
def test_a_layer_of_very_many_seeds_takes_several_messages(seeds: int) -> None:
    state = lattice(2, seeds)
    found = list(Packer(WHO, ["a", "b"], seeds).pack(Capturer(state, Health()).take(0, 0, 0), lambda _: 0))
    parts = parts_of(seeds)
    assert [outgoing.tag for outgoing in found] == [0, *[PART_TAG] * (parts - 1), 1, *[PART_TAG] * (parts - 1)]
    for index in range(2):
        own = windows(found[index * parts : (index + 1) * parts])
        assert [window.seed_offset for window in own] == [i * MAX_SEEDS_PER_MESSAGE for i in range(parts)]
        together = np.concatenate([window.columns["alpha"] for window in own])
        np.testing.assert_array_equal(together, state.alpha_blend[index * seeds : (index + 1) * seeds].numpy())


def test_a_capture_is_of_its_moment() -> None:
    state = Lattice(1, 2)
    capturer = Capturer(state, Health())
    capture = capturer.take(0, 0, 0)
    state.layer(0).transition_seed_state(0, SeedLifecycleState.LOADING)
    (window,) = windows(Packer(WHO, ["a"], 2).pack(capture, lambda _: 0))
    assert window.columns["lifecycle_state"].tolist() == [0, 0]


@pytest.mark.gpu
def test_a_window_of_a_gpu_arrives_without_waiting_for_it() -> None:
    state, health = lattice(2, 1000).to("cuda"), Health()
    health.closed = {1: ClosedWindow(16, table(1000).cuda())}
    expected = state.alpha_blend.cpu(), table(1000)[HealthField.SCORE]
    spin = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(50):
                spin = spin @ spin / 2048
            capture = Capturer(state, health).take(0, 0, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    capture.wait()
    found = windows(Packer(WHO, ["a", "b"], 1000).pack(capture, lambda _: 0))
    together = np.concatenate([window.columns["alpha"] for window in found])
    np.testing.assert_array_equal(together, expected[0].numpy())
    np.testing.assert_array_equal(found[1].columns["health_score"], expected[1].numpy().astype(np.float32))


class Event:
    """Stands for that of a copy from a GPU."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every table is as if it came from a GPU; the events of their copies."""
    made: list[Event] = []

    def on_its_way(window: ClosedWindow, events: list[Any]) -> ClosedWindow:
        made.append(Event())
        events.append(made[-1])
        return window

    monkeypatch.setattr(capture_module, "_on_its_way", on_its_way)
    return made


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_a_default_device_does_not_move_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_for_cuda(monkeypatch)
    health, events = torch.rand(3, 4), []
    # What says nothing of its device is on meta here, and would be on the GPU under a default device "cuda".
    with torch.device("meta"), Unpinned() as mode:
        window = capture_module._on_its_way(ClosedWindow(5, health.as_subclass(OnGpu)), events)
    assert [memory.device.type for memory in mode.pinned] == ["cpu"]
    assert window.samples == 5 and torch.equal(window.table, health)
    assert len(events) == 1


def waits(capture: Any) -> bool:
    """Whether ``capture.wait()`` returns only when all of the copies it waits for are done."""
    pending = [event for event in capture._events if not event.query()]
    returned = threading.Event()
    thread = threading.Thread(target=lambda: (capture.wait(), returned.set()))
    thread.start()
    early = returned.wait(0.05)
    for event in pending:
        event.done = True
    thread.join(30)
    return not early and returned.is_set()


def test_a_table_on_a_gpu_is_waited_for_wherever_the_lattice_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made, health = on_a_gpu(monkeypatch), Health()
    health.closed = {1: ClosedWindow(1, table(2))}
    capture = Capturer(lattice(2, 2), health).take(0, 0, 0)
    assert len(made) == 1
    assert waits(capture)


def test_health_of_a_window_that_is_not_sent_is_waited_for_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    made, health = on_a_gpu(monkeypatch), Health()
    capturer = Capturer(lattice(3, 2), health)
    captures = []
    for n, layers in enumerate([(0, 1), (1,), ()]):
        health.closed = {layer: ClosedWindow(n, table(2)) for layer in layers}
        captures.append(capturer.take(n, n, 0))
    made[0].done = True
    captures[1].absorb(captures[0])
    assert list(captures[1]._events) == made[1:], "what has arrived does not pile up"
    captures[2].absorb(captures[1])
    assert {layer: window.samples for layer, window in captures[2].closed.items()} == {0: 0, 1: 1}, "the newest of each"
    assert waits(captures[2])


def test_events_are_asked_where_that_ends_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def beside_captures() -> Iterator[None]:
        told.append("begin")
        yield
        told.append("end")

    class Asked(Event):
        def query(self) -> bool:
            told.append("query")
            return told.count("query") > 2

    monkeypatch.setattr(capture_module, "beside_captures", beside_captures)
    capturer = Capturer(lattice(1, 2), Health())
    capturer.take(0, 0, 0).wait()
    assert told == [], "without a GPU there is nothing to ask, and no driver to start"
    capture = capturer.take(1, 1, 0)
    capture._events = [Asked()]  # type: ignore[list-item]
    capture.wait()
    assert told == ["begin", "query", "query", "query", "end"]


@pytest.mark.gpu
def test_a_window_is_waited_for_beside_a_capture() -> None:
    if native.driver() is None:
        pytest.skip(native.driver_reason())
    state, x, graph = lattice(2, 1000).to("cuda"), torch.ones(8, device="cuda"), torch.cuda.CUDAGraph()
    capture = Capturer(state, Health()).take(0, 0, 0)
    with ThreadPoolExecutor(1) as threads, torch.cuda.graph(graph):
        y = x * 2
        fields = threads.submit(capture.wait).result()
        z = y + 1
    graph.replay()
    assert z.tolist() == [3.0] * 8
    np.testing.assert_array_equal(fields["alpha_blend"], state.alpha_blend.cpu().numpy())


@pytest.mark.gpu
def test_a_layer_on_a_gpu_of_a_lattice_that_is_not() -> None:
    health = Health()
    expected = table(2)
    health.closed = {0: ClosedWindow(5, expected), 1: ClosedWindow(5, expected.cuda())}
    capture = Capturer(lattice(2, 2), health).take(0, 0, 0)
    capture.wait()
    for window in capture.closed.values():
        assert torch.equal(window.table, expected)
