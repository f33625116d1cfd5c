"""Kernels by artifact id: memory, then disk, then the registry.

The hit in memory takes a lock and a dictionary look-up in the caller's own thread. Everything else happens once an id,
however many ask, on the package's background loop, with file work, hashing and parsing in worker threads; so it makes
no difference which event loop, or how many, the callers use, and a caller that is cancelled takes nothing away from
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import torch

from esper.artifacts.artifact import Artifact
from esper.artifacts.folder import ArtifactFolder
from esper.artifacts.locate import open_registry
from esper.artifacts.text import summarise
from esper.artifacts.workers import run_blocking
from esper.contracts.errors import ArtifactError, EsperError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.ids import parse_artifact_id
from esper.contracts.paths import cache_dir
from esper.contracts.registry import ArtifactSummary, RegistryClient
from esper.execution import background
from esper.execution.circuit_breaker import CircuitBreaker
from esper.execution.kernel_executor import LoadedKernel

__all__ = ["KernelCache"]

_MIB: Final = 1 << 20
_MAX_BACKOFF_S: Final = 5.0
_ERRORS_KEPT: Final = 1024


class KernelCache:
    """A cache of kernels, safe from any thread and any event loop.

    Copying or pickling a cache gives an empty one with the same settings.

    Args:
        max_cache_size_mb: Memory for kernels, in MiB of artifact bytes; the least recently used go first. A kernel
            larger than this is handed out, but not kept.
        max_entries: Most kernels kept.
        registry: Where kernels come from: a client, a ``file://`` URL or a path. None means ``ESPER_REGISTRY``, else
            the user's own registry folder. A client's coroutines run on the background loop.
        device: Where the kernels' tensors go.
        disk_dir: Folder of the disk tier, which processes may share; None means ``ESPER_CACHE_DIR``, else the XDG
            cache folder.
        use_disk: False leaves the disk tier out.
        timeout_s: Seconds for one attempt at the registry.
        retries: Further attempts after one that failed for a reason that may pass.
        max_artifact_mb: Largest artifact accepted, in MiB; checked before it is read.
        backoff_s: Longest wait before the first retry; it doubles with each, and the actual wait is random below it.
        breaker_threshold: Failed attempts in a row after which the registry is left alone,
        breaker_cooldown_s: for this many seconds.

    Raises:
        ValueError: for a size, count or time that is out of range, or a registry URL that cannot be opened.
    """

    def __init__(
        self,
        max_cache_size_mb: float = 128,
        max_entries: int = 128,
        *,
        registry: RegistryClient | str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        disk_dir: str | os.PathLike[str] | None = None,
        use_disk: bool = True,
        timeout_s: float = 30.0,
        retries: int = 3,
        max_artifact_mb: float = 256,
        backoff_s: float = 0.1,
        breaker_threshold: int = 5,
        breaker_cooldown_s: float = 10.0,
    ) -> None:
        _check("max_cache_size_mb", max_cache_size_mb, 0)
        _check("max_entries", max_entries, 0, integer=True)
        _check("timeout_s", timeout_s, 0)
        _check("retries", retries, 0, integer=True)
        _check("max_artifact_mb", max_artifact_mb, 0)
        _check("backoff_s", backoff_s, 0)
        _check("breaker_threshold", breaker_threshold, 1, integer=True)
        _check("breaker_cooldown_s", breaker_cooldown_s, 0)
        self._registry = open_registry(registry)
        self._settings: dict[str, Any] = {
            "max_cache_size_mb": max_cache_size_mb,
            "max_entries": max_entries,
            "registry": self._registry,
            "device": device,
            "disk_dir": disk_dir,
            "use_disk": use_disk,
            "timeout_s": timeout_s,
            "retries": retries,
            "max_artifact_mb": max_artifact_mb,
            "backoff_s": backoff_s,
            "breaker_threshold": breaker_threshold,
            "breaker_cooldown_s": breaker_cooldown_s,
        }
        self.device = torch.device(device)
        self.max_entries = max_entries
        self.max_bytes = int(max_cache_size_mb * _MIB)
        self._max_artifact_bytes = int(max_artifact_mb * _MIB)
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        folder = Path(disk_dir).expanduser().absolute() if disk_dir is not None else cache_dir() / "kernels"
        self._disk = ArtifactFolder(folder, durable=False) if use_disk else None
        self._breaker = CircuitBreaker(breaker_threshold, breaker_cooldown_s)
        # Not the module's generator: retries must not move the random numbers that a training run draws.
        self._random = random.Random()
        self._lock = threading.Lock()
        self._kernels: OrderedDict[str, LoadedKernel] = OrderedDict()
        self._bytes = 0
        self._flights: dict[str, Future[LoadedKernel | None]] = {}
        self._errors: OrderedDict[str, str] = OrderedDict()
        self._counts = dict.fromkeys(_COUNTERS, 0)
        _caches.add(self)

    @property
    def registry(self) -> RegistryClient:
        """Where kernels come from."""
        return self._registry

    async def load_kernel(self, artifact_id: str) -> LoadedKernel | None:
        """The kernel, from wherever it is nearest.

        Args:
            artifact_id: As :func:`esper.compile` returned it.

        Returns:
            The kernel, or None when it is not to be had: it does not exist, or the registry does not answer.
            :meth:`last_error` then says why.

        Raises:
            ArtifactError: the artifact was had, and is bad.
        """
        with self._lock:
            kernel = self._kernels.get(artifact_id)
            if kernel is not None:
                self._kernels.move_to_end(artifact_id)
                self._counts["hits"] += 1
                return kernel
            self._counts["misses"] += 1
            flight = self._flights.get(artifact_id)
            if flight is None:
                flight = self._flights[artifact_id] = background.submit(self._fly(artifact_id))
        return await background.wait(flight)

    async def preload_kernels(self, artifact_ids: Iterable[str]) -> dict[str, LoadedKernel | None]:
        """Load several kernels at once; None for each that is not to be had or is bad, with its :meth:`last_error`."""
        ids = list(dict.fromkeys(artifact_ids))
        results = await asyncio.gather(*(self.load_kernel(i) for i in ids), return_exceptions=True)
        found: dict[str, LoadedKernel | None] = {}
        for artifact_id, result in zip(ids, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, ArtifactError):
                raise result
            found[artifact_id] = None if isinstance(result, BaseException) else result
        return found

    def remove_kernel(self, artifact_id: str) -> bool:
        """Drop a kernel from memory (not from the disk); whether it was there."""
        with self._lock:
            kernel = self._kernels.pop(artifact_id, None)
            if kernel is not None:
                self._bytes -= kernel.nbytes
            return kernel is not None

    def clear_cache(self) -> None:
        """Drop all kernels from memory (not from the disk). Counters and loads under way go on."""
        with self._lock:
            self._kernels.clear()
            self._bytes = 0

    def last_error(self, artifact_id: str) -> str | None:
        """Why the last load of ``artifact_id`` gave no kernel; None when it gave one, or was never tried."""
        with self._lock:
            return self._errors.get(artifact_id)

    def get_cache_stats(self) -> dict[str, Any]:
        """What the cache holds and did.

        Returns:
            entries, max_entries, total_size_mb, max_size_mb (MiB of artifact bytes); hits, misses, hit_rate (of memory;
            0.0 before the first load), evictions; disk_hits, disk_errors (the disk tier could not be read or written),
            quarantined (altered on disk, set aside and fetched again); fetches (artifacts had from the registry),
            retries, failures (loads that gave no kernel); in_flight (loads under way), circuit_open.
        """
        with self._lock:
            asked = self._counts["hits"] + self._counts["misses"]
            return {
                "entries": len(self._kernels),
                "max_entries": self.max_entries,
                "total_size_mb": self._bytes / _MIB,
                "max_size_mb": self.max_bytes / _MIB,
                **self._counts,
                "hit_rate": self._counts["hits"] / asked if asked else 0.0,
                "in_flight": len(self._flights),
                "circuit_open": self._breaker.open,
            }

    async def _fly(self, artifact_id: str) -> LoadedKernel | None:
        """One load, on the background loop, for all who asked."""
        kernel: LoadedKernel | None = None
        reason: str | None = "the load was cancelled"
        try:
            kernel = await self._obtain(artifact_id)
            reason = None
        except ArtifactError as error:
            reason = str(error)
            raise
        except EsperError as error:
            reason = str(error)
        except Exception as error:
            # A client's own fault must not end a training run; the reason stays on record.
            reason = f"the registry client failed: {type(error).__name__}: {error}"
        finally:
            self._land(artifact_id, kernel, reason)
        return kernel

    def _land(self, artifact_id: str, kernel: LoadedKernel | None, reason: str | None) -> None:
        with self._lock:
            self._flights.pop(artifact_id, None)
            self._errors.pop(artifact_id, None)
            if kernel is not None:
                self._keep(kernel)
                return
            self._counts["failures"] += 1
            self._errors[artifact_id] = (reason or "not to be had").removeprefix(f"{artifact_id}: ")
            while len(self._errors) > _ERRORS_KEPT:
                self._errors.popitem(last=False)

    def _keep(self, kernel: LoadedKernel) -> None:
        """Insert and evict; the lock is held."""
        replaced = self._kernels.pop(kernel.artifact_id, None)
        self._bytes -= replaced.nbytes if replaced is not None else 0
        if kernel.nbytes > self.max_bytes or self.max_entries == 0:
            return
        self._kernels[kernel.artifact_id] = kernel
        self._bytes += kernel.nbytes
        while self._bytes > self.max_bytes or len(self._kernels) > self.max_entries:
            _, evicted = self._kernels.popitem(last=False)
            self._bytes -= evicted.nbytes
            self._counts["evictions"] += 1

    async def _obtain(self, artifact_id: str) -> LoadedKernel:
        try:
            parse_artifact_id(artifact_id)
        except ValueError as error:
            raise KernelNotFoundError(str(error)) from None
        kernel = await run_blocking(self._read_disk, artifact_id)
        if kernel is not None:
            return kernel
        data = await self._fetch(artifact_id)
        self._count("fetches")
        return await run_blocking(self._accept, artifact_id, data)

    async def _fetch(self, artifact_id: str) -> bytes | bytearray:
        """Ask the registry, again if the failure may pass, and not at all while the circuit is open."""
        failure: Exception | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                self._count("retries")
                await asyncio.sleep(self._random.uniform(0, min(_MAX_BACKOFF_S, self._backoff_s * 2 ** (attempt - 1))))
            if not self._breaker.allow():
                break
            try:
                async with asyncio.timeout(self._timeout_s):
                    data = await self._registry.fetch(artifact_id, max_bytes=self._max_artifact_bytes)
            except (KernelNotFoundError, ArtifactError):
                self._breaker.success()
                raise
            except TimeoutError:
                failure = TimeoutError(f"no answer within {self._timeout_s:g} s")
            except OSError as error:  # RegistryUnavailableError among them
                failure = error
            else:
                self._breaker.success()
                return data
            self._breaker.failure()
        reason = str(failure) if failure is not None else f"not asked, the next try is in {self._breaker.wait_s:.1f} s"
        raise RegistryUnavailableError(f"registry {self._registry.url} does not answer: {reason}") from failure

    def _accept(self, artifact_id: str, data: bytes | bytearray) -> LoadedKernel:
        """Verify what the registry gave, keep it on the disk, load it."""
        if len(data) > self._max_artifact_bytes:
            raise ArtifactError(f"{len(data)} bytes are more than the limit of {self._max_artifact_bytes}")
        artifact = self._open(artifact_id, data)
        if self._disk is not None:
            facts = summarise(artifact.manifest)
            summary = ArtifactSummary(artifact_id, artifact.sha256, artifact.nbytes, facts)
            try:
                self._disk.store(data, summary)
            except EsperError:
                # A full or read-only disk costs a fetch next time, not the kernel now.
                self._count("disk_errors")
        return LoadedKernel.from_artifact(artifact, self.device)

    def _read_disk(self, artifact_id: str) -> LoadedKernel | None:
        if self._disk is None:
            return None
        try:
            data, sha256 = self._disk.read(artifact_id, self._max_artifact_bytes)
            artifact = self._open(artifact_id, data, sha256)
        except ArtifactError:
            self._set_aside(self._disk, artifact_id)
            return None
        except KernelNotFoundError:
            return None
        except RegistryUnavailableError:
            if self._disk.root.exists():
                self._count("disk_errors")
            return None
        self._count("disk_hits")
        return LoadedKernel.from_artifact(artifact, self.device)

    def _set_aside(self, disk: ArtifactFolder, artifact_id: str) -> None:
        """Quarantine what is damaged; leave what is merely too large for this cache, another process may allow more."""
        with contextlib.suppress(EsperError):
            if disk.entry(artifact_id).size > self._max_artifact_bytes:
                return
        self._count("quarantined")
        try:
            disk.quarantine(artifact_id)
        except RegistryUnavailableError:
            self._count("disk_errors")

    def _open(self, artifact_id: str, data: bytes | bytearray, sha256: str | None = None) -> Artifact:
        """Verify bytes that are said to be ``artifact_id``: their hash before anything in them is parsed."""
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        if sha256[:8] != parse_artifact_id(artifact_id).version:
            raise ArtifactError(f"the bytes' SHA-256 is {sha256}: they are truncated, altered, or another artifact's")
        artifact = Artifact.adopt(data, sha256=sha256, max_bytes=self._max_artifact_bytes)
        if artifact.artifact_id != artifact_id:
            raise ArtifactError(f"asked for {artifact_id}, was given {artifact.artifact_id}")
        return artifact

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _forget_flights(self) -> None:
        """In a forked child: the parent's loads are the parent's, and its threads may have held the lock."""
        self._lock = threading.Lock()
        self._flights.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        return type(self)(**self._settings)

    def __reduce__(self) -> tuple[Callable[..., KernelCache], tuple[type[KernelCache], dict[str, Any]]]:
        return _rebuild, (type(self), self._settings)

    def __repr__(self) -> str:
        with self._lock:
            return f"KernelCache({len(self._kernels)} kernels, {self._bytes / _MIB:.1f} MiB, {self._registry.url})"


_COUNTERS: Final[Sequence[str]] = (
    "hits",
    "misses",
    "evictions",
    "disk_hits",
    "disk_errors",
    "quarantined",
    "fetches",
    "retries",
    "failures",
)


def _check(name: str, value: float, low: int, *, integer: bool = False) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= low or not math.isfinite(value):
        raise ValueError(
            f"{name} must be {'an integer' if integer else 'a finite number'} of at least {low}, not {value!r}"
        )


def _rebuild(kind: type[KernelCache], settings: dict[str, Any]) -> KernelCache:
    return kind(**settings)


_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


def _reset_in_child() -> None:
    for cache in _caches:
        cache._forget_flights()


os.register_at_fork(after_in_child=_reset_in_child)
