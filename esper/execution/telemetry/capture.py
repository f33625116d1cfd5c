"""Taking a window on the training thread: a copy of the lattice, and references to what the monitor derived.

Nothing here waits. On a GPU the lattice goes to pinned memory in one copy on the training stream, and an event behind
it tells the sender when it is there. On a CPU only the fields that travel are copied, a third of the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from numpy.typing import NDArray

from esper.execution.health import ClosedWindow
from esper.execution.lattice import Lattice
from esper.execution.lattice_mirror import Snapshot
from esper.ops.captures import beside_captures
from esper.ops.lattice import PERSISTENT

__all__ = ["FIELDS", "Capture", "Capturer", "HealthSource"]

Array = NDArray[Any]

#: What is told of the lattice.
FIELDS: Final = ("lifecycle_states", "alpha_blend", "error_count", "exec_latency_us")
_SEED_BYTES: Final = sum(PERSISTENT[name].itemsize for name in FIELDS)
#: Between two questions whether a copy has arrived.
_POLL_S: Final = 0.0005


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
        captured_ns: The same moment by the monotonic clock, for lags.
        closed: Health that is new since the window before, in host memory once :meth:`wait` returns.
        nbytes: Memory that the lattice's part takes.
    """

    sequence: int
    step: int
    epoch: int
    captured_at: float
    captured_ns: int
    closed: dict[int, ClosedWindow]
    nbytes: int
    _fields: Mapping[str, Array]
    _snapshot: Snapshot | None = None
    _events: Sequence[torch.cuda.Event] = ()

    def wait(self) -> Mapping[str, Array]:
        """Wait for what a GPU still has to send, on the sender's thread; then each of :data:`FIELDS`, ``[seeds]``."""
        snapshot = self._snapshot
        if snapshot is None and not self._events:
            return self._fields
        # The training thread may be capturing a graph, which a question after an event would end.
        with beside_captures():
            while not ((snapshot is None or snapshot.ready()) and all(event.query() for event in self._events)):
                time.sleep(_POLL_S)
            if snapshot is None:
                return self._fields
            found = snapshot.fields()
            return {name: found[name].numpy() for name in FIELDS}

    def absorb(self, older: Capture) -> None:
        """Take what a window before, which is not sent, has of health: news all the same, unless there is newer."""
        self.closed = {**older.closed, **self.closed}
        # What has arrived needs no waiting for, and windows may be dropped for hours.
        self._events = [*(event for event in older._events if not event.query()), *self._events]


class Capturer:
    """Takes windows of one model.

    Args:
        lattice: Its seeds.
        health: Its monitor.
    """

    def __init__(self, lattice: Lattice, health: HealthSource) -> None:
        self._lattice = lattice
        self.health = health

    def take(self, sequence: int, step: int, epoch: int) -> Capture:
        """A window of now. Does not wait for the device."""
        lattice = self._lattice
        closed = self.health.take_closed()
        now, now_ns = time.time(), time.monotonic_ns()
        # Wherever the lattice is, a layer may be on a GPU.
        events: list[torch.cuda.Event] = []
        closed = {index: _on_its_way(window, events) for index, window in closed.items()}
        snapshot = lattice.snapshot() if lattice.storage.is_cuda else None
        nbytes = snapshot.buffer.nbytes if snapshot is not None else lattice.num_seeds * _SEED_BYTES
        fields = lattice.copies(FIELDS) if snapshot is None else {}
        return Capture(sequence, step, epoch, now, now_ns, closed, nbytes, fields, snapshot, events)


def _on_its_way(window: ClosedWindow, events: list[torch.cuda.Event]) -> ClosedWindow:
    table = window.table
    if not table.is_cuda:
        return window
    host = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(table.device):
        host.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    events.append(event)
    return ClosedWindow(window.samples, host)
