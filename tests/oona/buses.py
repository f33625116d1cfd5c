"""One face for the blocking client, the asyncio client and the bus in memory, so that one suite tests all of them."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from esper.contracts.messages import OonaMessage, TopicNames
from esper.oona import AsyncOonaClient, BusSettings, OonaClient
from esper.oona.commands import Add, Command
from esper.oona.memory_broker import MemoryBroker, broker
from esper.oona.urls import parse
from tests.servers import RedisServer

__all__ = ["EPOCH", "HEALTH", "KINDS", "MemoryPlace", "Place", "RedisPlace", "Waiting", "message"]

EPOCH = TopicNames.SYSTEM_EVENTS_EPOCH.value
HEALTH = TopicNames.TELEMETRY_SEED_HEALTH.value
#: Where the bus is, and which client speaks to it.
KINDS = ["redis", "redis async", "memory", "memory async"]

_numbers = itertools.count()


def message(number: int = 0, topic: str = EPOCH, **payload: Any) -> OonaMessage:
    return OonaMessage("tests", "trace", TopicNames(topic), {"number": number, **payload})


class Waiting:
    """An asyncio client and its event loop, behind methods that wait."""

    def __init__(self, client: AsyncOonaClient) -> None:
        self.client = client
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if inspect.isasyncgenfunction(found):
            return lambda *args, **kwargs: self._runner.run(_listed(found(*args, **kwargs)))
        if name == "follow":
            return lambda *args, **kwargs: _WaitingFollower(self, self._runner.run(found(*args, **kwargs)))
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._runner.run(found(*args, **kwargs))
        return found

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    def close(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()


class _WaitingFollower:
    def __init__(self, owner: Waiting, follower: Any) -> None:
        self._owner, self._follower = owner, follower

    def read(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner.run(self._follower.read(*args, **kwargs))


async def _listed(items: Any) -> list[Any]:
    return [item async for item in items]


class Place:
    """A bus, its clients, and ways to look at it and to meddle with it."""

    def __init__(self, url: str, waiting: bool) -> None:
        self.url = url
        self._waiting = waiting
        self._clients: list[Any] = []

    def client(self, url: str | None = None, **settings: Any) -> Any:
        chosen = BusSettings(**settings)
        made: Any
        if self._waiting:
            made = Waiting(AsyncOonaClient(url or self.url, settings=chosen))
        else:
            made = OonaClient(url or self.url, settings=chosen, connect=False)
        self._clients.append(made)
        return made

    def close(self) -> None:
        for each in self._clients:
            each.close()

    def put(self, stream: str, fields: Mapping[str, str | bytes]) -> str:
        """Append an entry that need not be a message."""
        raise NotImplementedError

    def length(self, stream: str) -> int:
        raise NotImplementedError

    def pending(self, stream: str, group: str) -> int:
        raise NotImplementedError

    def drop_group(self, stream: str, group: str) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Lose all data."""
        raise NotImplementedError


class RedisPlace(Place):
    def __init__(self, server: RedisServer, waiting: bool) -> None:
        super().__init__(server.url, waiting)
        self.redis = server.client()
        self.redis.flushall()

    def put(self, stream: str, fields: Mapping[str, str | bytes]) -> str:
        return str(self.redis.xadd(stream, dict(fields)))

    def length(self, stream: str) -> int:
        return int(self.redis.xlen(stream))

    def pending(self, stream: str, group: str) -> int:
        return int(self.redis.xpending(stream, group)["pending"])

    def drop_group(self, stream: str, group: str) -> None:
        assert self.redis.xgroup_destroy(stream, group)

    def forget(self) -> None:
        self.redis.flushall()

    def close(self) -> None:
        super().close()
        self.redis.close()


class MemoryPlace(Place):
    def __init__(self, waiting: bool) -> None:
        super().__init__(f"memory://{next(_numbers)}", waiting)
        self.broker: MemoryBroker = broker(parse(self.url))

    def put(self, stream: str, fields: Mapping[str, str | bytes]) -> str:
        return str(self.run(Add(stream, fields)))

    def length(self, stream: str) -> int:
        found = self.broker._streams.get(stream)
        return len(found.ids) if found else 0

    def pending(self, stream: str, group: str) -> int:
        return len(self.broker._streams[stream].groups[group].pending)

    def drop_group(self, stream: str, group: str) -> None:
        del self.broker._streams[stream].groups[group]

    def forget(self) -> None:
        self.broker._streams.clear()

    def run(self, command: Command) -> Any:
        return self.broker.run(command)
