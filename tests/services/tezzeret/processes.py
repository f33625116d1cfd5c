"""Tezzeret workers as processes, and jobs for them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.blueprints import get
from esper.services.tezzeret.job import CompileJob
from tests.servers import stop_process, wait_until

__all__ = ["WorkerProcess", "blueprint", "job", "worker_process"]


def blueprint(name: str = "lowrank", **options: Any) -> dict[str, Any]:
    """A ready-made blueprint as JSON values."""
    import json

    return dict(json.loads(get(name, **options).to_json()))


def job(**changes: Any) -> CompileJob:
    return CompileJob(**{"blueprint": blueprint(), "d_in": 6, "d_out": 4, **changes})


def _is_sandbox(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return b"esper.services.tezzeret.sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


class WorkerProcess:
    """``esper tezzeret worker`` with what it has said so far."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "esper.cli.main", "tezzeret", "worker", *arguments]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Until it has said ``text``."""

        def found() -> bool:
            if text in self.said:
                return True
            assert self.process.poll() is None, f"the worker ended: {self.said}"
            return False

        try:
            wait_until(found, f"the worker says {text!r}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said: {self.said}") from None

    def sandboxes(self) -> list[int]:
        """Process ids of what it is compiling with.

        A child that is not yet the sandbox's program is left out: it is still the worker, in a ``vfork`` that the
        worker waits for, and whoever stopped it would stop both.
        """
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return [int(pid) for pid in children if _is_sandbox(pid)]
        return []

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        status = stop_process(self.process)
        self._reader.join(5)
        return status


@contextlib.contextmanager
def worker_process(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[WorkerProcess]:
    """A running worker, stopped at the end."""
    worker = WorkerProcess(*arguments, environment=environment)
    try:
        yield worker
    finally:
        worker.stop()
        assert worker.process.stderr is not None
        worker.process.stderr.close()
