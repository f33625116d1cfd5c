"""What travels between the parts: one envelope for every topic, typed, versioned, checked on the way in and out.

A message is JSON. Arrays may go with it as they are, in an attachment: as text inside the JSON they would take ten
times as long to write and to read. Whoever reads a message reads it from a bus that others write to, so everything is
bounded before it is parsed and anything unexpected is refused with the field's name.
"""

from __future__ import annotations

import binascii
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Self

from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError, EsperError

__all__ = ["MAX_MESSAGE_BYTES", "MESSAGE_VERSION", "MessageError", "OonaMessage", "TopicNames"]

MESSAGE_VERSION: Final = 1
#: Longest message, in either form; the longest blueprint takes a quarter of it.
MAX_MESSAGE_BYTES: Final = 1 << 20
_MAX_NAME: Final = 256
_ATTACHMENT: Final = "attachment"
#: Between envelope and attachment on the wire: no JSON text holds this byte.
_END: Final = b"\0"


class TopicNames(StrEnum):
    """Every topic, which is also the name of its Redis stream."""

    TELEMETRY_SEED_HEALTH = "telemetry.seed.health"
    CONTROL_KASMINA_COMMANDS = "control.kasmina.commands"
    COMPILATION_BLUEPRINT_SUBMITTED = "compilation.blueprint.submitted"
    COMPILATION_KERNEL_READY = "compilation.kernel.ready"
    VALIDATION_KERNEL_CHARACTERIZED = "validation.kernel.characterized"
    SYSTEM_EVENTS_EPOCH = "system.events.epoch"
    INNOVATION_FIELD_REPORTS = "innovation.field_reports"


class MessageError(EsperError, ValueError):
    """A message is not one: bad JSON, too long, an unknown version or topic, a field missing or of the wrong type."""


@dataclass(frozen=True, slots=True)
class OonaMessage:
    """One message.

    Attributes:
        sender_id: Who sent it, in words ("tezzeret-host-4711").
        trace_id: Common to all messages that one request led to.
        topic: What it is about, and which stream it travels on.
        payload: JSON values by key. Copied when the message is made; to be treated as read-only.
        event_id: A UUID of its own; a message delivered twice is recognised by it.
        timestamp: Seconds since 1970 by the sender's clock. For people: clocks differ and jump, so nothing is decided
            by it.
        version: Of the envelope.
        attachment: Bytes that belong to the payload, which says what they are: arrays.

    Raises:
        MessageError: a value that is not as described; the message names the field.
    """

    sender_id: str
    trace_id: str
    topic: TopicNames
    payload: Mapping[str, Any]
    event_id: str = field(default_factory=lambda: str(uuid.uuid4()), kw_only=True)
    timestamp: float = field(default_factory=time.time, kw_only=True)
    version: int = field(default=MESSAGE_VERSION, kw_only=True)
    attachment: bytes = field(default=b"", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != MESSAGE_VERSION:
            raise MessageError(
                f"message version {self.version!r:.40} is unknown; this Esper reads version {MESSAGE_VERSION}"
            )
        for name in ("sender_id", "trace_id"):
            _check_name(name, getattr(self, name))
        _check_uuid(self.event_id)
        if isinstance(self.timestamp, bool) or not isinstance(self.timestamp, int | float):
            raise MessageError(f"timestamp is {self.timestamp!r:.40}; need seconds since 1970, a number")
        if not math.isfinite(self.timestamp) or self.timestamp < 0:
            raise MessageError(f"timestamp is {self.timestamp}; need a finite number, 0 or more")
        object.__setattr__(self, "timestamp", float(self.timestamp))
        try:
            object.__setattr__(self, "topic", TopicNames(self.topic))
        except ValueError:
            raise MessageError(f"topic {self.topic!r:.80} is unknown; known: {', '.join(TopicNames)}") from None
        if not isinstance(self.payload, Mapping):
            raise MessageError(f"payload is a {type(self.payload).__name__}; need a mapping")
        object.__setattr__(self, "payload", _copied(self.payload, "payload", 1))
        if type(self.attachment) is not bytes:
            raise MessageError(f"attachment is a {type(self.attachment).__name__}; need bytes")

    def reply(self, sender_id: str, topic: TopicNames, payload: Mapping[str, Any]) -> OonaMessage:
        """A message that follows from this one: same trace."""
        return OonaMessage(sender_id, self.trace_id, topic, payload)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; an attachment is there in base64, if there is one."""
        found = self._envelope()
        if self.attachment:
            found[_ATTACHMENT] = binascii.b2a_base64(self.attachment, newline=False).decode("ascii")
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            MessageError: unknown version, missing or unknown fields (named), or a bad value.
        """
        if not isinstance(data, Mapping):
            raise MessageError(f"a message is an object, not {type(data).__name__}")
        version = data.get("version")
        # First, because a message of another version may have other fields.
        if type(version) is not int or version != MESSAGE_VERSION:
            raise MessageError(
                f"message version {version!r:.40} is unknown; this Esper reads version {MESSAGE_VERSION}"
            )
        if missing := sorted(_FIELDS - data.keys()):
            raise MessageError(f"the message lacks {', '.join(missing)}")
        if unknown := sorted(f"{key!s:.40}" for key in data.keys() - _FIELDS - {_ATTACHMENT}):
            raise MessageError(f"the message has unknown fields: {', '.join(unknown[:8])}")
        if _ATTACHMENT in data:
            data = {**data, _ATTACHMENT: _from_base64(data[_ATTACHMENT])}
        return cls(**data)

    def to_json(self) -> str:
        """The message as text, for files: ASCII, sorted keys.

        Raises:
            MessageError: it is longer than :data:`MAX_MESSAGE_BYTES`.
        """
        text = strict_json.canonical(self.to_dict())
        _check_length(len(text))
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of :meth:`to_json`, whatever ``text`` holds.

        Raises:
            MessageError: it is no message.
        """
        try:
            data = strict_json.loads(text, what="the message", max_bytes=MAX_MESSAGE_BYTES)
        except ArtifactError as error:
            raise MessageError(str(error)) from None
        payload = data.get("payload") if isinstance(data, dict) else None
        if not isinstance(payload, dict):
            return cls.from_dict(data)
        # What was just parsed is JSON, no deeper than allowed, and nobody else's: it need not be copied to be checked.
        message = cls.from_dict({**data, "payload": {}})
        object.__setattr__(message, "payload", payload)
        return message

    def to_bytes(self) -> bytes:
        """The message on the wire: the text without the attachment and, where there is one, a zero byte and its bytes.

        Raises:
            MessageError: it is longer than :data:`MAX_MESSAGE_BYTES`.
        """
        text = strict_json.canonical(self._envelope()).encode("ascii")
        whole = b"".join((text, _END, self.attachment)) if self.attachment else text
        _check_length(len(whole))
        return whole

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of :meth:`to_bytes`, whatever ``data`` holds.

        Raises:
            MessageError: it is no message.
        """
        _check_length(len(data))
        text, _, attachment = data.partition(_END)
        message = cls.from_json(text)
        if attachment:
            if message.attachment:
                raise MessageError("the message has two attachments, in its text and behind it")
            object.__setattr__(message, _ATTACHMENT, attachment)
        return message

    def _envelope(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "event_id": self.event_id,
            "sender_id": self.sender_id,
            "timestamp": self.timestamp,
            "trace_id": self.trace_id,
            "topic": self.topic.value,
            "payload": dict(self.payload),
        }


_FIELDS: Final = frozenset(each.name for each in fields(OonaMessage)) - {_ATTACHMENT}


def _check_length(length: int) -> None:
    if length > MAX_MESSAGE_BYTES:
        raise MessageError(f"the message has {length} bytes, more than the limit of {MAX_MESSAGE_BYTES}")


def _from_base64(encoded: object) -> bytes:
    if not isinstance(encoded, str):
        raise MessageError(f"attachment is {encoded!r:.60}; need base64")
    try:
        return binascii.a2b_base64(encoded, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"attachment is not base64: {error}") from None


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > _MAX_NAME or not value.isprintable():
        raise MessageError(f"{name} is {value!r:.80}; need printable text of 1 to {_MAX_NAME} characters")


def _check_uuid(value: object) -> None:
    try:
        good = isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        good = False
    if not good:
        raise MessageError(f"event_id is {value!r:.80}; need a UUID, in lower case with hyphens")


def _copied(value: Any, where: str, depth: int) -> Any:
    """``value`` made of plain dicts and lists, or what in it is not JSON."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise MessageError(f"{where} is {value}, which JSON has no word for")
        return value
    # One level is the envelope's own.
    if depth >= strict_json.MAX_DEPTH:
        raise MessageError(f"{where} is nested deeper than {strict_json.MAX_DEPTH - 1} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise MessageError(f"{where} has the key {key!r:.40}; keys are strings")
        return {key: _copied(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise MessageError(f"{where} is a {type(value).__name__}, which JSON has no word for")
