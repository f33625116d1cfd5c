"""Blueprints in SQL."""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from esper.contracts import strict_json
from esper.services.urza.errors import conflict, not_found
from esper.services.urza.lifecycle import check_move, is_legal
from esper.services.urza.records import history_of, iso, record
from esper.services.urza.tables import blueprints, jobs, kernels

__all__ = ["change_status", "describe", "insert_if_new", "move", "page", "status_of"]

_FIRST_STATUS = "UNVALIDATED"


def insert_if_new(connection: Connection, blueprint_id: str, document: dict[str, Any], by: str) -> bool:
    """Enter a blueprint under its canonical hash; whether it was new. The caller holds the database's lock."""
    if status_of(connection, blueprint_id) is not None:
        return False
    connection.execute(
        sa.insert(blueprints).values(
            blueprint_id=blueprint_id,
            status=_FIRST_STATUS,
            document=strict_json.canonical(document),
            created_at=time.time(),
            created_by=by,
        )
    )
    record(connection, "blueprint", blueprint_id, None, _FIRST_STATUS, by, "submitted")
    return True


def status_of(connection: Connection, blueprint_id: str) -> str | None:
    """Where a blueprint stands; None for one that is unknown."""
    return connection.execute(sa.select(blueprints.c.status).where(blueprints.c.blueprint_id == blueprint_id)).scalar()


def move(connection: Connection, blueprint_id: str, after: str, *, by: str, reason: str) -> None:
    """Follow one of the blueprint's jobs.

    Several jobs (for several sizes) may pull in several directions; a move that is not legal is then left out: what one
    job compiled, another's failure does not undo.
    """
    before = status_of(connection, blueprint_id)
    if before is None or before == after or not is_legal("blueprint", before, after):
        return
    connection.execute(sa.update(blueprints).where(blueprints.c.blueprint_id == blueprint_id).values(status=after))
    record(connection, "blueprint", blueprint_id, before, after, by, reason)


def change_status(connection: Connection, blueprint_id: str, after: str, *, by: str, reason: str) -> None:
    """Follow a job that somebody else keeps; the status it has already is no move. The caller holds the lock.

    Raises:
        ApiError: 404; 409 where the move is illegal, or COMPILED is claimed of a blueprint without a kernel here.
    """
    before = status_of(connection, blueprint_id)
    if before is None:
        raise not_found(f"there is no blueprint {blueprint_id}")
    if before == after:
        return
    check_move("blueprint", blueprint_id, before, after)
    its_kernels = sa.select(kernels.c.artifact_id).where(kernels.c.blueprint_hash == blueprint_id).limit(1)
    if after == "COMPILED" and connection.execute(its_kernels).first() is None:
        raise conflict(f"blueprint {blueprint_id} has no kernel here; upload it first", "no_kernel")
    move(connection, blueprint_id, after, by=by, reason=reason)


def describe(connection: Connection, blueprint_id: str) -> dict[str, Any]:
    """Everything on record about a blueprint.

    Raises:
        ApiError: 404.
    """
    row = connection.execute(sa.select(blueprints).where(blueprints.c.blueprint_id == blueprint_id)).first()
    if row is None:
        raise not_found(f"there is no blueprint {blueprint_id}")
    its_jobs = sa.select(jobs.c.job_id).where(jobs.c.blueprint_id == blueprint_id).order_by(jobs.c.job_id)
    its_kernels = (
        sa.select(kernels.c.artifact_id).where(kernels.c.blueprint_hash == blueprint_id).order_by(kernels.c.artifact_id)
    )
    return {
        "blueprint_id": row.blueprint_id,
        "status": row.status,
        "blueprint": json.loads(row.document),
        "created_at": iso(row.created_at),
        "jobs": list(connection.execute(its_jobs).scalars()),
        "kernels": list(connection.execute(its_kernels).scalars()),
        "history": history_of(connection, "blueprint", blueprint_id),
    }


def page(connection: Connection, *, after: str, limit: int, status: str | None = None) -> list[dict[str, Any]]:
    """Blueprints sorted by id: at most ``limit`` of those after ``after``."""
    query = sa.select(blueprints).where(blueprints.c.blueprint_id > after)
    if status is not None:
        query = query.where(blueprints.c.status == status)
    return [
        {
            "blueprint_id": row.blueprint_id,
            "status": row.status,
            "name": json.loads(row.document)["name"],
            "created_at": iso(row.created_at),
        }
        for row in connection.execute(query.order_by(blueprints.c.blueprint_id).limit(limit))
    ]
