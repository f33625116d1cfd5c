"""Kernels by artifact id: memory, then disk, then the registry.

The hit in memory takes a lock and a dictionary look-up in the caller's own thread. Everything else happens once an id,
however many ask: the disk, hashing and parsing in a worker thread, the network on the package's background loop. So it
makes no difference which event loop, or how many, the callers use, and a caller that is cancelled takes nothing away
from the others.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from esper.artifacts.keyring import KeyRing, TrustedKeys
from esper.artifacts.locate import open_registry
from esper.artifacts.trust import resolve_policy
from esper.contracts.errors import ArtifactError, EsperError
from esper.contracts.paths import cache_dir
from esper.contracts.registry import RegistryClient
from esper.execution import background
from esper.execution.circuit_breaker import CircuitBreaker
from esper.execution.disk_cache import DiskCache
from esper.execution.fetching import Fetcher
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.kernel_source import KernelSource, Load
from esper.execution.memory_cache import KernelMemory

__all__ = ["KernelCache"]

_MIB: Final = 1 << 20
_ERRORS_KEPT: Final = 1024


class KernelCache:
    """A cache of kernels, safe from any thread and any event loop.

    Copying or pickling a cache gives an empty one with the same settings.

    Args:
        max_cache_size_mb: Memory for kernels, in MiB of artifact bytes; the least recently used go first. A kernel
            larger than this is handed out, but not kept.
        max_entries: Most kernels kept.
        registry: Where kernels come from: a client, a path, a ``file://`` or ``http(s)://`` URL. None means
            ``ESPER_REGISTRY``, else the user's own registry folder. A client's coroutines run on the background loop.
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
        max_disk_mb: Bound of the disk tier, in MiB; the least recently used go first. It is the folder's: of the
            processes that share one, the smallest bound counts.
        trusted_keys: Whose signatures are trusted, as for :meth:`Artifact.open`; None means ``ESPER_TRUSTED_KEYS``.
        policy: ``standard``, or ``strict``, which refuses what no trusted key signed; None means
            ``ESPER_TRUST_POLICY``, else ``standard``.

    Raises:
        ValueError: for a size, count or time that is out of range, a registry URL that cannot be opened, or keys that
            cannot be read.
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
        max_disk_mb: float = 4096,
        trusted_keys: TrustedKeys = None,
        policy: str | None = None,
    ) -> None:
        _check("max_cache_size_mb", max_cache_size_mb, 0)
        _check("max_entries", max_entries, 0, integer=True)
        _check("timeout_s", timeout_s, 0)
        _check("retries", retries, 0, integer=True)
        _check("max_artifact_mb", max_artifact_mb, 0)
        _check("backoff_s", backoff_s, 0)
        _check("breaker_threshold", breaker_threshold, 1, integer=True)
        _check("breaker_cooldown_s", breaker_cooldown_s, 0)
        _check("max_disk_mb", max_disk_mb, 0)
        self._registry = open_registry(registry)
        keys, chosen = KeyRing.of(trusted_keys), resolve_policy(policy)
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
            "max_disk_mb": max_disk_mb,
            "trusted_keys": keys,
            "policy": chosen,
        }
        self.device = torch.device(device)
        self.max_entries = max_entries
        self.max_bytes = int(max_cache_size_mb * _MIB)
        max_artifact_bytes = int(max_artifact_mb * _MIB)
        folder = Path(disk_dir).expanduser().absolute() if disk_dir is not None else cache_dir() / "kernels"
        self._disk = DiskCache(folder, int(max_disk_mb * _MIB)) if use_disk else None
        self._breaker = CircuitBreaker(breaker_threshold, breaker_cooldown_s)
        self._fetcher = Fetcher(
            self._registry,
            max_bytes=max_artifact_bytes,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
            breaker=self._breaker,
            on_retry=lambda: self._count("retries"),
        )
        self._source = KernelSource(
            self._disk,
            self._fetcher,
            max_bytes=max_artifact_bytes,
            patience_s=timeout_s,
            keys=keys,
            policy=chosen,
            count=self._count,
        )
        self._lock = threading.Lock()
        self._memory = KernelMemory(self.max_bytes, max_entries)
        self._flights: dict[tuple[str, torch.device], Future[LoadedKernel | None]] = {}
        self._errors: OrderedDict[str, str] = OrderedDict()
        self._counts = dict.fromkeys(_COUNTERS, 0)
        _caches.add(self)

    @property
    def registry(self) -> RegistryClient:
        """Where kernels come from."""
        return self._registry

    async def load_kernel(self, artifact_id: str, *, device: torch.device | None = None) -> LoadedKernel | None:
        """The kernel, from wherever it is nearest.

        Args:
            artifact_id: As :func:`esper.compile` returned it.
            device: Where its tensors shall be; None means the cache's device. Layers ask for their own.

        Returns:
            The kernel, or None when it is not to be had: it does not exist, or the registry does not answer.
            :meth:`last_error` then says why.

        Raises:
            ArtifactError: the artifact was had, and is bad.
        """
        place = self.device if device is None else device
        with self._lock:
            kernel = self._memory.get(artifact_id, place)
            if kernel is not None:
                self._counts["hits"] += 1
                return kernel
            self._counts["misses"] += 1
            flight = self._flights.get((artifact_id, place))
            if flight is None:
                flight = Future()
                self._source.start(Load(artifact_id, place, partial(self._land, artifact_id, place, flight)))
                self._flights[artifact_id, place] = flight
        return await background.wait(flight)

    async def preload_kernels(
        self, artifact_ids: Iterable[str], *, device: torch.device | None = None
    ) -> dict[str, LoadedKernel | None]:
        """Load several kernels at once, as :meth:`load_kernel` does.

        Args:
            artifact_ids: What to load; each once.
            device: Where it shall be: that of the model which will ask for it. None means the cache's.

        Returns:
            None for each that is not to be had or is bad, with its :meth:`last_error`.
        """
        ids = list(dict.fromkeys(artifact_ids))
        results = await asyncio.gather(*(self.load_kernel(i, device=device) for i in ids), return_exceptions=True)
        found: dict[str, LoadedKernel | None] = {}
        for artifact_id, result in zip(ids, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, ArtifactError):
                raise result
            found[artifact_id] = None if isinstance(result, BaseException) else result
        return found

    def remove_kernel(self, artifact_id: str) -> bool:
        """Drop a kernel from memory (not from the disk); whether it was there."""
        with self._lock:
            return self._memory.pop(artifact_id)

    def clear_cache(self) -> None:
        """Drop all kernels from memory (not from the disk). Counters and loads under way go on."""
        with self._lock:
            self._memory.clear()

    def last_error(self, artifact_id: str) -> str | None:
        """Why the last load of ``artifact_id`` gave no kernel; None when it gave one, or was never tried."""
        with self._lock:
            return self._errors.get(artifact_id)

    def get_cache_stats(self) -> dict[str, Any]:
        """What the cache holds and did.

        Returns:
            entries, max_entries, total_size_mb, max_size_mb (memory, in MiB of artifact bytes); hits, misses, hit_rate
            (of memory; 0.0 before the first load), evictions; disk_hits, disk_evictions (by this cache), disk_errors
            (the disk tier could not be read or written), quarantined (altered on disk, set aside and fetched again),
            disk_size_mb (as last seen; None before this cache stored anything), max_disk_mb; fetches (artifacts had
            from the registry), shared_fetches (had from the disk after another process fetched them), retries, failures
            (loads that gave no kernel); in_flight (loads under way), circuit_open; offline (the registry did not answer
            when it was asked last), last_error (why; None while it answers).
        """
        with self._lock:
            asked = self._counts["hits"] + self._counts["misses"]
            disk, error = self._disk, self._fetcher.error
            stored = disk.nbytes if disk is not None else None
            return {
                "entries": len(self._memory),
                "max_entries": self.max_entries,
                "total_size_mb": self._memory.nbytes / _MIB,
                "max_size_mb": self.max_bytes / _MIB,
                **self._counts,
                "hit_rate": self._counts["hits"] / asked if asked else 0.0,
                "evictions": self._memory.evictions,
                "disk_evictions": disk.evictions if disk is not None else 0,
                "disk_size_mb": stored / _MIB if stored is not None else None,
                "max_disk_mb": disk.max_bytes / _MIB if disk is not None else 0.0,
                "in_flight": len(self._flights),
                "circuit_open": self._breaker.open,
                "offline": error is not None,
                "last_error": error,
            }

    def _land(
        self,
        artifact_id: str,
        place: torch.device,
        flight: Future[LoadedKernel | None],
        outcome: LoadedKernel | BaseException,
    ) -> None:
        """Put on record what came of a load, and tell all who asked."""
        with self._lock:
            if self._flights.get((artifact_id, place)) is flight:
                del self._flights[artifact_id, place]
            self._errors.pop(artifact_id, None)
            if isinstance(outcome, LoadedKernel):
                self._memory.put(outcome, place)
            else:
                self._counts["failures"] += 1
                self._errors[artifact_id] = _reason(outcome).removeprefix(f"{artifact_id}: ")
                while len(self._errors) > _ERRORS_KEPT:
                    self._errors.popitem(last=False)
        if isinstance(outcome, LoadedKernel):
            flight.set_result(outcome)
        elif isinstance(outcome, ArtifactError):
            flight.set_exception(outcome)
        elif isinstance(outcome, asyncio.CancelledError):
            flight.cancel()
            flight.set_running_or_notify_cancel()
        else:
            flight.set_result(None)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _forget_flights(self) -> None:
        """In a forked child: the parent's loads are the parent's, and its threads may have held the lock."""
        self._lock = threading.Lock()
        self._flights.clear()
        if self._disk is not None:
            self._disk._forget_lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        return type(self)(**self._settings)

    def __reduce__(self) -> tuple[Callable[..., KernelCache], tuple[type[KernelCache], dict[str, Any]]]:
        return _rebuild, (type(self), self._settings)

    def __repr__(self) -> str:
        with self._lock:
            held = f"{len(self._memory)} kernels, {self._memory.nbytes / _MIB:.1f} MiB"
        return f"KernelCache({held}, {self._registry.url})"


_COUNTERS: Final[Sequence[str]] = (
    "hits",
    "misses",
    "disk_hits",
    "disk_errors",
    "quarantined",
    "fetches",
    "shared_fetches",
    "retries",
    "failures",
)


def _check(name: str, value: float, low: int, *, integer: bool = False) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= low or not math.isfinite(value):
        raise ValueError(
            f"{name} must be {'an integer' if integer else 'a finite number'} of at least {low}, not {value!r}"
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, EsperError):
        return str(error) or "not to be had"
    if isinstance(error, asyncio.CancelledError):
        return "the load was cancelled"
    # A client's own fault must not end a training run; the reason stays on record.
    return f"the registry client failed: {type(error).__name__}: {error}"


def _rebuild(kind: type[KernelCache], settings: dict[str, Any]) -> KernelCache:
    return kind(**settings)


_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


def _reset_in_child() -> None:
    for cache in _caches:
        cache._forget_flights()


os.register_at_fork(after_in_child=_reset_in_child)
