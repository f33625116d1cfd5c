"""A program on a real pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyte")

import pyte

__all__ = ["Terminal"]

KEYS = {"up": "\x1b[A", "down": "\x1b[B", "pagedown": "\x1b[6~", "end": "\x1b[F", "enter": "\r", "escape": "\x1b"}


class Terminal:
    """Runs ``command`` on a terminal of ``columns`` x ``lines``; a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        columns: int = 80,
        lines: int = 24,
        cwd: Path | None = None,
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        self._master, slave = pty.openpty()
        self.modes = termios.tcgetattr(slave)
        self._slave = slave
        self.resize(columns, lines)
        plain = {"TERM": "xterm-256color", "TZ": "UTC", "PYTHONUNBUFFERED": "1"}
        self.process: subprocess.Popen[Any] = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **plain, **(environment or {})},
            start_new_session=True,
            cwd=cwd,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def rows(self) -> list[str]:
        """What is on the screen, without spaces at the right."""
        return [row.rstrip() for row in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.rows)

    def style(self, row: int, column: int) -> Any:
        """One character with its colours."""
        return self._screen.buffer[row][column]

    def now_modes(self) -> list[Any]:
        """The terminal's settings at present."""
        return termios.tcgetattr(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        self._screen.resize(lines, columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, *keys: str) -> None:
        for key in keys:
            os.write(self._master, KEYS.get(key, key).encode())
            # A person's next key comes later: an escape is not the beginning of what follows it.
            time.sleep(0.1 if key == "escape" else 0.01)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def read(self, seconds: float) -> None:
        """Take in what the program writes for ``seconds``."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._master], [], [], left)[0] and not self._take():
                return

    def wait_for(self, *texts: str, timeout_s: float = 60.0) -> None:
        """Until all of ``texts`` are on the screen at once."""
        self._until(lambda: all(text in self.text for text in texts), f"on the screen: {texts}", timeout_s)

    def wait_gone(self, text: str, timeout_s: float = 60.0) -> None:
        """Until ``text`` is no longer on the screen."""
        self._until(lambda: text not in self.text, f"gone from the screen: {text}", timeout_s)

    def wait_end(self, timeout_s: float = 60.0) -> int:
        """Until the program ends; its exit status."""
        self._until(lambda: self.process.poll() is not None, "the program ends", timeout_s)
        self.read(0.1)
        return int(self.process.returncode)

    def wait_stopped(self, timeout_s: float = 60.0) -> None:
        """Until the program is stopped, as by Ctrl-Z."""

        def stopped() -> bool:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]
            return state == "T"

        self._until(stopped, "the program is stopped", timeout_s)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def _until(self, condition: Any, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s: {what}; the screen shows:\n{self.text}")
            if self.process.poll() is not None and not condition():
                self.read(0.2)
                if not condition():
                    raise AssertionError(f"ended with {self.process.returncode} before {what}; shows:\n{self.text}")
            self.read(0.05)

    def _take(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return False
        self.output += data
        self._stream.feed(data)
        return bool(data)
