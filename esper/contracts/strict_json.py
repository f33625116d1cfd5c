"""JSON from strangers: bounded before it is parsed, and without the freedoms Python's parser takes.

Refused: duplicate keys (the last would silently win), NaN and infinities (also as ``1e999``), invalid UTF-8, lone
surrogates, deep nesting. The number of structural characters is bounded first, because it bounds the memory the parsed
value can take.
"""

from __future__ import annotations

import json
import math
from typing import Any

from esper.contracts.errors import ArtifactError

__all__ = ["canonical", "loads"]

MAX_DEPTH = 24
#: Commas, colons and opening brackets: at about 100 bytes a value, no more than 2 MB once parsed.
MAX_TOKENS = 20_000


def canonical(value: Any) -> str:
    """``value`` as JSON in one form only: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def loads(data: bytes | str, *, what: str, max_bytes: int) -> Any:
    """Parse JSON.

    Args:
        data: The text, or its UTF-8 bytes.
        what: What it is, for messages ("the manifest").
        max_bytes: Longest text accepted.

    Raises:
        ArtifactError: whatever is wrong with ``data``.
    """
    if len(data) > max_bytes:
        raise ArtifactError(f"{what} is {len(data)} bytes long, more than the limit of {max_bytes}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    # One pass over the bytes: a message may be one long string, and four passes would take longer than parsing it.
    raw = data if isinstance(data, bytes) else text.encode("utf-8", "surrogatepass")
    tokens = len(raw) - len(raw.translate(None, b"[{,:"))
    if tokens > MAX_TOKENS:
        raise ArtifactError(f"{what} has {tokens} JSON elements, more than the limit of {MAX_TOKENS}")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ArtifactError(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ArtifactError(f"{what} is not valid JSON: {error}") from None
    # Few brackets cannot nest deep, and without escapes ASCII holds no surrogate: then there is nothing to look for.
    if "\\" in text or not text.isascii() or (tokens > MAX_DEPTH and raw.count(b"[") + raw.count(b"{") > MAX_DEPTH):
        _check(value, what)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {again[:80]!a}")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of the range of float64")
    return value


def _check(value: Any, what: str) -> None:
    """Bound the depth and refuse text that cannot be written as UTF-8; no recursion, so depth cannot hurt here."""
    level = [value]
    depth = 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ArtifactError(f"{what} has a string with a lone surrogate: {item[:40]!a}")
        if depth > MAX_DEPTH and below:
            raise ArtifactError(f"{what} is nested deeper than {MAX_DEPTH} levels")
        level = below
