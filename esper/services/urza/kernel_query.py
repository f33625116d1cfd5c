"""The question of a controller: which kernels fit here, and which of them first?

What must hold is filtered in SQL; what is merely better counts towards a score, also in SQL, so that the limit cuts
off the worst. The parts of the score are sized so that a weaker reason never outweighs a stronger one: each preferred
tag 1, VALIDATED 1/2, a binary for the architecture asked for 1/4, and latency from 0 (unknown, or slow) to 1/5 (none).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from esper.services.urza.kernel_store import summary, tags_of
from esper.services.urza.lifecycle import KernelStatus
from esper.services.urza.schemas import KernelQuery
from esper.services.urza.tables import kernel_architectures, kernel_tags, kernels

__all__ = ["DEFAULT_STATUSES", "find"]

#: Without a wish: what may be used. REJECTED and DEPRECATED must be asked for.
DEFAULT_STATUSES: Final[tuple[KernelStatus, ...]] = ("VALIDATED", "PENDING_BENCHMARKING")
_VALIDATED: Final = 0.5
_BINARY: Final = 0.25
_LATENCY: Final = 0.2
#: Latency at which half of the latency's part of the score is left.
_HALF_US: Final = 1000.0


def find(connection: Connection, wanted: KernelQuery) -> list[dict[str, Any]]:
    """The kernels that fit, best first; equal scores in the order of ids."""
    score = _score(wanted).label("score")
    query = sa.select(kernels, score).where(kernels.c.status.in_(wanted.statuses or DEFAULT_STATUSES))
    for column, value in (
        (kernels.c.d_in, wanted.d_in),
        (kernels.c.d_out, wanted.d_out),
        (kernels.c.dtype, wanted.dtype),
        (kernels.c.family, wanted.family),
        (kernels.c.blueprint_hash, wanted.blueprint_id),
    ):
        if value is not None:
            query = query.where(column == value)
    # What was never measured is not known to stay below a limit.
    if wanted.max_latency_us is not None:
        query = query.where(kernels.c.latency_us <= wanted.max_latency_us)
    if wanted.max_memory_bytes is not None:
        query = query.where(kernels.c.memory_bytes <= wanted.max_memory_bytes)
    if wanted.architecture is not None:
        # Without binaries the blueprint runs on the package's own kernels, on any architecture.
        query = query.where(sa.or_(kernels.c.target == "any", _has_binary(wanted.architecture)))
    if wanted.tags_required:
        query = query.where(_count(wanted.tags_required) == len(set(wanted.tags_required)))
    if wanted.tags_excluded:
        query = query.where(_count(wanted.tags_excluded) == 0)
    rows = connection.execute(query.order_by(score.desc(), kernels.c.artifact_id).limit(wanted.limit)).all()
    tags = tags_of(connection, [row.artifact_id for row in rows])
    return [
        {
            **summary(row),
            "score": round(float(row.score), 6),
            "tags": tags[row.artifact_id],
            "latency_us": row.latency_us,
            "memory_bytes": row.memory_bytes,
        }
        for row in rows
    ]


def _score(wanted: KernelQuery) -> sa.ColumnElement[float]:
    score: sa.ColumnElement[Any] = sa.case(
        (kernels.c.status == "VALIDATED", sa.literal(_VALIDATED, sa.Double)), else_=0.0
    )
    score = score + sa.func.coalesce(_LATENCY / (1.0 + kernels.c.latency_us / _HALF_US), 0.0)
    if wanted.architecture is not None:
        score = score + sa.case((_has_binary(wanted.architecture), _BINARY), else_=0.0)
    if wanted.tags_preferred:
        score = score + _count(wanted.tags_preferred)
    return score


def _count(tags: Sequence[str]) -> sa.ScalarSelect[int]:
    """How many of the tags a kernel has."""
    return (
        sa.select(sa.func.count())
        .where(kernel_tags.c.artifact_id == kernels.c.artifact_id, kernel_tags.c.tag.in_(sorted(set(tags))))
        .correlate(kernels)
        .scalar_subquery()
    )


def _has_binary(architecture: str) -> sa.Exists:
    return (
        sa.select(kernel_architectures.c.artifact_id)
        .where(
            kernel_architectures.c.artifact_id == kernels.c.artifact_id,
            kernel_architectures.c.architecture == architecture,
        )
        .correlate(kernels)
        .exists()
    )
