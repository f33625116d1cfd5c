"""The whole way: ``esper grow`` trains and publishes, a person watches on a terminal, and the log tells the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esper.oona import OonaClient
from esper.watch.bus_source import BusSource
from esper.watch.facts import STATES, RunStatus
from esper.watch.recording import FileSource
from esper.watch.state import RunState
from esper.watch.watcher import Watcher
from tests.servers import redis_server
from tests.watch.terminal import Terminal

#: One network of each kind, where the command trains five.
GROW = "import sys; from esper.grow import cli; cli.REPEATS = 1; from esper.cli.main import main; sys.exit(main())"


def rings(path: Path) -> Path:
    """Rings that a narrow network cannot tell apart: it levels off, and is given seeds."""
    rng = np.random.default_rng(0)
    angle, y = rng.uniform(0, 2 * np.pi, 300), np.arange(300) % 3
    radius = 1.0 + y + rng.normal(0, 0.1, 300)
    np.savez(path, X=np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), y=y)
    return path


def read(source: BusSource | FileSource) -> Watcher:
    watcher = Watcher(source).start()
    assert watcher.done.wait(60)
    if watcher.error is not None:
        raise watcher.error
    return watcher


def grown(watcher: Watcher, part: str) -> RunState:
    (run,) = (run for run in watcher.state.runs.values() if part in run.run)
    return run


def test_a_job_while_it_runs_and_its_log_afterwards(tmp_path: Path):
    out = tmp_path / "out"
    with redis_server(tmp_path / "redis") as redis:
        environment = {**os.environ, "REDIS_URL": redis.url, "ESPER_CACHE_DIR": str(tmp_path / "cache")}
        monitor = [sys.executable, "-m", "esper.cli.main", "monitor"]
        with Terminal(monitor, {"REDIS_URL": redis.url, "COLUMNS": ""}) as terminal:
            terminal.wait_for("no run heard of yet")
            data = rings(tmp_path / "rings.npz")
            command = [sys.executable, "-c", GROW, "grow", "--data", str(data), "--epochs", "60", "--seed", "3"]
            job = subprocess.Popen(
                [*command, "--out", str(out)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                terminal.wait_for("run grow-out-", "-seed3", "6 seeds", "run started", timeout_s=200)
                terminal.wait_for("run ended", "finished", timeout_s=200)
                output, _ = job.communicate(timeout=200)
            finally:
                job.kill()
            assert job.returncode == 0, output
            assert "dropped 0  missing 0  late 0" in terminal.text
            terminal.press("q")
            assert terminal.wait_end() == 0
        with OonaClient(redis.url) as bus:
            heard = grown(read(BusSource(bus, since_s=600.0, follow=False)), "grow-")
    logged = grown(read(FileSource(out / "events.jsonl")), "grown-")

    assert heard.status is logged.status is RunStatus.FINISHED
    assert heard.epoch == logged.epoch == 60
    # The network levels off and is given a seed, whatever becomes of it.
    assert heard.loads_asked > 0
    assert (heard.loads_asked, heard.loads_done, heard.loads_refused) == (
        logged.loads_asked,
        logged.loads_done,
        logged.loads_refused,
    )
    assert (heard.missing, heard.late, heard.dropped) == (0, 0, 0)
    assert list(heard.layers) == list(logged.layers)
    for name, layer in heard.layers.items():
        same = logged.layers[name]
        assert [STATES[s] for s in layer.states] == [STATES[s] for s in same.states]
        assert layer.column("alpha").tolist() == pytest.approx(same.column("alpha").tolist())
    assert heard.metrics["loss"] == logged.metrics["validation_loss"]
    assert heard.metrics["accuracy"] == logged.metrics["validation_accuracy"]
    stories = [
        [(h.place, h.text.split()[0].rstrip(":,")) for h in run.happenings if h.place] for run in (heard, logged)
    ]
    assert sorted(stories[0]) == sorted(stories[1])


def test_a_job_that_exports_itself_needs_no_server(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    data = rings(tmp_path / "rings.npz")
    command = [
        sys.executable,
        "-c",
        GROW,
        "grow",
        "--data",
        str(data),
        "--epochs",
        "12",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "REDIS_URL": "", "ESPER_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [*command, "--prometheus", "0", "--tensorboard", str(tmp_path / "tb")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("metrics at http://127.0.0.1:")
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name.startswith("grow-out-")
    files = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0})
    files.Reload()
    logged = grown(read(FileSource(tmp_path / "out" / "events.jsonl")), "grown-")
    # The last point is the end of the run.
    assert files.Scalars("run/loss")[-1].value == pytest.approx(logged.metrics["validation_loss"], rel=1e-6)
    assert len(files.Scalars("run/loss")) >= 12
    assert files.Scalars("seeds/dormant")[-1].value == 6


def test_a_job_is_told_at_once_that_it_cannot_export(tmp_path: Path):
    command = [sys.executable, "-c", GROW, "grow", "--epochs", "1", "--out", str(tmp_path / "out"), "--prometheus", "x"]
    result = subprocess.run(
        command, env={**os.environ, "REDIS_URL": ""}, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 2
    assert result.stderr == ("esper grow: the address for metrics is 'x'; need a port from 0 to 65535, or HOST:PORT\n")
