"""The short way for the request that a registry answers most: ``GET /api/v1/kernels/{id}``.

What is left of such a request, when the answer is in memory, is the cost of the framework's layers. So one whose answer
is there is answered in front of them; everything else goes through. Both ways give the same answers, which a test
compares.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from esper.services.urza.errors import ApiError
from esper.services.urza.service import Service

__all__ = ["QuickWay"]

_PATH: Final = re.compile(r"/api/v1/kernels/([0-9a-f]{16}-[a-z0-9_]{1,32}-[a-z]{1,16}-[0-9a-f]{8})")
_ROUTE: Final = "/api/v1/kernels/{artifact_id}"
_Headers = list[tuple[bytes, bytes]]
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
        """Answer what is in memory; pass everything else on."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope["query_string"]:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        answer = self._answer(scope)
        if answer is None:
            await self._app(scope, receive, send)
            return
        status, headers, body = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        seconds = time.perf_counter() - began
        self._service.metrics.observe("GET", _ROUTE, status, seconds, sent=len(body))
        if _access.isEnabledFor(logging.INFO):
            _access.info("GET %s %d %d bytes %.1f ms", scope["path"], status, len(body), seconds * 1e3)

    def _answer(self, scope: Scope) -> tuple[int, _Headers, bytes] | None:
        """Status, headers and body; or None: not this way."""
        found = _PATH.fullmatch(scope["path"])
        if found is None or not self._service.watch.is_fresh():
            return None
        card = self._service.cards.get(found[1])
        if card is None:
            return None
        given: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"authorization", b"if-none-match"):
                if name in given:
                    return None
                given[name] = value
        authorization = given.get(b"authorization")
        try:
            self._service.authorize(None if authorization is None else authorization.decode("latin-1"), "read")
        except ApiError:
            return None
        wanted = given.get(b"if-none-match")
        if wanted is None:
            return 200, card.head, card.body
        return (304, card.head_unchanged, b"") if wanted == card.etag.encode("ascii") else None
