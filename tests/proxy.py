"""A proxy in front of an HTTP server that answers 503, dribbles, and drops connections, as told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

__all__ = ["FaultProxy", "fault_proxy"]

_HEAD = 1 << 16
_PIECE = 4096


class FaultProxy:
    """One request a connection, passed on unchanged but for that.

    Attributes:
        failing: How many of the next requests are answered with 503; -1: all.
        rate: Bytes of answers that pass in a second, each connection; None: all at once.
        requests: Requests so far.
        passed: Bytes of answers that have passed.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.failing = 0
        self.rate: float | None = None
        self.requests = 0
        self.passed = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()
        assert self._started.wait(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Behave."""
        self.failing, self.rate, self.requests, self.passed = 0, None, 0, 0

    def cut(self) -> None:
        """Drop every connection, with what is on its way in them."""

        def drop() -> None:
            for writer in self._writers:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(drop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def begin() -> asyncio.Server:
            return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_HEAD)

        server = self._loop.run_until_complete(begin())
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        sending: asyncio.Task[None] | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            if self.failing:
                self.failing -= self.failing > 0
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
                return
            # A small window, so that a server's bytes stay with it and not in buffers on the way.
            plug = socket.socket()
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
            plug.setblocking(False)
            await self._loop.sock_connect(plug, ("127.0.0.1", self.target_port))
            answer, upstream = await asyncio.open_connection(sock=plug, limit=_PIECE)
            self._writers.add(upstream)
            upstream.write(_once(head))
            sending = asyncio.create_task(_pass_on(reader, upstream))
            while piece := await answer.read(_PIECE):
                if self.rate is not None:
                    await asyncio.sleep(len(piece) / self.rate)
                writer.write(piece)
                await writer.drain()
                self.passed += len(piece)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if sending is not None:
                sending.cancel()
            for each in (writer, upstream):
                if each is not None:
                    self._writers.discard(each)
                    each.close()


def _once(head: bytes) -> bytes:
    lines = [line for line in head.split(b"\r\n")[:-2] if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()


@contextlib.contextmanager
def fault_proxy(target_port: int) -> Iterator[FaultProxy]:
    """A running proxy."""
    proxy = FaultProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
