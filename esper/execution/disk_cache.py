"""The kernel cache's disk tier: a folder that any number of processes share, kept under a bound.

Readers and writers need no lock: a file appears under its name complete, and whoever opened one reads it to its end
even if it is deleted meanwhile. There are two locks all the same, both advisory and both the kernel's own (``flock``),
so that a process that is killed lets go of them: one an artifact, so that of several processes that lack it one fetches
it, and one for the process that makes room.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from esper.artifacts.folder import ArtifactFolder
from esper.contracts.errors import ArtifactError, EsperError
from esper.contracts.registry import ArtifactSummary

__all__ = ["Claim", "DiskCache"]

#: Making room goes on until this share of the bound is in use, so that not every artifact stored has to make some.
_LOW_WATER: Final = 0.9
#: What other processes store is found out by looking again: after this time,
_LOOK_AGAIN_S: Final = 600.0
#: or when this process has stored as much as this share of what seemed to be free.
_LOOK_AGAIN_SHARE: Final = 0.25
#: Files of writers and fetchers that were killed are removed when they are this old.
_ABANDONED_S: Final = 3600.0
_ENTRIES_KNOWN: Final = 4096


class Claim:
    """A process's word that it is fetching an artifact. Others wait for what it stores, as long as they see fit."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others fetch it; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError):
            # Whoever opened the file before this and locks it afterwards holds a lock that nobody else sees. Then two
            # fetch the same bytes, which does no harm.
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Not by closing alone: a child that was forked meanwhile has the file open too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class DiskCache:
    """Artifacts on the local disk. Blocking; safe from several threads and processes.

    Args:
        root: The folder.
        max_bytes: Most bytes of artifacts kept; the least recently used go first. Between two looks at the folder
            several processes may together exceed it.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.evictions = 0
        self._files = ArtifactFolder(root, durable=False)
        self._known: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._seen: int | None = None
        self._seen_at = 0.0
        self._stored = 0

    @property
    def nbytes(self) -> int | None:
        """Bytes kept, as far as this process knows; None before it stored anything."""
        return None if self._seen is None else self._seen + self._stored

    def read(self, artifact_id: str, max_bytes: int) -> tuple[bytearray, str]:
        """An artifact's bytes and their SHA-256; it is now the most recently used.

        Raises:
            KernelNotFoundError: it is not here.
            RegistryUnavailableError: there is no such folder, or it cannot be read.
            ArtifactError: it is larger than ``max_bytes``, or was altered.
        """
        known = self._known.get(artifact_id)
        if known is not None and known[1] <= max_bytes:
            try:
                return self._read(artifact_id, *known), known[0]
            except EsperError:
                self._known.pop(artifact_id, None)  # read the entry again
        entry = self._files.entry(artifact_id)
        if entry.size > max_bytes:
            raise ArtifactError(f"{artifact_id} has {entry.size} bytes, more than the limit of {max_bytes}")
        data = self._read(artifact_id, entry.sha256, entry.size)
        if len(self._known) >= _ENTRIES_KNOWN:
            self._known.clear()
        self._known[artifact_id] = entry.sha256, entry.size
        return data, entry.sha256

    def _read(self, artifact_id: str, sha256: str, size: int) -> bytearray:
        data = self._files.read_blob(artifact_id, sha256, size)
        with contextlib.suppress(OSError):  # a disk that is read only, or a blob that was just evicted
            os.utime(self._files.blob_path(sha256))
        return data

    def store(self, data: bytes | bytearray, summary: ArtifactSummary) -> None:
        """Keep an artifact that was verified, and make room if need be; one larger than the bound is not kept.

        Raises:
            RegistryUnavailableError: the folder cannot be written.
            ArtifactError: another artifact has the same id.
        """
        if summary.size > self.max_bytes:
            return
        self._files.store(data, summary)
        with self._lock:
            self._stored += summary.size
            due = self._due()
        if due:
            self.make_room()

    def set_aside(self, artifact_id: str, max_bytes: int) -> bool:
        """Quarantine what is damaged; False for what is merely too large for this cache: another may allow more.

        Raises:
            RegistryUnavailableError: the folder cannot be written.
        """
        with contextlib.suppress(EsperError):
            if self._files.entry(artifact_id).size > max_bytes:
                return False
        self._known.pop(artifact_id, None)
        self._files.quarantine(artifact_id)
        return True

    def holds(self, artifact_id: str) -> bool:
        """Whether there is an index entry; it may be gone, or turn out bad, when it is read."""
        # Not Path.exists, which raises where a name is too long.
        return os.path.exists(self._files.entry_path(artifact_id))

    def claim(self, artifact_id: str) -> Claim | None:
        """Take it upon this process to fetch an artifact; None if another one has.

        Where files cannot be locked everybody may fetch.
        """
        path = self.root / "locks" / f"{artifact_id}.lock"
        try:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return Claim(path, None)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            return Claim(path, None)
        return Claim(path, descriptor)

    # -- the bound

    def _due(self) -> bool:
        """Whether to look at the folder; the lock is held."""
        if self._seen is None or time.monotonic() - self._seen_at > _LOOK_AGAIN_S:
            return True
        free = self.max_bytes - self._seen
        return self._stored > free * _LOOK_AGAIN_SHARE

    def make_room(self) -> None:
        """Look at what is there, and if it is too much, delete what was used longest ago.

        One process does it at a time; the others go on. A file that cannot be deleted is passed over.
        """
        with _locked(self.root / "evict.lock") as mine:
            if not mine:
                return
            with self._lock:
                self._stored = 0
            blobs = self._blobs()
            total = sum(size for _, size, _ in blobs)
            if total > self.max_bytes:
                total -= self._evict(blobs, total - int(self.max_bytes * _LOW_WATER))
            self._remove_abandoned()
        with self._lock:
            self._seen, self._seen_at = total, time.monotonic()

    def _blobs(self) -> list[tuple[int, int, str]]:
        """Time of last use, size and path of every blob, those in quarantine among them."""
        found = []
        shards: list[str | Path] = [entry.path for entry in _scan(self.root / "blobs" / "sha256")]
        for folder in [*shards, self.root / "quarantine"]:
            for entry in _scan(folder):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    def _evict(self, blobs: list[tuple[int, int, str]], wanted: int) -> int:
        """Delete blobs, the one used longest ago first, until ``wanted`` bytes are free; how many are."""
        # An id ends with the first digits of its blob's name, so the entries need not be read.
        entries: dict[str, list[str]] = {}
        for entry in _scan(self._files.index):
            entries.setdefault(entry.name.removesuffix(".json").rpartition("-")[2], []).append(entry.path)
        freed = 0
        for _, size, path in sorted(blobs):
            if freed >= wanted:
                break
            # The entry first: whoever finds it finds the blob, but for a moment in which he fetches again.
            for stale in (*entries.get(os.path.basename(path)[:8], ()), path):
                with contextlib.suppress(OSError):
                    os.unlink(stale)
            freed += size
            self.evictions += 1
        return freed

    def _remove_abandoned(self) -> None:
        before = time.time() - _ABANDONED_S
        for folder in ("tmp", "locks"):
            for entry in _scan(self.root / folder):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.path)

    def _forget_lock(self) -> None:
        """In a forked child, whose parent's threads may have held it."""
        self._lock = threading.Lock()


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file; False if another process holds it, or there can be none."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
