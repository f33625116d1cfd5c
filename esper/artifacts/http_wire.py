"""HTTP/1.1 on one connection: as much of it as fetching from a registry needs, and strict.

Why not httpx: a request through it measured 1.4 ms of Python on a slow core, all of it holding the interpreter that
the training loop runs in. This takes a quarter of that. What it does not do (proxies) goes through httpx, see
:mod:`esper.artifacts.http_pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

__all__ = ["Connection", "Response", "StaleConnectionError", "WireError"]

_MAX_HEAD: Final = 1 << 16
_MAX_LINE: Final = 1 << 10
_MAX_HEADERS: Final = 100
#: Received and not yet read: above this the sender has to wait.
_MAX_BUFFERED: Final = 1 << 19
_SENT_AT_ONCE: Final = 1 << 18
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_HEADER: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_LENGTH: Final = re.compile(r"\d{1,19}")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
#: Two different ones would mean two different things to two readers.
_SINGLE: Final = ("content-length", "transfer-encoding", "content-encoding", "content-range", "location")


class WireError(ConnectionError):
    """The connection ended too early, or what came over it is not HTTP."""


class StaleConnectionError(WireError):
    """A kept-alive connection turned out to be closed before anything of an answer came."""


@dataclass(slots=True)
class Response:
    """An answer whose body has not been read.

    Attributes:
        status: The status code.
        headers: By lower-case name; of several with one name the first.
        parts: The body as it arrives; to be read once.
        aclose: Lets go of the connection, which is used again if the body was read to its end.
    """

    status: int
    headers: Mapping[str, str]
    parts: AsyncIterator[bytes]
    aclose: Callable[[], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One connection, one request at a time.

    Make it with ``loop.create_connection``. ``idle`` says whether it may be used for another request.

    Args:
        silence_s: Longest wait for the next piece of an answer, or for the other side to take the next of a request.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._why: Exception | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._used = False
        self._clean = True
        self.idle_since = 0.0

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._buffer += data
        if len(self._buffer) > _MAX_BUFFERED and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Called by the loop; the transport then closes itself."""
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._ended, self._why = True, exc
        self._wake()

    def pause_writing(self) -> None:
        """Called by the loop."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._writing_paused = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        """Until something happened on the connection.

        Raises:
            TimeoutError: nothing did.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._silence_s):
                await self._waiter
        except TimeoutError:
            raise TimeoutError(f"silent for {self._silence_s:g} s") from None
        finally:
            self._waiter = None

    # -- the user's side

    @property
    def idle(self) -> bool:
        """Whether the connection is open with nothing under way or left over."""
        return self._clean and not self._ended and not self._buffer and not self._transport.is_closing()

    def close(self) -> None:
        """Drop the connection, whatever is under way."""
        self._clean = False
        self._transport.abort()

    async def request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes, done: Callable[[], None]
    ) -> Response:
        """Send a request and read the head of the answer.

        Args:
            method: In capitals.
            target: Path and query, already quoted.
            headers: All that are sent; ``Host`` among them.
            body: May be empty.
            done: Called once, when the answer is let go of.

        Raises:
            StaleConnectionError: the other side had closed a connection that was used before.
            WireError: the connection broke, or the answer is not HTTP.
            TimeoutError: silence.
        """
        self._clean = False
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
        try:
            await self._write(head, body)
            status, keep, found = await self._head()
            while status < 200:  # "100 Continue" and the like come before the answer
                status, keep, found = await self._head()
        except WireError:
            if self._used and not self._buffer:
                raise StaleConnectionError("the connection was closed while it was idle") from None
            raise
        self._used = True
        ends_itself, body_parts = self._body(method, status, found)
        parts = self._through(body_parts, reusable=keep and ends_itself)

        async def close() -> None:
            await parts.aclose()
            if not self._clean:
                self.close()
            done()

        return Response(status, found, parts, close)

    async def _write(self, head: bytes, body: bytes) -> None:
        if len(body) <= _SENT_AT_ONCE:
            self._transport.write(head + body)
            return
        self._transport.write(head)
        for begin in range(0, len(body), _SENT_AT_ONCE):
            # An answer that comes before all is sent is a refusal: there is no use in sending the rest.
            while self._writing_paused and not self._ended and not self._buffer:
                await self._wait()
            if self._ended or self._buffer:
                return
            self._transport.write(memoryview(body)[begin : begin + _SENT_AT_ONCE])

    async def _head(self) -> tuple[int, bool, dict[str, str]]:
        """Status, whether the connection may stay open, headers."""
        lines = (await self._take_until(b"\r\n\r\n", _MAX_HEAD)).split(b"\r\n")
        first = _STATUS.fullmatch(lines[0])
        if first is None or len(lines) > _MAX_HEADERS:
            raise WireError(f"the answer begins with {lines[0][:40]!r}, which is not HTTP/1.1")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            found = _HEADER.fullmatch(line)
            if found is None:
                raise WireError(f"the answer has the header {line[:40]!r}, which is none")
            name, value = found[1].decode("ascii").lower(), found[2].decode("latin-1")
            if headers.setdefault(name, value) != value and name in _SINGLE:
                raise WireError(f"the answer has two headers {name} that differ")
        keep = first[1] == b"1" and "close" not in headers.get("connection", "").lower()
        return int(first[2]), keep, headers

    def _body(self, method: str, status: int, headers: Mapping[str, str]) -> tuple[bool, AsyncGenerator[bytes]]:
        """Whether the body has an end of its own, and the body (RFC 9112, 6.3)."""
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if method == "HEAD" or status in (204, 304):
            return True, self._sized(0)
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise WireError(f"the answer is framed as {coding[:40]!r} with length {length!r:.40}")
            return True, self._chunked()
        if length is None:
            return False, self._rest()
        if not _LENGTH.fullmatch(length):
            raise WireError(f"the answer's Content-Length is {length[:40]!r}")
        return True, self._sized(int(length))

    async def _through(self, parts: AsyncGenerator[bytes], *, reusable: bool) -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(parts):
            async for part in parts:
                yield part
        self._clean = reusable

    async def _sized(self, size: int) -> AsyncGenerator[bytes]:
        while size:
            part = await self._take(size)
            if not part:
                raise self._broken(f"{size} bytes before the end of the answer")
            size -= len(part)
            yield part

    async def _rest(self) -> AsyncGenerator[bytes]:
        while part := await self._take(_MAX_BUFFERED):
            yield part
        if self._why is not None:
            raise self._broken("before the end of the answer")

    async def _chunked(self) -> AsyncGenerator[bytes]:
        while True:
            line = await self._take_until(b"\r\n", _MAX_LINE)
            found = _CHUNK.fullmatch(line)
            if found is None:
                raise WireError(f"a chunk of the answer begins with {line[:40]!r}")
            size = int(found[1], 16)
            if not size:
                break
            async for part in self._sized(size):
                yield part
            if await self._take_until(b"\r\n", _MAX_LINE):
                raise WireError("a chunk of the answer is longer than it says")
        for _ in range(_MAX_HEADERS):  # headers after the body say nothing that is wanted
            if not await self._take_until(b"\r\n", _MAX_LINE):
                return
        raise WireError("the answer has too many trailers")

    async def _take(self, most: int) -> bytes:
        """What has arrived, up to ``most`` bytes; nothing at the end."""
        while not self._buffer and not self._ended:
            await self._wait()
        part = bytes(self._buffer) if len(self._buffer) <= most else bytes(self._buffer[:most])
        self._drop(len(part))
        return part

    async def _take_until(self, mark: bytes, most: int) -> bytes:
        """Everything before ``mark``, which is dropped."""
        begin = 0
        while (at := self._buffer.find(mark, begin, most)) < 0:
            if len(self._buffer) >= most:
                raise WireError(f"a part of the answer that ends with {mark!r} is longer than {most} bytes")
            begin = max(0, len(self._buffer) - len(mark) + 1)
            if self._ended:
                raise self._broken("before an answer" if not self._buffer else "in the middle of an answer")
            await self._wait()
        found = bytes(self._buffer[:at])
        self._drop(at + len(mark))
        return found

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        if self._reading_paused and len(self._buffer) < _MAX_BUFFERED // 2 and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    def _broken(self, where: str) -> WireError:
        why = f": {self._why}" if self._why is not None else ""
        return WireError(f"the connection ended {where}{why}")


def connect_options(host: str, secure: bool, context: Any) -> dict[str, Any]:
    """Arguments of ``loop.create_connection`` for a host with several addresses, some of which may be dead."""
    options: dict[str, Any] = {"happy_eyeballs_delay": 0.25}
    return options | ({"ssl": context, "server_hostname": host} if secure else {})
