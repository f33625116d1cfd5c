"""Worker threads for blocking work."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from esper.artifacts.workers import run_blocking
from tests.artifacts.forks import in_forked_child
from tests.servers import wait_until


def test_runs_elsewhere_and_returns():
    async def main():
        here = threading.current_thread()
        there = await run_blocking(threading.current_thread)
        assert there is not here and there.daemon
        assert await run_blocking(lambda a, *, b: a + b, 1, b=2) == 3

    asyncio.run(main())


def test_errors_come_back():
    async def main():
        with pytest.raises(ZeroDivisionError):
            await run_blocking(lambda: 1 / 0)

    asyncio.run(main())


def test_several_run_at_once():
    # Three calls that all wait for each other can only end if three threads run.
    barrier = threading.Barrier(3)

    async def main():
        await asyncio.gather(*(run_blocking(barrier.wait, 30) for _ in range(3)))

    asyncio.run(main())


def test_more_calls_than_threads():
    async def main():
        assert await asyncio.gather(*(run_blocking(int, i) for i in range(200))) == list(range(200))

    asyncio.run(main())


def test_results_are_let_go():
    class Big:
        pass

    import gc
    import weakref

    async def main():
        big = await run_blocking(Big)
        return weakref.ref(big)

    def gone() -> bool:
        gc.collect()
        return reference() is None

    reference = asyncio.run(main())
    # The thread hands the result over before it lets go of it itself.
    wait_until(gone, "the result is let go of")


def test_a_forked_child_has_threads_of_its_own():
    asyncio.run(run_blocking(int))
    assert in_forked_child(lambda: asyncio.run(run_blocking(lambda: 42)) == 42)


def test_exit_does_not_wait_for_what_hangs():
    program = """
import asyncio, threading
from esper.artifacts import workers
workers._EXIT_GRACE_S = 0.05
async def main():
    started = threading.Event()
    task = asyncio.ensure_future(workers.run_blocking(lambda: (started.set(), threading.Event().wait())))
    await workers.run_blocking(started.wait)
    task.cancel()
asyncio.run(main())
print("end of program")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of program\n", "")
