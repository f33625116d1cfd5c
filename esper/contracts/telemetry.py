"""What a training process tells others: the health of its seeds by window, and what happened to them.

Topics: :class:`HealthWindow` travels on ``telemetry.seed.health``; :class:`RunEvent` on ``system.events.epoch`` when an
epoch or a run is its subject, else on ``innovation.field_reports``, where the outcomes of commands
(:mod:`esper.contracts.commands`) are too. :func:`read_payload` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from esper.contracts import payload
from esper.contracts.commands import CommandOutcome, KasminaCommand
from esper.contracts.messages import MessageError, OonaMessage, TopicNames
from esper.contracts.operational import SETTLED_STATES, HealthSignal

__all__ = [
    "COLUMNS",
    "MAX_SEEDS_PER_MESSAGE",
    "EventKind",
    "HealthWindow",
    "RunEvent",
    "TelemetryPayload",
    "packed_columns",
    "printable",
    "read_payload",
    "window_payload",
]

Array = NDArray[Any]

_WINDOW_TYPE: Final = "health_window"
_WINDOW_VERSION: Final = 2
_EVENT_TYPE: Final = "run_event"
_EVENT_VERSION: Final = 1

#: Column of a window -> its type, little-endian, in the order in which they are packed: the widest first, so that each
#: begins where its type may begin, whatever their length.
COLUMNS: Final[Mapping[str, np.dtype[Any]]] = {
    "alpha": np.dtype("<f4"),
    "activation_mean": np.dtype("<f4"),
    "activation_variance": np.dtype("<f4"),
    "dead_neuron_ratio": np.dtype("<f4"),
    "avg_correlation": np.dtype("<f4"),
    "health_score": np.dtype("<f4"),
    "nonfinite_count": np.dtype("<i4"),
    "error_count": np.dtype("<i4"),
    "exec_latency_us": np.dtype("<i4"),
    "lifecycle_state": np.dtype("u1"),
}
_SEED_BYTES: Final = sum(dtype.itemsize for dtype in COLUMNS.values())
#: How a message says what its attachment is.
_LAYOUT: Final = " ".join(f"{name}:{dtype.str.lstrip('|')}" for name, dtype in COLUMNS.items())
#: Closed ranges of the columns; NaN is in none, but a health score may be NaN.
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "lifecycle_state": (0, 7),
    "alpha": (0.0, 1.0),
    "activation_mean": (-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max)),
    "activation_variance": (0.0, float(np.finfo(np.float32).max)),
    "dead_neuron_ratio": (0.0, 1.0),
    "avg_correlation": (-1.0, 1.0),
    "nonfinite_count": (0, 2**31 - 1),
    "health_score": (0.0, 1.0),
    "error_count": (0, 2**31 - 1),
    "exec_latency_us": (0, 2**31 - 1),
}
#: A seed takes 37 bytes, 50 in a file of events: this many fit a message of 1 MiB with room for the rest.
MAX_SEEDS_PER_MESSAGE: Final = 16_384
_MAX_SEEDS: Final = 2**31 - 1
MAX_LAYER_NAME: Final = 512
_MAX_REASON: Final = 1000
_MAX_VALUES: Final = 32
_MAX_RANK: Final = 2**20

#: By state.
_SETTLED: Final = np.isin(np.arange(8), list(SETTLED_STATES))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HealthWindow:
    """The health of a layer's seeds over one window, or of a part of them where they are many.

    Windows of one layer of one rank of one run are numbered without gaps as they are captured. A number that comes
    twice is a duplicate (its message has the same ``event_id``); one that never comes was dropped, and
    ``dropped_windows`` says how many were.

    Attributes:
        run_id: Name of the run.
        rank: Of the process among the ``world_size`` that train together.
        world_size: As said.
        layer_name: Dotted name of the layer in the host.
        sequence: Number of the window, from 0.
        step: Training steps done when it was captured.
        epoch: Epochs done.
        captured_at: Seconds since 1970, by the trainer's clock.
        dropped_windows: Windows of this layer that were given up so far in this run, as known when this was packed.
        num_seeds: Seeds of the layer.
        seed_offset: First seed of this message; a layer of more than :data:`MAX_SEEDS_PER_MESSAGE` takes several.
        window_samples: Probes in the window; 0 before the layer was first looked at.
        columns: One array a seed each, as :data:`COLUMNS` has them, all of one length: int32 saturates, a mean or
            variance beyond float32 is clamped, a health score of NaN is none. Read-only.

    Raises:
        MessageError: a value that is not as described; the message names the field.
    """

    run_id: str
    rank: int
    world_size: int
    layer_name: str
    sequence: int
    step: int
    epoch: int
    captured_at: float
    dropped_windows: int
    num_seeds: int
    seed_offset: int
    window_samples: int
    columns: Mapping[str, Array]

    def __post_init__(self) -> None:
        payload.run_id("run_id", self.run_id)
        payload.integer("world_size", self.world_size, 1, _MAX_RANK)
        payload.integer("rank", self.rank, 0, self.world_size - 1)
        payload.text("layer_name", self.layer_name, MAX_LAYER_NAME)
        for name in ("sequence", "step", "epoch", "dropped_windows", "window_samples"):
            payload.integer(name, getattr(self, name))
        payload.number("captured_at", self.captured_at, 0.0)
        payload.integer("num_seeds", self.num_seeds, 1, _MAX_SEEDS)
        payload.integer("seed_offset", self.seed_offset, 0, self.num_seeds - 1)
        if not isinstance(self.columns, Mapping) or self.columns.keys() != COLUMNS.keys():
            raise MessageError(f"columns has {sorted(self.columns)!r:.200}; need {', '.join(COLUMNS)}")
        longest = min(MAX_SEEDS_PER_MESSAGE, self.num_seeds - self.seed_offset)
        rows = len(self.columns["alpha"])
        if not 0 < rows <= longest:
            raise MessageError(f"columns has {rows} seeds; need 1 to {longest} from seed {self.seed_offset} on")
        for name, dtype in COLUMNS.items():
            _check_column(name, self.columns[name], dtype, rows)

    def __len__(self) -> int:
        return len(self.columns["alpha"])

    @property
    def ready(self) -> Array:
        """Where a decision may rest on this window, bool ``[len(self)]``; see :attr:`HealthSignal.ready`."""
        settled: Array = _SETTLED[self.columns["lifecycle_state"]]
        return settled & ~np.isnan(self.columns["health_score"]) & (self.window_samples > 0)

    def arrays(self) -> dict[str, Array]:
        """All columns, with ``seed_idx`` (int64) and ``ready`` (bool): for readers of many seeds."""
        indices = np.arange(self.seed_offset, self.seed_offset + len(self))
        return {"seed_idx": indices, **self.columns, "ready": self.ready}

    def signals(self) -> list[HealthSignal]:
        """One checked record a seed."""
        columns = {name: array.tolist() for name, array in self.columns.items()}
        rows = zip(*columns.values(), strict=True)
        signals = []
        for seed_idx, row in enumerate(rows, start=self.seed_offset):
            values = dict(zip(columns, row, strict=True))
            if math.isnan(values["health_score"]):
                values["health_score"] = None
            signals.append(
                HealthSignal(
                    layer_name=self.layer_name,
                    seed_idx=seed_idx,
                    epoch=self.epoch,
                    window_samples=self.window_samples,
                    **values,
                )
            )
        return signals

    def to_message(self, sender_id: str, trace_id: str) -> OonaMessage:
        """The window as it travels: its fields in the payload, its columns in the attachment."""
        fields = {name: getattr(self, name) for name in _WINDOW_FIELDS}
        topic, packed = TopicNames.TELEMETRY_SEED_HEALTH, packed_columns(self.columns)
        return OonaMessage(sender_id, trace_id, topic, window_payload(fields), attachment=packed)

    @classmethod
    def from_payload(cls, data: Mapping[str, Any], attachment: bytes) -> Self:
        """The window of a message, whatever its payload and its attachment hold.

        Raises:
            MessageError: it is no window; the message names the field.
        """
        found = payload.fields_of(data, _WINDOW_TYPE, _WINDOW_VERSION, (*_WINDOW_FIELDS, "layout"))
        if (layout := found.pop("layout")) != _LAYOUT:
            raise MessageError(f"layout is {layout!r:.60}; need {_LAYOUT!r}")
        rows, rest = divmod(len(attachment), _SEED_BYTES)
        if rest or not rows:
            raise MessageError(f"columns has {len(attachment)} bytes; need a multiple of the {_SEED_BYTES} of a seed")
        columns, begin = {}, 0
        for name, dtype in COLUMNS.items():
            columns[name] = np.frombuffer(attachment, dtype, rows, begin)
            begin += rows * dtype.itemsize
        return cls(columns=columns, **found)


_WINDOW_FIELDS: Final = tuple(name for name in HealthWindow.__dataclass_fields__ if name != "columns")


def window_payload(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a window's message, from every field of :class:`HealthWindow` but the columns, unchecked."""
    return {"type": _WINDOW_TYPE, "version": _WINDOW_VERSION, "layout": _LAYOUT, **fields}


def packed_columns(columns: Mapping[str, Array]) -> bytes:
    """The attachment of a window's message: its columns one behind another, unchecked."""
    return b"".join([columns[name].tobytes() for name in COLUMNS])


def _check_column(name: str, column: object, dtype: np.dtype[Any], rows: int) -> None:
    if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (rows,):
        what = f"{column.dtype} {column.shape}" if isinstance(column, np.ndarray) else f"{column!r:.60}"
        raise MessageError(f"columns.{name} is {what}; need {dtype.str} ({rows},)")
    low, high = _RANGES[name]
    # The extremes of a column with NaN are NaN, and compare false; a health score may be NaN, so its are found without.
    # What no value of the type can exceed is not looked for: these checks are half of what reading a window costs.
    least, most = (np.fmin, np.fmax) if name == "health_score" else (np.minimum, np.maximum)
    smallest = float(least.reduce(column)) if dtype.kind != "u" else low
    largest = float(most.reduce(column)) if dtype.kind != "i" else high
    if name == "health_score" and math.isnan(smallest):
        return
    if not (low <= smallest and largest <= high):
        raise MessageError(f"columns.{name} has values from {smallest} to {largest}; need {low} to {high}")


class EventKind(StrEnum):
    """What a :class:`RunEvent` is about."""

    RUN_STARTED = "run_started"
    RUN_ENDED = "run_ended"
    EPOCH_ENDED = "epoch_ended"
    #: A load was asked for.
    SEED_LOADING = "seed_loading"
    SEED_WOKEN = "seed_woken"
    #: A load came to nothing; the seed is dormant, or in ERROR_RECOVERY when the kernel was bad. Where a command to the
    #: seed has overtaken the load, that command is told next.
    SEED_REFUSED = "seed_refused"
    #: Put back to sleep.
    SEED_UNLOADED = "seed_unloaded"
    SEED_CULLED = "seed_culled"
    SEED_FOSSILIZED = "seed_fossilized"
    #: Its kernel failed in training, and was taken off the path.
    SEED_FAULT = "seed_fault"


_ABOUT_THE_RUN: Final = frozenset((EventKind.RUN_STARTED, EventKind.RUN_ENDED, EventKind.EPOCH_ENDED))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """Something that happened in a run.

    Attributes:
        kind: What.
        run_id: Name of the run.
        rank: Of the process among the ``world_size`` that train together.
        world_size: As said.
        sequence: Number of the event among those of this process, from 0.
        step: Training steps done when it happened.
        epoch: Epochs done.
        occurred_at: Seconds since 1970, by the trainer's clock.
        dropped_events: Events that were given up so far, as known when this was packed.
        layer_name: Whose seed; None for events of the run.
        seed_idx: Which seed; None for events of the run.
        artifact_id: The kernel, where one is known.
        reason: Why, in words, at most 1000 characters.
        loss: Mean over the epoch, where it is given.
        accuracy: Share in [0, 1], where it is given.
        values: Up to 32 further numbers by name.

    Raises:
        MessageError: a value that is not as described; the message names the field.
    """

    kind: EventKind
    run_id: str
    rank: int
    world_size: int
    sequence: int
    step: int
    epoch: int
    occurred_at: float
    dropped_events: int = 0
    layer_name: str | None = None
    seed_idx: int | None = None
    artifact_id: str | None = None
    reason: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "kind", EventKind(self.kind))
        except ValueError:
            raise MessageError(f"kind is {self.kind!r:.60}; known: {', '.join(EventKind)}") from None
        payload.run_id("run_id", self.run_id)
        payload.integer("world_size", self.world_size, 1, _MAX_RANK)
        payload.integer("rank", self.rank, 0, self.world_size - 1)
        for name in ("sequence", "step", "epoch", "dropped_events"):
            payload.integer(name, getattr(self, name))
        payload.number("occurred_at", self.occurred_at, 0.0)
        if (self.layer_name is None) != (self.kind in _ABOUT_THE_RUN) or (self.layer_name is None) != (
            self.seed_idx is None
        ):
            raise MessageError(f"a {self.kind} has layer {self.layer_name!r:.60} and seed {self.seed_idx!r:.20}")
        payload.optional(payload.text, "layer_name", self.layer_name, MAX_LAYER_NAME)
        payload.optional(payload.integer, "seed_idx", self.seed_idx, 0, _MAX_SEEDS)
        payload.optional(payload.text, "artifact_id", self.artifact_id, 512)
        payload.optional(payload.text, "reason", self.reason, _MAX_REASON)
        payload.optional(payload.number, "loss", self.loss)
        payload.optional(payload.number, "accuracy", self.accuracy, 0.0, 1.0)
        if not isinstance(self.values, Mapping) or len(self.values) > _MAX_VALUES:
            raise MessageError(f"values is {self.values!r:.60}; need at most {_MAX_VALUES} numbers by name")
        for key, value in self.values.items():
            payload.text("a name in values", key, 64)
            payload.number(f"values.{key}", value)

    @property
    def topic(self) -> TopicNames:
        """Where it travels."""
        return TopicNames.SYSTEM_EVENTS_EPOCH if self.kind in _ABOUT_THE_RUN else TopicNames.INNOVATION_FIELD_REPORTS

    def to_payload(self) -> dict[str, Any]:
        """JSON values."""
        found = {name: getattr(self, name) for name in _EVENT_FIELDS}
        found |= {"kind": self.kind.value, "values": dict(self.values)}
        return {"type": _EVENT_TYPE, "version": _EVENT_VERSION, **found}

    @classmethod
    def from_payload(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`, whatever ``data`` holds.

        Raises:
            MessageError: it is no event; the message names the field.
        """
        return cls(**payload.fields_of(data, _EVENT_TYPE, _EVENT_VERSION, _EVENT_FIELDS))


_EVENT_FIELDS: Final = tuple(RunEvent.__dataclass_fields__)


def printable(reason: str, longest: int = _MAX_REASON) -> str | None:
    """``reason`` as a payload can hold it: control characters become spaces, the end is cut; None if it is empty."""
    flat = "".join(letter if letter.isprintable() else " " for letter in reason[:longest]).strip()
    return flat or None


TelemetryPayload = HealthWindow | RunEvent | KasminaCommand | CommandOutcome
#: Of what travels without an attachment.
_READERS: Final[Mapping[tuple[TopicNames, str], type[RunEvent | KasminaCommand | CommandOutcome]]] = {
    (TopicNames.SYSTEM_EVENTS_EPOCH, _EVENT_TYPE): RunEvent,
    (TopicNames.INNOVATION_FIELD_REPORTS, _EVENT_TYPE): RunEvent,
    (TopicNames.INNOVATION_FIELD_REPORTS, CommandOutcome.TYPE): CommandOutcome,
    (TopicNames.CONTROL_KASMINA_COMMANDS, KasminaCommand.TYPE): KasminaCommand,
}


def read_payload(message: OonaMessage) -> TelemetryPayload:
    """What a message of one of the four topics of a run carries, checked.

    A command is as it came: whoever acts on it verifies it first.

    Raises:
        MessageError: it carries something else, or something that is not what it says.
    """
    kind = message.payload.get("type")
    if message.topic == TopicNames.TELEMETRY_SEED_HEALTH and kind == _WINDOW_TYPE:
        return HealthWindow.from_payload(message.payload, message.attachment)
    reader = _READERS.get((message.topic, kind)) if isinstance(kind, str) else None
    if reader is None:
        raise MessageError(f"a message on {message.topic} has a payload of type {kind!r:.60}, which nothing here reads")
    if message.attachment:
        raise MessageError(f"a {kind} has no attachment, and this one has one of {len(message.attachment)} bytes")
    return reader.from_payload(message.payload)
