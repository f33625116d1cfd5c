"""Jobs by asking Urza for them, where there is no Redis.

Urza keeps the leases and counts the attempts; this side polls, less often the longer there is nothing to do.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from esper.contracts.ids import JOB_PATTERN
from esper.services.tezzeret.job import CompileJob, CompileResult, JobError, JobStatus
from esper.services.tezzeret.queue import DEFAULT_LEASE_S, Aside, Backoff, Claim, worker_name
from esper.services.tezzeret.urza_link import UrzaLink

__all__ = ["UrzaQueue"]

_FIRST_POLL_S: Final = 0.25
_LONGEST_POLL_S: Final = 5.0
#: As many jobs as Urza takes into account when it is told which ones not to hand out.
_MAX_ASIDE: Final = 4096
_JOB_FIELDS: Final = ("d_in", "d_out", "seed", "dtype", "pipeline", "architectures", "tags", "job_id", "blueprint")
#: What a server answers to a word that its version does not have.
_NOT_KNOWN: Final = 422
#: In Urza's words.
_ENDS: Final[Mapping[JobStatus, str]] = {JobStatus.COMPILED: "done", JobStatus.INVALID: "invalid"}
_STATUSES: Final[Mapping[str, JobStatus]] = {"DONE": JobStatus.COMPILED, "INVALID": JobStatus.INVALID}


class UrzaQueue:
    """A :class:`~esper.services.tezzeret.queue.JobQueue` in Urza's database, and the submitter's side of it.

    Used from one event loop.

    Args:
        url: Urza's address; the token, with the role ``publish``, in it (``http://:TOKEN@host:8470``) or in
            ``ESPER_REGISTRY_TOKEN``.
        lease_s: Seconds after which a silent worker's job goes to another.
        name: This worker's name in Urza's records.

    Raises:
        ValueError: not an http or https URL, or not a name.
    """

    def __init__(self, url: str, *, lease_s: float = DEFAULT_LEASE_S, name: str | None = None) -> None:
        self._link = UrzaLink(url)
        self.name = worker_name(name)
        # Urza takes a second to a day.
        self._lease_s = min(86_400.0, max(1.0, lease_s))
        self._idle = Backoff(_FIRST_POLL_S, _LONGEST_POLL_S)
        self._next_poll = 0.0
        self._aside = Aside()

    @property
    def url(self) -> str:
        """Where Urza is, without the token."""
        return self._link.url

    # -- the worker's side --

    async def claim(self, wait_s: float) -> Claim | None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; asks at once when ``wait_s`` is 0."""
        pause = self._next_poll - time.monotonic()
        if wait_s > 0 and pause > 0:
            await asyncio.sleep(min(wait_s, pause))
            if pause > wait_s:
                return None
        status, found = await self._ask_for_one()
        if status == 204:
            self._next_poll = time.monotonic() + self._idle.next()
            return None
        self._idle.reset()
        self._next_poll = 0.0
        token = f"{found.get('job_id')} {found.get('lease')}"
        try:
            job = CompileJob.from_payload({name: found[name] for name in _JOB_FIELDS if name in found})
            attempt = found.get("attempts")
            if type(attempt) is not int:
                raise JobError(f"attempts is {attempt!r:.40}")
        except JobError as error:
            await self._end(token, "invalid", log=str(error))
            return None
        return Claim(job, attempt, token, job.job_id)

    async def renew(self, claim: Claim) -> bool:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`."""
        job_id, _, lease = claim.token.partition(" ")
        body = {"lease": lease, "lease_s": self._lease_s}
        status, _ = await self._link.ask("POST", f"/jobs/{job_id}/renew", body, (404, 409))
        return status < 300

    async def finish(self, claim: Claim, result: CompileResult) -> bool:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`.

        Raises:
            JobError: Urza does not have the artifact; the worker publishes elsewhere.
        """
        end = _ENDS[result.status]
        return await self._end(claim.token, end, artifact_id=result.artifact_id, log=result.log) < 300

    async def retry(self, claim: Claim, log: str, delay_s: float) -> None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; Urza knows no delay, so it is waited for here."""
        await asyncio.sleep(delay_s)
        await self._end(claim.token, "retry", log=log)

    async def hand_back(self, claim: Claim, log: str = "handed back", aside_s: float = 0.0) -> None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; an Urza that is older counts it as an attempt."""
        # Before it is let go of: the next claim may come in the same moment.
        self._aside.put(claim.job.job_id, aside_s)
        if await self._end(claim.token, "release", log=log) == _NOT_KNOWN:
            # It would hand the same job to us again: the others get their chance while we do not ask.
            self._next_poll = time.monotonic() + aside_s
            await self._end(claim.token, "retry", log=log)

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    # -- the submitter's side --

    async def submit(self, job: CompileJob) -> str:
        """Put a job into the queue; the same request again is the same job, unless that failed.

        Returns:
            The name Urza gave it.

        Raises:
            QueueUnavailableError: Urza does not answer, or refuses us.
            JobError: Urza refuses the job; the message says why.
        """
        body = {name: value for name, value in job.to_payload().items() if name != "job_id"}
        _, answer = await self._link.ask("POST", "/blueprints", body)
        job_id = answer.get("job_id")
        if not isinstance(job_id, str) or not re.fullmatch(JOB_PATTERN, job_id):
            raise JobError(f"{self.url} took the blueprint, but made no job of it")
        return job_id

    async def result(self, job_id: str, *, timeout_s: float) -> CompileResult | None:
        """Wait for a job's result; None when there is none in time."""
        deadline = time.monotonic() + timeout_s
        pauses = Backoff(_FIRST_POLL_S, _LONGEST_POLL_S / 5)
        while True:
            _, found = await self._link.ask("GET", f"/jobs/{job_id}")
            if (status := _STATUSES.get(str(found.get("status")))) is not None:
                return CompileResult(
                    job_id=job_id,
                    status=status,
                    artifact_id=found.get("artifact_id"),
                    blueprint_hash=found.get("blueprint_id"),
                    log=str(found.get("log", "")),
                    attempts=found.get("attempts", 0),
                )
            pause = pauses.next()
            if time.monotonic() + pause > deadline:
                return None
            await asyncio.sleep(pause)

    # -- within --

    async def _ask_for_one(self) -> tuple[int, dict[str, Any]]:
        wish: dict[str, Any] = {"worker": self.name, "lease_s": self._lease_s}
        aside = self._aside.names()
        if len(aside) > _MAX_ASIDE:
            return 204, {}
        if aside:
            status, found = await self._link.ask("POST", "/jobs/claim", {**wish, "aside": aside}, (204, _NOT_KNOWN))
            if status != _NOT_KNOWN:
                return status, found
        # Nothing is aside, or Urza is older than this worker and hands out whatever comes first.
        return await self._link.ask("POST", "/jobs/claim", wish, (204,))

    async def _end(self, token: str, status: str, *, artifact_id: str | None = None, log: str = "") -> int:
        job_id, _, lease = token.partition(" ")
        body = {"status": status, "lease": lease, "log": log.replace("\0", "?")}
        if artifact_id is not None:
            body["artifact_id"] = artifact_id
        expected = (404, 409, _NOT_KNOWN) if status == "release" else (404, 409)
        code, _ = await self._link.ask("POST", f"/jobs/{job_id}/finish", body, expected)
        return code
