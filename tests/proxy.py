"""A proxy in front of an HTTP server that answers 503, dribbles, and drops connections, as told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

from tests.loop_server import LoopServer

__all__ = ["FaultProxy", "fault_proxy"]

_PIECE = 4096


class FaultProxy(LoopServer):
    """One request a connection, passed on unchanged but for that.

    Attributes:
        failing: How many of the next requests are answered with 503; -1: all.
        rate: Bytes of answers that pass in a second, each connection; None: all at once.
        requests: Requests so far.
        passed: Bytes of answers that have passed.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.failing = 0
        self.rate: float | None = None
        self.requests = 0
        self.passed = 0
        super().__init__("fault-proxy")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Behave."""
        self.failing, self.rate, self.requests, self.passed = 0, None, 0, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
            await self.loop.sock_connect(plug, ("127.0.0.1", self.target_port))
            answer, upstream = await asyncio.open_connection(sock=plug, limit=_PIECE)
            self.writers.add(upstream)
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
            if upstream is not None:
                self.writers.discard(upstream)
                upstream.close()


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
    with FaultProxy(target_port) as proxy:
        yield proxy
