"""Kernels in SQL: inserting, reading, listing, and changes of status. Functions take the transaction's connection."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from esper.contracts import strict_json
from esper.services.urza.errors import ApiError, conflict, invalid, not_found
from esper.services.urza.lifecycle import check_move
from esper.services.urza.records import history_of, iso, record
from esper.services.urza.tables import kernel_architectures, kernel_tags, kernels
from esper.services.urza.verify import Verified

__all__ = [
    "MAX_TAGS",
    "add_tags",
    "by_sha256",
    "card",
    "change_status",
    "count_by_status",
    "insert",
    "missing",
    "page",
    "summary",
    "tags_of",
]

#: Most tags that one kernel may have.
MAX_TAGS: Final = 64
_FIRST_STATUS: Final = "PENDING_BENCHMARKING"
_ARCHITECTURE: Final = re.compile(r"sm_[0-9]{2,3}[a-z]?")
_SUMMARY: Final = (kernels.c.artifact_id, kernels.c.sha256, kernels.c.size, kernels.c.status, kernels.c.info)


def insert(connection: Connection, found: Verified, tags: Iterable[str], by: str) -> None:
    """Enter a verified artifact, whose bytes are stored.

    Raises:
        ApiError: 409, if other bytes have the same id.
        sqlalchemy.exc.IntegrityError: if another upload of the same bytes was faster.
    """
    taken = connection.execute(sa.select(kernels.c.sha256).where(kernels.c.artifact_id == found.artifact_id)).scalar()
    if taken is not None and taken != found.sha256:
        raise conflict(
            f"{found.artifact_id} is taken by other bytes (SHA-256 {taken}, not {found.sha256}); "
            "compile with another seed or provenance",
            "id_taken",
        )
    connection.execute(
        sa.insert(kernels).values(
            artifact_id=found.artifact_id,
            sha256=found.sha256,
            size=found.size,
            status=_FIRST_STATUS,
            blueprint_hash=found.blueprint_hash,
            family=found.info["family"],
            d_in=found.info["d_in"],
            d_out=found.info["d_out"],
            dtype=found.info["dtype"],
            target=found.target,
            info=strict_json.canonical(found.info),
            manifest=found.manifest,
            metrics="{}",
            created_at=time.time(),
            created_by=by,
        )
    )
    architectures = sorted(set(_ARCHITECTURE.findall(found.target)))
    if architectures:
        connection.execute(
            sa.insert(kernel_architectures),
            [{"artifact_id": found.artifact_id, "architecture": name} for name in architectures],
        )
    add_tags(connection, found.artifact_id, tags)
    record(connection, "kernel", found.artifact_id, None, _FIRST_STATUS, by, "uploaded")


def add_tags(connection: Connection, artifact_id: str, tags: Iterable[str]) -> bool:
    """Add tags that a kernel has not yet; whether there were any.

    Raises:
        ApiError: 422, if it would have more than :data:`MAX_TAGS`.
    """
    present = set(tags_of(connection, [artifact_id])[artifact_id])
    new = sorted(set(tags) - present)
    if len(present) + len(new) > MAX_TAGS:
        raise invalid(f"{artifact_id} would have {len(present) + len(new)} tags; at most {MAX_TAGS} are possible")
    if new:
        connection.execute(sa.insert(kernel_tags), [{"artifact_id": artifact_id, "tag": tag} for tag in new])
    return bool(new)


def by_sha256(connection: Connection, sha256: str) -> Row[*tuple[Any, ...]] | None:
    """Id and status of the kernel with these bytes."""
    query = sa.select(kernels.c.artifact_id, kernels.c.status, kernels.c.size).where(kernels.c.sha256 == sha256)
    return connection.execute(query).first()


def card(connection: Connection, artifact_id: str) -> dict[str, Any]:
    """Everything on record about a kernel; ``manifest`` is still text, because nobody here needs to read it.

    Raises:
        ApiError: 404.
    """
    row = _row(connection, artifact_id)
    return {
        "artifact_id": row.artifact_id,
        "status": row.status,
        "sha256": row.sha256,
        "size": row.size,
        "manifest": row.manifest,
        "info": json.loads(row.info),
        "tags": tags_of(connection, [artifact_id])[artifact_id],
        "metrics": json.loads(row.metrics),
        "created_at": iso(row.created_at),
        "history": history_of(connection, "kernel", artifact_id),
    }


def summary(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    """One line of a list."""
    return {
        "artifact_id": row.artifact_id,
        "sha256": row.sha256,
        "size": row.size,
        "status": row.status,
        "info": json.loads(row.info),
    }


def page(
    connection: Connection, *, after: str, limit: int, prefix: str = "", status: str | None = None
) -> list[dict[str, Any]]:
    """Summaries sorted by id: at most ``limit`` of those after ``after``."""
    query = sa.select(*_SUMMARY).where(kernels.c.artifact_id > after)
    if prefix:
        query = query.where(kernels.c.artifact_id.startswith(prefix, autoescape=True))
    if status is not None:
        query = query.where(kernels.c.status == status)
    return [summary(row) for row in connection.execute(query.order_by(kernels.c.artifact_id).limit(limit))]


def change_status(
    connection: Connection, artifact_id: str, after: str, *, by: str, reason: str, metrics: Mapping[str, Any]
) -> None:
    """Move a kernel along its life cycle; new metrics replace old ones of the same name.

    Raises:
        ApiError: 404, or 409 where the move is illegal.
    """
    row = _row(connection, artifact_id, lock=True)
    check_move("kernel", artifact_id, row.status, after)
    merged = {**json.loads(row.metrics), **metrics}
    connection.execute(
        sa.update(kernels)
        .where(kernels.c.artifact_id == artifact_id)
        .values(
            status=after,
            metrics=strict_json.canonical(merged),
            latency_us=merged.get("latency_us"),
            memory_bytes=merged.get("memory_bytes"),
        )
    )
    record(connection, "kernel", artifact_id, row.status, after, by, reason)


def count_by_status(connection: Connection) -> dict[str, int]:
    """How many kernels have each status."""
    query = sa.select(kernels.c.status, sa.func.count()).group_by(kernels.c.status)
    return {status: count for status, count in connection.execute(query)}


def tags_of(connection: Connection, artifact_ids: Collection[str]) -> dict[str, list[str]]:
    """The tags of each of the kernels, sorted."""
    found: dict[str, list[str]] = {artifact_id: [] for artifact_id in artifact_ids}
    query = sa.select(kernel_tags).where(kernel_tags.c.artifact_id.in_(found)).order_by(kernel_tags.c.tag)
    for row in connection.execute(query):
        found[row.artifact_id].append(row.tag)
    return found


def missing(artifact_id: str) -> ApiError:
    """What to raise for an id that is not here."""
    return not_found(f"there is no kernel {artifact_id}")


def _row(connection: Connection, artifact_id: str, *, lock: bool = False) -> Row[*tuple[Any, ...]]:
    query = sa.select(kernels).where(kernels.c.artifact_id == artifact_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise missing(artifact_id)
    return row
