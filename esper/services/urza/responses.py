"""Error answers: their declaration in the OpenAPI document, and what turns exceptions into them."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from esper.services.urza.errors import ApiError
from esper.services.urza.schemas import ErrorOut

__all__ = ["DATABASE_FAULTS", "add_handlers", "database_unavailable", "error_response", "errors", "shown_path"]

_log = logging.getLogger("esper.urza")

_MEANINGS: Final = {
    400: "The request cannot be read",
    401: "No token, or an unknown one",
    403: "The token has not the role",
    404: "There is no such thing",
    408: "The body did not arrive in time",
    409: "It does not fit the present state",
    413: "Too large",
    416: "The range lies outside",
    422: "The request is wrong",
    429: "Too many writes",
    500: "A fault in the registry",
    503: "The database or the blob store does not answer",
}
#: What SQLAlchemy raises when the database does not answer.
DATABASE_FAULTS: Final = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
_CODES: Final = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: these statuses, and those that every route can have."""
    declared: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, 401, 403, 422, 503}):
        declared[status] = {"model": ErrorOut, "description": _MEANINGS[status]}
        if status in (429, 503):
            declared[status]["headers"] = {
                "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}
            }
    return declared


def error_response(error: ApiError) -> JSONResponse:
    """The answer that an error is."""
    body = {"error": {"code": error.code, "message": str(error)}}
    return JSONResponse(body, error.status, headers=error.headers)


def shown_path(scope: Scope) -> str:
    """A request's path for the log: as it was sent, so that no character in it can begin a line or move a cursor."""
    path = scope.get("raw_path") or scope["path"].encode("utf-8", "backslashreplace")
    return re.sub(r"[^!-~]", lambda found: f"\\x{ord(found[0]):02x}", path.decode("latin-1"))[:500]


def database_unavailable(error: Exception) -> ApiError:
    """503, and a line in the log."""
    # Its text repeats the statement and the address.
    _log.warning("the database does not answer: %s", type(error).__name__)
    return ApiError(503, "database_unavailable", "the database does not answer", {"Retry-After": "1"})


def add_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail ends in the one form of answer."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5]]
        text = "; ".join(problems).encode("ascii", "backslashreplace").decode()
        return error_response(ApiError(422, "invalid", text))

    @app.exception_handler(HTTPException)
    async def unrouted(_: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "error")
        return error_response(ApiError(error.status_code, code, str(error.detail), error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> Response:
        _log.info("the client left in the middle of %s %s", request.method, shown_path(request.scope))
        return error_response(ApiError(400, "bad_request", "the request broke off"))

    for kind in DATABASE_FAULTS:

        @app.exception_handler(kind)
        async def no_database(_: Request, error: Exception) -> Response:
            return error_response(database_unavailable(error))
