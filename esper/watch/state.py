"""The picture of everything that is heard: runs, their ranks, layers, seeds, and what happened.

:class:`JobState` is told facts (:mod:`esper.watch.facts`) and the time, and does nothing else: no clock, no input, no
output. So a bus, a recording of it and a test make the same picture of the same facts. It is bounded, whatever it is
told: runs that were silent longest are forgotten first, layers and seeds beyond the limits are counted and left out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from esper.watch.facts import COLUMNS, Fact, LayerWindow, Level, RunReport, RunStatus, SeedChange, Unreadable
from esper.watch.rates import Pace, Rate
from esper.watch.summary import LayerState, Totals, summarise

__all__ = ["Happening", "JobState", "Limits", "RunKey", "RunState"]

RunKey = tuple[str, int]

_LAGS_KEPT: Final = 64
_METRICS_KEPT: Final = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept.

    Attributes:
        runs: Pairs of run and rank.
        layers: Of one run.
        seeds: Of one run, all layers together.
        happenings: Of one run, the latest.
        ids: Messages by which a copy is recognised.
    """

    runs: int = 64
    layers: int = 16_384
    seeds: int = 4_000_000
    happenings: int = 200
    ids: int = 65_536


@dataclass(frozen=True, slots=True)
class Happening:
    """A line of a run's story.

    Attributes:
        at: Seconds since 1970 by the sender's clock.
        text: For people.
        level: How much it matters.
        place: ``layer#seed``; empty for what concerns the run.
    """

    at: float
    text: str
    level: Level = Level.INFO
    place: str = ""


@dataclass(slots=True)
class RunState:
    """One process of one run.

    Attributes:
        run, rank: Which.
        limits: How much is kept.
        world_size: Processes that train together, as far as known.
        first_at, last_at: Times of its first and latest fact, by the sender's clock.
        heard_at: When it was last heard, by the watcher's clock.
        status: Where it stands.
        step, epoch: As last reported; None before.
        metrics: The latest value of every number it reports.
        layers: By name, in the order they were first heard of.
        totals: One row a layer, up to date after :meth:`refresh`.
        seed_count: Seeds of all layers.
        happenings: The latest, oldest first.
        windows, seeds: Rates of windows and of seeds in them.
        pace: Steps a second.
        lags: Seconds between a window's capture and its arrival here, the latest ones.
        loads_asked, loads_done, loads_refused: Kernels that were to be loaded.
        faults: Faults since watching began: rises of ``error_count``.
        missing: Windows that never came, by their numbers.
        late: Windows that came after a later one of their layer, and were left out.
        dropped: Windows and events the sender says it gave up.
        left_out: Windows and changes beyond the limits.
    """

    run: str
    rank: int
    limits: Limits
    world_size: int = 1
    first_at: float = 0.0
    last_at: float = 0.0
    heard_at: float = 0.0
    status: RunStatus = RunStatus.RUNNING
    step: int | None = None
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerState] = field(default_factory=dict)
    totals: Totals = field(default_factory=lambda: Totals.empty(0))
    seed_count: int = 0
    happenings: deque[Happening] = field(default_factory=deque)
    windows: Rate = field(default_factory=Rate)
    seeds: Rate = field(default_factory=Rate)
    pace: Pace = field(default_factory=Pace)
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=_LAGS_KEPT))
    loads_asked: int = 0
    loads_done: int = 0
    loads_refused: int = 0
    faults: int = 0
    missing: int = 0
    late: int = 0
    dropped: int = 0
    left_out: int = 0
    _dropped_events: int = 0
    _reported_at: float = 0.0
    _step_at: float = 0.0
    _epoch_at: float = 0.0

    @property
    def key(self) -> RunKey:
        """What it is kept under."""
        return self.run, self.rank

    def refresh(self) -> Totals:
        """Bring :attr:`totals` up to date with the layers."""
        if len(self.totals.counts) < len(self.layers):
            self.totals.resize(len(self.layers))
        changed = [(row, layer) for row, layer in enumerate(self.layers.values()) if layer.changed]
        if changed:
            self.totals.put(np.array([row for row, _ in changed]), summarise([layer for _, layer in changed]))
            for _, layer in changed:
                layer.changed = False
        return self.totals

    def take(self, fact: Fact, now: float) -> None:
        """Take in one fact, heard at ``now``."""
        if not self.first_at:
            self.first_at = fact.at
        self.last_at = max(self.last_at, fact.at)
        self.heard_at = now
        self.world_size = fact.world_size or self.world_size
        self._advance(fact)
        if isinstance(fact, RunReport):
            self._report(fact)
        elif isinstance(fact, LayerWindow):
            self._window(fact, now)
        elif isinstance(fact, SeedChange):
            self._change(fact)

    def _window(self, fact: LayerWindow, now: float) -> None:
        self.windows.add(1, now)
        self.seeds.add(len(fact.states), now)
        self.lags.append(now - fact.at)
        layer = self._layer(fact.layer, fact.num_seeds or fact.seed_offset + len(fact.states))
        if layer is None:
            return
        if not self._in_order(layer, fact):
            return
        self.dropped += _growth(layer.dropped, fact.dropped)
        layer.dropped = fact.dropped
        before = layer.columns.get("error_count")
        if fact.seed_offset == 0 and len(fact.states) == (fact.num_seeds or len(fact.states)):
            # All of them; fewer than before when a run is started again with fewer seeds.
            self.seed_count += len(fact.states) - len(layer.states)
            layer.states = fact.states
            layer.columns = dict(fact.columns)
        else:
            _put(layer, fact)
        rises = _rises(before, layer.columns.get("error_count"))
        layer.faults += rises
        self.faults += rises
        layer.at = fact.at
        layer.changed = True

    def _change(self, fact: SeedChange) -> None:
        if fact.kind == "requested":
            self.loads_asked += 1
        elif fact.kind == "bound":
            self.loads_done += 1
        elif fact.kind == "refused":
            self.loads_refused += 1
        self._tell(Happening(fact.at, fact.text or fact.kind, fact.level, f"{fact.layer}#{fact.seed_idx}"))
        layer = self._layer(fact.layer, fact.seed_idx + 1)
        # A window captured later knows better what state the seed is in.
        if layer is not None and fact.at >= layer.at:
            layer.set(fact.seed_idx, fact.state, fact.values)

    def _report(self, fact: RunReport) -> None:
        if fact.status is not None:
            self.status = fact.status
        for name, value in fact.metrics.items():
            if name in self.metrics or len(self.metrics) < _METRICS_KEPT:
                self.metrics[name] = value
        if fact.at >= self._reported_at:
            self.dropped += _growth(self._dropped_events, fact.dropped)
            self._dropped_events, self._reported_at = fact.dropped, fact.at
        if fact.text:
            self._tell(Happening(fact.at, fact.text, fact.level))

    def _advance(self, fact: Fact) -> None:
        # A late report takes nothing back. A run that is started again under its name counts from the beginning.
        if fact.step is not None and fact.at >= self._step_at:
            self.step, self._step_at = fact.step, fact.at
            self.pace.add(fact.step, fact.at)
        if fact.epoch is not None and fact.at >= self._epoch_at:
            self.epoch, self._epoch_at = fact.epoch, fact.at

    def _tell(self, happening: Happening) -> None:
        self.happenings.append(happening)
        while len(self.happenings) > self.limits.happenings:
            self.happenings.popleft()

    def _layer(self, name: str, seeds: int) -> LayerState | None:
        """The layer, with at least so many seeds; None beyond the limits."""
        layer = self.layers.get(name)
        more = seeds - (0 if layer is None else len(layer.states))
        if (layer is None and len(self.layers) >= self.limits.layers) or (
            more > 0 and self.seed_count + more > self.limits.seeds
        ):
            self.left_out += 1
            return None
        if layer is None:
            layer = self.layers[name] = LayerState(name)
        if more > 0:
            layer.grow(seeds)
            self.seed_count += more
        return layer

    def _in_order(self, layer: LayerState, fact: LayerWindow) -> bool:
        last, this = layer.sequence, fact.sequence
        # The next number is the next window even where the sender's clock was set back. For the others its clock
        # decides: numbers begin anew when a run is started again under its name.
        if fact.at < layer.at and (last is None or this != last + 1):
            self.late += 1
            if this is not None and last is not None and this < last:
                # It was counted as missing when the later one came.
                self.missing = max(0, self.missing - 1)
            return False
        if this is not None:
            self.missing += 0 if last is None else max(0, this - last - 1)
            layer.sequence = this
        return True


def _growth(before: int, now: int) -> int:
    """How much a counter grew that may have begun anew."""
    return now - before if now >= before else now


def _put(layer: LayerState, fact: LayerWindow) -> None:
    """Write a part of a layer's seeds into copies of its arrays."""
    part = slice(fact.seed_offset, fact.seed_offset + len(fact.states))
    layer.states = layer.states.copy()
    layer.states[part] = fact.states
    for name in COLUMNS:
        if name in fact.columns or name in layer.columns:
            column = layer.column(name).copy()
            column[part] = fact.columns.get(name, np.nan)
            layer.columns[name] = column


def _rises(before: npt.NDArray[Any] | None, after: npt.NDArray[Any] | None) -> int:
    """By how much the error counts rose; what they stood at when a layer is first seen is no rise."""
    if before is None or after is None or len(before) != len(after) or not after.any():
        return 0
    rises = np.nan_to_num(after).astype(np.int64) - np.nan_to_num(before).astype(np.int64)
    return int(rises[rises > 0].sum())


class JobState:
    """Everything that was heard.

    Attributes:
        limits: How much is kept.
        runs: By (run, rank), in the order they were first heard of.
        messages: Rate of all messages.
        duplicates: Messages that came again.
        unreadable: Messages that were none, or of kinds nobody here knows.
        unreadable_reason: What was wrong with the last of them.
        forgotten: Runs let go of because there were too many.
        skipped_s: Seconds of windows that the source left unread, to keep up.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.runs: dict[RunKey, RunState] = {}
        self.messages = Rate()
        self.duplicates = 0
        self.unreadable = 0
        self.unreadable_reason = ""
        self.forgotten = 0
        self.skipped_s = 0.0
        self._seen: dict[str, None] = {}

    def apply(self, fact: Fact | Unreadable, now: float) -> None:
        """Take in one fact.

        Args:
            fact: What is said.
            now: Seconds since 1970 by the watcher's clock; in a replay, the time that is replayed.
        """
        self.messages.add(1, now)
        if isinstance(fact, Unreadable):
            self.unreadable += 1
            self.unreadable_reason = fact.reason
        elif fact.event_id and self._again(fact.event_id):
            self.duplicates += 1
        else:
            self._run(fact).take(fact, now)

    def skip(self, seconds: float) -> None:
        """So much of the windows was left unread by whoever tells; what is left out that way is not missing."""
        self.skipped_s += seconds
        for run in self.runs.values():
            for layer in run.layers.values():
                layer.sequence = None

    def current(self) -> RunState | None:
        """The run to look at when nobody chose: of the latest that has layers, or else the latest, its lowest rank."""
        runs = list(self.runs.values())
        if not runs:
            return None
        latest = next((run for run in reversed(runs) if run.layers), runs[-1])
        ranks = [run for run in runs if run.run == latest.run and bool(run.layers) == bool(latest.layers)]
        return min(ranks, key=lambda run: run.rank)

    def _again(self, event_id: str) -> bool:
        if event_id in self._seen:
            return True
        self._seen[event_id] = None
        if len(self._seen) > self.limits.ids:
            del self._seen[next(iter(self._seen))]
        return False

    def _run(self, fact: Fact) -> RunState:
        key = (fact.run, fact.rank)
        run = self.runs.get(key)
        if run is None:
            if len(self.runs) >= self.limits.runs:
                silent = min(self.runs.values(), key=lambda each: each.heard_at)
                del self.runs[silent.key]
                self.forgotten += 1
            run = self.runs[key] = RunState(fact.run, fact.rank, self.limits)
        return run
