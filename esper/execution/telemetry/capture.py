"""Taking a window on the training thread: one copy of the lattice, and references to what the monitor derived.

Nothing here waits. On a GPU the copies go to pinned memory on the training stream, and an event behind them tells the
sender when they are there. Buffers come back from the sender, because fresh memory costs more than the copy into it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from esper.execution.health import ClosedWindow
from esper.execution.lattice import Lattice
from esper.execution.lattice_mirror import Snapshot, take_snapshot

__all__ = ["Capture", "Capturer", "HealthSource", "SpareBuffers"]

#: Buffers kept for the next windows.
_SPARE = 8
#: Between two questions whether a copy has arrived.
_POLL_S = 0.0005


class HealthSource(Protocol):
    """What is needed of the monitor."""

    def take_closed(self) -> dict[int, ClosedWindow]:
        """The last full window of each layer that closed one since the last call, by number of the layer."""


@dataclass(slots=True, eq=False)
class Capture:
    """One window of all layers.

    Attributes:
        sequence: Number of the window.
        step: Training steps done.
        epoch: Epochs done.
        captured_at: Seconds since 1970.
        snapshot: The lattice.
        closed: Health that is new since the window before, in host memory once :meth:`wait` returns.
        captured_ns: The same moment by the monotonic clock, for lags.
        on_gpu: Whether the lattice was on a GPU.
    """

    sequence: int
    step: int
    epoch: int
    captured_at: float
    snapshot: Snapshot
    closed: dict[int, ClosedWindow]
    captured_ns: int
    on_gpu: bool
    _events: Sequence[torch.cuda.Event] = ()

    @property
    def nbytes(self) -> int:
        """Memory it holds on to, about."""
        return self.snapshot.buffer.numel() + sum(window.table.nbytes for window in self.closed.values())

    def wait(self) -> None:
        """Wait for what a GPU still has to send; for the sender's thread."""
        while not (self.snapshot.ready() and all(event.query() for event in self._events)):
            time.sleep(_POLL_S)


class SpareBuffers:
    """Buffers that the sender is done with. The sender holds these, and not the capturer with the model behind it."""

    def __init__(self) -> None:
        #: And whether they are pinned; both ends are atomic.
        self._buffers: deque[tuple[bool, Tensor]] = deque(maxlen=_SPARE)

    def take(self, pinned: bool) -> Tensor | None:
        """One of the kind, if there is one; others are let go of: the model has moved."""
        try:
            found, buffer = self._buffers.pop()
        except IndexError:
            return None
        return buffer if found == pinned else None

    def give_back(self, capture: Capture) -> None:
        """The sender is done with it."""
        self._buffers.append((capture.on_gpu, capture.snapshot.buffer))


class Capturer:
    """Takes windows of one model.

    Args:
        lattice: Its seeds.
        health: Its monitor.
    """

    def __init__(self, lattice: Lattice, health: HealthSource) -> None:
        self._lattice = lattice
        self.health = health
        self.spare = SpareBuffers()

    def take(self, sequence: int, step: int, epoch: int) -> Capture:
        """A window of now. Does not wait for the device."""
        lattice = self._lattice
        storage, rows = lattice.storage, lattice.num_seeds
        closed = self.health.take_closed()
        events: list[torch.cuda.Event] = []
        if any(window.table.is_cuda for window in closed.values()):
            closed = {index: _on_its_way(window, events) for index, window in closed.items()}
        snapshot = take_snapshot(storage, rows, lattice.epoch, self.spare.take(storage.is_cuda))
        now, now_ns = time.time(), time.monotonic_ns()
        return Capture(sequence, step, epoch, now, snapshot, closed, now_ns, storage.is_cuda, events)


def _on_its_way(window: ClosedWindow, events: list[torch.cuda.Event]) -> ClosedWindow:
    table = window.table
    if not table.is_cuda:
        return window
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    with torch.cuda.device(table.device):
        host.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    events.append(event)
    return ClosedWindow(window.samples, host)
