"""The background event loop: one a process, usable from everywhere, gone at exit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future

import pytest

from esper.execution import background
from tests.artifacts.forks import in_forked_child


async def _thread() -> threading.Thread:
    return threading.current_thread()


def test_one_daemon_thread_for_all():
    first, second = (background.submit(_thread()).result(30) for _ in range(2))
    assert first is second is not threading.current_thread()
    assert first.daemon


def test_errors_come_back():
    async def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        background.submit(fail()).result(30)


def test_cancelling_the_future_cancels_the_coroutine():
    started, ended = threading.Event(), threading.Event()

    async def hang():
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    future = background.submit(hang())
    assert started.wait(30)
    future.cancel()
    assert ended.wait(30)
    with pytest.raises(CancelledError):
        future.result(30)


def test_started_from_many_threads_at_once():
    gate = threading.Barrier(8)
    seen = []

    def use():
        gate.wait(30)
        seen.append(background.submit(_thread()).result(30))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_wait_on_any_loop_and_on_the_background_loop():
    async def answer():
        return 42

    async def ask():
        return await background.wait(background.submit(answer()))

    assert asyncio.run(ask()) == 42
    assert background.submit(ask()).result(30) == 42


def test_a_cancelled_waiter_leaves_the_work_to_the_others():
    release: Future[int] = Future()

    async def main():
        waiters = [asyncio.ensure_future(background.wait(release)) for _ in range(2)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]
        assert not release.cancelled()
        release.set_result(1)
        assert await waiters[1] == 1

    asyncio.run(main())


def test_the_work_may_end_after_the_waiters_loop_closed():
    release: Future[int] = Future()

    async def give_up():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(background.wait(release), 0.001)

    asyncio.run(give_up())
    release.set_result(1)  # tells a closed loop, which must not raise or print
    assert release.result() == 1


def test_a_forked_child_starts_its_own():
    background.submit(_thread()).result(30)

    def check():
        thread = background.submit(_thread()).result(30)
        return thread.is_alive() and background.submit(_thread()).result(30) is thread

    assert in_forked_child(check)
    background.submit(_thread()).result(30)  # the parent's goes on


@pytest.mark.parametrize(
    "program",
    [
        "background.submit(asyncio.sleep(1000))",
        "background.submit(asyncio.sleep(0)).result()",
        # work that refuses to be cancelled for a while
        "background.submit(stubborn())",
        # exit handlers that ask for more, too late
        "import atexit; background.submit(asyncio.sleep(0)).result(); background._stop_at_exit(); late()",
    ],
)
def test_the_interpreter_exits_without_a_word(program):
    text = f"""
import asyncio
from esper.execution import background
from tests.artifacts.forks import in_forked_child
async def stubborn():
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)
def late():
    try:
        background.submit(asyncio.sleep(0))
    except RuntimeError as error:
        assert "exiting" in str(error)
    else:
        raise SystemExit("accepted")
{program}
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
