"""CUDA calls of background threads beside graphs that other threads capture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

from esper.ops import native

__all__ = ["beside_captures"]

_log = logging.getLogger(__name__)
#: ``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: the thread minds its own captures and no others.
_THREAD_LOCAL: Final = 1


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Let the calling thread ask the GPU for what a graph cannot hold, whatever other threads capture meanwhile.

    ``torch.cuda.graph`` captures in mode "global": if any thread then allocates, loads a binary or asks whether an
    event has passed, that call fails, and so does the capture. Inside this block the thread is bound by captures of its
    own alone. Enter it only where a GPU is used, since it starts the CUDA driver, and leave it in the same thread: no
    ``await`` inside. Without a driver or the extension nothing happens; nor if the driver refuses, as it may
    in a thread that has no context: then there is one warning, and what is inside runs as it would without the block.
    """
    # An extension that is older than this package has no such method.
    exchange = getattr(native.driver(), "exchange_capture_mode", None)
    if exchange is None:
        yield
        return
    before = _exchanged(exchange, _THREAD_LOCAL)
    try:
        yield
    finally:
        if before is not None:
            _exchanged(exchange, before)


def _exchanged(exchange: Callable[[int], int], mode: int) -> int | None:
    """The mode before, or None if the driver refuses: a load must not fail over what only a capture needs."""
    try:
        return exchange(mode)
    except RuntimeError as error:  # the extension's DriverError is one
        _refused(str(error))
        return None


@lru_cache(maxsize=8)
def _refused(words: str) -> None:
    """Once for each reason: some threads ask many times a second."""
    _log.warning("graphs that other threads capture meanwhile may fail: %s", words)
