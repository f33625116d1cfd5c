"""Messages that could not be sent, kept on disk in order until they can.

Each process has a folder of its own under a common root, locked with ``flock(2)`` for as long as it lives. A folder
whose lock is free was left by a process that is gone, and the next process takes over what is in it. In a folder,
records are appended to segment files; a segment is deleted when all of it was sent, and the oldest goes when the spool
is full.

A record is 16 bytes (length of the content, CRC-32 of tag and content, tag as int64; little-endian) and the content. A
process that is killed leaves at most one record torn, at the end: reading stops there. Nothing is flushed to the
device, so what a power failure leaves is up to the file system; a torn record is recognised all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["Record", "Spool", "SpoolError"]

#: A segment is closed when it has grown beyond this; dropping is by whole segments.
SEGMENT_BYTES: Final = 1 << 20
_HEAD: Final = struct.Struct("<IIq")
#: A longer record is no message.
_LONGEST: Final = 1 << 21
_LOCK: Final = "lock"
_SUFFIX: Final = ".seg"
#: Folders that are being made; whoever looks for what others left passes them by.
_UNFINISHED: Final = ".new-"


class SpoolError(OSError):
    """The spool cannot be used: its folder cannot be made or written, or the disk is full. Says which."""


@dataclass(frozen=True, slots=True)
class Record:
    """One spooled message.

    Attributes:
        tag: A number that the writer can tell its kind by, without parsing the content.
        content: The message.
        own: Whether this process wrote it.
    """

    tag: int
    content: bytes
    own: bool


@dataclass(slots=True, eq=False)
class _Segment:
    path: Path
    own: bool
    size: int
    #: Records not yet taken, by tag.
    tags: Counter[int] = field(default_factory=Counter)
    #: All of them: asked for with every message of an outage, so it is not added up.
    count: int = 0
    #: Position of the first record not yet taken.
    read: int = 0


class Spool:
    """Records in the order of writing, bounded in bytes. Used by one thread.

    Args:
        root: Folder that the processes of one bus share; made if missing.
        max_bytes: Most that this process keeps, what it took over included; at least two segments.

    Raises:
        SpoolError: no folder can be made and locked there.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max(max_bytes, 2 * SEGMENT_BYTES)
        self._segments: deque[_Segment] = deque()
        self._size = 0
        self._next = 0
        self._file: int | None = None
        self._lock: int | None = None
        self._pid = os.getpid()
        #: Records of tags that were dropped since :meth:`take_dropped`: (own, taken over).
        self._dropped: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        #: Segments of others that ended in something that is no record.
        self.damaged = 0
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._folder, self._lock = _make_folder(root)
        except OSError as error:
            raise SpoolError(f"no spool in {root}: {error.strerror or error}") from error
        self._adopt()

    # -- what is there -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(segment.count for segment in self._segments)

    @property
    def own(self) -> int:
        """Records that this process wrote and that are still here."""
        return sum(segment.count for segment in self._segments if segment.own)

    @property
    def size_bytes(self) -> int:
        """Bytes of the segments."""
        return self._size

    # -- writing -----------------------------------------------------------------------------------

    def append(self, tag: int, content: bytes) -> None:
        """Add a record behind the others; the oldest segments go if there is no room.

        Raises:
            SpoolError: it was not written, and is in none of the counts.
        """
        framed = _HEAD.pack(len(content), _crc(tag, content), tag) + content
        segment = self._segment_for(len(framed))
        assert self._file is not None
        try:
            written = os.write(self._file, framed)
        except OSError as error:
            raise self._undone(segment, error.strerror or str(error)) from error
        if written != len(framed):
            raise self._undone(segment, "no space left")
        segment.size += len(framed)
        self._size += len(framed)
        segment.tags[tag] += 1
        segment.count += 1

    def _segment_for(self, size: int) -> _Segment:
        """The segment that a record of this size goes to."""
        if self._file is None or self._segments[-1].size >= SEGMENT_BYTES:
            self._close_file()
            path = self._folder / f"{self._next:010d}{_SUFFIX}"
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise SpoolError(f"{path}: {error.strerror or error}") from error
            self._next += 1
            self._segments.append(_Segment(path, own=True, size=0))
        while self._size + size > self._max_bytes and len(self._segments) > 1:
            self._drop_oldest()
        return self._segments[-1]

    def _undone(self, segment: _Segment, why: str) -> SpoolError:
        # Half a record would hide those after it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, segment.size)  # type: ignore[arg-type]
        self._close_file()
        return SpoolError(f"{segment.path}: {why}")

    def _drop_oldest(self) -> None:
        segment = self._segments.popleft()
        self._size -= segment.size
        if not self._segments:
            self._close_file()
        self._dropped[0 if segment.own else 1].update(segment.tags)
        _unlink(segment.path)

    def take_dropped(self) -> tuple[Counter[int], Counter[int]]:
        """Records dropped for want of room since the last call, by tag: this process's own, and taken over."""
        dropped, self._dropped = self._dropped, (Counter(), Counter())
        return dropped

    # -- reading -----------------------------------------------------------------------------------

    def head(self, max_bytes: int, max_records: int) -> list[Record]:
        """The oldest records, from one segment, without taking them: at least one if there is any.

        Args:
            max_bytes: Stop before the contents are longer together.
            max_records: Most records.
        """
        while self._segments:
            segment = self._segments[0]
            if not segment.count:
                self._remove_empty(segment)
            elif found := self._read(segment, max_bytes, max_records):
                return found
            else:
                # Somebody took it away, or the disk is failing: what is missing counts as dropped.
                self._drop_oldest()
        return []

    def take(self, records: list[Record]) -> None:
        """The records that :meth:`head` gave were sent."""
        segment = self._segments[0]
        for record in records:
            segment.read += _HEAD.size + len(record.content)
            segment.tags[record.tag] -= 1
        segment.count -= len(records)
        if not segment.count:
            self._remove_empty(segment)

    def _remove_empty(self, segment: _Segment) -> None:
        if segment is self._segments[-1]:
            self._close_file()
        self._segments.remove(segment)
        self._size -= segment.size
        _unlink(segment.path)

    def _read(self, segment: _Segment, max_bytes: int, max_records: int) -> list[Record]:
        found: list[Record] = []
        total = 0
        try:
            with segment.path.open("rb") as file:
                file.seek(segment.read)
                while len(found) < min(max_records, segment.count):
                    record = _next_record(file.read(_HEAD.size), file.read)
                    if record is None:
                        break
                    total += len(record[1])
                    if found and total > max_bytes:
                        break
                    found.append(Record(*record, segment.own))
        except OSError:
            return found
        return found

    # -- what others left --------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the segments of processes that are gone, oldest folder first."""
        left: list[tuple[float, Path]] = []
        for folder in self._root.iterdir():
            if folder.name.startswith(_UNFINISHED) or folder == self._folder:
                continue
            with contextlib.suppress(OSError):
                left.append((folder.stat().st_mtime, folder))
        for _, folder in sorted(left):
            with contextlib.suppress(OSError):
                self._take_over(folder)

    def _take_over(self, folder: Path) -> None:
        with _locked(folder / _LOCK) as mine:
            if not mine:
                return
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                target = self._folder / f"{self._next:010d}{_SUFFIX}"
                path.rename(target)
                self._next += 1
                segment = self._scanned(target)
                if segment.count:
                    self._segments.append(segment)
                    self._size += segment.size
                else:
                    _unlink(target)
            shutil.rmtree(folder, ignore_errors=True)
        while self._size > self._max_bytes and len(self._segments) > 1:
            self._drop_oldest()

    def _scanned(self, path: Path) -> _Segment:
        segment = _Segment(path, own=False, size=path.stat().st_size)
        end = 0
        with path.open("rb") as file:
            while (record := _next_record(file.read(_HEAD.size), file.read)) is not None:
                segment.tags[record[0]] += 1
                segment.count += 1
                end += _HEAD.size + len(record[1])
        self.damaged += end != segment.size
        return segment

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the folder: what is in it is the next process's. An empty one is removed. Once is enough."""
        self._close_file()
        if os.getpid() != self._pid or self._lock is None:
            return  # in a forked child the folder is its parent's
        if not len(self):
            shutil.rmtree(self._folder, ignore_errors=True)
        self._unlock()

    def forget(self) -> None:
        """In a forked child: close what was inherited; the parent keeps its lock."""
        self._close_file()
        self._unlock()
        self._segments.clear()

    def _unlock(self) -> None:
        # A number that is closed may be somebody else's file by the next time.
        lock, self._lock = self._lock, None
        if lock is not None:
            _close(lock)

    def _close_file(self) -> None:
        if self._file is not None:
            _close(self._file)
            self._file = None


def _crc(tag: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(tag.to_bytes(8, "little", signed=True)))


def _next_record(head: bytes, read: Callable[[int], bytes]) -> tuple[int, bytes] | None:
    """The record that begins with ``head``, its content from ``read(size)``; None at the end and where it is torn."""
    if len(head) != _HEAD.size:
        return None
    size, crc, tag = _HEAD.unpack(head)
    if size > _LONGEST:
        return None
    content = read(size)
    if len(content) != size or _crc(tag, content) != crc:
        return None
    return tag, content


def _make_folder(root: Path) -> tuple[Path, int]:
    """A new folder, locked before anybody can see it."""
    name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    unfinished = root / f"{_UNFINISHED}{name}"
    unfinished.mkdir(mode=0o700)
    lock = os.open(unfinished / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = root / name
        unfinished.rename(folder)
    except OSError:
        _close(lock)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder, lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            # Somebody may have emptied and removed the folder between the opening and the locking.
            yield path.exists()
    finally:
        _close(lock)


def _close(file: int) -> None:
    with contextlib.suppress(OSError):
        os.close(file)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
