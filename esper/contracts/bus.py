"""What a message bus is to the rest of the package, and how it fails.

A bus keeps one append-only stream for each topic. Whoever publishes appends; consumers share a stream through a named
*group*, in which each message goes to one consumer until that one acknowledges it. Delivery is at least once: a message
whose consumer died goes to another, and a publish that was repeated after a lost answer stands in the stream twice. The
``event_id`` of a message tells such twins.

Lower layers are handed an object of these protocols and import nothing else. The implementations are in
:mod:`esper.oona`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from esper.contracts.errors import (
    BusDeniedError,
    BusError,
    BusFullError,
    BusUnavailableError,
    BusURLError,
    BusWrongTypeError,
)
from esper.contracts.messages import OonaMessage

__all__ = [
    "AsyncBus",
    "Bus",
    "BusDeniedError",
    "BusError",
    "BusFullError",
    "BusHealth",
    "BusURLError",
    "BusUnavailableError",
    "BusWrongTypeError",
    "Delivery",
]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as the bus hands it out.

    Attributes:
        stream: The stream it stands in.
        entry_id: Its place there, ``milliseconds-number``: ids of one stream grow in the order of publishing, and the
            first part is the time by the bus's clock, since 1970.
        message: What was published.
        consumer_group: The group it was handed out to; empty for one that was read without a group.
        times_delivered: 1 for a message never handed out to this group before.
    """

    stream: str
    entry_id: str
    message: OonaMessage
    consumer_group: str = ""
    times_delivered: int = 1

    @property
    def published_at(self) -> float:
        """Seconds since 1970 by the bus's clock, to the millisecond."""
        return int(self.entry_id.partition("-")[0]) / 1000


@dataclass(frozen=True, slots=True)
class BusHealth:
    """Answer to "is it there".

    Attributes:
        ok: It answered.
        url: Where it is, without credentials.
        latency_s: Seconds one question took; 0.0 where there was no answer.
        version: Of the server, as it calls itself; empty where unknown.
        memory_bytes: What it holds; 0 where unknown.
        memory_limit_bytes: What it may hold; 0 for no limit.
        reason: Why it is not ok; empty otherwise.
    """

    ok: bool
    url: str
    latency_s: float = 0.0
    version: str = ""
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    reason: str = ""


@runtime_checkable
class Bus(Protocol):
    """What ``bus=`` accepts besides a URL. Every method may be called from any thread and in a forked child.

    No call blocks for ever: each ends within the bus's timeouts, with an answer or a :class:`BusError`.
    """

    @property
    def url(self) -> str:
        """Where the bus is, for messages; without credentials."""

    def publish(self, message: OonaMessage) -> str:
        """Append ``message`` to the stream of its topic and return its entry id.

        Raises:
            MessageError: it is longer than a message may be; nothing was sent.
            BusError: it may or may not be in the stream; publishing it again is safe, because its ``event_id`` stays.
        """

    def publish_many(self, messages: Sequence[OonaMessage]) -> list[str]:
        """Append all in order, in one round trip, and return their entry ids in the same order.

        Raises:
            MessageError: one is longer than a message may be; nothing was sent.
            BusError: not every one is known to be in its stream. Publish all of them again.
        """

    def consume(
        self,
        streams: Sequence[str],
        consumer_group: str,
        consumer_name: str,
        count: int = 1,
        block: int = 1000,
    ) -> list[Delivery]:
        """Up to ``count`` messages of each stream for this consumer: what dead consumers left first, then new ones.

        The group is made where it is missing, from the beginning of the stream. Entries that are no messages go to
        the dead letters and are not returned.

        Args:
            streams: Names of topics.
            consumer_group: Consumers with the same group share the messages.
            consumer_name: Different for every consumer of a group.
            count: Most messages of each stream.
            block: Milliseconds to wait while there is nothing; 0 does not wait.

        Raises:
            BusError: the bus did not answer, or refused.
        """

    def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        """Take them off the group's list of what is under way; how many were still on it.

        Raises:
            BusError: the bus did not answer, or refused. Acknowledging again is safe.
        """

    def health_check(self) -> BusHealth:
        """Ask the bus one question. Says why there was no answer instead of raising."""

    def counters(self) -> Mapping[str, int]:
        """What happened so far, by name; every name is always there and no number ever falls."""

    def close(self) -> None:
        """Let go of connections; further calls raise :class:`BusError`. Closing again does nothing."""


@runtime_checkable
class AsyncBus(Protocol):
    """A :class:`Bus` for asyncio, to be used from one event loop; every method is as described there."""

    @property
    def url(self) -> str:
        """See :class:`Bus`."""

    async def publish(self, message: OonaMessage) -> str:
        """See :class:`Bus`."""

    async def publish_many(self, messages: Sequence[OonaMessage]) -> list[str]:
        """See :class:`Bus`."""

    async def consume(
        self,
        streams: Sequence[str],
        consumer_group: str,
        consumer_name: str,
        count: int = 1,
        block: int = 1000,
    ) -> list[Delivery]:
        """See :class:`Bus`."""

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        """See :class:`Bus`."""

    async def health_check(self) -> BusHealth:
        """See :class:`Bus`."""

    def counters(self) -> Mapping[str, int]:
        """See :class:`Bus`."""

    async def close(self) -> None:
        """See :class:`Bus`."""
