"""A real ``esper urza serve`` process for tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

#: Generous: the machine may be busy with other tests.
_START_S = 60.0
_STOP_S = 30.0

#: The command line, under a limit on open files and with settings that it has no options for.
_PROGRAM = """
import json, resource, sys
from esper.cli.main import main
from esper.services.urza import settings
files, values = json.loads(sys.argv[1])
if files:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
plain = settings.settings_for
settings.settings_for = lambda *args, **options: plain(*args, **{**options, **values})
sys.exit(main(sys.argv[2:]))
"""


class UrzaProcess:
    """One server, its data under one folder, on one port for all its life.

    Attributes:
        url: ``http://127.0.0.1:PORT``.
        admin_token: A token with all roles.
        process: The process that runs at present.
        log: Everything it wrote to standard error, over all restarts.
    """

    def __init__(
        self, folder: Path, port: int, args: Sequence[str], env: dict[str, str], program: Sequence[str]
    ) -> None:
        self.folder = folder
        self.url = ""
        self.admin_token = ""
        self._args = list(args)
        self._env = env
        self._program = list(program)
        self._log_path = folder / "urza.log"
        self._port = port
        self.start()

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, *self._program, "urza", "serve"]
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self._port), "--data", str(self.folder / "urza"), *self._args],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._env},
            )
        assert self.process.stdout is not None
        # readline() itself has no time limit; the timer ends the process, and with it the pipe.
        timer = threading.Timer(_START_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        found = re.fullmatch(r"urza: listening on (http://127\.0\.0\.1:(\d+))\n", line)
        if found is None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError(f"urza did not start; it said {line!r} and logged:\n{self.log}")
        self.url, self._port = found[1], int(found[2])
        token = re.search(r"urza_[A-Za-z0-9_-]+", self.log)
        if not self.admin_token and token is not None:
            self.admin_token = token[0]

    def stop(self) -> int:
        """Ask it to stop (SIGTERM), wait, and return its exit status."""
        return self._end(self.process.terminate)

    def kill(self) -> int:
        """Kill it without warning (SIGKILL)."""
        return self._end(self.process.kill)

    def restart(self) -> None:
        """Kill it without warning if it runs, and start it again on the same port and data."""
        self.kill()
        self.start()

    def _end(self, ask: object) -> int:
        if self.process.poll() is None:
            ask()  # type: ignore[operator]
        try:
            status = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


@contextlib.contextmanager
def running_urza(
    tmp_path: Path,
    *,
    port: int = 0,
    args: Sequence[str] = (),
    env: dict[str, str] | None = None,
    settings: dict[str, float] | None = None,
    files: int | None = None,
) -> Iterator[UrzaProcess]:
    """A registry in a process of its own, with its data under ``tmp_path/urza``; killed in the end.

    Args:
        tmp_path: Where database, blobs and log go.
        port: Port to listen on; 0 takes a free one.
        args: More arguments of ``esper urza serve``.
        env: More environment variables, such as AWS_* for S3.
        settings: Settings that the command line has no options for.
        files: Most files that the process may open.
    """
    # Looked for here: of the process that lacks one there would be nothing but its log.
    for package in ("fastapi", "uvicorn", "sqlalchemy", "alembic", "prometheus_client"):
        pytest.importorskip(package)
    program = ["-m", "esper.cli.main"]
    if settings or files:
        program = ["-c", _PROGRAM, json.dumps([files, settings or {}])]
    server = UrzaProcess(tmp_path, port, args, env or {}, program)
    try:
        yield server
    finally:
        server.kill()


def wait_until(condition: object, seconds: float = 20.0) -> None:
    """Wait until ``condition()`` holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
