"""Checks that the payloads of messages share: each names the field and the value, and raises ``MessageError``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from esper.contracts.messages import MessageError

__all__ = ["MAX_COUNT", "fields_of", "integer", "number", "optional", "run_id", "text", "word"]

#: Largest count that JSON readers with float64 numbers keep exactly.
MAX_COUNT: Final = 2**53 - 1
_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def fields_of(data: object, kind: str, version: int, names: Collection[str]) -> dict[str, Any]:
    """The fields of a payload of this kind, without ``type`` and ``version``.

    Args:
        data: The payload.
        kind: What its ``type`` has to be.
        version: The version that is understood.
        names: The fields it has to have, no more and no less.

    Raises:
        MessageError: it is another type or version, or fields are missing or unknown (named).
    """
    if not isinstance(data, Mapping):
        raise MessageError(f"a {kind} is an object, not {type(data).__name__}")
    if data.get("type") != kind:
        raise MessageError(f"the payload has the type {data.get('type')!r:.60}, not {kind!r}")
    found = data.get("version")
    # First, because another version may have other fields.
    if type(found) is not int or found != version:
        raise MessageError(f"{kind} version {found!r:.40} is unknown; this Esper reads version {version}")
    wanted = {*names, "type", "version"}
    if missing := sorted(wanted - data.keys()):
        raise MessageError(f"the {kind} lacks {', '.join(missing)}")
    if unknown := sorted(f"{key!s:.40}" for key in data.keys() - wanted):
        raise MessageError(f"the {kind} has unknown fields: {', '.join(unknown[:8])}")
    return {name: data[name] for name in names}


def integer(where: str, value: object, low: int = 0, high: int = MAX_COUNT) -> None:
    """An integer from ``low`` to ``high``; True and 1.0 are none."""
    if type(value) is not int or not low <= value <= high:
        raise MessageError(f"{where} is {value!r:.60}; need an integer from {low} to {high}")


def number(where: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """A finite number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MessageError(f"{where} is {value!r:.60}; need a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise MessageError(f"{where} is {value!r:.60}; need a finite number in [{low}, {high}]")


def text(where: str, value: object, longest: int) -> None:
    """Printable text of 1 to ``longest`` characters."""
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise MessageError(f"{where} is {value!r:.80}; need printable text of 1 to {longest} characters")


def word(where: str, value: object, pattern: re.Pattern[str]) -> None:
    """Text that matches ``pattern`` from end to end."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise MessageError(f"{where} is {value!r:.80}, which does not match {pattern.pattern}")


def run_id(where: str, value: object) -> None:
    """The name of a run: 1 to 64 letters, digits, dots, underscores and hyphens."""
    word(where, value, _RUN_ID)


def optional(check: Any, where: str, value: object, *bounds: Any) -> None:
    """None, or what ``check`` lets pass."""
    if value is not None:
        check(where, value, *bounds)
