"""Where jobs come from: what a worker needs of a queue, whichever kind it is."""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Final, Protocol

from esper.contracts.errors import EsperError
from esper.services.tezzeret.job import CompileJob, CompileResult

__all__ = [
    "DEFAULT_LEASE_S",
    "DEFAULT_MAX_ATTEMPTS",
    "Aside",
    "Backoff",
    "Claim",
    "JobQueue",
    "QueueUnavailableError",
    "worker_name",
]

#: A job whose worker has not been heard of for so long is given to another.
DEFAULT_LEASE_S: Final = 60.0
#: A job that ended so many workers, or so many attempts, is INVALID.
DEFAULT_MAX_ATTEMPTS: Final = 3
_MAX_NAME: Final = 128


class QueueUnavailableError(EsperError, ConnectionError):
    """The queue did not answer, or refused us. May pass."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is ours for the length of a lease.

    Attributes:
        job: What to do.
        attempt: 1 for a job that was never handed out before.
        token: The queue's own name for it.
        trace_id: Of the request that it came from.
    """

    job: CompileJob
    attempt: int
    token: str
    trace_id: str


class JobQueue(Protocol):
    """A source of jobs that several workers share. Every coroutine may raise :class:`QueueUnavailableError`.

    A job is handed out to one worker at a time. Whoever stops renewing loses it to another, so a job may be done twice,
    but never gets lost; publishing an artifact twice changes nothing.
    """

    @property
    def url(self) -> str:
        """Where the queue is, for messages; without credentials."""

    async def claim(self, wait_s: float) -> Claim | None:
        """The next job, or None when there is none within about ``wait_s`` seconds."""

    async def renew(self, claim: Claim) -> bool:
        """Start the lease anew; False when the job is no longer ours."""

    async def finish(self, claim: Claim, result: CompileResult) -> bool:
        """Announce the result and take the job out of the queue; False when it was no longer ours to finish."""

    async def retry(self, claim: Claim, log: str, delay_s: float) -> None:
        """Let it be tried again, by anyone, after ``delay_s``; this attempt counts."""

    async def hand_back(self, claim: Claim, log: str = "handed back", aside_s: float = 0.0) -> None:
        """Let another have it at once; this attempt does not count. We are not given it again for ``aside_s``."""

    async def close(self) -> None:
        """Let go of connections; jobs that were not handed back come free when their lease runs out."""


class Aside:
    """Names of the jobs that a worker does not want back yet."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def put(self, name: str, pause_s: float) -> None:
        """Not wanted for ``pause_s`` seconds."""
        if pause_s > 0:
            self._until[name] = time.monotonic() + pause_s

    def names(self) -> list[str]:
        """Those whose time is not over."""
        now = time.monotonic()
        self._until = {name: until for name, until in self._until.items() if now < until}
        return list(self._until)


class Backoff:
    """Pauses that double from ``first_s`` to ``longest_s``, each drawn at random from its upper half.

    So workers that lost one server do not all come back in the same moment.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._random = random.Random()
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        pause = min(self._longest_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return self._random.uniform(pause / 2, pause)

    def reset(self) -> None:
        """It worked."""
        self._failures = 0


def worker_name(name: str | None) -> str:
    """``name`` if it can be one, or one that no other worker has.

    Raises:
        ValueError: it is empty, too long, or has characters that cannot be shown.
    """
    if name is None:
        return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(3)}"
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(f"the worker's name is {name!r:.80}; need printable text of 1 to {_MAX_NAME} characters")
    return name
