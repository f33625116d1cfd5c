"""The bus for code on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any, Self, TypeVar

from esper.contracts.bus import BusHealth, Delivery
from esper.contracts.errors import BusError
from esper.contracts.messages import OonaMessage
from esper.oona.async_redis_link import AsyncRedisLink
from esper.oona.base import Base, Place
from esper.oona.commands import Pause, Step
from esper.oona.entries import DeadLetter
from esper.oona.memory_link import AsyncMemoryLink
from esper.oona.settings import BusSettings
from esper.oona.urls import BusAddress

__all__ = ["AsyncFollower", "AsyncOonaClient"]

T = TypeVar("T")


class AsyncOonaClient(Base):
    """An :class:`~esper.contracts.bus.AsyncBus` in Redis Streams, or in this process; from one event loop.

    Every method is :class:`~esper.oona.client.OonaClient`'s of the same name. Nothing is connected when one is made:
    use ``async with``, or await :meth:`connect`, to be told at the start that nothing answers.

    Args:
        url: As for :class:`~esper.oona.client.OonaClient`.
        settings: How patient to be, and what to keep.

    Raises:
        BusURLError: not a bus's URL.
        EsperError: the Python package ``redis`` is not installed.
    """

    def __init__(self, url: str | None = None, *, settings: BusSettings | None = None) -> None:
        super().__init__(url, settings, _link)

    async def connect(self) -> None:
        """Meet the server: tries for ``settings.start_patience_s``, then raises one error that says what to check."""
        await self._run(self._engine.connect())

    async def publish(self, message: OonaMessage) -> str:
        """See :class:`~esper.contracts.bus.Bus`."""
        return (await self.publish_many([message]))[0]

    async def publish_many(self, messages: Sequence[OonaMessage]) -> list[str]:
        """See :class:`~esper.oona.client.OonaClient`."""
        return await self._run(self._engine.publish(messages))

    async def consume(
        self, streams: Sequence[str], consumer_group: str, consumer_name: str, count: int = 1, block: int = 1000
    ) -> list[Delivery]:
        """See :class:`~esper.contracts.bus.Bus`."""
        return await self._run(self._engine.consume(streams, consumer_group, consumer_name, count, block))

    async def claim(
        self,
        streams: Sequence[str],
        consumer_group: str,
        consumer_name: str,
        count: int = 1,
        *,
        idle_s: float | None = None,
    ) -> list[Delivery]:
        """See :class:`~esper.oona.client.OonaClient`."""
        return await self._run(self._engine.claim(streams, consumer_group, consumer_name, count, idle_s))

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        """See :class:`~esper.contracts.bus.Bus`."""
        return await self._run(self._engine.acknowledge(deliveries))

    async def trim(
        self, stream: str, *, max_length: int | None = None, max_age_s: float | None = None, exact: bool = False
    ) -> int:
        """See :class:`~esper.oona.client.OonaClient`."""
        return await self._run(self._engine.trim(stream, max_length, max_age_s, exact))

    async def replay(
        self, stream: str, since: Place | None = None, until: Place | None = None, *, page: int = 100
    ) -> AsyncIterator[Delivery]:
        """See :class:`~esper.oona.client.OonaClient`."""
        place: str | None = self._first(since)
        last = self._last(until)
        while place is not None:
            found, place = await self._run(self._engine.page(stream, place, last, page))
            for each in found:
                yield each

    async def dead_letters(self, stream: str, *, page: int = 100) -> AsyncIterator[DeadLetter]:
        """See :class:`~esper.oona.client.OonaClient`."""
        place: str | None = "-"
        while place is not None:
            found, place = await self._run(self._engine.dead_page(stream, place, page))
            for each in found:
                yield each

    async def follow(self, streams: Sequence[str], since: Place | None = None) -> AsyncFollower:
        """See :class:`~esper.oona.client.OonaClient`."""
        if since is None:
            return AsyncFollower(self, await self._run(self._engine.newest(streams)))
        return AsyncFollower(self, self._before(streams, since))

    async def health_check(self) -> BusHealth:
        """See :class:`~esper.contracts.bus.Bus`."""
        return await self._run(self._engine.health())

    async def close(self) -> None:
        """See :class:`~esper.contracts.bus.Bus`."""
        self._closed = True
        await self._link.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Generator[Step, Any, T]) -> T:
        self._begin()
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._carry_out(step)
                except BusError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found

    async def _carry_out(self, step: Step) -> Any:
        if self._closed:
            raise BusError(f"this client of {self.url} was closed during a call")
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        task = asyncio.current_task()
        asked = task.cancelling() if task else 0
        try:
            return await self._link.run(step)
        finally:
            if task and task.cancelling() > asked:
                # Before Python 3.12 asyncio.wait_for, which redis-py sends with, may swallow a cancellation.
                raise asyncio.CancelledError


class AsyncFollower:
    """Places in streams, moving on as they are read."""

    def __init__(self, client: AsyncOonaClient, places: dict[str, str]) -> None:
        self._client = client
        self._places = places

    @property
    def places(self) -> dict[str, str]:
        """The id behind which each stream is read next."""
        return dict(self._places)

    async def read(self, count: int = 100, block: int = 1000) -> list[Delivery]:
        """See :class:`~esper.oona.client.Follower`."""
        client = self._client
        found, self._places = await client._run(client._engine.read(self._places, count, block))
        return found


def _link(address: BusAddress, timeout_s: float) -> AsyncMemoryLink | AsyncRedisLink:
    return AsyncMemoryLink(address) if address.kind == "memory" else AsyncRedisLink(address, timeout_s)
