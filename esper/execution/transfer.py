"""From the bytes of an artifact to tensors on the device, beside the training and not in its way."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from esper.ops.captures import beside_captures

__all__ = ["Arrival", "to_device"]

#: Every tensor begins at a multiple of this in the common buffer, as the allocator's own do.
_ALIGN = 256

_lock = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


class Arrival:
    """The moment from which tensors copied on a side stream may be read.

    Args:
        event: Recorded after the copy; None if there is nothing to wait for.
        buffer: The memory that was copied to.
    """

    __slots__ = ("_buffer", "_event")

    def __init__(self, event: torch.cuda.Event | None = None, buffer: Tensor | None = None) -> None:
        self._event = event
        self._buffer = buffer

    def ready(self) -> bool:
        """Whether the copy is done; never waits."""
        return self._event is None or self._event.query()

    def wait_on_current_stream(self) -> None:
        """Let the current stream, and not the calling thread, wait for the copy."""
        if self._event is None or self._buffer is None:
            return
        stream = torch.cuda.current_stream(self._buffer.device)
        stream.wait_event(self._event)
        # The memory is the side stream's: told of a reader, the allocator does not hand it out again under him.
        self._buffer.record_stream(stream)

    def __reduce__(self) -> tuple[type[Arrival], tuple[()]]:
        # A copy of the tensors is made by waiting for them, so it has arrived.
        if self._event is not None:
            self._event.synchronize()
        return Arrival, ()


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Arrival | None]:
    """Copies of ``tensors`` on ``device``; on the CPU the tensors themselves.

    For a GPU they go through one piece of pinned memory and one copy on a stream of their own, so that neither the
    calling thread nor the training stream waits. Whoever reads them first lets his stream wait for the arrival.

    Args:
        tensors: On the CPU, contiguous.
        device: Where they should go.

    Returns:
        The tensors, and when they arrive where that is not at once.
    """
    if device.type != "cuda" or not tensors:
        return {name: tensor.to(device) for name, tensor in tensors.items()}, None
    # Allocating, in this thread, would end a graph that the training thread is capturing.
    with beside_captures():
        return _send(tensors, device)


def _send(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Arrival]:
    spans, size = {}, 0
    for name, tensor in tensors.items():
        spans[name] = size, size + tensor.nbytes
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    for name, tensor in tensors.items():
        begin, end = spans[name]
        pinned[begin:end].copy_(tensor.reshape(-1).view(torch.uint8))
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        buffer.copy_(pinned, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    placed = {
        name: buffer[begin:end].view(tensors[name].dtype).view(tensors[name].shape)
        for name, (begin, end) in spans.items()
    }
    return placed, Arrival(event, buffer)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The process's stream for such copies, one a device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    device = torch.device("cuda", index)
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        return _streams[device]
