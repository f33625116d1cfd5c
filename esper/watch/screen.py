"""The terminal as a place for pictures: the alternate screen, keys without echo, and everything put back at the end."""

from __future__ import annotations

import os
import signal
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Final, TextIO

from rich.console import Console
from rich.text import Text

from esper.watch.keys import KeyReader

__all__ = ["Screen"]

#: DEC private modes: the alternate screen, no cursor, no wrapping at the right edge.
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE: Final = "\x1b[?7h\x1b[?25h\x1b[?1049l"


class Screen:
    """Draws pictures on a terminal and reads its keys; a context manager.

    Only lines that changed are written, so a slow connection carries little. After Ctrl-C, SIGTERM and SIGHUP the next
    :meth:`keys` ends the ``with`` block by ``KeyboardInterrupt`` or ``SystemExit``: wherever they arrive, a lock may
    just have been taken. A second one is not waited for. Ctrl-Z puts the terminal back before the process stops.

    Args:
        out: Where to draw; a terminal.
        keys: Where keys come from; None, or what is no terminal, for no keys.
    """

    def __init__(self, out: TextIO, keys: TextIO | None) -> None:
        self._out = out
        self._console = Console(file=out)
        self._input = keys.fileno() if keys is not None and keys.isatty() else None
        self._reader = KeyReader(self._input) if self._input is not None else None
        self._modes: list[Any] | None = None
        self._shown: list[str] = []
        self._size = (0, 0)
        self._stopping = False
        self._ending: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Screen:
        """Take the terminal."""
        for number, handler in (
            (signal.SIGINT, self._on_end),
            (signal.SIGTERM, self._on_end),
            (signal.SIGHUP, self._on_end),
            (signal.SIGTSTP, self._on_stop),
        ):
            self._handlers[number] = signal.signal(number, handler)
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back as it was."""
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._ending is not None and (error is None or isinstance(error, OSError)):
            # A terminal that hung up has no more keys and refuses what is written to it: that is not why this ends.
            raise _end(self._ending) from None

    @property
    def ended(self) -> bool:
        """Whether the terminal is gone."""
        return self._reader is not None and self._reader.ended

    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        try:
            found = os.get_terminal_size(self._out.fileno())
        except OSError:
            return 80, 24
        # A terminal that was never told its size says 0.
        return found.columns or 80, found.lines or 24

    def keys(self, timeout_s: float) -> list[str]:
        """Keys pressed within ``timeout_s`` seconds; returns with the first.

        Raises:
            KeyboardInterrupt, SystemExit: a signal has asked for the end.
        """
        if self._stopping:
            self._stop()
        found: list[str] = []
        if self._ending is None:
            if self._reader is None:
                time.sleep(timeout_s)
            else:
                found = self._reader.read(timeout_s)
        if self._ending is not None:
            raise _end(self._ending)
        return found

    def show(self, lines: Sequence[Text]) -> None:
        """Make the terminal show ``lines``, the first at the top."""
        size = self.size()
        if size != self._size:
            self._size, self._shown = size, []
            # Rich believes COLUMNS more than the terminal; here the terminal is asked each time.
            self._console.width, self._console.height = size
            self._out.write("\x1b[2J")
        width = size[0]
        # A line that fills its row needs no erasing behind it, and would lose its last character by it.
        drawn = [
            self._drawn(line, width) + ("\x1b[0m" if line.cell_len >= width else "\x1b[0m\x1b[K")
            for line in lines[: size[1]]
        ]
        for place, line in enumerate(drawn):
            if place >= len(self._shown) or self._shown[place] != line:
                self._out.write(f"\x1b[{place + 1};1H{line}")
        for place in range(len(drawn), len(self._shown)):
            self._out.write(f"\x1b[{place + 1};1H\x1b[K")
        self._shown = drawn
        self._out.flush()

    def _drawn(self, line: Text, width: int) -> str:
        with self._console.capture() as capture:
            self._console.print(line, end="", no_wrap=True, overflow="crop", width=width, soft_wrap=False)
        return capture.get()

    def _take(self) -> None:
        if self._input is not None:
            self._modes = termios.tcgetattr(self._input)
            tty.setcbreak(self._input, termios.TCSADRAIN)
        self._shown, self._size = [], (0, 0)
        self._out.write(_ENTER)
        self._out.flush()

    def _give_back(self) -> None:
        try:
            self._out.write(_LEAVE)
            self._out.flush()
            if self._input is not None and self._modes is not None:
                termios.tcsetattr(self._input, termios.TCSADRAIN, self._modes)
        except (OSError, termios.error):
            # The terminal is gone, and nobody is left to be annoyed.
            pass

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        if self._ending is not None:
            # The first was not heeded: the terminal takes nothing, for one.
            raise _end(number)
        self._ending = number

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # Not here: the program may be in the middle of a write.
        self._stopping = True

    def _stop(self) -> None:
        self._stopping = False
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        # Here it goes on after `fg`.
        self._take()


def _end(number: int) -> BaseException:
    """What a signal ends a program by."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
