"""``esper monitor`` as a person uses it: on a real pseudo-terminal, with a real Redis and real messages."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rich")

from esper.contracts.telemetry import EventKind
from esper.oona import OonaClient
from esper.watch.screen import Screen
from tests.servers import RedisServer, free_port, redis_server, wait_until
from tests.watch.scenes import event_message, window_message
from tests.watch.terminal import Terminal
from tests.watch.test_recording import grow_log, recorded

MONITOR = (sys.executable, "-m", "esper.cli.main", "monitor")
QUIET = {"REDIS_URL": "", "ESPER_DEBUG": "", "COLUMNS": "80", "NO_COLOR": ""}


def monitor(*arguments: object, **options: object) -> Terminal:
    environment = {**QUIET, **options.pop("environment", {})}  # type: ignore[dict-item]
    return Terminal([*MONITOR, *map(str, arguments)], environment, **options)  # type: ignore[arg-type]


def piped(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*MONITOR, *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **QUIET, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def bus(redis: RedisServer) -> Iterator[OonaClient]:
    redis.client().flushall()
    with OonaClient(redis.url) as client:
        yield client


def publish_job(bus: OonaClient) -> None:
    now = time.time()
    bus.publish(event_message(EventKind.RUN_STARTED, at=now))
    for sequence in range(3):
        bus.publish_many(
            [
                window_message(
                    f"blocks.{number}.mlp",
                    sequence,
                    now + sequence / 100,
                    lifecycle_state=[0, number % 8, 0, 0],
                    alpha=[0, 0.5, 0, 0],
                    health_score=[0.75, 0.5, 0.25, 1],
                )
                for number in range(16)
            ]
        )


def test_a_running_job(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    with monitor("--redis", redis.url) as terminal:
        terminal.wait_for("esper monitor", "run job", "live", "64 seeds", "all 16 layers", "blocks.0.mlp", "q quit")
        assert all(len(row) <= 80 for row in terminal.rows)
        # What happens now is seen.
        bus.publish(
            event_message(
                EventKind.SEED_LOADING, 1, time.time(), layer_name="blocks.0.mlp", seed_idx=3, artifact_id="k"
            )
        )
        terminal.wait_for("blocks.0.mlp#3 loading k", "loads 3 under way")
        bus.publish(
            event_message(EventKind.SEED_FAULT, 2, time.time(), layer_name="blocks.1.mlp", seed_idx=1, reason="NaN")
        )
        terminal.wait_for("blocks.1.mlp#1 fault: NaN")
        bus.publish(window_message("blocks.0.mlp", 7, time.time(), lifecycle_state=[0] * 4))
        terminal.wait_for("missing 4")

        # Filters.
        terminal.press("/", *"ks.1")
        terminal.wait_for("layer name contains: ks.1")
        terminal.wait_gone("blocks.2.mlp ")
        terminal.press("enter")
        terminal.wait_for("name:ks.1", "blocks.15.mlp")
        terminal.press("s")
        terminal.wait_for("state:awake")
        terminal.wait_gone("blocks.11.mlp ")
        terminal.press("escape")
        terminal.wait_for("blocks.2.mlp ")

        # A layer's seeds, and back.
        terminal.press("down", "down", "enter")
        terminal.wait_for("blocks.2.mlp  4 of 4 seeds", "#1", "active", "dormant")
        terminal.press("escape")
        terminal.wait_for("all 16 layers")

        terminal.press("?")
        terminal.wait_for("the picture stands still")
        terminal.press("?", "q")
        assert terminal.wait_end() == 0
        assert terminal.now_modes() == terminal.modes
        assert terminal.output.endswith(b"\x1b[?1049l")


def test_pausing_a_live_picture(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    with monitor("--redis", redis.url) as terminal:
        terminal.wait_for("live", "64 seeds")
        terminal.press("p")
        terminal.wait_for("paused")
        bus.publish(window_message("new.layer", 0, time.time()))
        terminal.read(0.8)
        assert "new.layer" not in terminal.text
        # A picture that stands still can be looked at all the same.
        terminal.press("/", *"blocks.3", "enter")
        terminal.wait_gone("blocks.2.mlp ")
        terminal.press("escape", "p")
        terminal.wait_for("live", "all 17 layers", "66 seeds")


def test_it_follows_the_size_of_the_terminal(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    with monitor("--redis", redis.url, columns=132, lines=40) as terminal:
        terminal.wait_for("64 seeds", "worst", "corr", "blocks.15.mlp")
        terminal.resize(80, 24)
        terminal.wait_gone("corr")
        terminal.wait_for("alpha faults", "q quit")
        terminal.resize(40, 10)
        terminal.wait_for("run job")
        terminal.press("q")
        assert terminal.wait_end() == 0


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm", "hangup"])
def test_the_terminal_is_given_back_however_it_ends(bus: OonaClient, redis: RedisServer, how: str):
    with monitor("--redis", redis.url) as terminal:
        terminal.wait_for("no run heard of yet")
        assert terminal.now_modes() != terminal.modes
        if how == "ctrl-c":
            terminal.press("\x03")
            assert terminal.wait_end() == 130
        elif how == "sigterm":
            terminal.signal(signal.SIGTERM)
            assert terminal.wait_end() == 128 + signal.SIGTERM
        else:
            terminal.signal(signal.SIGHUP)
            assert terminal.wait_end() == 128 + signal.SIGHUP
        assert terminal.now_modes() == terminal.modes
        assert b"\x1b[?1049l" in terminal.output
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize(
    ("number", "ended_by", "status"),
    [(signal.SIGINT, KeyboardInterrupt, ()), (signal.SIGTERM, SystemExit, (143,)), (signal.SIGHUP, SystemExit, (129,))],
)
def test_a_signal_ends_where_no_lock_is_held(number: signal.Signals, ended_by: type[BaseException], status: object):
    before = signal.getsignal(number)
    heeded = False
    with pytest.raises(ended_by) as caught, Screen(io.StringIO(), None) as screen:
        signal.raise_signal(number)  # in the middle of anything
        heeded = True
        screen.keys(60.0)
    assert heeded and caught.value.args == status
    with pytest.raises(ended_by), Screen(io.StringIO(), None):
        signal.raise_signal(number)
        signal.raise_signal(number)  # the first was not heeded
        raise AssertionError("the second one ends it at once")
    with pytest.raises(ended_by), Screen(io.StringIO(), None):
        signal.raise_signal(number)
        raise OSError("the terminal is gone")
    assert signal.getsignal(number) is before


def test_ctrl_z_and_back(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    with monitor("--redis", redis.url) as terminal:
        terminal.wait_for("64 seeds")
        terminal.signal(signal.SIGTSTP)
        terminal.wait_stopped()
        assert terminal.now_modes() == terminal.modes
        terminal.resume()
        bus.publish(window_message("new.layer", 0, time.time()))
        terminal.wait_for("all 17 layers")
        assert terminal.now_modes() != terminal.modes
        terminal.press("q")
        assert terminal.wait_end() == 0


def test_redis_lost_and_back(tmp_path: Path):
    with redis_server(tmp_path / "own") as redis, OonaClient(redis.url) as bus:
        publish_job(bus)
        with monitor("--redis", redis.url) as terminal:
            terminal.wait_for("live", "64 seeds")
            redis.kill()
            # What is wrong, below the first line, which keeps its place and its time.
            terminal.wait_for("no answer", "does not answer: ")
            assert "redis://127.0.0.1" in terminal.rows[0]
            # The last picture stays.
            assert "64 seeds" in terminal.text
            redis.start()
            bus.publish(window_message("new.layer", 0, time.time()))
            terminal.wait_for("live", "all 17 layers")
            terminal.press("q")
            assert terminal.wait_end() == 0


def test_a_log_of_esper_grow(tmp_path: Path):
    with monitor("--events", grow_log(tmp_path / "events.jsonl")) as terminal:
        terminal.wait_for("ended", "run grown-seed0", "finished", "fossilized: validation loss 1.250 -> 1.000")
        terminal.wait_for("test_accuracy 0.750", "loads 0 under way, 1 done, 1 refused")
        terminal.press("r")
        terminal.wait_for("host-seed0", "grown-seed0")
        terminal.press("q")
        assert terminal.wait_end() == 0


def test_a_replay(tmp_path: Path):
    with monitor("--events", recorded(tmp_path / "r.jsonl"), "--speed", "1") as terminal:
        terminal.wait_for("replay x1", "step 32")
        terminal.press("p")
        terminal.wait_for("paused")
        terminal.read(0.3)
        paused = terminal.rows
        terminal.read(1.5)
        assert terminal.rows == paused
        terminal.press("p", *"++++++")
        terminal.wait_for("ended", "step 320", "finished")


def test_what_a_bad_file_says(tmp_path: Path):
    path = grow_log(tmp_path / "events.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "nonsense\n", *lines[5:]]))
    with monitor("--events", path) as terminal:
        assert terminal.wait_end() == 1
        assert b"\x1b[?1049h" not in terminal.output
        assert re.match(
            r"esper monitor: .*events\.jsonl:5: the line is not valid JSON: .*\r\n\Z", terminal.output.decode()
        )


def test_once(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    result = piped("--once", REDIS_URL=redis.url)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert "run job" in result.stdout
    assert sum(line.startswith("blocks.") for line in lines) == 16
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.stdout
    only = piped("--once", "--redis", redis.url, "--layer", "blocks.1", "--state", "awake")
    assert [line.split()[0] for line in only.stdout.splitlines() if line.startswith("blocks.")] == [
        "blocks.10.mlp",
        "blocks.12.mlp",
        "blocks.13.mlp",
        "blocks.14.mlp",
    ]


def nothing_there() -> str:
    return f"redis://:secret@127.0.0.1:{free_port()}/0"


ERRORS = [
    (["--once"], "no bus to listen to: set REDIS_URL, or give --redis URL; --events FILE shows a recording"),
    ([], "standard output is no terminal: use --once"),
    (["--once", "--redis", "http://localhost"], "has the scheme 'http'; known: redis://"),
    (["--once", "--events", "missing.jsonl"], "missing.jsonl: cannot be opened: No such file or directory"),
    (["--once", "--speed", "2", "--redis", "redis://x"], "--follow and --speed are for --events FILE"),
    (["--once", "--follow", "--events", "x"], "--once reads the whole file at once"),
    (["--once", "--state", "asleep", "--events", "x"], "--state asleep: known are awake, loading"),
    (["--record", "y", "--once", "--events", "x"], "--events is a recording already"),
    (
        ["--once", "--prometheus", "high", "--events", os.devnull],
        "the address for metrics is 'high'; need a port from 0 to 65535",
    ),
    (["--once", "--events", os.devnull], "is empty: no events were recorded"),
    (["--rank", "1", "--once", "--events", "x"], "--rank needs --run"),
    (["--no-view", "--events", "x"], "--no-view leaves nothing to do: add --prometheus, --tensorboard or --record"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=range(len(ERRORS)))
def test_errors_are_one_line(arguments: list[str], words: str):
    result = piped(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("esper monitor: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_nobody_at_the_address():
    result = piped("--once", "--redis", nothing_there())
    assert result.returncode == 1
    assert "127.0.0.1" in result.stderr
    assert "secret" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_bad_file_ends_exporting_too(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    result = piped("--no-view", "--prometheus", "0", "--events", tmp_path / "bad.jsonl")
    assert result.returncode == 1
    assert "bad.jsonl:1: the line is not valid JSON" in result.stderr


def test_a_bus_on_which_nobody_speaks(bus: OonaClient, redis: RedisServer):
    result = piped("--once", "--redis", redis.url, "--since", "30")
    assert result.returncode == 1
    assert "no run was heard of in the last 30 s (--since reads more)" in result.stderr


def test_a_run_that_is_not_there(bus: OonaClient, redis: RedisServer):
    publish_job(bus)
    result = piped("--once", "--redis", redis.url, "--run", "jab")
    assert "--run jab --rank 0: not heard of; known: job rank 0" in result.stderr


def test_metrics_without_a_view(bus: OonaClient, redis: RedisServer, tmp_path: Path):
    publish_job(bus)
    command = [*MONITOR, "--no-view", "--prometheus", "0", "--record", str(tmp_path / "r.jsonl")]
    environment = {**os.environ, **QUIET, "REDIS_URL": redis.url}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("metrics at ").strip()
        assert url.startswith("http://127.0.0.1:")

        def told() -> bool:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return 'esper_windows_total{rank="0",run="job"} 48.0' in answer.read().decode()

        wait_until(told, "all windows are counted")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    result = piped("--once", "--events", tmp_path / "r.jsonl")
    assert "64 seeds" in result.stdout


def test_it_does_not_load_torch(tmp_path: Path):
    path = recorded(tmp_path / "r.jsonl")
    script = (
        "import sys; from esper.cli.main import main; main(['monitor', '--once', '--events', sys.argv[1]]); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.splitlines()[-1] == "False"


def test_termios_modes_compare() -> None:
    """The tests above compare terminal settings: what cbreak changes must show."""
    with Terminal([sys.executable, "-c", "import tty, time; tty.setcbreak(0); time.sleep(30)"]) as terminal:
        wait_until(lambda: terminal.now_modes() != terminal.modes, "the settings differ")
        assert not terminal.now_modes()[3] & termios.ICANON


def test_without_rich(tmp_path: Path):
    script = "import sys; sys.modules['rich'] = None; from esper.cli.main import main; sys.exit(main(['monitor']))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (
        1,
        "esper monitor: the package rich is not installed; in Esper's folder: pip install '.[monitor]'\n",
    )
