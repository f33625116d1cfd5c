"""The errors that Esper raises on purpose.

All derive from :class:`EsperError`, so that one ``except`` clause catches them, and from the built-in class that fits
best, so that code which knows nothing of Esper catches them too. Messages say what was wrong with the value and what to
do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "ArtifactError",
    "BlueprintError",
    "BlueprintShapeError",
    "BusDeniedError",
    "BusError",
    "BusFullError",
    "BusURLError",
    "BusUnavailableError",
    "BusWrongTypeError",
    "EsperError",
    "KernelNotFoundError",
    "RegistryUnavailableError",
    "ShapeMismatchError",
]


class EsperError(Exception):
    """Base class of every error that Esper raises on purpose."""


class ArtifactError(EsperError, ValueError):
    """An artifact was had and is bad: truncated, altered, of an unknown version, or at odds with its blueprint."""


class ShapeMismatchError(EsperError, ValueError):
    """Two shapes that must agree do not; the message names both.

    Attributes:
        expected: The shape that was needed, where one is known.
        got: The shape that was found, where one is known.
    """

    def __init__(
        self, message: str, *, expected: Sequence[int] | None = None, got: Sequence[int] | None = None
    ) -> None:
        super().__init__(message)
        self.expected = None if expected is None else tuple(expected)
        self.got = None if got is None else tuple(got)


class BlueprintError(EsperError, ValueError):
    """A blueprint is not one: bad JSON, an unknown operation, a cycle, a size out of range.

    Attributes:
        node: Name of the node at fault, or None when the fault is not one node's; the message begins with it.
    """

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message if node is None else f"node {node!r}: {message}")
        self.node = node


class BlueprintShapeError(BlueprintError, ShapeMismatchError):
    """Shapes inside a blueprint, or between it and the sizes asked for, do not agree; the message names both."""

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        expected: Sequence[int] | None = None,
        got: Sequence[int] | None = None,
    ) -> None:
        BlueprintError.__init__(self, message, node=node)
        self.expected = None if expected is None else tuple(expected)
        self.got = None if got is None else tuple(got)


class KernelNotFoundError(EsperError, LookupError):
    """The registry answered: it has no such artifact."""


class RegistryUnavailableError(EsperError, ConnectionError):
    """The registry did not answer: its folder is gone, it cannot be reached, or access was denied. May pass.

    Attributes:
        retryable: Whether asking again soon may help; False where somebody has to change something first.
        retry_after_s: Seconds the registry asked to be left alone, where it said so.
    """

    def __init__(self, message: str, *, retryable: bool = True, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class BusError(EsperError):
    """The message bus did not do what it was asked to.

    Attributes:
        retryable: Whether asking again may help by itself; False where somebody has to change something first.
        reason: What the server or the operating system said, alone; empty where neither spoke.
    """

    _retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retryable: bool | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.retryable = self._retryable if retryable is None else retryable
        self.reason = reason


class BusUnavailableError(BusError, ConnectionError):
    """The bus did not answer in time, or cannot be reached. May pass."""

    _retryable = True


class BusFullError(BusError):
    """The bus has no memory left for another message. May pass, when something is trimmed."""

    _retryable = True


class BusDeniedError(BusError, PermissionError):
    """The bus wants a user or password, does not take the one given, or does not permit the command."""


class BusWrongTypeError(BusError, TypeError):
    """Under the name of a stream the bus keeps something else."""


class BusURLError(BusError, ValueError):
    """What was given as the URL of a bus is none that this version can open."""
