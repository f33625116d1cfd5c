"""The bus for code that blocks."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Self, TypeVar

from esper.contracts.bus import BusHealth, Delivery
from esper.contracts.errors import BusError
from esper.contracts.messages import OonaMessage
from esper.oona.base import Base, Place
from esper.oona.commands import Pause, Step
from esper.oona.entries import DeadLetter
from esper.oona.memory_link import MemoryLink
from esper.oona.redis_link import RedisLink
from esper.oona.settings import BusSettings
from esper.oona.urls import BusAddress

__all__ = ["Follower", "OonaClient"]

T = TypeVar("T")


class OonaClient(Base):
    """A :class:`~esper.contracts.bus.Bus` in Redis Streams, or in this process.

    May be used from any thread. In a forked child it opens connections of its own.

    Args:
        url: See :mod:`esper.oona.urls`. None takes the environment's ``REDIS_URL``, and without one the bus in this
            process that all clients without a URL share.
        settings: How patient to be, and what to keep.
        connect: Meet the server now, so that a missing one is reported here. False leaves that to the first call.

    Raises:
        BusURLError: not a bus's URL.
        BusError: with ``connect``: nothing answered there, or it refused us, or is too old.
        EsperError: the Python package ``redis`` is not installed.
    """

    def __init__(self, url: str | None = None, *, settings: BusSettings | None = None, connect: bool = True) -> None:
        super().__init__(url, settings, _link)
        self._closing = threading.Event()
        if connect:
            try:
                self.connect()
            except BaseException:
                self.close()
                raise

    def connect(self) -> None:
        """Meet the server: tries for ``settings.start_patience_s``, then raises one error that says what to check.

        Raises:
            BusError: nothing answered there, or it refused us, or is too old.
        """
        self._run(self._engine.connect())

    def publish(self, message: OonaMessage) -> str:
        """See :class:`~esper.contracts.bus.Bus`."""
        return self.publish_many([message])[0]

    def publish_many(self, messages: Sequence[OonaMessage]) -> list[str]:
        """See :class:`~esper.contracts.bus.Bus`.

        More than a thousand messages, or 16 MiB, take several round trips. Each is carried out as a whole or not at
        all, except by a cluster.
        """
        return self._run(self._engine.publish(messages))

    def consume(
        self, streams: Sequence[str], consumer_group: str, consumer_name: str, count: int = 1, block: int = 1000
    ) -> list[Delivery]:
        """See :class:`~esper.contracts.bus.Bus`."""
        return self._run(self._engine.consume(streams, consumer_group, consumer_name, count, block))

    def claim(
        self,
        streams: Sequence[str],
        consumer_group: str,
        consumer_name: str,
        count: int = 1,
        *,
        idle_s: float | None = None,
    ) -> list[Delivery]:
        """Take over, now, what was handed out ``idle_s`` ago or earlier and not acknowledged.

        :meth:`consume` does that by itself, with ``settings.claim_idle_s``.

        Raises:
            BusError: the bus did not answer, or refused.
        """
        return self._run(self._engine.claim(streams, consumer_group, consumer_name, count, idle_s))

    def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        """See :class:`~esper.contracts.bus.Bus`."""
        return self._run(self._engine.acknowledge(deliveries))

    def trim(
        self, stream: str, *, max_length: int | None = None, max_age_s: float | None = None, exact: bool = False
    ) -> int:
        """Drop the oldest entries of a stream, read or not.

        Args:
            stream: Its name.
            max_length: How many to keep.
            max_age_s: How old an entry may be, by this machine's clock.
            exact: False frees only what is cheap to free: a few entries more may stay.

        Returns:
            How many entries went.
        """
        return self._run(self._engine.trim(stream, max_length, max_age_s, exact))

    def replay(
        self, stream: str, since: Place | None = None, until: Place | None = None, *, page: int = 100
    ) -> Iterator[Delivery]:
        """What was published to ``stream``, oldest first, without taking it from anybody.

        Args:
            stream: Its name.
            since: Where to begin; None begins with the oldest that is kept.
            until: Where to end; an id is the last one returned, a time is not. None ends with what is newest then.
            page: How many to fetch at once.

        Raises:
            ValueError: no time and no id.
            BusError: the bus did not answer, or refused. What was yielded before stays good.
        """
        place: str | None = self._first(since)
        last = self._last(until)
        while place is not None:
            found, place = self._run(self._engine.page(stream, place, last, page))
            yield from found

    def dead_letters(self, stream: str, *, page: int = 100) -> Iterator[DeadLetter]:
        """What could not be delivered from ``stream``, oldest first, with the reasons."""
        place: str | None = "-"
        while place is not None:
            found, place = self._run(self._engine.dead_page(stream, place, page))
            yield from found

    def follow(self, streams: Sequence[str], since: Place | None = None) -> Follower:
        """Read streams as they grow, without a group: every follower sees every message, and leaves nothing behind.

        Args:
            streams: Their names.
            since: Where to begin; None begins behind what is there now.
        """
        if since is None:
            return Follower(self, self._run(self._engine.newest(streams)))
        return Follower(self, self._before(streams, since))

    def health_check(self) -> BusHealth:
        """See :class:`~esper.contracts.bus.Bus`."""
        return self._run(self._engine.health())

    def close(self) -> None:
        """See :class:`~esper.contracts.bus.Bus`."""
        self._closed = True
        self._closing.set()
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Generator[Step, Any, T]) -> T:
        self._begin()
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._carry_out(step)
                except BusError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found

    def _carry_out(self, step: Step) -> Any:
        try:
            if isinstance(step, Pause):
                self._closing.wait(step.seconds)
            elif not self._closed:
                return self._link.run(step)
        except ValueError:
            # Reading from a socket that another thread has just closed.
            if not self._closed:
                raise
        if self._closed:
            raise BusError(f"this client of {self.url} was closed during a call")
        return None

    def _after_fork(self) -> None:
        super()._after_fork()
        self._closing = threading.Event()


class Follower:
    """Places in streams, moving on as they are read."""

    def __init__(self, client: OonaClient, places: dict[str, str]) -> None:
        self._client = client
        self._places = places

    @property
    def places(self) -> dict[str, str]:
        """The id behind which each stream is read next."""
        return dict(self._places)

    def read(self, count: int = 100, block: int = 1000) -> list[Delivery]:
        """Up to ``count`` messages of each stream, waiting up to ``block`` milliseconds for the first.

        Raises:
            BusError: the bus did not answer, or refused. Reading again goes on where this began.
        """
        client = self._client
        found, self._places = client._run(client._engine.read(self._places, count, block))
        return found


def _link(address: BusAddress, timeout_s: float) -> MemoryLink | RedisLink:
    return MemoryLink(address) if address.kind == "memory" else RedisLink(address, timeout_s)
