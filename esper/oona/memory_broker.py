"""Streams and groups in the memory of this process, with the meaning that Redis gives to the same commands.

Held to that by the tests, which run one suite on both. Bounded: at its limit it refuses to append, as Redis does. A
forked child begins with empty streams: the bus is the process's own.
"""

from __future__ import annotations

import bisect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any, Final

from esper.oona.commands import (
    Acknowledge,
    Add,
    Batch,
    Claim,
    Command,
    Entry,
    Info,
    MakeGroup,
    Newest,
    Pending,
    PendingRow,
    Ping,
    Range,
    Read,
    ReadGroup,
    StreamEntries,
    Trim,
)
from esper.oona.failures import refused
from esper.oona.urls import BusAddress

__all__ = ["DEFAULT_MAX_BYTES", "MemoryBroker", "broker"]

#: What all streams of one bus may hold.
DEFAULT_MAX_BYTES: Final = 128 << 20
#: What an entry costs beside its bytes: its id, its dictionary, its place in the lists.
_ENTRY_BYTES: Final = 500

_Id = tuple[int, int]
_LAST: Final[_Id] = (sys.maxsize, sys.maxsize)


@dataclass(slots=True)
class _HandedOut:
    consumer: str
    since: float
    times: int


@dataclass(slots=True)
class _Group:
    last: _Id
    pending: dict[_Id, _HandedOut] = field(default_factory=dict)


@dataclass(slots=True)
class _Stream:
    ids: list[_Id] = field(default_factory=list)
    entries: dict[_Id, Mapping[bytes, bytes]] = field(default_factory=dict)
    sizes: dict[_Id, int] = field(default_factory=dict)
    groups: dict[str, _Group] = field(default_factory=dict)
    last: _Id = (0, 0)

    def between(self, first: _Id, last: _Id, count: int) -> list[_Id]:
        begin = bisect.bisect_left(self.ids, first)
        end = bisect.bisect_right(self.ids, last)
        return self.ids[begin : min(end, begin + count)]

    def drop(self, number: int) -> int:
        """Forget the oldest entries; the bytes that they took."""
        gone, self.ids[:number] = self.ids[:number], []
        for each in gone:
            del self.entries[each]
        return sum(self.sizes.pop(each) for each in gone)


class MemoryBroker:
    """A server without a server.

    Args:
        address: Of the bus, for messages.
        max_bytes: What it holds at most.
    """

    def __init__(self, address: BusAddress, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._address = address
        self._max_bytes = max_bytes
        self._bytes = 0
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.RLock()
        self._waiting: set[Callable[[], None]] = set()

    def run(self, step: Command | Batch) -> Any:
        """Carry out ``step`` at once; a command that would wait does not.

        Raises:
            BusError: as a Redis would have refused it.
        """
        with self._lock:
            if isinstance(step, Batch):
                return [self._do(command) for command in step.commands]
            return self._do(step)

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, from any thread, whenever something was appended."""
        with self._lock:
            self._waiting.add(callback)

    def unwatch(self, callback: Callable[[], None]) -> None:
        """No longer."""
        with self._lock:
            self._waiting.discard(callback)

    @singledispatchmethod
    def _do(self, command: Command) -> Any:
        raise NotImplementedError(type(command).__name__)

    @_do.register
    def _(self, command: Ping) -> bool:
        return True

    @_do.register
    def _(self, command: Info) -> dict[str, Any]:
        return {"redis_version": "", "used_memory": self._bytes, "maxmemory": self._max_bytes}

    @_do.register
    def _(self, command: Add) -> str:
        if self._bytes >= self._max_bytes:
            reason = f"it holds {self._bytes} bytes, and its limit is {self._max_bytes}"
            raise refused("OOM", reason, self._address, command.stream)
        stream = self._streams.setdefault(command.stream, _Stream())
        now = int(time.time() * 1000)
        # Ids grow even where the clock does not.
        stream.last = (now, 0) if now > stream.last[0] else (stream.last[0], stream.last[1] + 1)
        fields = {_bytes(name): _bytes(value) for name, value in command.fields.items()}
        size = _ENTRY_BYTES + sum(len(name) + len(value) for name, value in fields.items())
        stream.ids.append(stream.last)
        stream.entries[stream.last] = fields
        stream.sizes[stream.last] = size
        self._bytes += size
        if command.max_length is not None:
            self._bytes -= stream.drop(max(0, len(stream.ids) - command.max_length))
        for callback in tuple(self._waiting):
            callback()
        return _text(stream.last)

    @_do.register
    def _(self, command: Trim) -> int:
        stream = self._streams.get(command.stream)
        if stream is None:
            return 0
        if command.min_id is not None:
            number = bisect.bisect_left(stream.ids, _id(command.min_id))
        else:
            number = max(0, len(stream.ids) - (command.max_length or 0))
        self._bytes -= stream.drop(number)
        return number

    @_do.register
    def _(self, command: MakeGroup) -> bool:
        stream = self._streams.setdefault(command.stream, _Stream())
        if command.group in stream.groups:
            raise refused("BUSYGROUP", "the group exists", self._address, command.stream)
        stream.groups[command.group] = _Group(_id(command.start))
        return True

    @_do.register
    def _(self, command: ReadGroup) -> StreamEntries:
        found: StreamEntries = []
        now = time.monotonic()
        groups = [self._group(name, command.group) for name in command.streams]
        for name, (stream, group) in zip(command.streams, groups, strict=True):
            ids = stream.between(_after(group.last), _LAST, command.count)
            if ids:
                group.last = ids[-1]
                group.pending.update((each, _HandedOut(command.consumer, now, 1)) for each in ids)
                found.append((name, _entries(stream, ids)))
        return found

    @_do.register
    def _(self, command: Read) -> StreamEntries:
        found: StreamEntries = []
        for name, place in command.places:
            stream = self._streams.get(name)
            ids = stream.between(_after(_id(place)), _LAST, command.count) if stream else []
            if stream and ids:
                found.append((name, _entries(stream, ids)))
        return found

    @_do.register
    def _(self, command: Acknowledge) -> int:
        stream = self._streams.get(command.stream)
        group = stream.groups.get(command.group) if stream else None
        if group is None:
            return 0
        return sum(group.pending.pop(_id(each), None) is not None for each in command.ids)

    @_do.register
    def _(self, command: Pending) -> list[PendingRow]:
        _, group = self._group(command.stream, command.group)
        idle = time.monotonic() - command.idle_ms / 1000
        rows = (PendingRow(_text(each), row.times) for each, row in sorted(group.pending.items()) if row.since <= idle)
        return _first(rows, command.count)

    @_do.register
    def _(self, command: Claim) -> list[Entry]:
        stream, group = self._group(command.stream, command.group)
        now = time.monotonic()
        claimed = []
        for each in map(_id, command.ids):
            row = group.pending.get(each)
            if row is None or row.since > now - command.idle_ms / 1000 or each not in stream.entries:
                continue
            group.pending[each] = _HandedOut(command.consumer, now, row.times + 1)
            claimed.append(each)
        return _entries(stream, claimed)

    @_do.register
    def _(self, command: Range) -> list[Entry]:
        stream = self._streams.get(command.stream)
        if stream is None:
            return []
        first = command.first.removeprefix("(")
        begin = (0, 0) if first == "-" else _id(first)
        last = _LAST if command.last == "+" else _id(command.last, missing=sys.maxsize)
        ids = stream.between(begin if first == command.first else _after(begin), last, command.count)
        return _entries(stream, ids)

    @_do.register
    def _(self, command: Newest) -> list[Entry]:
        stream = self._streams.get(command.stream)
        return _entries(stream, stream.ids[-1:]) if stream else []

    def _group(self, name: str, group: str) -> tuple[_Stream, _Group]:
        stream = self._streams.get(name)
        found = stream.groups.get(group) if stream else None
        if stream is None or found is None:
            raise refused("NOGROUP", f"no stream {name!r} or no group {group!r} in it", self._address, name)
        return stream, found


#: Buses by name. One lives as long as a client holds it.
_BROKERS: weakref.WeakValueDictionary[str, MemoryBroker] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def broker(address: BusAddress) -> MemoryBroker:
    """The bus of that name in this process."""
    with _LOCK:
        found = _BROKERS.get(address.path)
        if found is None:
            found = _BROKERS[address.path] = MemoryBroker(address)
        return found


def _in_child() -> None:
    # The lock may be held by a thread that the child does not have.
    global _BROKERS, _LOCK
    _BROKERS, _LOCK = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_in_child)


def _entries(stream: _Stream, ids: list[_Id]) -> list[Entry]:
    return [Entry(_text(each), stream.entries[each]) for each in ids]


def _first(rows: Iterator[PendingRow], count: int) -> list[PendingRow]:
    return [row for row, _ in zip(rows, range(count), strict=False)]


def _id(text: str, missing: int = 0) -> _Id:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number) if number else missing


def _after(place: _Id) -> _Id:
    return place[0], place[1] + 1


def _text(place: _Id) -> str:
    return f"{place[0]}-{place[1]}"


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
