"""Progress on a terminal: a bar where there is one, plain lines where there is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from esper.grow.experiment import NetworkName
from esper.grow.trainer import EpochRecord

__all__ = ["BarProgress", "LineProgress", "make_progress", "print_table"]

HEADER = ("network", "parameters", "test accuracy", "test loss", "seconds")


class LineProgress:
    """One plain line per network and per note, for logs and pipes."""

    def __init__(self, networks: int, epochs: int, stream: TextIO) -> None:
        """Count ``networks`` of ``epochs`` epochs each; write to ``stream``."""
        self._networks, self._epochs, self._stream = networks, epochs, stream
        self._begun = 0

    def __enter__(self) -> LineProgress:
        """The progress itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to tidy up."""

    def network(self, name: NetworkName, seed: int) -> None:
        """Say which network begins."""
        self._begun += 1
        self.note(f"[{self._begun}/{self._networks}] training {name}, seed {seed}")

    def epoch(self, record: EpochRecord) -> None:
        """Say how a network ended."""
        if record.epoch == self._epochs:
            self.note(f"epoch {record.epoch}: validation accuracy {100 * record.validation_accuracy:.1f} %")

    def note(self, text: str) -> None:
        """Write one line."""
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar over all epochs of all networks, with notes scrolling above it; needs rich and a terminal."""

    def __init__(self, networks: int, epochs: int, stream: TextIO) -> None:
        """Count ``networks`` of ``epochs`` epochs each; draw on ``stream``."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("starting", total=networks * epochs, accuracy="")

    def __enter__(self) -> BarProgress:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and leave the last state on the screen."""
        self._bar.stop()

    def network(self, name: NetworkName, seed: int) -> None:
        """Show which network is trained."""
        self._bar.update(self._task, description=f"{name}, seed {seed}")

    def epoch(self, record: EpochRecord) -> None:
        """Move the bar on."""
        self._bar.update(self._task, advance=1, accuracy=f"{100 * record.validation_accuracy:5.1f} % val")

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)


def make_progress(networks: int, epochs: int, stream: TextIO | None = None) -> LineProgress | BarProgress:
    """A bar if ``stream`` (standard error) is a terminal and rich is there, else lines."""
    stream = stream if stream is not None else sys.stderr
    if stream.isatty():
        try:
            return BarProgress(networks, epochs, stream)
        except ImportError:
            pass
    return LineProgress(networks, epochs, stream)


def print_table(rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> None:
    """Print rows under :data:`HEADER`, in columns; numbers are right-aligned."""
    stream = stream if stream is not None else sys.stdout
    lines: list[Sequence[Any]] = [HEADER, *rows]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(HEADER))]
    for number, line in enumerate(lines):
        cells = [str(line[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells), file=stream)
        if number == 0:
            print("  ".join("-" * width for width in widths), file=stream)
