"""Readers of single values in a manifest: each takes the key, for messages, and the value, and returns it checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from esper.contracts.errors import ArtifactError
from esper.contracts.ids import check_sha256

__all__ = ["choice", "integer", "mapping", "sha256", "text_map", "word"]


def mapping(key: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ArtifactError(f"manifest: {key} is {type(value).__name__}, not an object")
    return value


def text_map(key: str, value: Any) -> dict[str, str]:
    """A JSON object whose values are all text."""
    for name, text in mapping(key, value).items():
        if not isinstance(text, str):
            raise ArtifactError(f"manifest: {key}[{name[:40]!a}] is {type(text).__name__}, not text")
    return dict(value)


def integer(low: int, high: int) -> Callable[[str, Any], int]:
    """A reader of integers from ``low`` to ``high``; True and 1.0 are none."""

    def read(key: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ArtifactError(f"manifest: {key} is {value!a:.40}, not an integer from {low} to {high}")
        return value

    return read


def word(pattern: re.Pattern[str]) -> Callable[[str, Any], str]:
    """A reader of text that matches ``pattern`` from end to end."""

    def read(key: str, value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ArtifactError(f"manifest: {key} is {value!a:.40}, which does not match {pattern.pattern}")
        return value

    return read


def choice(*allowed: str) -> Callable[[str, Any], str]:
    """A reader of one of a few words."""

    def read(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ArtifactError(f"manifest: {key} is {value!a:.40}, not one of {', '.join(allowed)}")
        return value

    return read


def sha256(key: str, value: Any) -> str:
    """A SHA-256 in lower-case hex."""
    try:
        return check_sha256(value)
    except ValueError as error:
        raise ArtifactError(f"manifest: {key}: {error}") from None
