"""Telemetry through a real Redis: the values that arrive, and what every fault of the server leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.contracts.commands import CommandOutcome, KasminaCommand
from esper.contracts.errors import EsperError
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import HealthSignal
from esper.contracts.telemetry import HealthWindow, RunEvent, read_payload
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.telemetry.options import TelemetryOptions
from esper.oona import OonaClient
from tests.execution.telemetry.fakes import add_up, settled
from tests.flaky_proxy import FlakyProxy
from tests.integration import telemetry_process
from tests.servers import RedisServer, redis_server, wait_until

LAYERS = 2
KEY = b"0123456789abcdef"
#: No step may take longer: the bus's timeout is 2 s, and none of it is the training's.
LONGEST_STEP_S = 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis", appendfsync="no") as running:
        yield running


def messages(server: RedisServer, topic: TopicNames) -> list[OonaMessage]:
    with server.client(text=False) as client:
        if client.type(topic.value) != b"stream":
            return []
        return [OonaMessage.from_bytes(fields[b"message"]) for _, fields in client.xrange(topic.value)]


def windows(server: RedisServer, run_id: str | None = None) -> list[HealthWindow]:
    found = [read_payload(message) for message in messages(server, TopicNames.TELEMETRY_SEED_HEALTH)]
    kept = [window for window in found if isinstance(window, HealthWindow)]
    return [window for window in kept if run_id in (None, window.run_id)]


def wrapped(url: str, spool: Path, **options: Any) -> esper.MorphableModel:
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    chosen = {"every_steps": 1, "spool_dir": spool, **options}
    return esper.wrap(network, seeds_per_layer=2, monitor_budget=0.0, bus=url, telemetry=TelemetryOptions(**chosen))


def train(model: esper.MorphableModel, seconds: float, pause_s: float = 0.005) -> int:
    """Train; the number of steps. None may take long, and none raises."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    end, steps, longest = time.monotonic() + seconds, 0, 0.0
    while time.monotonic() < end:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        model.step()
        longest = max(longest, time.perf_counter() - began)
        steps += 1
        time.sleep(pause_s)
    assert longest < LONGEST_STEP_S
    return steps


def all_arrived(model: esper.MorphableModel, timeout_s: float = 60.0) -> dict[str, Any]:
    stats: dict[str, Any] = settled(model, lambda stats: stats["spooled"] == stats["in_flight"] == 0, timeout_s)
    return stats


def in_order_and_complete(found: list[HealthWindow], count: int) -> None:
    for layer in ("0", "2"):
        numbers = [window.sequence for window in found if window.layer_name == layer]
        assert list(dict.fromkeys(numbers)) == list(range(count))


# -- values --


def expected_health(rows: np.ndarray) -> dict[str, float]:
    """The formulas of docs/monitoring.md, of one chunk's values ``[samples, features]``, in float64."""
    rows = rows.astype(np.float64)
    features = rows.shape[1]
    within, total, mean = rows.var(axis=0), rows.var(), rows.mean()
    dead = float((np.abs(rows).max(axis=0) <= 1e-6).mean())
    correlation = (rows.sum(axis=1).var() - within.sum()) / ((features - 1) * within.sum())
    correlation = float(np.clip(correlation, -1 / (features - 1), 1.0))
    moving = within.mean() / (within.mean() + 1e-4 * (total + mean**2))
    return {
        "activation_mean": float(mean),
        "activation_variance": float(total),
        "dead_neuron_ratio": dead,
        "avg_correlation": correlation,
        "health_score": float((1 - dead) * (1 - max(0.0, correlation)) * moving),
    }


def test_what_a_consumer_reads_is_what_numpy_computes(server: RedisServer, tmp_path: Path) -> None:
    torch.manual_seed(3)
    seeds, batch, width = 3, 32, 12
    network = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width))
    with torch.no_grad():
        network[0].bias[:2] = -100.0  # two dead units after the ReLU
    model = esper.wrap(
        network,
        [nn.Linear, nn.ReLU],
        seeds_per_layer=seeds,
        monitor_budget=0.0,
        bus=server.url,
        telemetry=TelemetryOptions(run_id="numpy", every_steps=1, spool_dir=tmp_path / "spool"),
    )
    assert model.monitor.rows >= batch, "every row of a batch is looked at"
    seen: dict[str, list[np.ndarray]] = {"0": [], "1": [], "2": []}
    for name in seen:
        module = model.wrapped_model[int(name)]
        module.register_forward_hook(lambda _, __, y, name=name: seen[name].append(y.detach().numpy().copy()))
    for step in range(model.monitor.window):
        model.monitor.sample_now()
        x = torch.randn(batch, 6)
        model(x)
        model.step()
        if step == 3:
            model.report_epoch(loss=0.125)
    model.layer("0").state_layout.transition_seed_state(1, SeedLifecycleState.LOADING)
    model.layer("2").state_layout.update_telemetry(2, 1234, 0.5)
    model.layer("2").state_layout.increment_error_count(0)
    model.step()
    model.close()
    add_up(model.telemetry_stats())
    assert model.telemetry_stats()["dropped"] == 0

    run_id = model.telemetry_stats()["run_id"]
    last = {window.layer_name: window for window in windows(server, run_id)}
    assert last.keys() == {"0", "1", "2"}
    for name, window in last.items():
        assert window.window_samples == model.monitor.window
        assert window.epoch == 1
        values = np.concatenate(seen[name])
        assert len(values) == batch * model.monitor.window
        for each in window.signals():
            assert isinstance(each, HealthSignal)
            low, high = each.seed_idx * width // seeds, (each.seed_idx + 1) * width // seeds
            for field, value in expected_health(values[:, low:high]).items():
                # Both compute in float64, to some 1e-12; what travels is rounded to float32: half a unit in the last
                # place, 2**-24 of the value. A correlation is a difference of sums that are larger than it.
                close = pytest.approx(value, rel=2**-24 + 1e-9, abs=1e-9)
                assert getattr(each, field) == close, (name, each.seed_idx, field)
            assert each.nonfinite_count == 0
            assert each.layer_name == name
    states = {name: window.columns["lifecycle_state"].tolist() for name, window in last.items()}
    assert states == {"0": [0, 1, 0], "1": [0, 0, 0], "2": [0, 0, 0]}
    assert [signal.ready for signal in last["0"].signals()] == [True, False, True]
    assert last["2"].columns["exec_latency_us"].tolist() == [0, 0, 1234]
    assert last["2"].columns["error_count"].tolist() == [1, 0, 0]
    assert last["1"].columns["dead_neuron_ratio"][0] == 0.5
    kinds = [message.payload["kind"] for message in messages(server, TopicNames.SYSTEM_EVENTS_EPOCH)]
    assert kinds == ["run_started", "epoch_ended", "run_ended"]


def test_commands_and_their_outcomes(server: RedisServer, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    kernel = esper.compile("lowrank", d_in=8, d_out=8, rank=2, registry=registry)
    model = esper.wrap(
        nn.Sequential(nn.Linear(8, 8)),
        seeds_per_layer=2,
        registry=registry,
        bus=server.url,
        telemetry=TelemetryOptions(
            run_id="commanded", spool_dir=tmp_path / "spool", control_key=KEY, command_interval_s=0.02
        ),
    )
    model.step()
    with OonaClient(server.url) as operator:
        answers = operator.follow([TopicNames.INNOVATION_FIELD_REPORTS], "0")
        load = KasminaCommand(
            action="load",
            layer_name="0",
            seed_idx=1,
            artifact_id=kernel,
            alpha=0.5,
            ramp_steps=0,
            run_id=model.telemetry_stats()["run_id"],
        )
        good, unsigned = load.signed(KEY), KasminaCommand(action="unload", layer_name="0", seed_idx=1)
        outcomes: dict[str, CommandOutcome] = {}

        def send(command: KasminaCommand) -> CommandOutcome:
            outcomes.pop(command.command_id, None)
            operator.publish(
                OonaMessage("operator", "trace", TopicNames.CONTROL_KASMINA_COMMANDS, command.to_payload())
            )

            def answered() -> CommandOutcome | None:
                model.step()
                for delivery in answers.read(block=0):
                    payload = read_payload(delivery.message)
                    if isinstance(payload, CommandOutcome):
                        outcomes[payload.command_id] = payload
                return outcomes.get(command.command_id)

            found: CommandOutcome = wait_until(answered, "an outcome")
            return found

        assert send(good).done
        layout = model.layer("0").state_layout
        assert layout.state_of(1) is SeedLifecycleState.ACTIVE
        assert layout.alpha_of(1) == 0.5
        assert "signature" in str(send(unsigned).reason)
        assert "replayed" in str(send(good).reason)
        assert layout.state_of(1) is SeedLifecycleState.ACTIVE
        with server.client() as client:
            client.xadd(TopicNames.CONTROL_KASMINA_COMMANDS.value, {"message": "{"})

        def reported() -> bool:
            model.step()
            time.sleep(0.01)
            return model.telemetry_stats()["commands_refused"] == 3

        wait_until(reported, "the malformed entry is counted")
        assert send(KasminaCommand(action="fossilize", layer_name="0", seed_idx=1).signed(KEY)).done
    model.close()
    add_up(model.telemetry_stats())


# -- start --


def test_no_redis_at_start_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.core.model_wrapper.BUS_PATIENCE_S", 0.3)
    with pytest.raises(EsperError, match=r"127\.0\.0\.1:1\b") as caught:
        wrapped("redis://user:hunter2@127.0.0.1:1/0", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_wrong_password_at_start_is_one_clear_error(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", requirepass="right") as server, pytest.raises(EsperError) as caught:
        wrapped(server.url.replace("redis://", "redis://:hunter2@"), tmp_path / "spool")
    assert "hunter2" not in str(caught.value)


# -- faults --


def kill(server: RedisServer) -> Callable[[], None]:
    server.kill()
    return server.start


def lose_data(server: RedisServer) -> Callable[[], None]:
    server.lose_data()
    return server.start


def pause(server: RedisServer) -> Callable[[], None]:
    server.pause(True)
    return lambda: server.pause(False)


def fill(server: RedisServer) -> Callable[[], None]:
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)

    def heal() -> None:
        with server.client() as client:
            client.config_set("maxmemory", 0)

    return heal


def lock_out(server: RedisServer) -> Callable[[], None]:
    """A new password, and everybody who is connected has to give it."""
    with server.client() as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)

    def heal() -> None:
        import redis

        with redis.Redis.from_url(server.url, password="another") as client:
            client.config_set("requirepass", "")

    return heal


def wrong_type(server: RedisServer) -> Callable[[], None]:
    topic = TopicNames.TELEMETRY_SEED_HEALTH.value
    with server.client() as client:
        client.rename(topic, "elsewhere")
        client.set(topic, "not a stream")

    def heal() -> None:
        with server.client() as client:
            client.delete(topic)
            client.rename("elsewhere", topic)

    return heal


@pytest.mark.parametrize(
    "fault", [kill, lose_data, pause, fill, lock_out, wrong_type], ids=lambda fault: fault.__name__
)
def test_after_each_fault_everything_arrives_in_order(
    fault: Callable[[RedisServer], Callable[[], None]], server: RedisServer, tmp_path: Path
) -> None:
    model = wrapped(server.url, tmp_path / "spool")
    steps = train(model, 0.3)
    all_arrived(model)
    before = len(windows(server))
    assert before == steps * LAYERS
    heal = fault(server)
    steps += train(model, 2.5 if fault is pause else 1.0)
    stats = settled(model, lambda stats: stats["spooled"] > 0)
    add_up(stats, produced=steps * LAYERS + 1)
    assert stats["last_error"]
    assert stats["away_s"] > 0
    heal()
    steps += train(model, 0.3)
    stats = all_arrived(model)
    assert stats["delivered"] == stats["produced"] == steps * LAYERS + 1
    assert stats["dropped"] == 0
    model.close()
    add_up(model.telemetry_stats())
    found = windows(server)
    if fault is lose_data:
        numbers = [window.sequence for window in found if window.layer_name == "0"]
        assert list(dict.fromkeys(numbers)) == list(range(before // LAYERS, steps))
    else:
        in_order_and_complete(found, steps)
    ids = {message.event_id for message in messages(server, TopicNames.TELEMETRY_SEED_HEALTH)}
    distinct = {(window.layer_name, window.sequence) for window in found}
    assert len(ids) == len(distinct), "what came twice has the id that it had"


@pytest.mark.parametrize("fault", ["delay", "cut", "swallow", "refuse"])
def test_a_bad_network(fault: str, server: RedisServer, tmp_path: Path) -> None:
    with FlakyProxy(server.port) as proxy:
        model = wrapped(f"redis://127.0.0.1:{proxy.port}/0", tmp_path / "spool")
        steps = train(model, 0.3)
        if fault == "delay":
            proxy.delay_s = 0.3
        elif fault == "cut":
            proxy.cut_after = 2000
        elif fault == "swallow":
            proxy.swallow = True
        else:
            proxy.refuse = True
            proxy.cut_after = 0
        steps += train(model, 2.5 if fault == "swallow" else 1.0)
        proxy.heal()
        steps += train(model, 0.3)
        stats = all_arrived(model)
        model.close()
        add_up(model.telemetry_stats())
        assert stats["delivered"] == steps * LAYERS + 1
    in_order_and_complete(windows(server), steps)


def test_closing_while_redis_is_gone_keeps_everything(server: RedisServer, tmp_path: Path) -> None:
    model = wrapped(server.url, tmp_path / "spool", run_id="first")
    train(model, 0.2)
    all_arrived(model)
    server.kill()
    train(model, 0.2)
    began = time.monotonic()
    model.close()
    assert time.monotonic() - began < 10
    stats = model.telemetry_stats()
    add_up(stats)
    assert stats["spooled"] > 0
    assert stats["dropped"] == 0
    server.start()
    successor = wrapped(server.url, tmp_path / "spool", run_id="second")
    train(successor, 0.1)
    settled(successor, lambda each: each["recovered"] == stats["spooled"])
    successor.close()
    wait_until(lambda: windows(server, stats["run_id"]), "what was spooled is there to be read")
    in_order_and_complete(windows(server, stats["run_id"]), (stats["produced"] - 2) // LAYERS)


def test_the_successor_of_a_killed_process_sends_its_spool(server: RedisServer, tmp_path: Path) -> None:
    victim = telemetry_process.start(server.url, tmp_path / "spool", "victim")
    wait_until(lambda: windows(server, "victim"), "the victim publishes")
    server.kill()
    # It has to notice, and to write more than one record.
    wait_until(lambda: sum(path.stat().st_size for path in (tmp_path / "spool").rglob("*.seg")) > 50_000, "it spools")
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    server.start()
    successor = telemetry_process.start(server.url, tmp_path / "spool", "successor")
    wait_until(lambda: windows(server, "successor"), "the successor publishes")
    stats = telemetry_process.finish(successor)
    add_up(stats)  # type: ignore[arg-type]
    assert int(str(stats["recovered"])) > 50
    found = windows(server, "victim")
    numbers = [window.sequence for window in found if window.layer_name == "0"]
    distinct = list(dict.fromkeys(numbers))
    assert distinct == list(range(len(distinct))), "all that was spooled, in order, without a gap"
    assert list((tmp_path / "spool").rglob("*.seg")) == []


# -- the main job --


def test_grow_is_visible_to_another_process_while_it_runs(server: RedisServer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", X=rng.standard_normal((600, 4)), y=np.arange(600) % 3)
    command = [sys.executable, "-m", "esper.cli.main", "grow", "--data", str(tmp_path / "data.npz"), "--epochs", "12"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "REDIS_URL": server.url, "OMP_NUM_THREADS": "1"},
    )
    try:
        found = wait_until(lambda: windows(server), "its health signals arrive", timeout_s=90)
        assert process.poll() is None, "while it runs"
        assert found[0].run_id.startswith("grow-out-")
        signals = found[0].signals()
        assert len(signals) == 2
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    events = [read_payload(message) for message in messages(server, TopicNames.SYSTEM_EVENTS_EPOCH)]
    ended = [event for event in events if isinstance(event, RunEvent) and event.kind == "epoch_ended"]
    runs = {event.run_id for event in ended}
    assert len(runs) == 5, "one run for each growing network"
    assert all(event.accuracy is not None for event in ended)
    for run in runs:
        assert [event.epoch for event in ended if event.run_id == run] == list(range(1, 13))
    assert len({window.run_id for window in windows(server)}) == 5
    assert any(np.isfinite(window.columns["health_score"]).any() for window in windows(server))


def test_grow_says_at_once_that_redis_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "esper.cli.main", "grow", "--epochs", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0"},
    )
    assert done.returncode == 2
    assert "127.0.0.1:1" in done.stderr
    assert "hunter2" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
