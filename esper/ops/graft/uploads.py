"""Small tables on a GPU, put there without the calling thread waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Table"]


class Table:
    """Numbers as int32 on a device.

    An upload from ordinary memory waits until the stream has done all that it was given before; one from pinned memory
    joins the end of it. Other streams are told to wait for it, as long as it is under way.

    Tables are kept for as long as anybody may ask for them. One made in the course of a compiled call, whose memory
    belongs to the CUDA graph that is to come of it, would hold on to a piece of that; so whoever knows of seeds has
    theirs made before the first call (:func:`esper.execution.grafts.fused.upload`).

    Args:
        numbers: Of any shape.
        device: Where to.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would hold the upload and not the numbers.
    """

    __slots__ = ("_event", "_stream", "_tensor")

    def __init__(self, numbers: Sequence[Any], device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        with torch.inference_mode(False):
            if device.type != "cuda":
                self._tensor = torch.tensor(numbers, dtype=torch.int32, device=device)
                return
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "seeds that have not run before are in a CUDA graph that is being captured; run the model once "
                    "before the capture"
                )
            with torch.cuda.device(device):
                pinned = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=True)
                self._tensor = pinned.to(device, non_blocking=True)
                self._stream = torch.cuda.current_stream(device)
                self._event = torch.cuda.Event()
                self._event.record(self._stream)

    def here(self) -> Tensor:
        """The numbers, for work that is given to the current stream."""
        if self._event is not None:
            self._arrive(self._event)
        return self._tensor

    def _arrive(self, event: torch.cuda.Event) -> None:
        # Whoever begins a capture waits for the device first, and inside of one an event must not be asked.
        if torch.cuda.is_current_stream_capturing():
            return
        if event.query():
            self._event = None
            return
        stream = torch.cuda.current_stream(self._tensor.device)
        if stream != self._stream:
            stream.wait_event(event)
            self._tensor.record_stream(stream)
