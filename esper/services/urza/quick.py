"""The short way for the request that a registry answers most: ``GET /api/v1/kernels/{id}``.

When the answer is in memory, such a request costs what the server's layers cost: 1.4 ms, where this way takes 0.1.
So a request that arrives whole, alone, and without a body is answered before those layers; everything else (and
whatever is not in memory, or is not allowed) goes through them. Both ways give the same answers, which a test compares.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from esper.services.urza.errors import ApiError
from esper.services.urza.service import Service

__all__ = ["quick_protocol"]

_START: Final = b"GET /api/v1/kernels/"
_LINE: Final = re.compile(rb"GET (/api/v1/kernels/([0-9a-f]{16}-[a-z0-9_]{1,32}-[a-z]{1,16}-[0-9a-f]{8})) HTTP/1\.1")
_ROUTE: Final = "/api/v1/kernels/{artifact_id}"
#: The head after its first line: well-formed lines only.
_LINES: Final = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)+\r\n")
#: Headers that are looked at, once each.
_KNOWN: Final = frozenset({b"host", b"authorization", b"connection", b"if-none-match"})
#: Headers that say that there is more to the request than its head.
_MORE: Final = frozenset({b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer"})
_LONGEST: Final = 4096
_access = logging.getLogger("esper.urza.access")


def quick_protocol(service: Service) -> type[asyncio.Protocol]:
    """Uvicorn's protocol for HTTP/1.1 with the short way in front."""

    class QuickProtocol(H11Protocol):
        def data_received(self, data: bytes) -> None:
            if data.startswith(_START) and self._is_idle():
                began = time.perf_counter()
                answer = _answer(service, data)
                if answer is not None:
                    self._write(answer, data, began)
                    return
            super().data_received(data)

        def _is_idle(self) -> bool:
            """Nothing of another request is under way, and the client takes what it is sent."""
            return (
                self.conn.their_state is h11.IDLE
                and self.conn.our_state is h11.IDLE
                and not self.conn.trailing_data[0]
                and not self.flow.write_paused
                and not self.transport.is_closing()
            )

        def _write(self, answer: tuple[int, bytes, int], request: bytes, began: float) -> None:
            status, content, length = answer
            own = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
            reason = b"200 OK" if status == 200 else b"304 Not Modified"
            self.transport.write(b"HTTP/1.1 %b\r\n%b%b" % (reason, own, content))
            self.server_state.total_requests += 1
            # As after any other answer: the connection is closed when nothing more comes.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            seconds = time.perf_counter() - began
            service.metrics.observe("GET", _ROUTE, status, seconds, sent=length)
            if _access.isEnabledFor(logging.INFO):
                path = request.split(b" ", 2)[1].decode("ascii")
                _access.info("GET %s %d %d bytes %.1f ms", path, status, length, seconds * 1e3)

    return QuickProtocol


def _answer(service: Service, data: bytes) -> tuple[int, bytes, int] | None:
    """Status, headers with body, and length of the body; or None: not this way."""
    if len(data) > _LONGEST or data.find(b"\r\n\r\n") != len(data) - 4 or not service.watch.is_fresh():
        return None
    first, _, lines = data.partition(b"\r\n")
    found = _LINE.fullmatch(first)
    if found is None or _LINES.fullmatch(lines) is None:
        return None
    headers: dict[bytes, bytes] = {}
    for line in lines[:-4].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in _MORE or name in headers:
            return None
        if name in _KNOWN:
            headers[name] = value.strip()
    if b"host" not in headers or headers.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    card = service.cards.get(found[2].decode("ascii"))
    if card is None:
        return None
    authorization = headers.get(b"authorization")
    try:
        service.authorize(None if authorization is None else authorization.decode("latin-1"), "read")
    except ApiError:
        return None
    wanted = headers.get(b"if-none-match")
    if wanted is None:
        return 200, card.head + card.body, len(card.body)
    if wanted == card.etag.encode("ascii"):
        return 304, card.head_unchanged, 0
    return None
