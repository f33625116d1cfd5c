"""The short way for the requests that a registry answers most: a kernel's card, and its bytes.

What is left of such a request, when the answer is in memory or in a small file, is the cost of the framework's layers.
So one whose answer is there is answered in front of them; everything else goes through. Both ways give the same
answers, which a test compares.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from esper.services.urza.blobs import PIECE, FolderBlobs
from esper.services.urza.errors import ApiError
from esper.services.urza.ranges import blob_headers
from esper.services.urza.service import Service

__all__ = ["QuickWay"]

_PATH: Final = re.compile(r"/api/v1/kernels/([0-9a-f]{16}-[a-z0-9_]{1,32}-[a-z]{1,16}-[0-9a-f]{8})(/blob)?")
_ROUTE: Final = "/api/v1/kernels/{artifact_id}"
#: Headers that change the answer, and those that change which way it goes.
_SEEN: Final = frozenset((b"authorization", b"if-none-match", b"range", b"if-range"))
_Headers = list[tuple[bytes, bytes]]
_Answer = tuple[int, _Headers, bytes]
_access = logging.getLogger("esper.urza.access")


class QuickWay:
    """ASGI application in front of the whole API.

    Args:
        app: What everything else goes to.
        service: The registry.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is there; pass everything else on."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope["query_string"]:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        found = _PATH.fullmatch(scope["path"])
        answer = None
        if found is not None:
            given = self._given(scope)
            if given is not None:
                answer = await self._blob(found[1], given) if found[2] else self._card(found[1], given)
        if found is None or answer is None:
            await self._app(scope, receive, send)
            return
        status, headers, body = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        seconds = time.perf_counter() - began
        self._service.metrics.observe("GET", _ROUTE + (found[2] or ""), status, seconds, sent=len(body))
        if _access.isEnabledFor(logging.INFO):
            _access.info("GET %s %d %d bytes %.1f ms", scope["path"], status, len(body), seconds * 1e3)

    def _given(self, scope: Scope) -> dict[bytes, bytes] | None:
        """The headers that matter, of somebody who may read; None: not this way."""
        if not self._service.watch.is_fresh():
            return None
        given: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in _SEEN:
                if name in given:
                    return None
                given[name] = value
        authorization = given.pop(b"authorization", None)
        try:
            self._service.authorize(None if authorization is None else authorization.decode("latin-1"), "read")
        except ApiError:
            return None
        return given

    def _card(self, artifact_id: str, given: dict[bytes, bytes]) -> _Answer | None:
        card = self._service.cards.get(artifact_id)
        if card is None:
            return None
        wanted = given.get(b"if-none-match")
        if wanted is None:
            return 200, card.head, card.body
        return (304, card.head_unchanged, b"") if wanted == card.etag.encode("ascii") else None

    async def _blob(self, artifact_id: str, given: dict[bytes, bytes]) -> _Answer | None:
        """All of a file that is one piece; parts, comparisons, and what is wrong with it are for the long way."""
        blobs, facts = self._service.blobs, self._service.blob_facts_known(artifact_id)
        if given or facts is None or facts[1] > PIECE or not isinstance(blobs, FolderBlobs):
            return None
        sha256, size = facts
        try:
            # One byte more than there should be, to notice a file that is too long.
            body = await asyncio.get_running_loop().run_in_executor(None, blobs.read, sha256, 0, size + 1)
        except ApiError:
            return None
        if len(body) != size:
            return None
        head = {**blob_headers(f'"{sha256}"'), "Content-Length": str(size), "Content-Type": "application/octet-stream"}
        return 200, [(name.lower().encode(), value.encode()) for name, value in head.items()], body
