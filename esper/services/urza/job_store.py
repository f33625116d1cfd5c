"""Compile jobs in SQL: a queue with leases, for workers that have no Redis.

A worker that claims a job has it for as long as its lease; it renews, or finishes, or vanishes, and then the job is
claimed by another. After :data:`MAX_ATTEMPTS` claims without an end the job is INVALID; a claim that is handed back
untried is none.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from esper.contracts import strict_json
from esper.services.urza import blueprint_store
from esper.services.urza.errors import conflict, invalid, not_found
from esper.services.urza.lifecycle import check_move
from esper.services.urza.records import history_of, iso, record
from esper.services.urza.tables import jobs, kernels

__all__ = ["MAX_ATTEMPTS", "claim", "count_by_status", "describe", "enqueue", "finish", "page", "renew"]

MAX_ATTEMPTS: Final = 3


def enqueue(connection: Connection, blueprint_id: str, request: dict[str, Any], by: str) -> tuple[str, bool]:
    """The job for a request, and whether it is a new one. The caller holds the database's lock.

    The same request is the same job as long as that has not failed; after a failure, asking again is a new attempt.
    """
    text = strict_json.canonical(request)
    digest = hashlib.sha256(f"{blueprint_id}\n{text}".encode("ascii")).hexdigest()
    known = connection.execute(
        sa.select(jobs.c.job_id).where(jobs.c.request_sha256 == digest, jobs.c.status != "INVALID")
    ).scalar()
    if known is not None:
        return known, False
    now = time.time()
    job_id = f"{int(now * 1000):012x}{secrets.token_hex(10)}"
    connection.execute(
        sa.insert(jobs).values(
            job_id=job_id,
            blueprint_id=blueprint_id,
            request_sha256=digest,
            request=text,
            status="QUEUED",
            attempts=0,
            log="",
            created_at=now,
            created_by=by,
            updated_at=now,
        )
    )
    record(connection, "job", job_id, None, "QUEUED", by, "submitted")
    return job_id, True


def claim(
    connection: Connection, worker: str, lease_s: float, aside: Sequence[str] = (), *, by: str
) -> dict[str, Any] | None:
    """Give the oldest job that waits, or whose lease ran out, to a worker; None when there is none.

    Args:
        connection: In a transaction that writes.
        worker: Its name as it says, which stands in the history's reasons.
        lease_s: How long it has the job.
        aside: Jobs that it does not want: it cannot run them, and has left them to others.
        by: The name of its token, which is who the history says it was.
    """
    now = time.time()
    while True:
        row = connection.execute(
            sa.select(jobs)
            .where(sa.or_(jobs.c.status == "QUEUED", sa.and_(jobs.c.status == "RUNNING", jobs.c.lease_until < now)))
            .where(jobs.c.job_id.not_in(aside))
            .order_by(jobs.c.job_id)
            .limit(1)
            # On PostgreSQL two workers that claim at once get two jobs.
            .with_for_update(skip_locked=True)
        ).first()
        if row is None:
            return None
        if row.attempts < MAX_ATTEMPTS:
            break
        reason = f"given up after {row.attempts} attempts that did not end; the last was {row.worker}'s"
        _end(connection, row, "INVALID", by=by, reason=reason, log=row.log or reason)
    reason = f"claimed by {worker}" + ("" if row.status == "QUEUED" else f": the lease of {row.worker} ran out")
    connection.execute(
        sa.update(jobs)
        .where(jobs.c.job_id == row.job_id)
        .values(
            status="RUNNING",
            attempts=row.attempts + 1,
            worker=worker,
            lease=secrets.token_hex(16),
            lease_until=now + lease_s,
            updated_at=now,
        )
    )
    record(connection, "job", row.job_id, row.status, "RUNNING", by, reason)
    blueprint_store.move(connection, row.blueprint_id, "COMPILING", by=by, reason=f"job {row.job_id}")
    claimed = _row(connection, row.job_id)
    return {**_summary(claimed), "blueprint": _blueprint(connection, row.blueprint_id), "lease": claimed.lease}


def renew(connection: Connection, job_id: str, lease: str | None, lease_s: float) -> dict[str, Any]:
    """Extend a lease from now on.

    Raises:
        ApiError: 404, or 409 when the job is no longer this worker's.
    """
    row = _leased(connection, job_id, lease)
    now = time.time()
    connection.execute(sa.update(jobs).where(jobs.c.job_id == job_id).values(lease_until=now + lease_s, updated_at=now))
    return _summary(_row(connection, row.job_id))


def finish(
    connection: Connection, job_id: str, outcome: str, *, lease: str | None, artifact_id: str | None, log: str, by: str
) -> dict[str, Any]:
    """End a job: ``done``, ``invalid`` (never again), or ``retry`` (another worker may, unless too many have).

    ``release`` says that it was not tried: another worker may have it, and the claim does not count.

    Raises:
        ApiError: 404; 409 when the job is no longer this worker's; 422 for ``done`` without a kernel in the registry,
            or with one that is not what the job asks for.
    """
    row = _leased(connection, job_id, lease)
    if outcome == "done":
        _check_fits(connection, row, artifact_id)
        _end(connection, row, "DONE", by=by, reason=f"compiled to {artifact_id}", log=log, artifact_id=artifact_id)
    elif outcome == "release":
        _end(connection, row, "QUEUED", by=by, reason="handed back untried", log=log, attempts=row.attempts - 1)
    elif outcome == "invalid" or row.attempts >= MAX_ATTEMPTS:
        reason = "failed" if outcome == "invalid" else f"given up after {row.attempts} attempts"
        _end(connection, row, "INVALID", by=by, reason=reason, log=log)
    else:
        _end(connection, row, "QUEUED", by=by, reason="given back", log=log)
    return _summary(_row(connection, job_id))


def describe(connection: Connection, job_id: str) -> dict[str, Any]:
    """Everything on record about a job.

    Raises:
        ApiError: 404.
    """
    return {**_summary(_row(connection, job_id)), "history": history_of(connection, "job", job_id)}


def page(connection: Connection, *, after: str, limit: int, status: str | None = None) -> list[dict[str, Any]]:
    """Jobs in the order they came."""
    query = sa.select(jobs).where(jobs.c.job_id > after)
    if status is not None:
        query = query.where(jobs.c.status == status)
    return [_summary(row) for row in connection.execute(query.order_by(jobs.c.job_id).limit(limit))]


def count_by_status(connection: Connection) -> dict[str, int]:
    """How many jobs have each status."""
    query = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
    return {status: count for status, count in connection.execute(query)}


_BLUEPRINT_AFTER: Final = {"DONE": "COMPILED", "INVALID": "INVALID", "QUEUED": "UNVALIDATED"}


def _end(
    connection: Connection,
    row: Row[*tuple[Any, ...]],
    after: str,
    *,
    by: str,
    reason: str,
    log: str,
    artifact_id: str | None = None,
    attempts: int | None = None,
) -> None:
    check_move("job", row.job_id, row.status, after)
    connection.execute(
        sa.update(jobs)
        .where(jobs.c.job_id == row.job_id)
        .values(
            status=after,
            lease=None,
            lease_until=None,
            artifact_id=artifact_id,
            attempts=row.attempts if attempts is None else attempts,
            log=log,
            updated_at=time.time(),
        )
    )
    record(connection, "job", row.job_id, row.status, after, by, reason)
    blueprint_store.move(
        connection, row.blueprint_id, _BLUEPRINT_AFTER[after], by=by, reason=f"job {row.job_id}: {reason}"
    )


def _check_fits(connection: Connection, row: Row[*tuple[Any, ...]], artifact_id: str | None) -> None:
    """Whether a kernel is what a job asks for."""
    query = sa.select(kernels.c.blueprint_hash, kernels.c.d_in, kernels.c.d_out, kernels.c.dtype)
    found = connection.execute(query.where(kernels.c.artifact_id == artifact_id)).first()
    if artifact_id is None or found is None:
        raise invalid("a job is done when its artifact is in the registry: upload it, then give its artifact_id")
    asked = {"blueprint_hash": row.blueprint_id, **json.loads(row.request)}
    for name, value in found._mapping.items():
        # A kernel without weights fits every dtype.
        if value != asked[name] and (name, value) != ("dtype", "none"):
            raise invalid(
                f"{artifact_id} is not what job {row.job_id} asks for: its {name} is {value}, the job's {asked[name]}",
                "wrong_artifact",
            )


def _leased(connection: Connection, job_id: str, lease: str | None) -> Row[*tuple[Any, ...]]:
    row = _row(connection, job_id, lock=True)
    if row.status != "RUNNING":
        raise conflict(f"job {job_id} is {row.status}, not RUNNING", "not_leased")
    if lease is not None and lease != row.lease:
        raise conflict(f"the lease on job {job_id} ran out, and {row.worker} has claimed the job", "not_leased")
    return row


def _row(connection: Connection, job_id: str, *, lock: bool = False) -> Row[*tuple[Any, ...]]:
    query = sa.select(jobs).where(jobs.c.job_id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise not_found(f"there is no job {job_id}")
    return row


def _blueprint(connection: Connection, blueprint_id: str) -> Any:
    return blueprint_store.describe(connection, blueprint_id)["blueprint"]


def _summary(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    return {
        "job_id": row.job_id,
        "blueprint_id": row.blueprint_id,
        "status": row.status,
        **json.loads(row.request),
        "attempts": row.attempts,
        "worker": row.worker,
        "lease_until": None if row.lease_until is None else iso(row.lease_until),
        "artifact_id": row.artifact_id,
        "log": row.log,
        "created_at": iso(row.created_at),
        "updated_at": iso(row.updated_at),
    }
