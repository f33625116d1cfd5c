"""Files of recorded events: what esper grow writes, what --record writes, and what is none of both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rich")

from esper.contracts.telemetry import EventKind
from esper.grow import events
from esper.watch.facts import RunStatus
from esper.watch.grow_log import GrowLog
from esper.watch.recording import FileSource, Recorder, RecordingError
from esper.watch.state import JobState
from esper.watch.ui import Ui
from esper.watch.view import Heading, draw
from esper.watch.watcher import Watcher
from tests.servers import wait_until
from tests.watch.scenes import T0, event_message, window_message


def read(path: Path) -> JobState:
    watcher = Watcher(FileSource(path)).start()
    assert watcher.done.wait(30)
    if watcher.error is not None:
        raise watcher.error
    return watcher.state


def grow_log(path: Path) -> Path:
    """What a small job of esper grow writes, by its own code."""
    with events.EventLog(path) as log:
        log.write(events.RunStarted("rings", {"train": 180}, 2, 3, [0], 2, "cpu"))
        log.write(events.NetworkStarted("host", 0, 33))
        log.write(events.EpochEnded("host", 0, 1, 1.0, 1.25, 0.5))
        log.write(events.NetworkFinished("host", 0, 33, 1.0, 0.5, 0.1))
        log.write(events.NetworkStarted("grown", 0, 33))
        log.write(events.SeedsObserved(0, 1, "0", [0, 0], [0.0, 0.0], [0.5, None]))
        log.write(events.SeedsObserved(0, 1, "2", [0, 0], [0.0, 0.0], [0.25, 0.75]))
        log.write(events.EpochEnded("grown", 0, 1, 1.0, float("nan"), 0.5))
        log.write(events.LevelledOff(0, 1, 1.25))
        log.write(events.SeedRequested(0, 1, "2", 0, "bottleneck", "abc-2x3-fast-0123", 0.25))
        log.write(events.SeedBound(0, 2, "2", 0, 77))
        log.write(events.SeedsObserved(0, 2, "2", [5, 0], [0.5, 0.0], [0.25, 0.75]))
        log.write(events.SeedRefused(0, 2, "0", 1, "no such kernel"))
        log.write(events.SeedJudged(0, 2, "2", 0, "fossilized", 1.25, 1.0))
        log.write(events.CheckpointSaved(0, "grown-seed0.safetensors", 1234))
        log.write(events.NetworkFinished("grown", 0, 110, 0.5, 0.75, 0.2))
        log.write(events.RunFinished(False, 1.5))
    return path


@pytest.fixture(scope="module")
def lines_of_a_log(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = grow_log(tmp_path_factory.mktemp("log") / "events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_of_esper_grow(tmp_path: Path):
    state = read(grow_log(tmp_path / "events.jsonl"))
    assert state.unreadable == 0
    assert [key for key, _ in state.runs] == ["job", "host-seed0", "grown-seed0"]
    assert state.runs["job", 0].status is RunStatus.FINISHED
    host, grown = state.runs["host-seed0", 0], state.runs["grown-seed0", 0]
    assert host.metrics["validation_loss"] == 1.25
    assert (grown.status, grown.epoch, grown.metrics["test_accuracy"]) == (RunStatus.FINISHED, 2, 0.75)
    assert grown.layers["2"].states.tolist() == [4, 0]
    assert grown.layers["2"].column("alpha").tolist() == [0.5, 0.0]
    assert grown.layers["0"].column("health_score").tolist()[0] == 0.5
    assert (grown.loads_asked, grown.loads_done, grown.loads_refused) == (1, 1, 1)
    assert grown.refresh().by_state()["fossilized"] == 1
    assert state.current() is grown
    assert [each.place for each in grown.happenings if each.place] == ["2#0", "2#0", "0#1", "2#0"]


def test_every_event_of_esper_grow_is_known(tmp_path: Path):
    """A new kind of event has to be given a meaning here, or nobody would see it."""
    kinds = {
        kind.kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event
    }
    written = {json.loads(line)["event"] for line in grow_log(tmp_path / "e.jsonl").read_text().splitlines()}
    assert written == kinds


def recorded(path: Path) -> Path:
    with Recorder(path) as recorder:
        recorder.write(event_message(EventKind.RUN_STARTED, 0, T0, step=0))
        for sequence in range(20):
            recorder.write(
                window_message("fc", sequence, T0 + sequence, lifecycle_state=[0, 6], alpha=[0, sequence / 20])
            )
        recorder.write(event_message(EventKind.SEED_FOSSILIZED, 1, T0 + 20, layer_name="fc", seed_idx=1, step=320))
        recorder.write(event_message(EventKind.RUN_ENDED, 2, T0 + 21, step=320))
    return path


def test_messages_as_they_came_over_the_bus(tmp_path: Path):
    state = read(recorded(tmp_path / "r.jsonl"))
    (run,) = state.runs.values()
    assert run.layers["fc"].states.tolist() == [0, 4]
    assert run.layers["fc"].column("alpha")[1] == pytest.approx(0.95)
    assert (run.windows.total, run.missing, run.status) == (20, 0, RunStatus.FINISHED)
    assert [each.text for each in run.happenings] == ["run started", "fossilized", "run ended"]


def test_a_recording_is_never_overwritten(tmp_path: Path):
    path = recorded(tmp_path / "r.jsonl")
    with pytest.raises(RecordingError, match="exists; a recording is never overwritten"):
        Recorder(path)
    with pytest.raises(RecordingError, match="cannot be written"):
        Recorder(tmp_path / "no" / "folder.jsonl")


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {key: value for key, value in line.items() if key != name}


SPOILT = [
    (6, lambda line: "{not json", "events.jsonl:7: the line is not valid JSON"),
    (6, lambda line: "[1, 2]", "events.jsonl:7: the line is list, not an object"),
    (6, lambda line: json.dumps(json.loads(line) | {"lifecycle": [0, 9]}), ":7: lifecycle is "),
    (6, lambda line: json.dumps(json.loads(line) | {"alpha": [0.0]}), ":7: alpha is .* need 2 numbers, one a seed"),
    (2, lambda line: json.dumps(without("validation_loss")(json.loads(line))), ":3: validation_loss is None"),
    (2, lambda line: json.dumps(json.loads(line) | {"time": "yesterday"}), ":3: time is 'yesterday'"),
    (9, lambda line: json.dumps(json.loads(line) | {"seed_idx": -1}), ":10: seed_idx is -1"),
    (9, lambda line: json.dumps(json.loads(line) | {"seed_idx": 10**9}), ":10: seed_idx is 1000000000"),
    (0, lambda line: '{"topic": "system.events.epoch"}', ":1: message version None is unknown"),
    (16, lambda line: "\ufffd" + "x" * (1 << 20), ":17: is longer than"),
]


@pytest.mark.parametrize(("number", "spoil", "words"), SPOILT, ids=range(len(SPOILT)))
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, number: int, spoil: Callable[[str], str], words: str):
    path = grow_log(tmp_path / "events.jsonl")
    lines = path.read_text().splitlines()
    lines[number] = spoil(lines[number])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordingError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(RecordingError, match="No such file"):
        FileSource(tmp_path / "missing.jsonl")
    with pytest.raises(RecordingError, match="directory"):
        FileSource(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RecordingError, match="is empty"):
        read(tmp_path / "empty.jsonl")


def test_a_last_line_that_was_cut_off_is_counted(tmp_path: Path):
    path = grow_log(tmp_path / "events.jsonl")
    whole = path.read_text()
    path.write_text(whole + '{"seq": 99, "ti')
    state = read(path)
    assert (state.unreadable, state.unreadable_reason) == (1, f"line {len(whole.splitlines()) + 1} is cut off")
    # A whole line without its end is a line.
    path.write_text(whole.rstrip("\n"))
    assert read(path).unreadable == 0


def test_an_event_of_a_later_version_is_counted(tmp_path: Path):
    path = grow_log(tmp_path / "events.jsonl")
    path.write_text(path.read_text() + '{"seq": 99, "event": "moon_landing"}\n')
    assert read(path).unreadable_reason == "the event 'moon_landing' is unknown here"


def test_replay_keeps_the_recordings_own_pace(tmp_path: Path):
    source = FileSource(recorded(tmp_path / "r.jsonl"), speed=42.0)
    begin = time.monotonic()
    watcher = Watcher(source).start()
    assert watcher.done.wait(60)
    assert watcher.error is None
    # 21 seconds at 42 times their speed: never faster.
    assert time.monotonic() - begin >= 0.5
    assert watcher.state.runs["job", 0].status is RunStatus.FINISHED
    assert watcher.now() == pytest.approx(T0 + 21)


def test_replay_pauses_and_goes_faster(tmp_path: Path):
    source = FileSource(recorded(tmp_path / "r.jsonl"), speed=1.0)
    watcher = Watcher(source).start()
    assert source.replay is not None
    wait_until(lambda: watcher.heard and watcher.now() > T0, "the first event")
    source.replay.pause(True)
    time.sleep(0.2)
    still = source.replay.now()
    time.sleep(0.2)
    assert source.replay.now() == still
    source.replay.change(4096.0)
    assert source.replay.speed == source.replay.FASTEST
    source.replay.pause(False)
    assert watcher.done.wait(30)
    watcher.stop()


def test_a_replay_can_be_left(tmp_path: Path):
    watcher = Watcher(FileSource(recorded(tmp_path / "r.jsonl"), speed=0.1)).start()
    wait_until(lambda: watcher.heard, "the first event")
    watcher.stop()
    assert watcher.done.is_set()
    assert watcher.error is None


def test_a_file_that_grows_is_followed(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    grow_log(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    watcher = Watcher(FileSource(path, follow=True)).start()
    wait_until(lambda: watcher.mode == "following" and len(watcher.state.runs) == 3, "what is there is read")
    with path.open("a") as file:
        file.write(lines[5][20:] + "".join(lines[6:]))
    wait_until(lambda: watcher.state.runs["grown-seed0", 0].status is RunStatus.FINISHED, "the rest is read")
    watcher.stop()
    assert watcher.state.unreadable == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**400, 10**401) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("network", ["../../up", "/tmp/there", "a/b"])
def test_a_run_is_named_as_a_folder_may_be(lines_of_a_log: list[dict[str, Any]], network: str):
    line = next(line for line in lines_of_a_log if line["event"] == "network_started")
    with pytest.raises(ValueError, match="network is"):
        GrowLog().read({**line, "network": network})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_line_it_is_a_fact_or_an_error(data: st.DataObject, lines_of_a_log: list[dict[str, Any]]):
    line = dict(data.draw(st.sampled_from(lines_of_a_log)))
    for name in data.draw(st.lists(st.sampled_from(sorted(line)), max_size=3)):
        if name != "event":
            line[name] = data.draw(JSON)
    state = JobState()
    try:
        fact = GrowLog().read(line)
    except ValueError as error:
        assert str(error)
        return
    state.apply(fact, T0)
    assert len(draw(state, Ui(), Heading("x", "ended", T0), 80, 24)) == 24
