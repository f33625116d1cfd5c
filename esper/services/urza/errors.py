"""How the service refuses: one kind of error, one form of answer."""

from __future__ import annotations

from collections.abc import Mapping

from esper.contracts.errors import EsperError

__all__ = [
    "ApiError",
    "conflict",
    "forbidden",
    "invalid",
    "not_found",
    "too_large",
    "unauthorized",
    "unavailable",
]


class ApiError(EsperError):
    """A request that ends in an error status; the body says ``{"error": {"code": ..., "message": ...}}``.

    Attributes:
        status: The HTTP status.
        code: A word for programs; it stays the same when the message is reworded.
        headers: Headers that belong to the status, such as ``Retry-After``.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def unauthorized(message: str) -> ApiError:
    """401: no token, or none that is known."""
    return ApiError(401, "unauthorized", message, {"WWW-Authenticate": 'Bearer realm="urza"'})


def forbidden(message: str) -> ApiError:
    """403: a known token without the role."""
    return ApiError(403, "forbidden", message)


def not_found(message: str) -> ApiError:
    """404."""
    return ApiError(404, "not_found", message)


def conflict(message: str, code: str = "conflict") -> ApiError:
    """409: the request does not fit the state things are in."""
    return ApiError(409, code, message)


def too_large(message: str) -> ApiError:
    """413."""
    return ApiError(413, "too_large", message)


def invalid(message: str, code: str = "invalid") -> ApiError:
    """422: the request was understood and is wrong."""
    return ApiError(422, code, message)


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """503: worth trying again."""
    return ApiError(503, code, message, {"Retry-After": "1"})
