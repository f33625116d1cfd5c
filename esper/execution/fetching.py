"""Asking a registry: how long to wait, when to ask again, when to leave it alone, and what to say meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from esper.contracts.backoff import Backoff
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.registry import RegistryClient
from esper.execution.circuit_breaker import CircuitBreaker

__all__ = ["Fetcher"]

_log = logging.getLogger(__name__)

#: Longest pause that a registry may ask for; one that wants more is not asked again for this load.
PATIENCE_S = 10.0


class Fetcher:
    """The registry tier of a cache. Used from one event loop at a time; its properties may be read from any thread.

    Args:
        registry: The client.
        max_bytes: Largest artifact accepted.
        timeout_s: Seconds for one attempt.
        retries: Further attempts after one that failed for a reason that may pass.
        backoff_s: Bound of the first pause.
        breaker: Decides whether to ask at all.
        on_retry: Called before every further attempt.
    """

    def __init__(
        self,
        registry: RegistryClient,
        *,
        max_bytes: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        breaker: CircuitBreaker,
        on_retry: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff = Backoff(backoff_s, PATIENCE_S)
        self._breaker = breaker
        self._on_retry = on_retry
        self._error: str | None = None

    @property
    def error(self) -> str | None:
        """Why the registry did not answer when it was asked last; None if it did, or was never asked."""
        return self._error

    async def fetch(self, artifact_id: str) -> bytes | bytearray:
        """The artifact's bytes as the registry gave them.

        Raises:
            KernelNotFoundError: there is no such artifact.
            ArtifactError: there is one and it is bad.
            RegistryUnavailableError: it does not answer, refuses access, or is left alone at present.
        """
        failure: OSError | None = None
        for attempt in range(self._retries + 1):
            if failure is not None:
                pause = self._backoff.pause_s(attempt - 1, getattr(failure, "retry_after_s", None))
                if pause is None:
                    break
                self._on_retry()
                await asyncio.sleep(pause)
            if not self._breaker.allow():
                break
            try:
                async with asyncio.timeout(self._timeout_s):
                    data = await self._registry.fetch(artifact_id, max_bytes=self._max_bytes)
            except (KernelNotFoundError, ArtifactError):
                self._answered()
                raise
            except TimeoutError:
                failure = TimeoutError(f"no answer within {self._timeout_s:g} s")
            except OSError as error:  # RegistryUnavailableError among them
                if not getattr(error, "retryable", True):
                    # It is there, and says no; it would say no again.
                    self._answered()
                    raise
                failure = error
            else:
                self._answered()
                return data
            self._breaker.failure()
        reason = str(failure) if failure is not None else f"not asked, the next try is in {self._breaker.wait_s:.1f} s"
        self._unanswered(reason)
        raise RegistryUnavailableError(f"registry {self._registry.url} does not answer: {reason}") from failure

    def _answered(self) -> None:
        self._breaker.success()
        if self._error is not None:
            self._error = None
            _log.info("registry %s answers again", self._registry.url)

    def _unanswered(self, reason: str) -> None:
        if self._error is None:
            _log.warning(
                "registry %s does not answer (%s): until it does, kernels come from memory and the disk cache",
                self._registry.url,
                reason,
            )
            self._error = reason
