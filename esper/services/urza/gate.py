"""Around every request: the limits on JSON bodies, metrics, the access log, and an answer to what nobody caught."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.services.urza.errors import ApiError, too_large
from esper.services.urza.responses import DATABASE_FAULTS, database_unavailable, error_response, shown_path
from esper.services.urza.service import Service

__all__ = ["UPLOAD_PATH", "Gate"]

#: The one route whose body has a limit of its own.
UPLOAD_PATH: Final = "/api/v1/kernels"
_API: Final = "/api/"
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
        is_post = scope["method"] == "POST"
        is_upload = is_post and scope["path"] == UPLOAD_PATH
        limit = self._service.settings.max_bytes if is_upload else self._service.settings.max_json_bytes

        request_s = self._service.settings.request_s
        # Of a JSON body all must be here in time; later questions are about whether the client is still there.
        deadline = asyncio.get_running_loop().time() + request_s if is_post and not is_upload else None

        async def counted_receive() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive in {request_s:g} s; send it again", {"Connection": "close"}
                ) from None
            if not message.get("more_body", False):
                deadline = None
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
            refusal = await self._refusal(scope, limit)
            if refusal is not None:
                await error_response(refusal)(scope, receive, counted_send)
            else:
                await self._app(scope, counted_receive, counted_send)
        except Exception:
            _log.exception("a fault while answering %s %s", scope["method"], shown_path(scope))
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
                path = shown_path(scope)
                _access.info("%s %s %d %d bytes %.1f ms", scope["method"], path, status, sent, seconds * 1e3)

    async def _refusal(self, scope: Scope, limit: int) -> ApiError | None:
        """What can be said before any of the body is read, which nobody without a token can make us wait for."""
        if _declared_length(scope) > limit:
            return too_large(f"the body has more bytes than the limit of {limit}")
        if scope["method"] != "POST" or not scope["path"].startswith(_API):
            return None
        try:
            await self._service.watch.ensure_fresh()
            given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
            # The least that any of these routes asks for; the route itself asks for the role.
            self._service.authorize(None if given is None else given.decode("latin-1"), "read")
        except ApiError as error:
            return error
        except DATABASE_FAULTS as error:
            return database_unavailable(error)
        return None


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
