"""The worker: claims jobs, compiles several at once, publishes, announces; outlives its queue and its registry."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from esper.artifacts.artifact import Artifact
from esper.artifacts.http_registry import HttpRegistry
from esper.artifacts.workers import run_blocking
from esper.contracts.errors import ArtifactError, EsperError, RegistryUnavailableError
from esper.contracts.registry import RegistryClient
from esper.services.tezzeret.elsewhere import Elsewhere
from esper.services.tezzeret.job import CompileJob, CompileResult, JobStatus
from esper.services.tezzeret.limits import Limits
from esper.services.tezzeret.pipelines import PIPELINES
from esper.services.tezzeret.queue import (
    DEFAULT_LEASE_S,
    DEFAULT_MAX_ATTEMPTS,
    Backoff,
    Claim,
    JobQueue,
    QueueUnavailableError,
)
from esper.services.tezzeret.runner import compile_in_sandbox
from esper.services.tezzeret.urza_record import UrzaRecord

__all__ = ["Worker", "WorkerSettings"]

T = TypeVar("T")

_CLAIM_WAIT_S: Final = 1.0
_GOODBYE_S: Final = 10.0
_FOLDER_PREFIX: Final = "esper-tezzeret-"
_LOCK: Final = "lock"

#: From an artifact's bytes to signed ones.
Signer = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How a worker works.

    Attributes:
        concurrency: Jobs at once.
        limits: What each may take.
        pipelines: What it compiles; None: whatever is asked for. Other jobs are left to other workers.
        abandon_s: A job that this worker cannot run, and that it has seen nobody take for so long, is INVALID.
        lease_s: As the queue has it; a third of it is the time between renewals.
        max_attempts: After so many attempts that crashed, hung or took too much, a job is INVALID.
        retry_s: Pause before the next attempt; it doubles with each.
        grace_s: How long jobs under way may go on when the worker is told to stop.
    """

    concurrency: int = 2
    limits: Limits = field(default_factory=Limits)
    pipelines: frozenset[str] | None = None
    abandon_s: float = 86_400.0
    lease_s: float = DEFAULT_LEASE_S
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    retry_s: float = 1.0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        for name, low in (("concurrency", 1), ("max_attempts", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} is {value!r}; need an integer of at least {low}")
        for name in ("abandon_s", "lease_s", "retry_s", "grace_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
                raise ValueError(f"{name} is {value!r}; need seconds, 0 or more and below 10^9")
        if self.lease_s == 0:
            raise ValueError("lease_s is 0; a lease that has no length cannot be renewed")
        if self.pipelines is not None:
            if unknown := sorted(map(str, self.pipelines - set(PIPELINES))):
                raise ValueError(f"pipeline {unknown[0]!r} is unknown; known: {', '.join(PIPELINES)}")
            if not self.pipelines:
                raise ValueError(f"pipelines are none, so no job could be run; known: {', '.join(PIPELINES)}")


class Worker:
    """Takes jobs from a queue until told to stop.

    Args:
        queue: Where jobs come from and results go.
        registry: Where artifacts go.
        settings: How.
        signer: Signs what was compiled, here and not in the sandbox, which never sees the key.
        record: Where blueprints' statuses are kept, if the queue does not do so itself.
        say: Told in one line what happens.
    """

    def __init__(
        self,
        queue: JobQueue,
        registry: RegistryClient,
        settings: WorkerSettings | None = None,
        *,
        signer: Signer | None = None,
        record: UrzaRecord | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._queue, self._registry = queue, registry
        self._settings = settings if settings is not None else WorkerSettings()
        self._signer, self._record, self._say = signer, record, say
        self._elsewhere = Elsewhere(self._settings.pipelines)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._running: dict[asyncio.Task[None], asyncio.Task[None]] = {}
        self._folder = Path()

    def stop(self) -> None:
        """Take no more jobs, finish those under way, then end; a second call gives them back at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self, *, once: bool = False) -> None:
        """Work until :meth:`stop`, or with ``once`` until there is no job to be had and none under way.

        Raises:
            QueueUnavailableError: with ``once`` only; else the worker waits for its queue to come back.
        """
        await run_blocking(_remove_leftovers)
        with _private_folder() as self._folder:
            try:
                await self._take_jobs(once)
            finally:
                await self._wind_down()

    async def _take_jobs(self, once: bool) -> None:
        backoff = Backoff(0.5, 30.0)
        silent = False
        while not self._stopping.is_set():
            if len(self._running) >= self._settings.concurrency:
                await self._until_stopped(self._one_ends())
                continue
            try:
                # Never cancelled: a job that arrives at that moment would be nobody's until its lease ran out.
                claim = await self._queue.claim(0.0 if once else _CLAIM_WAIT_S)
            except QueueUnavailableError as error:
                if once:
                    raise
                if not silent:
                    self._say(f"{error}; trying again until it does")
                silent = True
                await self._until_stopped(asyncio.sleep(backoff.next()))
                continue
            if silent:
                self._say(f"{self._queue.url} answers again")
                silent = False
            backoff.reset()
            if claim is not None:
                self._begin(claim)
            elif once:
                if not self._running:
                    return
                await self._until_stopped(self._one_ends())

    def _begin(self, claim: Claim) -> None:
        work = asyncio.create_task(self._work(claim))
        care = asyncio.create_task(self._take_care(claim, work))
        self._running[care] = work
        care.add_done_callback(self._running.pop)

    async def _wind_down(self) -> None:
        """Let jobs under way finish for a while, then give them back."""
        if not self._running:
            return
        self._say(f"stopping; {len(self._running)} jobs under way have {self._settings.grace_s:g} s to finish")
        hurry = asyncio.create_task(self._hurry.wait())
        everything = asyncio.create_task(self._all_end())
        await asyncio.wait({hurry, everything}, timeout=self._settings.grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        everything.cancel()
        for work in list(self._running.values()):
            work.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=_GOODBYE_S)

    async def _one_ends(self) -> None:
        await asyncio.wait(set(self._running), return_when=asyncio.FIRST_COMPLETED)

    async def _all_end(self) -> None:
        await asyncio.wait(set(self._running))

    async def _until_stopped(self, doing: Coroutine[Any, Any, Any]) -> None:
        """Wait for something, or for :meth:`stop`."""
        tasks = {asyncio.ensure_future(doing), asyncio.ensure_future(self._stopping.wait())}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    # -- one job --

    async def _take_care(self, claim: Claim, work: asyncio.Task[None]) -> None:
        """See a job through: keep the lease, and give the job back if the work on it is called off."""
        lost = False
        while not work.done():
            await asyncio.wait({work}, timeout=self._settings.lease_s / 3)
            if not work.done():
                with contextlib.suppress(EsperError):
                    lost = not await self._queue.renew(claim)
                if lost and not work.done():
                    self._say(f"job {claim.job.job_id} has gone to another worker")
                    work.cancel()
                    await asyncio.wait({work})
        if work.cancelled():
            if not lost:
                self._say(f"job {claim.job.job_id} handed back")
                with contextlib.suppress(EsperError):
                    await self._queue.hand_back(claim, "handed back: the worker was stopped")
        elif (error := work.exception()) is not None:
            # A fault of the worker's own: on record, and the job comes free for the next attempt.
            self._say(f"job {claim.job.job_id} failed: {type(error).__name__}: {error}")
            with contextlib.suppress(EsperError):
                await self._queue.retry(claim, f"the worker failed: {type(error).__name__}", self._pause(claim))

    async def _work(self, claim: Claim) -> None:
        job, settings = claim.job, self._settings
        if claim.attempt > settings.max_attempts:
            given_up = f"given up: handed out {claim.attempt - 1} times, and its workers died or hung"
            await self._finish(claim, self._invalid(claim, None, given_up))
            return
        if (reason := self._elsewhere.reason(job)) is not None:
            await self._leave(claim, reason)
            return
        self._say(f"job {job.job_id} claimed, attempt {claim.attempt} of {settings.max_attempts}")
        self._say(f"job {job.job_id} compiling")
        if self._record is not None:
            await self._record.began(job)
        outcome = await compile_in_sandbox(job, settings.limits, self._folder)
        if outcome.elsewhere:
            reason = _last_line(outcome.log)
            self._elsewhere.learn(job, reason)
            if self._record is not None:
                await self._record.left(job, reason)
            await self._leave(claim, reason)
        elif outcome.data is not None:
            try:
                artifact_id = await self._publish(job, outcome.data)
            except ArtifactError as error:
                refused = f"{outcome.log}\nthe artifact was refused: {error}".strip()
                await self._finish(claim, self._invalid(claim, outcome.blueprint_hash, refused))
                return
            result = CompileResult(
                job_id=job.job_id,
                status=JobStatus.COMPILED,
                artifact_id=artifact_id,
                blueprint_hash=outcome.blueprint_hash,
                log=outcome.log,
                attempts=claim.attempt,
            )
            await self._finish(claim, result)
        elif outcome.final or claim.attempt >= settings.max_attempts:
            await self._finish(claim, self._invalid(claim, outcome.blueprint_hash, outcome.log))
        else:
            pause = self._pause(claim)
            self._say(f"job {job.job_id} failed, next attempt in {pause:g} s: {_last_line(outcome.log)}")
            await self._insist(lambda: self._queue.retry(claim, outcome.log, pause))

    async def _leave(self, claim: Claim, reason: str) -> None:
        """Let others have what this worker cannot run; INVALID if for a very long time nobody did."""
        job, limit_s = claim.job, self._settings.abandon_s
        leave = self._elsewhere.leave(job, claim.attempt)
        if leave.since_s > limit_s:
            nobody = f"no worker that runs pipeline {job.pipeline!r} took it within {limit_s:g} s; here: {reason}"
            await self._finish(claim, self._invalid(replace(claim, attempt=claim.attempt - 1), None, nobody))
            return
        if leave.is_first:
            # Once: it comes by again every few minutes.
            self._say(f"job {job.job_id} left to other workers: {reason}")
        await self._insist(lambda: self._queue.hand_back(claim, f"left to others: {reason}", leave.pause_s))

    async def _publish(self, job: CompileJob, data: bytes) -> str:
        """Verify, sign and store; waits for a registry that does not answer.

        Raises:
            ArtifactError: it is not what was asked for, or the registry refuses it.
        """
        signer = self._signer
        if signer is not None:
            data = await run_blocking(signer, data)
        # What ESPER_TRUST_POLICY asks of loading does not bind who builds.
        artifact = await run_blocking(Artifact.open, data, policy="standard")
        manifest = artifact.manifest
        asked = (job.d_in, job.d_out, job.seed, job.pipeline)
        got = (manifest.d_in, manifest.d_out, manifest.seed, manifest.pipeline)
        if got != asked:
            raise ArtifactError(f"it is for (d_in, d_out, seed, pipeline) {got}, not {asked}")
        registry = self._registry
        if isinstance(registry, HttpRegistry):
            artifact_id = await self._insist(lambda: registry.publish(data, tags=job.tags))
        else:
            artifact_id = await self._insist(lambda: registry.publish(data))
        self._say(f"job {job.job_id} published {artifact_id}")
        return artifact_id

    async def _finish(self, claim: Claim, result: CompileResult) -> None:
        ours = await self._insist(lambda: self._queue.finish(claim, result))
        self._elsewhere.done(claim.job, compiled=result.status is JobStatus.COMPILED)
        if ours and self._record is not None:
            await self._record.ended(claim.job, result)
        note = "" if ours else " (another worker was first)"
        reason = "" if result.status is JobStatus.COMPILED else f": {_last_line(result.log)}"
        self._say(f"job {result.job_id} {result.status}{note}{reason}")

    async def _insist(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call until the other side answers: the work is done, and must not be lost to an outage."""
        backoff = Backoff(0.5, 15.0)
        silent = False
        while True:
            try:
                return await call()
            except (QueueUnavailableError, RegistryUnavailableError) as error:
                if not silent:
                    self._say(f"{error}; trying again until it does")
                silent = True
            await asyncio.sleep(backoff.next())

    def _invalid(self, claim: Claim, blueprint_hash: str | None, log: str) -> CompileResult:
        return CompileResult(
            job_id=claim.job.job_id,
            status=JobStatus.INVALID,
            blueprint_hash=blueprint_hash,
            log=log,
            attempts=min(claim.attempt, self._settings.max_attempts),
        )

    def _pause(self, claim: Claim) -> float:
        return self._settings.retry_s * 2.0 ** (claim.attempt - 1)


def _last_line(log: str) -> str:
    return log.rpartition("\n")[2]


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for the sandboxes; while it is locked its worker is alive."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    # Locked before it has its name: what carries the name without being locked is a dead worker's.
    nameless = folder / secrets.token_hex(4)
    with open(nameless, "xb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        nameless.rename(folder / _LOCK)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the folders of workers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        # Not there, not ours to open, or locked: not a leftover of ours.
        with contextlib.suppress(OSError), open(os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_uid == os.getuid() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
