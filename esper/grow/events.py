"""What happened in a run, as typed events: one JSON object per line of ``events.jsonl``.

Every line has ``seq`` (0, 1, 2, ... without gaps), ``time`` (UTC, ISO 8601), ``elapsed_s`` (seconds since the log was
opened, from a clock that never goes back) and ``event`` (the type), then the type's own fields.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal

__all__ = [
    "CheckpointSaved",
    "EpochEnded",
    "Event",
    "EventLog",
    "LevelledOff",
    "NetworkFinished",
    "NetworkStarted",
    "RunFinished",
    "RunStarted",
    "SeedBound",
    "SeedJudged",
    "SeedRefused",
    "SeedRequested",
    "SeedsObserved",
]


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str] = "event"


@dataclass(frozen=True)
class RunStarted(Event):
    """The whole job began."""

    kind: ClassVar[str] = "run_started"
    data: str
    samples: dict[str, int]
    features: int
    classes: int
    seeds: list[int]
    epochs: int
    device: str


@dataclass(frozen=True)
class NetworkStarted(Event):
    """Training of one network began; ``network`` is ``grown``, ``host`` or ``static``."""

    kind: ClassVar[str] = "network_started"
    network: str
    seed: int
    parameters: int


@dataclass(frozen=True)
class EpochEnded(Event):
    """One pass over the training part; losses are mean cross-entropies in nats, accuracy a share."""

    kind: ClassVar[str] = "epoch_ended"
    network: str
    seed: int
    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class LevelledOff(Event):
    """The validation loss has stopped falling."""

    kind: ClassVar[str] = "levelled_off"
    seed: int
    epoch: int
    validation_loss: float


@dataclass(frozen=True)
class SeedRequested(Event):
    """A kernel was asked of the registry, in the background; ``health`` chose the seed (null: not sampled yet)."""

    kind: ClassVar[str] = "seed_requested"
    seed: int
    epoch: int
    layer: str
    seed_idx: int
    blueprint: str
    artifact_id: str
    health: float | None


@dataclass(frozen=True)
class SeedBound(Event):
    """The kernel is in its layer and its alpha ramps up."""

    kind: ClassVar[str] = "seed_bound"
    seed: int
    epoch: int
    layer: str
    seed_idx: int
    parameters: int


@dataclass(frozen=True)
class SeedRefused(Event):
    """The kernel could not be had or was bad; the layer goes on without it."""

    kind: ClassVar[str] = "seed_refused"
    seed: int
    epoch: int
    layer: str
    seed_idx: int
    reason: str


@dataclass(frozen=True)
class SeedJudged(Event):
    """The trial of a seed ended: kept for good, or removed."""

    kind: ClassVar[str] = "seed_judged"
    seed: int
    epoch: int
    layer: str
    seed_idx: int
    verdict: Literal["fossilized", "culled"]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class SeedsObserved(Event):
    """How the seeds of a layer stand after an epoch; ``lifecycle`` has numbers of ``SeedLifecycleState``."""

    kind: ClassVar[str] = "seeds_observed"
    seed: int
    epoch: int
    layer: str
    lifecycle: list[int]
    alpha: list[float]
    health: list[float | None]


@dataclass(frozen=True)
class NetworkFinished(Event):
    """Training of one network ended; the test part was looked at for the first time."""

    kind: ClassVar[str] = "network_finished"
    network: str
    seed: int
    parameters: int
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A grown network was written."""

    kind: ClassVar[str] = "checkpoint_saved"
    seed: int
    path: str
    bytes: int


@dataclass(frozen=True)
class RunFinished(Event):
    """The job ended; ``interrupted`` if by Ctrl-C."""

    kind: ClassVar[str] = "run_finished"
    interrupted: bool
    seconds: float


class EventLog:
    """Appends events to a file that must not exist yet; each line is flushed, so a killed run leaves whole lines."""

    def __init__(self, path: Path) -> None:
        """Create ``path``; ``FileExistsError`` if there is such a file."""
        self._file = path.open("x", encoding="utf-8")
        self._start = time.monotonic()
        self._next = 0

    def write(self, event: Event) -> None:
        """Append one event; a NaN or infinite number is written as null, because JSON has none."""
        line = {
            "seq": self._next,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "elapsed_s": round(time.monotonic() - self._start, 4),
            "event": event.kind,
            **{key: _finite(value) for key, value in asdict(event).items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._next += 1

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()

    def __enter__(self) -> EventLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
