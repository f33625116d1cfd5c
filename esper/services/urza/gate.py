"""Around every request: the limit on JSON bodies, metrics, the access log, and an answer to what nobody caught."""

from __future__ import annotations

import logging
import time
from typing import Final

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.services.urza.errors import ApiError, too_large
from esper.services.urza.responses import error_response
from esper.services.urza.service import Service

__all__ = ["UPLOAD_PATH", "Gate"]

#: The one route whose body has a limit of its own.
UPLOAD_PATH: Final = "/api/v1/kernels"
_log = logging.getLogger("esper.urza")
_access = logging.getLogger("esper.urza.access")


class Gate:
    """ASGI middleware.

    Args:
        app: What it stands before.
        service: The registry, for limits and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, sent, received = 0, 0, 0
        is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        limit = self._service.settings.max_bytes if is_upload else self._service.settings.max_json_bytes

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit and not is_upload:
                raise HTTPException(413, f"the body has more bytes than the limit of {limit}")
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        metrics = self._service.metrics
        metrics.running.inc()
        try:
            if _declared_length(scope) > limit:
                refusal = error_response(too_large(f"the body has more bytes than the limit of {limit}"))
                await refusal(scope, receive, counted_send)
            else:
                await self._app(scope, counted_receive, counted_send)
        except Exception:
            _log.exception("a fault while answering %s %s", scope["method"], scope["path"])
            if status:
                # The answer has begun: breaking it off is the only way left to say that it is not whole.
                raise
            failure = error_response(ApiError(500, "internal", "a fault in the registry; its log says more"))
            await failure(scope, receive, counted_send)
        finally:
            metrics.running.dec()
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unknown")
            metrics.observe(scope["method"], route, status, seconds, sent=sent, received=received)
            if _access.isEnabledFor(logging.INFO):
                # The path only: tokens may travel in a query by mistake.
                _access.info("%s %s %d %d bytes %.1f ms", scope["method"], scope["path"], status, sent, seconds * 1e3)


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
