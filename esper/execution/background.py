"""The package's one background event loop, in one daemon thread.

Training loops are synchronous; what they must not wait for runs here. The loop starts when it is first needed. A forked
child has no thread to run its parent's loop, so it starts its own. At exit, what still runs is cancelled and gets a
moment to clean up; nothing that hangs can keep the interpreter alive.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

__all__ = ["submit", "wait"]

T = TypeVar("T")

_EXIT_GRACE_S: Final = 5.0


class _Runner:
    """A loop and the thread that runs it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="esper-background", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            # Tasks that are destroyed while pending warn; cancelled ones that were awaited do not.
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(_EXIT_GRACE_S)


_lock = threading.Lock()
_runner: _Runner | None = None
_exiting = False
#: Loops of a parent process. Closing one would take its sockets out of the parent's epoll set, so they are only kept.
_abandoned: list[_Runner] = []


def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run ``coroutine`` on the background loop.

    Args:
        coroutine: What to run; it must not block, or all background work waits.

    Returns:
        A future of its result. Cancelling it cancels the coroutine. Waiting for it on the background loop itself
        (``.result()``) never ends; ``await wait(future)`` there.

    Raises:
        RuntimeError: the interpreter is exiting; the coroutine is closed.
    """
    with _lock:
        if not _exiting:
            return asyncio.run_coroutine_threadsafe(coroutine, _started().loop)
    coroutine.close()
    raise RuntimeError("esper's background loop has stopped: the interpreter is exiting")


async def wait(future: Future[T]) -> T:
    """The result of ``future``, awaited on whichever loop runs this coroutine.

    Unlike with :func:`asyncio.wrap_future`, being cancelled here leaves ``future`` running for the others who wait for
    it, and it may finish after this loop has closed.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[T]) -> None:
        # Whoever waited may be gone by now, and the loop closed with it: nobody is left to tell.
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    future.add_done_callback(wake)
    await done.wait()
    return future.result()


def _started() -> _Runner:
    global _runner
    if _runner is None:
        _runner = _Runner()
    return _runner


def _stop_at_exit() -> None:
    global _exiting, _runner
    with _lock:
        _exiting = True
        runner, _runner = _runner, None
    if runner is not None:
        runner.stop()


def _forget_in_child() -> None:
    global _lock, _runner
    _lock = threading.Lock()  # another thread may have held it at the moment of the fork
    if _runner is not None:
        _abandoned.append(_runner)
        _runner = None


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_stop_at_exit)
