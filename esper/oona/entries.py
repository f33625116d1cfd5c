"""Messages as entries of a stream, places in a stream, and what is a dead letter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from esper.contracts.messages import MAX_MESSAGE_BYTES, MessageError, OonaMessage
from esper.oona.commands import Entry

__all__ = [
    "DEAD",
    "FIELD",
    "DeadLetter",
    "dead_letter_fields",
    "fields_of",
    "first_id",
    "id_before",
    "message_of",
    "order_of",
    "read_dead_letter",
]

#: The entry's one field that counts: what ``OonaMessage.to_bytes`` gives.
FIELD: Final = "message"
#: What the name of a stream's dead letters ends in.
DEAD: Final = ".dead"
_FIELD: Final = FIELD.encode()
_LAST_NUMBER: Final = (1 << 64) - 1
_REASON: Final = 500


def fields_of(message: bytes) -> Mapping[str, str | bytes]:
    """The fields of an entry that carries ``message``."""
    return {FIELD: message}


def message_of(stream: str, entry: Entry) -> OonaMessage:
    """The message that ``entry`` of ``stream`` carries.

    Raises:
        MessageError: it carries none, one of another version, or one that belongs to another stream.
    """
    raw = entry.fields.get(_FIELD)
    if raw is None:
        names = ", ".join(f"{name!a:.40}" for name in list(entry.fields)[:8])
        raise MessageError(f"the entry has no field {FIELD!r}; it has: {names or 'none'}")
    message = OonaMessage.from_bytes(raw)
    if message.topic != stream:
        raise MessageError(f"the message is about {message.topic} and stands in the stream {stream}")
    return message


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that could not be delivered.

    Attributes:
        stream: Where it stood.
        entry_id: Its place there.
        reason: Why it is here.
        consumer_group: Whose consumer put it here.
        raw: The bytes of its message, as far as there were any; at most as long as a message may be.
    """

    stream: str
    entry_id: str
    reason: str
    consumer_group: str
    raw: bytes


def dead_letter_fields(stream: str, entry: Entry, group: str, reason: str) -> Mapping[str, str | bytes]:
    """The fields of a dead letter."""
    raw = entry.fields.get(_FIELD, b"")[:MAX_MESSAGE_BYTES]
    return {"reason": reason[:_REASON], "stream": stream, "entry": entry.entry_id, "group": group, FIELD: raw}


def read_dead_letter(stream: str, entry: Entry) -> DeadLetter:
    """The inverse of :func:`dead_letter_fields`, whatever the fields are."""

    def field(name: str) -> str:
        return entry.fields.get(name.encode(), b"").decode("utf-8", "replace")

    return DeadLetter(stream, field("entry"), field("reason"), field("group"), bytes(entry.fields.get(_FIELD, b"")))


def first_id(since: float | datetime | str) -> str:
    """The smallest id that an entry published at ``since`` can have; an id stands for itself.

    Raises:
        ValueError: it is no time and no id.
    """
    if isinstance(since, str):
        milliseconds, _, number = since.partition("-")
        if not (milliseconds.isdecimal() and (number.isdecimal() or not number)) or len(since) > 41:
            raise ValueError(f"{since!r:.60} is no entry id; need milliseconds-number, or seconds since 1970")
        return f"{milliseconds}-{number or 0}"
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ValueError(f"{since} has no time zone; need one, such as datetime.now(UTC)")
        since = since.timestamp()
    if not math.isfinite(since) or since < 0:
        raise ValueError(f"the time to begin at is {since!r}; need seconds since 1970, 0 or more")
    return f"{int(since * 1000)}-0"


def order_of(entry_id: str) -> tuple[int, int]:
    """What ids are ordered by: milliseconds since 1970 by the bus's clock, and a number within the millisecond."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def id_before(entry_id: str) -> str:
    """The largest id that is smaller; ``0-0`` has none and stands for itself."""
    milliseconds, number = (int(part) for part in entry_id.split("-"))
    if number:
        return f"{milliseconds}-{number - 1}"
    return f"{milliseconds - 1}-{_LAST_NUMBER}" if milliseconds else "0-0"
