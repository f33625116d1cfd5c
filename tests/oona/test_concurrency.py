"""One client in many hands: threads, tasks, cancelled calls, and a close in the middle of one."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from esper.contracts.bus import BusError
from esper.oona import AsyncOonaClient, BusSettings, OonaClient
from tests.oona.buses import EPOCH, HEALTH, message
from tests.oona.test_bus import numbers
from tests.servers import RedisServer


@pytest.fixture(params=["redis", "memory"])
def url(request: pytest.FixtureRequest, shared_server: RedisServer) -> str:
    if request.param == "memory":
        return "memory://concurrency"
    looking = shared_server.client()
    looking.flushall()
    looking.close()
    return shared_server.url


def test_threads(url: str) -> None:
    with OonaClient(url) as client:
        got: list[int] = []
        lock = threading.Lock()
        errors: list[BaseException] = []

        def publish(start: int) -> None:
            for number in range(start, start + 50):
                client.publish(message(number))

        def consume(name: str) -> None:
            try:
                while len(got) < 200:
                    some = client.consume([EPOCH], "g", name, count=7, block=20)
                    client.acknowledge(some)
                    with lock:
                        got.extend(numbers(some))
            except BusError as error:
                errors.append(error)

        threads = [threading.Thread(target=publish, args=(start,)) for start in (0, 50, 100, 150)]
        threads += [threading.Thread(target=consume, args=(f"c{index}",)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert sorted(got) == list(range(200))
        counters = client.counters()
        assert counters["published"] == counters["delivered"] == counters["acknowledged"] == 200
        assert [each for each in numbers(client.replay(EPOCH)) if each < 50] == list(range(50))


def test_tasks(url: str) -> None:
    async def scenario() -> list[int]:
        async with AsyncOonaClient(url) as client:
            got: list[int] = []

            async def consume(name: str) -> None:
                while len(got) < 60:
                    some = await client.consume([EPOCH], "g", name, count=5, block=50)
                    await client.acknowledge(some)
                    got.extend(numbers(some))

            await asyncio.gather(
                *(client.publish(message(number)) for number in range(60)),
                *(consume(f"c{index}") for index in range(3)),
            )
            return got

    assert sorted(asyncio.run(asyncio.wait_for(scenario(), 60))) == list(range(60))


def test_a_cancelled_call_leaves_the_others_their_answers(url: str) -> None:
    async def scenario() -> None:
        async with AsyncOonaClient(url) as client, AsyncOonaClient(url) as other:
            for number in range(20):
                # Cancelled while it makes a group, which answers well or, if the other has made it, with a refusal.
                group = f"g{number}"
                if number % 2:
                    await other.consume([HEALTH], group, "o", block=0)
                waiting = asyncio.create_task(client.consume([HEALTH], group, "c", block=10_000))
                await asyncio.sleep(0.001 * (number % 4 // 2) * (number % 5))
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                entry = await client.publish(message(number))
                assert (await client.health_check()).ok
                newest = [each async for each in client.replay(EPOCH, entry)]
                assert [each.entry_id for each in newest] == [entry]
                assert numbers(newest) == [number]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_closing_ends_a_call_that_waits_in_another_thread(url: str) -> None:
    client = OonaClient(url, settings=BusSettings(timeout_s=20.0))
    client.consume([EPOCH], "g", "c", block=0)
    ends: list[BaseException | None] = []

    def consume() -> None:
        try:
            client.consume([EPOCH], "g", "c", block=30_000)
            ends.append(None)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    client.close()
    thread.join(30)
    assert not thread.is_alive()
    # Within one wait inside the server, at the latest.
    assert time.monotonic() - began < 10
    (error,) = ends
    assert isinstance(error, BusError), repr(error)
    assert "closed" in str(error)


def test_a_waiting_consumer_costs_no_processor_time(url: str) -> None:
    with OonaClient(url) as client:
        client.consume([EPOCH], "g", "c", block=0)
        began = time.thread_time()
        assert client.consume([EPOCH], "g", "c", block=1000) == []
        # One or two round trips, each well under 1 ms of this thread's time; a loop that polls would take all of it.
        assert time.thread_time() - began < 0.25
