"""Jobs that this worker cannot run: left to others, looked at again now and then, and not for ever.

That a worker cannot run a job says nothing about the job: another may run that pipeline, or have the GPU. So it is no
attempt, and the job is free for others at once. The worker itself looks again after pauses that grow, because somebody
has to notice in the end that nobody came.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from esper.services.tezzeret.job import CompileJob
from esper.services.tezzeret.pipelines import PIPELINES
from esper.services.tezzeret.queue import Backoff

__all__ = ["Elsewhere", "Leave"]

_FIRST_PAUSE_S: Final = 2.0
_LONGEST_PAUSE_S: Final = 600.0
#: A job that has not come back for so long after its pause was taken by another worker, or is done.
_FORGET_S: Final = 3600.0

#: What a machine has or has not, whatever the blueprint: pipeline and architectures.
_Need: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Leave:
    """One more time that a job was left to others.

    Attributes:
        is_first: Whether this worker had not seen it before.
        since_s: Seconds since it saw it first, nobody having taken it.
        pause_s: How long it does not want it back.
    """

    is_first: bool
    since_s: float
    pause_s: float


@dataclass(slots=True)
class _Waiting:
    """Something that is looked at again after pauses that grow."""

    since: float
    attempt: int = 0
    until: float = 0.0
    reason: str = ""
    pauses: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S))

    def pause(self, now: float) -> float:
        pause_s = self.pauses.next()
        self.until = now + pause_s
        return pause_s


class Elsewhere:
    """What one worker cannot run, and what it has left to others for that.

    Args:
        pipelines: What it may run; None: every pipeline.
        clock: Seconds; the monotonic clock, which nobody sets.
    """

    def __init__(self, pipelines: frozenset[str] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipelines = pipelines
        self._clock = clock
        self._lacking: dict[_Need, _Waiting] = {}
        self._left: dict[str, _Waiting] = {}
        self._next_tidying = 0.0

    def reason(self, job: CompileJob) -> str | None:
        """Why this worker need not even try; None where it should."""
        # A pipeline that there is not is the job's fault: it ends INVALID, here as anywhere.
        if self._pipelines is not None and job.pipeline in PIPELINES and job.pipeline not in self._pipelines:
            return f"this worker does not run pipeline {job.pipeline!r}"
        lack = self._lacking.get(_need(job))
        return lack.reason if lack is not None and self._clock() < lack.until else None

    def learn(self, job: CompileJob, reason: str) -> None:
        """It tried, and this machine lacks something: jobs that need the same are not tried for a while."""
        now = self._clock()
        lack = self._lacking.setdefault(_need(job), _Waiting(now))
        lack.reason = reason
        lack.pause(now)

    def leave(self, job: CompileJob, attempt: int) -> Leave:
        """A job is left to others once more; ``attempt`` counts those who tried it."""
        now = self._clock()
        self._tidy(now)
        waiting = self._left.get(job.job_id)
        is_first = waiting is None
        if waiting is None or waiting.attempt != attempt:
            # Of one that somebody tried meanwhile nobody can say that nobody takes it.
            waiting = self._left[job.job_id] = _Waiting(now, attempt)
        return Leave(is_first, now - waiting.since, waiting.pause(now))

    def done(self, job: CompileJob, *, compiled: bool) -> None:
        """The job has ended; ``compiled``: here, so whatever this machine lacked, it has now."""
        self._left.pop(job.job_id, None)
        if compiled:
            self._lacking.pop(_need(job), None)

    def _tidy(self, now: float) -> None:
        if now < self._next_tidying:
            return
        self._next_tidying = now + _FORGET_S / 60
        self._left = {name: each for name, each in self._left.items() if now < each.until + _FORGET_S}


def _need(job: CompileJob) -> _Need:
    return job.pipeline, tuple(sorted(job.architectures))
