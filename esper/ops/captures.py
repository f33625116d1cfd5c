"""CUDA calls of background threads beside graphs that other threads capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from esper.ops import native

__all__ = ["beside_captures"]

#: ``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: the thread minds its own captures and no others.
_THREAD_LOCAL: Final = 1


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Let the calling thread ask the GPU for what a graph cannot hold, whatever other threads capture meanwhile.

    ``torch.cuda.graph`` captures in mode "global": if any thread then allocates, loads a binary or asks whether an
    event has passed, that call fails, and so does the capture. Inside this block the thread is bound by captures of its
    own alone. Enter it only where a GPU is used, since it starts the CUDA driver, and leave it in the same thread: no
    ``await`` inside. Without a driver or the extension nothing happens.
    """
    # An extension that is older than this package has no such method.
    exchange = getattr(native.driver(), "exchange_capture_mode", None)
    if exchange is None:
        yield
        return
    before = exchange(_THREAD_LOCAL)
    try:
        yield
    finally:
        exchange(before)
