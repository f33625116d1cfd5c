"""What the host knows of the lattice without asking the device.

On a CPU the mirror is the tensors' own memory. On a GPU it is a copy that asynchronous snapshots bring up to date and
that every command of the host writes through, so that a command is visible to its author at once. No method waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.ops.lattice import PERSISTENT, lattice_snapshot, layout_of, views

__all__ = ["AsyncMirror", "DirectMirror", "Mirror", "Snapshot", "take_snapshot"]

Array = NDArray[Any]


class _Event(Protocol):
    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Snapshot:
    """The persistent fields of a lattice at one moment, packed in host memory.

    Attributes:
        epoch: The lattice's epoch when the snapshot was asked for.
        rows: Number of seeds.
        buffer: uint8 ``[persistent_bytes]``, fields in the order of ``esper.ops.lattice.PERSISTENT``, each padded with
            zero bytes to a multiple of 64; pinned when it comes from a GPU. Valid once :meth:`ready`.
    """

    def __init__(self, buffer: Tensor, rows: int, epoch: int, event: _Event | None = None) -> None:
        self.buffer = buffer
        self.rows = rows
        self.epoch = epoch
        self._event = event

    def ready(self) -> bool:
        """Whether the copy has arrived; never waits."""
        return self._event is None or self._event.query()

    def wait(self) -> Snapshot:
        """Wait for the copy to arrive."""
        if self._event is not None:
            self._event.synchronize()
        return self

    def fields(self) -> dict[str, Tensor]:
        """Each field as a tensor ``[rows]`` over :attr:`buffer`.

        Raises:
            RuntimeError: the copy has not arrived yet.
        """
        if not self.ready():
            raise RuntimeError("the snapshot is still on its way: ask ready() first, or wait()")
        return views(self.buffer, self.rows)


def take_snapshot(storage: Tensor, rows: int, epoch: int, buffer: Tensor | None = None) -> Snapshot:
    """Start one copy of the persistent fields of ``storage`` to the host.

    Args:
        storage: The lattice's buffer.
        rows: Number of seeds.
        epoch: Noted in the snapshot.
        buffer: Reused if given, else made: pinned for a GPU.
    """
    on_gpu = storage.device.type == "cuda"
    if buffer is None:
        buffer = torch.empty(layout_of(rows).persistent_bytes, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
    lattice_snapshot(storage, rows, buffer)
    event = None
    if on_gpu:
        with torch.cuda.device(storage.device):
            event = torch.cuda.Event()
            event.record()
    return Snapshot(buffer, rows, epoch, event)


class Mirror(Protocol):
    """Host-side view of the fields.

    Attributes:
        exact: Whether the arrays are the device's memory, and so never behind it.
        fields: One array ``[rows]`` for each field the host can see.
    """

    exact: bool
    fields: Mapping[str, Array]

    def refresh(self, storage: Tensor, epoch: int) -> bool:
        """Take in what the device has sent, and ask for news if there can be any.

        Returns:
            Whether the arrays may have changed.
        """

    def device_wrote(self) -> None:
        """A step was launched: the arrays are behind the device from here on."""

    def host_wrote(self, row: int) -> None:
        """A command changed ``row`` in the arrays and on the device."""

    def reload(self, storage: Tensor) -> None:
        """Read everything again; may wait (checkpoints, moves between devices)."""


class DirectMirror:
    """The tensors' own memory: for a lattice on the CPU."""

    exact = True

    def __init__(self, storage: Tensor, rows: int) -> None:
        self.fields: Mapping[str, Array] = {name: field.numpy() for name, field in views(storage, rows).items()}

    def refresh(self, storage: Tensor, epoch: int) -> bool:
        """Nothing to do, nothing new."""
        return False

    def device_wrote(self) -> None:
        """Nothing to do."""

    def host_wrote(self, row: int) -> None:
        """Nothing to do."""

    def reload(self, storage: Tensor) -> None:
        """Nothing to do."""


class AsyncMirror:
    """A host copy that follows a device through snapshots.

    At most one snapshot is under way. Every write of the host and every step gets a number. A row that the host wrote
    after a snapshot was asked for keeps the host's values when that snapshot arrives.
    """

    exact = False

    def __init__(
        self, storage: Tensor, rows: int, take: Callable[[Tensor, int, int, Tensor | None], Snapshot] = take_snapshot
    ) -> None:
        self._rows = rows
        self._take = take
        self._landing: Tensor | None = None
        self._under_way: Snapshot | None = None
        self._writes = 0
        self._writes_asked = 0
        self._commanded: dict[int, int] = {}
        copy = torch.empty(layout_of(rows).persistent_bytes, dtype=torch.uint8, device="cpu")
        self.fields: Mapping[str, Array] = {name: field.numpy() for name, field in views(copy, rows).items()}
        self._copy = copy
        self.reload(storage)

    def device_wrote(self) -> None:
        """A step was launched."""
        self._writes += 1

    def host_wrote(self, row: int) -> None:
        """Protect ``row`` from snapshots that are older than this command."""
        self._writes += 1
        self._commanded[row] = self._writes

    def refresh(self, storage: Tensor, epoch: int) -> bool:
        """Take in the snapshot under way if it has arrived; ask for another if anything was written since."""
        arrived = False
        if self._under_way is not None:
            if not self._under_way.ready():
                return False
            self._take_in(self._under_way)
            self._under_way = None
            arrived = True
        if self._writes > self._writes_asked:
            self._writes_asked = self._writes
            self._under_way = self._take(storage, self._rows, epoch, self._landing)
            self._landing = self._under_way.buffer
        return arrived

    def reload(self, storage: Tensor) -> None:
        """Copy everything, waiting for the device; what is under way is dropped."""
        self._under_way = None
        self._landing = None
        self._commanded.clear()
        self._writes_asked = self._writes
        self._copy.copy_(storage[: self._copy.numel()])

    def _take_in(self, snapshot: Snapshot) -> None:
        self._commanded = {row: at for row, at in self._commanded.items() if at > self._writes_asked}
        kept = list(self._commanded)
        fresh = snapshot.fields()
        for name in PERSISTENT:
            array = self.fields[name]
            mine = array[kept]
            array[:] = fresh[name].numpy()
            array[kept] = mine
