"""``esper demo pipeline``: the real parts, once with Redis and once without."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper.demo import servers
from esper.demo.view import STAGES, LineView, LiveView, make_view
from tests.servers import wait_until


def demo(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    for package in ("fastapi", "uvicorn", "sqlalchemy", "alembic", "prometheus_client"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "esper.cli.main", "demo", "pipeline", *arguments]
    # What is configured for real runs must not be touched: this would fail.
    nowhere = {"ESPER_REGISTRY": "http://127.0.0.1:1", "REDIS_URL": "redis://127.0.0.1:1", "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **nowhere}, stdout=pipe, stderr=pipe, text=True)


def test_from_blueprint_to_fossil(tmp_path):
    pytest.importorskip("redis")
    out, err = demo(tmp_path).communicate(timeout=150)
    lines = out.splitlines()
    assert [line.partition("] ")[2].split()[0] for line in lines[: len(STAGES)]] == [*STAGES], err
    assert "jobs over Redis" in lines[0]
    assert "the seed is   kept (FOSSILIZED)" in lines
    assert err == ""
    assert nothing_left(tmp_path)


def test_without_redis_and_ended_from_outside(tmp_path):
    process = demo(tmp_path, "--no-redis")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    assert "jobs over Urza" in lines[0]
    assert "published" in lines[5]
    mine = descendants(process.pid)
    assert len(mine) >= 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine), "its servers are gone", 20)
    assert nothing_left(tmp_path)


def nothing_left(folder: Path) -> bool:
    # PyTorch's own folder for compiled code is not ours.
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")] == []


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def test_no_redis_server(monkeypatch):
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert servers.find_redis() is None


def test_a_server_that_does_not_start():
    server = servers.Server("thing", [sys.executable, "-c", "print('no luck'); raise SystemExit(3)"])
    with pytest.raises(servers.DemoError, match="thing ended with status 3; it said:\nno luck"):
        server.wait(lambda: None)
    server.stop()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_views(monkeypatch):
    assert isinstance(make_view(io.StringIO()), LineView)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(make_view(Terminal()), LineView)


def test_the_live_view_shows_every_stage_and_where_it_failed():
    pytest.importorskip("rich")
    terminal = Terminal()
    view = make_view(terminal)
    assert isinstance(view, LiveView)
    with pytest.raises(RuntimeError), view:
        view.begin("servers")
        view.done("servers", "all there")
        view.begin("training")
        view.progress("training", "loss 0.5")
        raise RuntimeError
    shown = terminal.getvalue()
    for stage in STAGES:
        assert stage in shown
    assert "all there" in shown
    last = shown.rpartition("servers")[2]
    assert "!" in last
    assert "loss 0.5" in last
