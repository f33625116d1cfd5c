"""A few daemon threads for blocking work: file reads, hashing, parsing.

Not ``asyncio.to_thread``, because the interpreter joins that pool's threads when it exits, so one read that hangs on a
dead network mount would keep the process alive for ever. These are given a moment at exit and then left behind. A
forked child starts with none.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

__all__ = ["run_blocking", "submit_blocking"]

P = ParamSpec("P")
T = TypeVar("T")

_MAX_THREADS: Final = 4
_EXIT_GRACE_S: Final = 2.0

_Job = tuple[Future[Any], Callable[[], Any]]


async def run_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a worker thread and wait for it without blocking the event loop, whichever loop that is.

    Cancelling the wait does not stop a call that has begun.

    Raises:
        RuntimeError: once the interpreter is exiting.
    """
    return await asyncio.wrap_future(_pool.submit(lambda: function(*args, **kwargs)))


def submit_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """As :func:`run_blocking`, for callers who do not wait on an event loop.

    Raises:
        RuntimeError: once the interpreter is exiting.
    """
    return _pool.submit(lambda: function(*args, **kwargs))


class _Pool:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("esper's worker threads have stopped: the interpreter is exiting")
            self._unfinished += 1
            if self._unfinished > len(self._threads) < _MAX_THREADS:
                thread = threading.Thread(target=self._work, name=f"esper-worker-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._jobs.put((future, call))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            # A traceback holds the frames of its call, and those hold the file's bytes: let go before waiting again.
            del job, future, call
            with self._lock:
                self._unfinished -= 1

    def close(self) -> None:
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _EXIT_GRACE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_pool = _Pool()


def _start_afresh() -> None:
    global _pool
    _pool = _Pool()


def _close() -> None:
    _pool.close()


os.register_at_fork(after_in_child=_start_afresh)
atexit.register(_close)
