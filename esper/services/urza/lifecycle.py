"""The life cycles of blueprints, kernels and jobs: one table of legal moves, obeyed by all that changes a status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from esper.services.urza.errors import conflict

__all__ = [
    "BLUEPRINT_STATUSES",
    "JOB_STATUSES",
    "KERNEL_STATUSES",
    "TRANSITIONS",
    "BlueprintStatus",
    "JobStatus",
    "KernelStatus",
    "Kind",
    "check_move",
    "is_legal",
]

Kind = Literal["blueprint", "kernel", "job"]
BlueprintStatus = Literal["UNVALIDATED", "COMPILING", "COMPILED", "INVALID"]
KernelStatus = Literal["PENDING_BENCHMARKING", "VALIDATED", "REJECTED", "DEPRECATED"]
JobStatus = Literal["QUEUED", "RUNNING", "DONE", "INVALID"]

#: Kind of thing -> status -> the statuses it may move to.
TRANSITIONS: Final[Mapping[Kind, Mapping[str, tuple[str, ...]]]] = {
    "blueprint": {
        "UNVALIDATED": ("COMPILING", "INVALID"),
        # Back to UNVALIDATED when a worker gives its job back or its lease runs out.
        "COMPILING": ("COMPILED", "INVALID", "UNVALIDATED"),
        # Other sizes of the same blueprint are other jobs.
        "COMPILED": ("COMPILING",),
        "INVALID": ("COMPILING",),
    },
    "kernel": {
        "PENDING_BENCHMARKING": ("VALIDATED", "REJECTED"),
        "VALIDATED": ("DEPRECATED", "REJECTED"),
        "REJECTED": ("PENDING_BENCHMARKING",),
        "DEPRECATED": ("VALIDATED",),
    },
    "job": {
        "QUEUED": ("RUNNING", "INVALID"),
        # To RUNNING again when another worker takes over a lease that ran out.
        "RUNNING": ("DONE", "INVALID", "QUEUED", "RUNNING"),
        "DONE": (),
        "INVALID": (),
    },
}

BLUEPRINT_STATUSES: Final = tuple(TRANSITIONS["blueprint"])
KERNEL_STATUSES: Final = tuple(TRANSITIONS["kernel"])
JOB_STATUSES: Final = tuple(TRANSITIONS["job"])


def is_legal(kind: Kind, before: str, after: str) -> bool:
    """Whether a thing of this kind may move from one status to the other."""
    return after in TRANSITIONS[kind][before]


def check_move(kind: Kind, subject: str, before: str, after: str) -> None:
    """Refuse an illegal move.

    Raises:
        ApiError: 409, naming the moves that are legal.
    """
    if not is_legal(kind, before, after):
        legal = ", ".join(TRANSITIONS[kind][before]) or "nothing"
        raise conflict(f"{kind} {subject} is {before} and cannot become {after}; legal: {legal}", "illegal_transition")
