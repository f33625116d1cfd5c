"""Keeps Urza's record of a blueprint up to date for jobs that travel through Redis.

A job that Urza itself hands out is on its record already. One that came through Redis is known to Redis alone; so the
worker that publishes to an Urza also tells it where the blueprint stands. That is a service to those who look there:
what it costs when Urza does not answer is a line in the worker's log, never a job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esper.contracts.errors import EsperError
from esper.services.tezzeret.job import CompileJob, CompileResult
from esper.services.tezzeret.urza_link import UrzaLink

__all__ = ["UrzaRecord"]

#: Characters of a log that the record keeps as the reason: its end says what went wrong.
_MAX_REASON = 1000


class UrzaRecord:
    """What a worker tells Urza.

    Args:
        url: As for :class:`~esper.services.tezzeret.urza_link.UrzaLink`.
        say: Told in one line what could not be recorded.
    """

    def __init__(self, url: str, say: Callable[[str], None] = lambda line: None) -> None:
        self._link = UrzaLink(url)
        self._say = say

    async def began(self, job: CompileJob) -> None:
        """A worker compiles the job: the blueprint is known to Urza from now on, and COMPILING."""
        await self._tell(job, "COMPILING", f"job {job.job_id}")

    async def left(self, job: CompileJob, reason: str) -> None:
        """The worker could not compile it, and another may: nobody does at present."""
        await self._tell(job, "UNVALIDATED", f"job {job.job_id} left to other workers: {reason}"[:_MAX_REASON])

    async def ended(self, job: CompileJob, result: CompileResult) -> None:
        """The job is done (its kernel is published) or INVALID, with the end of its log."""
        reason = f"job {job.job_id}"
        if result.log:
            reason = f"{reason}: {result.log.replace(chr(0), '?')[-_MAX_REASON:]}"
        await self._tell(job, result.status.value, reason)

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def _tell(self, job: CompileJob, status: str, reason: str) -> None:
        try:
            _, known = await self._link.ask("POST", "/blueprints", {"blueprint": dict(job.blueprint)})
            body: dict[str, Any] = {"status": status, "reason": reason}
            # 409: another job of the same blueprint has moved it on meanwhile.
            await self._link.ask("POST", f"/blueprints/{known.get('blueprint_id')}/status", body, (409,))
        except EsperError as error:
            # A blueprint that is none is refused here too, and has no place in the record.
            self._say(f"job {job.job_id}: {self._link.url} has no record of {status}: {error}")
