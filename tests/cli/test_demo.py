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
    command = [sys.executable, "-m", "esper.cli.main", "demo", "pipeline", *arguments]
    # What is configured for real runs must not be touched: this would fail.
    nowhere = {"ESPER_REGISTRY": "http://127.0.0.1:1", "REDIS_URL": "redis://127.0.0.1:1", "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **nowhere}, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("arguments", [(), ("--no-redis",)])
def test_from_blueprint_to_fossil(tmp_path, arguments):
    out, err = demo(tmp_path, *arguments).communicate(timeout=150)
    lines = out.splitlines()
    assert [line.partition("] ")[2].split()[0] for line in lines[: len(STAGES)]] == [*STAGES], err
    assert f"jobs over {'Urza' if arguments else 'Redis'}" in lines[0]
    assert "the seed is   kept (FOSSILIZED)" in lines
    assert err == ""
    # Nothing stays behind.
    assert list(tmp_path.iterdir()) == []


def test_ended_from_outside_it_stops_its_servers(tmp_path):
    process = demo(tmp_path)
    assert process.stdout is not None
    assert "servers" in process.stdout.readline()
    mine = {pid for pid in descendants(process.pid)}
    assert len(mine) >= 3
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine), "its servers are gone", 20)
    assert list(tmp_path.iterdir()) == []


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
