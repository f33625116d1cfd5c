"""A proxy in front of any TCP server: it delays, cuts, swallows, refuses, and speaks TLS, as told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from tests.loop_server import LoopServer

__all__ = ["FlakyProxy"]

_PIECE = 1 << 16


class FlakyProxy(LoopServer):
    """Passes bytes both ways; ``with FlakyProxy(port) as proxy`` runs one.

    Its settings may be changed at any time, from any thread, and hold from the next piece of data on.

    Args:
        target_port: Of the server on loopback.
        tls: Speak TLS to clients with this; to the server goes plain text.

    Attributes:
        delay_s: How late every piece of data arrives, in each direction.
        swallow: Nothing arrives any more, in neither direction, and connections stay open.
        refuse: New connections are closed at once.
        cut_after: So many more bytes of answers pass, then all connections are cut; None for no end.
        connections: How many there have been.
        cuts: How often ``cut_after`` has struck.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        self.swallow = False
        self.refuse = False
        self.cut_after: int | None = None
        self.connections = 0
        self.cuts = 0
        super().__init__("flaky-proxy", tls)

    def heal(self) -> None:
        """Pass everything on, at once."""
        self.delay_s, self.swallow, self.refuse, self.cut_after = 0.0, False, False, None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            return
        with contextlib.suppress(OSError):
            answers, upstream = await asyncio.open_connection("127.0.0.1", self.target_port)
            self.writers.add(upstream)
            sending = asyncio.create_task(self._pass_on(reader, upstream, False))
            try:
                await self._pass_on(answers, writer, True)
            finally:
                sending.cancel()
                self.writers.discard(upstream)
                upstream.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.swallow:
                    continue
                if answers and self.cut_after is not None:
                    piece = piece[: self.cut_after]
                    self.cut_after -= len(piece)
                    if not self.cut_after:
                        writer.write(piece)
                        self.cuts += 1
                        self.cut_after = None
                        for each in self.writers:
                            each.transport.abort()
                        return
                writer.write(piece)
                await writer.drain()
        if not answers:
            # The client is done; so is the server's answer to it.
            writer.close()
