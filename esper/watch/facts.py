"""What a watcher is told, whatever it was told by: a message from the bus or a line of a file.

Facts are plain values: text that may be put on a terminal, numbers, arrays. Whoever makes one has checked what it was
made of. :mod:`esper.watch.decode` makes them from messages, :mod:`esper.watch.grow_log` from the lines of
``events.jsonl``. One message is one fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "AWAKE",
    "COLUMNS",
    "STATES",
    "Fact",
    "LayerWindow",
    "Level",
    "RunReport",
    "RunStatus",
    "SeedChange",
    "Unreadable",
    "clean",
]

#: Lifecycle states by number, as ``SeedLifecycleState`` has them, in lower case.
STATES: Final = ("dormant", "loading", "active", "error_recovery", "fossilized", "grafting", "training", "culled")
#: Numbers of the states in which the seed's kernel is bound.
AWAKE: Final = (2, 4, 5, 6)

#: What is known of a seed besides its state, one number each; NaN where unknown.
COLUMNS: Final = (
    "alpha",
    "health_score",
    "activation_mean",
    "activation_variance",
    "dead_neuron_ratio",
    "avg_correlation",
    "nonfinite_count",
    "error_count",
    "exec_latency_us",
)

_MAX_TEXT: Final = 400


class Level(StrEnum):
    """How much something matters to somebody who watches."""

    INFO = "info"
    GOOD = "good"
    BAD = "bad"


class RunStatus(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Base of all facts.

    Attributes:
        run: Name of the run, for people.
        rank: Of the process within the run.
        world_size: Processes that train together; None where unknown.
        at: Seconds since 1970 by the sender's clock.
        event_id: Tells a copy from the first; empty where there is none.
        step: Training steps so far; None where unknown.
        epoch: Passes over the data so far; None where unknown.
    """

    run: str
    rank: int = 0
    world_size: int | None = None
    at: float
    event_id: str = ""
    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWindow(Fact):
    """One layer's seeds at one moment.

    Attributes:
        layer: Dotted name.
        sequence: Number of the window among those of this layer from this process, without gaps; None where it does
            not count. The parts of a layer too large for one message share it.
        dropped: Windows of this layer that the sender gave up so far.
        states: uint8 ``[n]``, numbers of :data:`STATES`.
        columns: Numbers ``[n]`` by name of :data:`COLUMNS`; names may be missing.
        seed_offset: First seed of the arrays.
        num_seeds: Seeds of the layer; None for as many as the arrays have.
    """

    layer: str
    sequence: int | None = None
    dropped: int = 0
    states: npt.NDArray[np.uint8]
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    seed_offset: int = 0
    num_seeds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedChange(Fact):
    """Something happened to one seed.

    Attributes:
        layer: Dotted name.
        seed_idx: Which of its seeds.
        kind: ``requested``, ``bound``, ``refused``, ``fault``, or any other word.
        state: The state it has from now on; None where that does not follow.
        values: Of :data:`COLUMNS`, where the event tells them.
        text: For people, without the seed's place.
        level: How much it matters.
    """

    layer: str
    seed_idx: int
    kind: str
    state: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    level: Level = Level.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport(Fact):
    """How far a run is, and what concerns all of it.

    Attributes:
        metrics: Numbers by name, as ``validation_loss``.
        dropped: Events that the sender gave up so far.
        text: For people; empty for what is worth no line.
        level: How much it matters.
        status: Where the run stands from now on; None where that does not change.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: int = 0
    text: str = ""
    level: Level = Level.INFO
    status: RunStatus | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that is none, or of a kind this version does not know: counted, and otherwise left alone.

    Attributes:
        reason: What was wrong with it.
    """

    reason: str


def clean(text: object, limit: int = _MAX_TEXT) -> str:
    """``text`` made safe for a terminal: one line, nothing that moves the cursor, bounded."""
    kept = str(text)[: limit + 1]
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in kept)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"
