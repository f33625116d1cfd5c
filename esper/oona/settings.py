"""How patient a bus client is, and how much it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from esper.contracts.messages import TopicNames

__all__ = ["DEFAULT_RETENTION", "MEMORY_RETENTION", "BusSettings", "Retention"]


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of a stream is kept by whoever publishes to it. What is beyond goes, oldest first, read or not.

    Attributes:
        max_length: Most entries; None for any number. Redis frees entries by nodes, so a few more may stay.
        max_bytes: Most bytes of messages, by the average size of those that this client published; None for any number.
        max_age_s: Seconds after which an entry may go, by the server's clock; None for never.

    Raises:
        ValueError: a bound that is not positive.
    """

    max_length: int | None = None
    max_bytes: int | None = None
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_bytes", "max_age_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Retention.{name} is {value!r}; need more than 0, or None for no bound")


_DAY_S: Final = 86_400.0
_MIB: Final = 1 << 20

#: What is kept of the streams of the package. The stream of submitted jobs is not here: an unfinished job must stay,
#: however old, and Tezzeret's queue removes the finished ones.
DEFAULT_RETENTION: Final[Mapping[str, Retention]] = MappingProxyType(
    {
        TopicNames.TELEMETRY_SEED_HEALTH: Retention(100_000, 256 * _MIB, _DAY_S),
        TopicNames.CONTROL_KASMINA_COMMANDS: Retention(10_000, 16 * _MIB, _DAY_S),
        TopicNames.COMPILATION_KERNEL_READY: Retention(10_000, 64 * _MIB),
        TopicNames.VALIDATION_KERNEL_CHARACTERIZED: Retention(10_000, 64 * _MIB),
        TopicNames.SYSTEM_EVENTS_EPOCH: Retention(100_000, 64 * _MIB, 7 * _DAY_S),
        TopicNames.INNOVATION_FIELD_REPORTS: Retention(100_000, 64 * _MIB),
    }
)

#: The same of a bus in this process, which has the memory of the process only.
MEMORY_RETENTION: Final[Mapping[str, Retention]] = MappingProxyType(
    {
        TopicNames.TELEMETRY_SEED_HEALTH: Retention(10_000, 32 * _MIB),
        TopicNames.CONTROL_KASMINA_COMMANDS: Retention(1_000, 4 * _MIB),
        TopicNames.COMPILATION_KERNEL_READY: Retention(1_000, 4 * _MIB),
        TopicNames.VALIDATION_KERNEL_CHARACTERIZED: Retention(1_000, 4 * _MIB),
        TopicNames.SYSTEM_EVENTS_EPOCH: Retention(10_000, 8 * _MIB),
        TopicNames.INNOVATION_FIELD_REPORTS: Retention(1_000, 4 * _MIB),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BusSettings:
    """Everything about a client that is a number.

    Attributes:
        timeout_s: Longest wait for one answer, and for one connection.
        patience_s: How long a call goes on trying to reach the server after the first failure; 0 tries once. A call
            takes at most ``patience_s + 2 * timeout_s`` longer than it was asked to block.
        start_patience_s: The same for the first contact.
        first_pause_s: Bound of the first random pause between two tries; it doubles up to five seconds.
        claim_idle_s: A message that was handed out so long ago and was not acknowledged goes to another consumer. Must
            be longer than handling one takes.
        max_deliveries: A message handed out so often and never acknowledged goes to the dead letters.
        dead_letters_kept: About how many dead letters a stream keeps.
        retention: What is kept of each stream, by its name; None for :data:`DEFAULT_RETENTION`, or
            :data:`MEMORY_RETENTION` for a bus in this process.

    Raises:
        ValueError: a number that cannot be.
    """

    timeout_s: float = 5.0
    patience_s: float = 2.0
    start_patience_s: float = 10.0
    first_pause_s: float = 0.05
    claim_idle_s: float = 60.0
    max_deliveries: int = 5
    dead_letters_kept: int = 1_000
    retention: Mapping[str, Retention] | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("timeout_s", 0.001),
            ("patience_s", 0.0),
            ("start_patience_s", 0.0),
            ("first_pause_s", 0.001),
            ("claim_idle_s", 0.001),
            ("max_deliveries", 1),
            ("dead_letters_kept", 1),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < low:
                raise ValueError(f"{name} is {value!r}; need a finite number of at least {low:g}")
