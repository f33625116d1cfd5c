"""Commands to the bus in memory: for a client that blocks, and for one on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

from esper.oona.commands import Batch, Command
from esper.oona.memory_broker import broker
from esper.oona.urls import BusAddress

__all__ = ["AsyncMemoryLink", "MemoryLink"]


class MemoryLink:
    """What :class:`~esper.oona.redis_link.RedisLink` is, without a server."""

    split = False

    def __init__(self, address: BusAddress) -> None:
        self._address = address
        self._broker = broker(address)

    def run(self, step: Command | Batch) -> Any:
        """See :class:`~esper.oona.redis_link.RedisLink`."""
        block_ms = getattr(step, "block_ms", 0)
        if not block_ms:
            return self._broker.run(step)
        appended = threading.Event()
        deadline = time.monotonic() + block_ms / 1000
        self._broker.watch(appended.set)
        try:
            while True:
                appended.clear()
                if answer := self._broker.run(step):
                    return answer
                if not appended.wait(max(0.0, deadline - time.monotonic())):
                    return []
        finally:
            self._broker.unwatch(appended.set)

    def close(self) -> None:
        """Nothing is held open."""

    def after_fork(self) -> None:
        """The child has a bus of its own."""
        self._broker = broker(self._address)


class AsyncMemoryLink:
    """What :class:`~esper.oona.async_redis_link.AsyncRedisLink` is, without a server."""

    split = False

    def __init__(self, address: BusAddress) -> None:
        self._address = address
        self._broker = broker(address)

    async def run(self, step: Command | Batch) -> Any:
        """See :class:`~esper.oona.redis_link.RedisLink`."""
        block_ms = getattr(step, "block_ms", 0)
        if not block_ms:
            return self._broker.run(step)
        loop = asyncio.get_running_loop()
        appended = asyncio.Event()

        def tell() -> None:
            # Publishers are other threads, and may outlive this loop.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(appended.set)

        self._broker.watch(tell)
        try:
            async with asyncio.timeout(block_ms / 1000):
                while True:
                    appended.clear()
                    if answer := self._broker.run(step):
                        return answer
                    await appended.wait()
        except TimeoutError:
            return []
        finally:
            self._broker.unwatch(tell)

    async def close(self) -> None:
        """Nothing is held open."""

    def after_fork(self) -> None:
        """The child has a bus of its own."""
        self._broker = broker(self._address)
