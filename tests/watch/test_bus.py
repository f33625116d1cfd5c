"""A real Redis, real messages: what it kept, what comes, what is lost, what does not belong there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.telemetry import EventKind
from esper.oona import BusSettings, OonaClient
from esper.watch import bus_source
from esper.watch.bus_source import BusSource
from esper.watch.facts import RunStatus
from esper.watch.recording import FileSource, Recorder
from esper.watch.watcher import Watcher
from tests.servers import RedisServer, redis_server, wait_until
from tests.watch.scenes import event_message, window_message

HEALTH = TopicNames.TELEMETRY_SEED_HEALTH.value


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def bus(redis: RedisServer) -> Iterator[OonaClient]:
    with OonaClient(redis.url, settings=BusSettings(patience_s=0.2, timeout_s=2.0)) as client:
        yield client


def started(bus: OonaClient, **options: object) -> Watcher:
    return Watcher(BusSource(bus, **options)).start()  # type: ignore[arg-type]


def windows_of(watcher: Watcher) -> int:
    run = watcher.state.runs.get(("job", 0))
    return 0 if run is None else run.windows.total


def test_what_was_kept_and_what_comes(bus: OonaClient):
    now = time.time()
    bus.publish(event_message(EventKind.RUN_STARTED, at=now))
    bus.publish_many([window_message("fc", n, now, lifecycle_state=[0, 5]) for n in range(150)])
    watcher = started(bus)
    wait_until(lambda: watcher.mode == "live" and windows_of(watcher) == 150, "what was kept is read")
    published = time.time()
    bus.publish(window_message("fc", 150, published, lifecycle_state=[0, 4]))
    wait_until(lambda: windows_of(watcher) == 151, "what comes is heard", pause_s=0.001)
    run = watcher.state.runs["job", 0]
    assert (run.missing, run.late, watcher.state.duplicates) == (0, 0, 0)
    assert run.layers["fc"].states.tolist() == [0, 4]
    assert 0 <= run.lags[-1] <= time.time() - published
    assert [each.text for each in run.happenings] == ["run started"]
    watcher.stop()
    # Nothing of a watcher stays on the server.
    assert all(not bus_groups(bus, stream) for stream in (HEALTH,))


def bus_groups(bus: OonaClient, stream: str) -> list[object]:
    import redis

    with redis.Redis.from_url(bus.url.replace("redis://", "redis://")) as client:
        return list(client.xinfo_groups(stream))


def test_only_the_last_minutes_are_read(bus: OonaClient, redis: RedisServer):
    old = window_message("fc", 0, time.time()).to_json()
    redis.client().xadd(HEALTH, {"message": old}, id=f"{int((time.time() - 600) * 1000)}-0")
    bus.publish(window_message("fc", 1, time.time()))
    watcher = started(bus, since_s=60.0, follow=False)
    assert watcher.done.wait(20)
    assert windows_of(watcher) == 1


def test_reading_once_ends_even_if_nothing_is_there(bus: OonaClient):
    watcher = started(bus, follow=False, patience_s=0.3)
    assert watcher.done.wait(20)
    assert watcher.error is None
    assert watcher.state.runs == {}


def test_what_does_not_belong_there_is_counted(bus: OonaClient, redis: RedisServer):
    watcher = started(bus)
    wait_until(lambda: watcher.mode == "live", "connected")
    client = redis.client()
    client.xadd(HEALTH, {"message": "{not json"})
    client.xadd(HEALTH, {"other": "field"})
    bus.publish(OonaMessage("t", "x", TopicNames.TELEMETRY_SEED_HEALTH, {"type": "something", "version": 7}))
    twice = window_message("fc", 0, time.time())
    bus.publish_many([twice, twice, window_message("fc", 3, time.time())])
    wait_until(lambda: windows_of(watcher) == 2, "the good ones are heard")
    assert watcher.state.unreadable == 3
    assert watcher.state.duplicates == 1
    assert watcher.state.runs["job", 0].missing == 2
    watcher.stop()


def test_a_bus_that_goes_and_comes_back(bus: OonaClient, redis: RedisServer):
    watcher = started(bus)
    with OonaClient(redis.url) as trainer:
        trainer.publish(window_message("fc", 0, time.time()))
        wait_until(lambda: windows_of(watcher) == 1, "the first window")
        redis.kill()
        wait_until(lambda: watcher.alarm and watcher.mode == "no answer", "the loss is noticed")
        assert not watcher.done.is_set()
        redis.start()
        trainer.publish(window_message("fc", 1, time.time()))
        wait_until(lambda: windows_of(watcher) == 2 and not watcher.alarm, "it goes on where it was")
    assert watcher.state.runs["job", 0].missing == 0
    watcher.stop()


def test_a_watcher_that_is_too_slow_skips_to_the_present(bus: OonaClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bus_source, "BEHIND_S", 0.05)
    monkeypatch.setattr(bus_source, "HISTORY_S", 0.0)
    monkeypatch.setattr(bus_source, "_LOOK_S", 0.0)
    now = time.time()
    for part in range(6):
        bus.publish_many([window_message("fc", 64 * part + n, now) for n in range(64)])
        time.sleep(0.06)
    bus.publish(event_message(EventKind.SEED_WOKEN, at=now, layer_name="fc", seed_idx=0))
    watcher = started(bus)
    wait_until(lambda: watcher.mode == "live", "the present")
    assert watcher.state.skipped_s > 0
    assert windows_of(watcher) < 6 * 64
    bus.publish(window_message("fc", 6 * 64, time.time(), lifecycle_state=[4, 4]))
    run = watcher.state.runs["job", 0]
    wait_until(lambda: run.layers["fc"].states.tolist() == [4, 4], "what comes is heard")
    # Events are few, and none is skipped.
    assert run.loads_done == 1
    # What was skipped on purpose is not missing.
    assert run.missing == 0
    watcher.stop()


def test_ranks_side_by_side(bus: OonaClient):
    now = time.time()
    bus.publish_many([window_message("fc", n, now, rank=rank, world_size=2) for n in range(5) for rank in range(2)])
    watcher = started(bus, follow=False)
    assert watcher.done.wait(20)
    assert [(key, run.windows.total, run.missing) for key, run in watcher.state.runs.items()] == [
        (("job", 0), 5, 0),
        (("job", 1), 5, 0),
    ]


def test_a_recording_shows_the_same_picture(bus: OonaClient, tmp_path: Path):
    now = time.time()
    messages = [event_message(EventKind.RUN_STARTED, 0, now)]
    messages += [
        window_message(layer, n, now + n, lifecycle_state=[0, 5, 2], alpha=[0, n / 10, 1], health_score=[0.5, 0.25, 1])
        for n in range(10)
        for layer in ("a", "b")
    ]
    messages += [event_message(EventKind.SEED_CULLED, 1, now + 10, layer_name="a", seed_idx=2, reason="no help")]
    messages += [event_message(EventKind.EPOCH_ENDED, 2, now + 11, loss=0.5), event_message(EventKind.RUN_ENDED, 3)]
    with Recorder(tmp_path / "r.jsonl") as recorder:
        watcher = started(bus, recorder=recorder)
        wait_until(lambda: watcher.mode == "live", "connected")
        for message in messages:
            bus.publish(message)
        wait_until(lambda: watcher.heard and watcher.state.messages.total == len(messages), "all is heard")
        watcher.stop()
    replayed = Watcher(FileSource(tmp_path / "r.jsonl")).start()
    assert replayed.done.wait(20)
    assert replayed.error is None
    live, again = watcher.state.runs["job", 0], replayed.state.runs["job", 0]
    assert list(again.layers) == list(live.layers) == ["a", "b"]
    for name, layer in live.layers.items():
        assert again.layers[name].states.tolist() == layer.states.tolist()
        assert again.layers[name].column("alpha").tolist() == layer.column("alpha").tolist()
    assert again.refresh().by_state() == live.refresh().by_state()
    assert list(again.happenings) == list(live.happenings)
    assert (again.metrics, again.status) == (live.metrics, RunStatus.FINISHED)


def test_within_a_millisecond_of_the_bus_the_senders_clock_decides(bus: OonaClient, redis: RedisServer):
    """Else a window of the third epoch would hide the first two, whose numbers stand in another stream."""
    now = time.time()
    place = f"{int(now * 1000)}-"
    window = window_message("fc", 0, now + 2.5, epoch=3, step=35)
    redis.client().xadd(HEALTH, {"message": window.to_bytes()}, id=f"{place}0")
    for epoch in (1, 2, 3):
        event = event_message(
            EventKind.EPOCH_ENDED, epoch, now + epoch - 1, epoch=epoch, step=10 * epoch, loss=1.0 / epoch
        )
        redis.client().xadd(TopicNames.SYSTEM_EVENTS_EPOCH.value, {"message": event.to_bytes()}, id=f"{place}{epoch}")
    told: list[tuple[int | None, float | None]] = []
    watcher = Watcher(BusSource(bus, follow=False))
    watcher.listen(lambda state, _: told.extend((run.epoch, run.metrics.get("loss")) for run in state.runs.values()))
    watcher.start()
    assert watcher.done.wait(20)
    assert told == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3)]


def test_a_clock_that_is_set_back_does_not_turn_a_stream_round(bus: OonaClient, redis: RedisServer):
    now = time.time()
    for number in range(3):
        window = window_message("fc", number, now - number)
        redis.client().xadd(HEALTH, {"message": window.to_bytes()}, id=f"{int(now * 1000)}-{number}")
    watcher = started(bus, follow=False)
    assert watcher.done.wait(20)
    run = watcher.state.runs["job", 0]
    assert (windows_of(watcher), run.late, run.missing, run.layers["fc"].sequence) == (3, 0, 0, 2)
