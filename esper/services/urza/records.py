"""What the SQL modules share: histories, change of status, pages, times."""

from __future__ import annotations

import base64
import binascii
import datetime
import time
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from esper.services.urza.errors import invalid
from esper.services.urza.lifecycle import Kind
from esper.services.urza.tables import history

__all__ = ["MAX_PAGE", "decode_cursor", "encode_cursor", "history_of", "iso", "paged", "record"]

MAX_PAGE: Final = 500


def iso(at: float) -> str:
    """Seconds since the epoch as UTC in ISO 8601, to the millisecond."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def record(
    connection: Connection, kind: Kind, subject: str, before: str | None, after: str, by: str, reason: str
) -> None:
    """Put a change of status on record."""
    connection.execute(
        sa.insert(history).values(
            kind=kind, subject=subject, before=before, after=after, at=time.time(), by=by, reason=reason
        )
    )


def history_of(connection: Connection, kind: Kind, subject: str) -> list[dict[str, Any]]:
    """All changes of status, oldest first."""
    query = sa.select(history).where(history.c.kind == kind, history.c.subject == subject).order_by(history.c.id)
    return [
        {"from": row.before, "to": row.after, "at": iso(row.at), "by": row.by, "reason": row.reason}
        for row in connection.execute(query)
    ]


def encode_cursor(last: str) -> str:
    """Where a page ended, as clients carry it."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str:
    """The key that a page begins after.

    Raises:
        ApiError: 422, if it is none of ours.
    """
    if cursor is None:
        return ""
    try:
        last = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError, ValueError):
        last = ""
    if not last or not last.isprintable():
        raise invalid("cursor is not one that this registry gave; take next_cursor of the page before", "bad_cursor")
    return last


def paged(items: list[dict[str, Any]], limit: int, key: str) -> dict[str, Any]:
    """A page from up to ``limit + 1`` items: the one too many only says that there is a next page."""
    shown = items[:limit]
    return {"items": shown, "next_cursor": encode_cursor(shown[-1][key]) if len(items) > limit else None}
