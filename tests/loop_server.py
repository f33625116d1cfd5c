"""A TCP server of the tests' own, on an event loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from typing import Any

__all__ = ["LoopServer"]

_HEAD = 1 << 16


class LoopServer:
    """Listens on a free port of loopback and gives every connection to :meth:`serve`.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, name: str, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        self._tls = tls
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        assert self._started.wait(20)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        """Drop every connection, with what is on its way in them."""

        def drop() -> None:
            for writer in self.writers:
                writer.transport.abort()

        self.loop.call_soon_threadsafe(drop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)

        async def begin() -> asyncio.Server:
            return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_HEAD, ssl=self._tls)

        server = self.loop.run_until_complete(begin())
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self.loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            # A cancelled handler would be reported as a mishap, and it is only the end of the test.
            with contextlib.suppress(asyncio.CancelledError):
                await self.serve(reader, writer)
        finally:
            self.writers.discard(writer)
            writer.close()
