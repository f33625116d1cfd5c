"""The stages as they go by: a table that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Protocol, TextIO

__all__ = ["STAGES", "LineView", "LiveView", "View", "make_view"]

#: Every stage, in order, with what happens in it.
STAGES: Final[Mapping[str, str]] = {
    "servers": "Redis, Urza and Tezzeret start",
    "training": "the host trains, and levels off",
    "submitted": "a blueprint is submitted",
    "claimed": "a worker claims the job",
    "compiling": "the worker compiles it in a sandbox",
    "published": "the artifact is published to Urza",
    "fetched": "the training process fetches it in the background",
    "awake": "a seed wakes with it",
    "ramp": "alpha ramps from 0 to 1",
    "trained": "host and seed train together",
    "fossilized": "the seed helped, and is kept",
}

_MARKS: Final = {"waiting": " ", "running": ">", "done": "x", "failed": "!"}


class View(Protocol):
    """Where the demo says what happens."""

    def __enter__(self) -> View:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, and leave the last state in sight."""

    def begin(self, stage: str, detail: str = "") -> None:
        """A stage is under way."""

    def done(self, stage: str, detail: str = "") -> None:
        """A stage is complete."""

    def progress(self, stage: str, detail: str) -> None:
        """Something to show of a stage under way, often."""


class LineView:
    """One line for each stage that ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = time.monotonic()

    def __enter__(self) -> LineView:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""

    def begin(self, stage: str, detail: str = "") -> None:
        """Nothing: a line when it is done is enough."""

    def done(self, stage: str, detail: str = "") -> None:
        """Write the line."""
        tail = f": {detail}" if detail else ""
        print(f"[{time.monotonic() - self._begun:6.2f} s] {stage:<10}  {STAGES[stage]}{tail}", file=self._stream)
        self._stream.flush()

    def progress(self, stage: str, detail: str) -> None:
        """Nothing: lines do not move."""


class LiveView:
    """A table that is drawn anew as stages begin and end; needs rich and a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._begun = time.monotonic()
        self._states = dict.fromkeys(STAGES, "waiting")
        self._details = dict.fromkeys(STAGES, "")
        self._times: dict[str, float] = {}
        self._live = Live(console=Console(file=stream), get_renderable=self._table, refresh_per_second=8)

    def __enter__(self) -> LiveView:
        """Start drawing."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        if kind is not None:
            self._states = {name: "failed" if state == "running" else state for name, state in self._states.items()}
        self._live.stop()

    def begin(self, stage: str, detail: str = "") -> None:
        """Mark a stage."""
        self._set(stage, "running", detail)

    def done(self, stage: str, detail: str = "") -> None:
        """Mark a stage and keep the time."""
        self._set(stage, "done", detail)

    def progress(self, stage: str, detail: str) -> None:
        """Show what a stage is at."""
        self._details[stage] = detail

    def _set(self, stage: str, state: str, detail: str) -> None:
        self._states[stage] = state
        self._details[stage] = detail or self._details[stage]
        self._times[stage] = time.monotonic() - self._begun

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1), show_header=False)
        styles = {"waiting": "dim", "running": "bold yellow", "done": "green", "failed": "bold red"}
        for stage, meaning in STAGES.items():
            state = self._states[stage]
            when = f"{self._times[stage]:6.2f} s" if stage in self._times else ""
            cells = (_MARKS[state], stage, when, meaning, self._details[stage])
            table.add_row(*(Text(cell, style=styles[state]) for cell in cells))
        return table


def make_view(stream: TextIO | None = None) -> LineView | LiveView:
    """A table if ``stream`` (standard output) is a terminal and rich is installed, else lines."""
    stream = stream if stream is not None else sys.stdout
    if stream.isatty():
        try:
            return LiveView(stream)
        except ImportError:
            pass
    return LineView(stream)
