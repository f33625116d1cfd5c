"""Jobs from a Redis stream, shared by a consumer group (Redis 6.2 or newer).

A job is an entry of the stream ``compilation.blueprint.submitted`` that the group has not acknowledged. Its lease is
the time since it was last delivered or renewed, and its attempts are Redis's count of deliveries, so nothing about a
job is kept anywhere else, and a worker that dies leaves nothing to clean up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.errors import BusURLError, EsperError
from esper.contracts.messages import MessageError, OonaMessage, TopicNames
from esper.oona.redis_options import check_tls_files, connection_options
from esper.oona.urls import BusAddress, mask, parse
from esper.services.tezzeret import redis_scripts
from esper.services.tezzeret.job import CompileJob, CompileResult, JobError
from esper.services.tezzeret.queue import DEFAULT_LEASE_S, Aside, Claim, QueueUnavailableError, worker_name

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["DEAD_LETTERS", "GROUP", "JOBS", "RESULTS", "RedisQueue"]

JOBS: Final = TopicNames.COMPILATION_BLUEPRINT_SUBMITTED.value
RESULTS: Final = TopicNames.COMPILATION_KERNEL_READY.value
#: Entries of the job stream that are no jobs, with the reason.
DEAD_LETTERS: Final = JOBS + ".dead"
GROUP: Final = "tezzeret"

#: The entry's one field that counts: an OonaMessage as JSON.
_FIELD: Final = "message"
_TIMEOUT_S: Final = 5.0
_RESULTS_KEPT: Final = 10_000
_JOBS_KEPT: Final = 10_000
_DEAD_KEPT: Final = 1_000
_DEAD_BYTES: Final = 1 << 16
_TRIM_EVERY: Final = 64
_FORGET_CONSUMER_MS: Final = 24 * 3600 * 1000
#: A job that looks idle for so long is free for every worker, whatever lease it goes by.
_FREE_MS: Final = 24 * 3600 * 1000


class RedisQueue:
    """A :class:`~esper.services.tezzeret.queue.JobQueue` in Redis, and the submitter's side of it.

    Used from one event loop. Nothing is connected before the first call; a lost connection is made anew by the next.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, as :mod:`esper.oona.urls` reads them.
        lease_s: Seconds after which a silent worker's job goes to another.
        name: This consumer's name in the group, different for every worker.

    Raises:
        BusURLError: not the URL of one Redis; a ``ValueError``.
        ValueError: not a name.
        EsperError: the Python package ``redis`` is not installed.
    """

    def __init__(self, url: str, *, lease_s: float = DEFAULT_LEASE_S, name: str | None = None) -> None:
        try:
            import redis.asyncio
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError:
            raise EsperError("jobs over Redis need the Python package redis: pip install redis") from None
        address = _address(url)
        self._url = mask(url.strip())
        # The worker does the retrying, with pauses that it can be woken from.
        options = connection_options(address, 2 * _TIMEOUT_S, Retry(NoBackoff(), 0))
        self._redis: redis.asyncio.Redis = redis.asyncio.Redis(**options | {"socket_connect_timeout": _TIMEOUT_S})
        self._failures = (redis.exceptions.RedisError, OSError)
        self._rejected = redis.exceptions.ResponseError
        self.name = worker_name(name)
        self._lease_ms = max(1, int(lease_s * 1000))
        self._held: set[str] = set()
        self._aside = Aside()
        self._ready = False
        self._settled = 0

    @property
    def url(self) -> str:
        """Where Redis is, without credentials."""
        return self._url

    # -- the worker's side --

    async def claim(self, wait_s: float) -> Claim | None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; what dead workers left comes first."""
        async with self._asking():
            await self._join()
            aside = self._aside.names()
            found = await self._script(redis_scripts.CLAIM_STALE, [JOBS], self.name, self._lease_ms, *aside)
            if found:
                return await self._accept(_text(found[0]), _pairs(found[1]), int(found[2]))
            # 0 would wait for ever.
            block = min(int(wait_s * 1000), int(_TIMEOUT_S * 1000)) or None
            streams: Any = await self._redis.xreadgroup(GROUP, self.name, {JOBS: ">"}, count=1, block=block)
        for _, entries in streams or ():
            for entry, fields in entries:
                return await self._accept(_text(entry), fields, 1)
        return None

    async def renew(self, claim: Claim) -> bool:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`."""
        async with self._asking():
            return bool(await self._script(redis_scripts.RENEW, [JOBS], self.name, claim.token))

    async def finish(self, claim: Claim, result: CompileResult) -> bool:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; announcing and acknowledging are one step."""
        message = OonaMessage(self.name, claim.trace_id, TopicNames.COMPILATION_KERNEL_READY, result.to_payload())
        async with self._asking():
            await self._join()
            done = await self._settle(claim.token, RESULTS, _RESULTS_KEPT, {_FIELD: message.to_json()})
        self._held.discard(claim.token)
        return done

    async def retry(self, claim: Claim, log: str, delay_s: float) -> None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; Redis has no place for the log."""
        await self._release(claim, max(0, self._lease_ms - int(delay_s * 1000)), claim.attempt)

    async def hand_back(self, claim: Claim, log: str = "handed back", aside_s: float = 0.0) -> None:
        """See :class:`~esper.services.tezzeret.queue.JobQueue`; Redis has no place for the log."""
        # Before it is let go of: the next claim may come in the same moment.
        self._aside.put(claim.token, aside_s)
        await self._release(claim, max(self._lease_ms, _FREE_MS), claim.attempt - 1)

    async def close(self) -> None:
        """Leave the group, if nothing is left undone, and disconnect."""
        with contextlib.suppress(QueueUnavailableError):
            if self._ready:
                async with self._asking():
                    await self._script(redis_scripts.LEAVE, [JOBS], self.name, _FORGET_CONSUMER_MS)
        # redis 5.0.0 calls it close().
        await (self._redis.aclose if hasattr(self._redis, "aclose") else self._redis.close)()

    # -- the submitter's side --

    async def submit(self, job: CompileJob, *, sender_id: str = "esper") -> str:
        """Put a job into the queue.

        Returns:
            A place in the stream of results; :meth:`result` looks for this job's behind it.

        Raises:
            QueueUnavailableError: Redis does not answer.
            MessageError: the job is too large for a message.
        """
        message = OonaMessage(sender_id, job.job_id, TopicNames.COMPILATION_BLUEPRINT_SUBMITTED, job.to_payload())
        text = message.to_json()
        async with self._asking():
            newest: Any = await self._redis.xrevrange(RESULTS, count=1)
            await self._redis.xadd(JOBS, {_FIELD: text})
        return _text(newest[0][0]) if newest else "0-0"

    async def result(self, job_id: str, *, since: str, timeout_s: float) -> CompileResult | None:
        """Wait for a job's result; None when there is none in time."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            async with self._asking():
                block = max(1, int(min(left, _TIMEOUT_S) * 1000))
                streams: Any = await self._redis.xread({RESULTS: since}, count=64, block=block)
            for _, entries in streams or ():
                for entry, fields in entries:
                    since = _text(entry)
                    with contextlib.suppress(MessageError, JobError):
                        found = CompileResult.from_payload(OonaMessage.from_json(_message(fields)).payload)
                        if found.job_id == job_id:
                            return found
        return None

    # -- within --

    async def _accept(self, token: str, fields: dict[bytes, bytes], attempt: int) -> Claim | None:
        """A claim, or None for what is no job: that goes to the dead letters, on record and in no one's way."""
        if token in self._held:
            # Ours, and under way: its renewals are late. Claiming it has renewed it.
            return None
        raw = b""
        try:
            raw = _message(fields)
            message = OonaMessage.from_json(raw)
            if message.topic is not TopicNames.COMPILATION_BLUEPRINT_SUBMITTED:
                raise MessageError(f"topic {message.topic} is not this stream's")
            job = CompileJob.from_payload(message.payload)
        except (MessageError, JobError) as error:
            letter = {"reason": str(error), "entry": token, _FIELD: raw[:_DEAD_BYTES]}
            async with self._asking():
                await self._settle(token, DEAD_LETTERS, _DEAD_KEPT, letter)
            return None
        self._held.add(token)
        return Claim(job, attempt, token, message.trace_id)

    async def _release(self, claim: Claim, idle_ms: int, deliveries: int) -> None:
        async with self._asking():
            await self._script(redis_scripts.RETRY, [JOBS], self.name, claim.token, idle_ms, deliveries)
        self._held.discard(claim.token)

    async def _settle(self, token: str, stream: str, kept: int, fields: dict[str, Any]) -> bool:
        flat = [item for pair in fields.items() for item in pair]
        done = await self._script(redis_scripts.SETTLE, [JOBS, stream], token, kept, *flat)
        self._settled += 1
        if self._settled % _TRIM_EVERY == 0:
            await self._script(redis_scripts.TRIM, [JOBS], _JOBS_KEPT)
        return bool(done)

    async def _join(self) -> None:
        """Make the group, from the beginning of the stream: jobs may have been submitted before the first worker."""
        if self._ready:
            return
        try:
            await self._redis.xgroup_create(JOBS, GROUP, id="0", mkstream=True)
        except self._rejected as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._ready = True

    async def _script(self, script: str, keys: Sequence[str], *args: Any) -> Any:
        # EVAL rather than EVALSHA: a few hundred bytes, and nothing to lose when the server restarts.
        call: Any = self._redis.eval(script, len(keys), *keys, GROUP, *args)
        return await call

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            yield
        except self._failures as error:
            # A server that lost its data has lost the group too: it is made anew with the next claim.
            self._ready = False
            raise QueueUnavailableError(f"Redis {self._url} does not answer: {_reason(error)}") from error


def _address(url: str) -> BusAddress:
    try:
        address = parse(url)
        if address.kind not in ("single", "unix"):
            raise BusURLError(f"a queue is in one Redis: need redis://, rediss:// or unix://, not a {address.kind}")
        check_tls_files(address)
    except BusURLError as error:
        raise BusURLError(f"{mask(url.strip())} is not a Redis URL for jobs: {error}") from None
    return address


def _message(fields: dict[bytes, bytes]) -> bytes:
    found = fields.get(_FIELD.encode())
    if found is None:
        raise MessageError(f"the entry has no field {_FIELD!r}; it has: {', '.join(map(ascii, list(fields)[:8]))}")
    return found


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _reason(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
