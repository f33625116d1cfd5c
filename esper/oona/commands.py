"""What the bus asks of a server: a dozen Redis commands as values.

The engine decides which commands to give and never speaks to anything; a link carries them out (:mod:`redis_link`,
:mod:`async_redis_link`, :mod:`memory_link`). Each command knows its form on the wire and how to read redis-py's answer
to it, in RESP2.
"""
# ruff: noqa: D102 - the base class says what the methods do

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

__all__ = [
    "Acknowledge",
    "Add",
    "Batch",
    "Claim",
    "Command",
    "Entry",
    "Info",
    "MakeGroup",
    "Newest",
    "Pause",
    "Pending",
    "PendingRow",
    "Ping",
    "Range",
    "Read",
    "ReadGroup",
    "Step",
    "StreamEntries",
    "Trim",
]

Wire: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a stream: its id, and its fields by name."""

    entry_id: str
    fields: Mapping[bytes, bytes]


StreamEntries: TypeAlias = list[tuple[str, list[Entry]]]


@dataclass(frozen=True, slots=True)
class PendingRow:
    """One line of a group's list of what was handed out and not acknowledged."""

    entry_id: str
    times_delivered: int


class Command(ABC):
    """One command. ``stream`` is what it is about, for messages, where it is about one."""

    __slots__ = ()

    @abstractmethod
    def wire(self) -> Wire:
        """The command's words."""

    @property
    def options(self) -> dict[str, Any]:
        """What redis-py wants to know in order to parse the answer."""
        return {}

    @property
    def about(self) -> str:
        """The streams it touches, for messages."""
        return str(getattr(self, "stream", ""))

    def read(self, answer: Any) -> Any:
        """redis-py's answer, in the engine's terms."""
        return answer


@dataclass(frozen=True, slots=True)
class Ping(Command):
    """Are you there: True."""

    def wire(self) -> Wire:
        return ("PING",)


@dataclass(frozen=True, slots=True)
class Info(Command):
    """Facts about the server, by name."""

    def wire(self) -> Wire:
        return ("INFO",)

    def read(self, answer: Any) -> dict[str, Any]:
        return answer if isinstance(answer, dict) else {}


@dataclass(frozen=True, slots=True)
class Add(Command):
    """Append an entry, and drop the oldest where the stream is then much longer than ``max_length``: its id."""

    stream: str
    fields: Mapping[str, str | bytes]
    max_length: int | None = None

    def wire(self) -> Wire:
        # "~": Redis frees whole nodes of its tree only, which costs nothing and leaves a few entries more.
        bound = () if self.max_length is None else ("MAXLEN", "~", self.max_length)
        return ("XADD", self.stream, *bound, "*", *(item for pair in self.fields.items() for item in pair))

    def read(self, answer: Any) -> str:
        return text(answer)


@dataclass(frozen=True, slots=True)
class Trim(Command):
    """Drop the oldest entries: those beyond ``max_length``, or those before ``min_id``. How many went."""

    stream: str
    min_id: str | None = None
    max_length: int | None = None
    exact: bool = False

    def wire(self) -> Wire:
        bound = ("MAXLEN", self.max_length) if self.min_id is None else ("MINID", self.min_id)
        return ("XTRIM", self.stream, bound[0], "=" if self.exact else "~", bound[1])


@dataclass(frozen=True, slots=True)
class MakeGroup(Command):
    """Make a group, and the stream where it is missing. ``start`` is the id behind which it begins.

    True, or False if the group was there.
    """

    stream: str
    group: str
    start: str

    def wire(self) -> Wire:
        return ("XGROUP CREATE", self.stream, self.group, self.start, "MKSTREAM")


@dataclass(frozen=True, slots=True)
class ReadGroup(Command):
    """New entries for one consumer of a group, waiting up to ``block_ms`` for the first; 0 does not wait."""

    streams: tuple[str, ...]
    group: str
    consumer: str
    count: int
    block_ms: int

    def wire(self) -> Wire:
        block = ("BLOCK", self.block_ms) if self.block_ms else ()
        ids = (">",) * len(self.streams)
        who = (self.group, self.consumer)
        return ("XREADGROUP", "GROUP", *who, "COUNT", self.count, *block, "STREAMS", *self.streams, *ids)

    @property
    def about(self) -> str:
        return ", ".join(self.streams)

    def read(self, answer: Any) -> StreamEntries:
        return _streams(answer)


@dataclass(frozen=True, slots=True)
class Read(Command):
    """Entries behind a place in each stream, for whoever asks, waiting up to ``block_ms``; 0 does not wait."""

    places: tuple[tuple[str, str], ...]
    count: int
    block_ms: int

    def wire(self) -> Wire:
        block = ("BLOCK", self.block_ms) if self.block_ms else ()
        return (
            "XREAD",
            "COUNT",
            self.count,
            *block,
            "STREAMS",
            *(s for s, _ in self.places),
            *(i for _, i in self.places),
        )

    @property
    def about(self) -> str:
        return ", ".join(stream for stream, _ in self.places)

    def read(self, answer: Any) -> StreamEntries:
        return _streams(answer)


@dataclass(frozen=True, slots=True)
class Acknowledge(Command):
    """Take entries off a group's list: how many were on it."""

    stream: str
    group: str
    ids: tuple[str, ...]

    def wire(self) -> Wire:
        return ("XACK", self.stream, self.group, *self.ids)


@dataclass(frozen=True, slots=True)
class Pending(Command):
    """The oldest lines of a group's list that have not moved for ``idle_ms``."""

    stream: str
    group: str
    idle_ms: int
    count: int

    def wire(self) -> Wire:
        return ("XPENDING", self.stream, self.group, "IDLE", self.idle_ms, "-", "+", self.count)

    @property
    def options(self) -> dict[str, Any]:
        return {"parse_detail": True}

    def read(self, answer: Any) -> list[PendingRow]:
        return [PendingRow(text(row["message_id"]), int(row["times_delivered"])) for row in answer or ()]


@dataclass(frozen=True, slots=True)
class Claim(Command):
    """Take entries over that have not moved for ``idle_ms``; only those that were had come back."""

    stream: str
    group: str
    consumer: str
    idle_ms: int
    ids: tuple[str, ...]

    def wire(self) -> Wire:
        return ("XCLAIM", self.stream, self.group, self.consumer, self.idle_ms, *self.ids)

    def read(self, answer: Any) -> list[Entry]:
        return _entries(answer)


@dataclass(frozen=True, slots=True)
class Range(Command):
    """Up to ``count`` entries from ``first`` to ``last``; a ``(`` in front leaves that one out."""

    stream: str
    first: str
    last: str
    count: int

    def wire(self) -> Wire:
        return ("XRANGE", self.stream, self.first, self.last, "COUNT", self.count)

    def read(self, answer: Any) -> list[Entry]:
        return _entries(answer)


@dataclass(frozen=True, slots=True)
class Newest(Command):
    """The newest entry of a stream, in a list; an empty list where there is none."""

    stream: str

    def wire(self) -> Wire:
        return ("XREVRANGE", self.stream, "+", "-", "COUNT", 1)

    def read(self, answer: Any) -> list[Entry]:
        return _entries(answer)


@dataclass(frozen=True, slots=True)
class Batch:
    """Several commands in one round trip: a list of their answers, or the first error.

    Attributes:
        commands: In the order in which they are carried out.
        whole: All or none, where the server can do that: one Redis can, a cluster cannot.
    """

    commands: Sequence[Command]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


Step: TypeAlias = Command | Batch | Pause

#: What an id that stands for "before everything" looks like.
BEGINNING: Final = "0-0"


def text(value: bytes | str) -> str:
    """An id or a name."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _entries(answer: Any) -> list[Entry]:
    # Redis 6 answers nil for what was deleted.
    return [Entry(text(each[0]), each[1] or {}) for each in answer or () if each and each[0] is not None]


def _streams(answer: Any) -> StreamEntries:
    return [(text(stream), _entries(entries)) for stream, entries in answer or ()]
