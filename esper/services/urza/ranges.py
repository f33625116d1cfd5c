"""Conditional and partial requests, as RFC 9110 has them: entity tags, ``Range``, ``If-Range``."""

from __future__ import annotations

import re

from esper.services.urza.errors import ApiError

__all__ = ["blob_headers", "parse_range", "tag_matches"]

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.ASCII | re.IGNORECASE)


def blob_headers(etag: str) -> dict[str, str]:
    """Headers of an answer with a blob or a part of it, beside type and length: it never changes, and has parts."""
    return {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=31536000, immutable"}


def tag_matches(header: str | None, etag: str) -> bool:
    """Whether an ``If-None-Match`` header names ``etag`` (compared weakly) or is ``*``."""
    if header is None:
        return False
    wanted = {item.strip().removeprefix("W/") for item in header.split(",")}
    return etag in wanted or "*" in wanted


def parse_range(header: str | None, if_range: str | None, etag: str, size: int) -> tuple[int, int] | None:
    """The first byte and the length that are asked for, or None for all of it.

    A header that is none, names several ranges or another unit, or comes with an ``If-Range`` that does not hold, is
    passed over, as the RFC allows or demands.

    Raises:
        ApiError: 416, for a range that lies outside.
    """
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None or (if_range is not None and if_range.strip() != etag):
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    if first and last and int(last) < int(first):
        return None
    if first:
        start, length = int(first), (min(int(last), size - 1) if last else size - 1) - int(first) + 1
    else:
        length = min(int(last), size)
        start = size - length
    if length <= 0 or start >= size:
        raise ApiError(416, "range_not_satisfiable", f"the blob has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return start, length
