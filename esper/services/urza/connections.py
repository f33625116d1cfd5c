"""Bounds on connections and on the heads of requests, which uvicorn's protocol has not.

Without them anybody, with no token, can hold connections for ever by sending half a request, or fill the memory with
headers. What happens to the bodies of requests is the gate's business, and that of uploads.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_BYTES", "Bounds", "bounded_protocol", "most_connections"]

#: Most bytes of a request's head; also of what a chunked body may have beside its data.
HEAD_BYTES: Final = 64 << 10
#: Beyond this a process has other worries than the number of its files.
_MOST: Final = 4096


@dataclass(slots=True)
class Bounds:
    """What all connections of one server share.

    Attributes:
        connections: Most connections at once.
        head_s: How long a head may take to arrive, from the connection or from its first byte.
        stalled_s: How long a client may take nothing of an answer that waits for it.
        idle: Connections that no request is under way on, the oldest first.
    """

    connections: int
    head_s: float
    stalled_s: float
    idle: dict[BoundedProtocol, None] = field(default_factory=dict)


class BoundedProtocol(HttpToolsProtocol):
    """One connection; what it is allowed is in :attr:`bounds`.

    A connection beyond the bound takes the place of the one that has been idle for longest, so that silent ones shut
    nobody out; where all are busy it is answered 503. A head that is too large is answered 431; one that takes too long
    ends the connection, as does a client that does not take its answer.
    """

    bounds: ClassVar[Bounds]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for it, or refuse it."""
        super().connection_made(transport)
        #: Bytes since the last that were of use: an end of a head or of a body, or a byte of a body.
        self._unused = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        bounds = self.bounds
        if len(self.connections) > bounds.connections:
            if not bounds.idle:
                self._refuse(b"503 Service Unavailable", b"too_many_connections", b"all connections are in use")
                return
            next(iter(bounds.idle)).give_way()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._wait_no_longer()
        self._unstall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it in pieces, so that no more of a head is kept than is allowed."""
        while data and not self.transport.is_closing():
            piece, data = data[: HEAD_BYTES - self._unused], data[HEAD_BYTES - self._unused :]
            before = self._unused = self._unused + len(piece)
            super().data_received(piece)
            if self._unused == before >= HEAD_BYTES and not self.transport.is_closing():
                self._refuse(
                    b"431 Request Header Fields Too Large",
                    b"head_too_large",
                    b"the request's head has more bytes than the limit of %d" % HEAD_BYTES,
                )
        # Whatever came, uvicorn waits no longer for more of it.
        if self._deadline is None and self._is_idle():
            self._wait()

    def on_headers_complete(self) -> None:
        """A request is under way."""
        self._unused = 0
        self._wait_no_longer()
        if not self.flow.write_paused:
            # Its answer comes on top of what the client has not taken yet.
            self._unstall()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Data of a body are bounded elsewhere."""
        self._unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes now is the head of another request."""
        self._unused = 0
        super().on_message_complete()
        if self._deadline is not None:
            # The answer was faster than the body; the next head has its own time.
            self._wait_no_longer()
            self._wait()

    def on_response_complete(self) -> None:
        """Give its place away if need be; when it is idle for long, uvicorn closes it."""
        super().on_response_complete()
        self._see_off()
        if self._is_idle():
            self.bounds.idle[self] = None

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP."""
        super().send_400_response(msg)
        self._see_off()

    def pause_writing(self) -> None:
        """The client takes the answer slower than it is made, or not at all."""
        super().pause_writing()
        self._see_off()

    def resume_writing(self) -> None:
        """It took it."""
        self._unstall()
        super().resume_writing()

    def give_way(self) -> None:
        """Leave the place to another connection."""
        self._wait_no_longer()
        # Not when the transport says that it is closed: of several that come at once, each takes another's place.
        self.connections.discard(self)
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for the client to take it
        else:
            self.transport.close()

    def _is_idle(self) -> bool:
        # A connection that is being closed has no cycle to be judged by.
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def _wait(self) -> None:
        self.bounds.idle[self] = None
        self._deadline = self.loop.call_later(self.bounds.head_s, self.give_way)

    def _wait_no_longer(self) -> None:
        self.bounds.idle.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _see_off(self) -> None:
        """See that the client takes what is written and not sent; nothing is added until it has, or is given up."""
        self._unstall()
        if (waiting := self.transport.get_write_buffer_size()) > 0:
            self._stalled = self.loop.call_later(self.bounds.stalled_s, self._judge, waiting)

    def _judge(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() >= waiting:
            self.transport.abort()
        else:
            self._see_off()

    def _unstall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _refuse(self, status: bytes, code: bytes, message: bytes) -> None:
        """Answer in the API's form, and close."""
        body = b'{"error":{"code":"%s","message":"%s"}}' % (code, message)
        retry = b"retry-after: 1\r\n" if status.startswith(b"503") else b""
        self.transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s"
            % (status, len(body), retry, body)
        )
        self.transport.close()
        self._see_off()


def bounded_protocol(bounds: Bounds) -> type[asyncio.Protocol]:
    """The class of a server's connections, for ``uvicorn.Config(http=...)``."""
    values: dict[str, Any] = {"bounds": bounds}
    return type("BoundedProtocol", (BoundedProtocol,), values)


def most_connections() -> int:
    """Half the files that the process may open: the others are for the database, uploads and blobs."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else max(1, min(files // 2, _MOST))
