"""One row of numbers for each layer of a run, made from all seeds of all layers that changed, at once.

A message costs its layer an assignment; what the screen shows is computed when it is drawn. So ten thousand seeds
reported a hundred times a second cost a few passes over ten thousand numbers each time the picture is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from esper.watch.facts import AWAKE, COLUMNS, STATES

__all__ = ["HEALTH_BINS", "LayerState", "Totals", "summarise"]

#: Equal parts of [0, 1] that health is counted in.
HEALTH_BINS: Final = 10

_AWAKE: Final = np.isin(np.arange(len(STATES)), AWAKE)

FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class LayerState:
    """What is known of one layer.

    Attributes:
        name: Dotted name.
        states: uint8 ``[S]``.
        columns: Float ``[S]`` by name of ``COLUMNS``; a missing name is unknown for all seeds.
        sequence: Of the last window; None where the sender does not count.
        at: When it was last reported, by the sender's clock.
        dropped: Windows of it that the sender says it gave up.
        faults: Faults seen since watching began: rises of ``error_count``.
        changed: Touched since it was last summarised.
    """

    name: str
    states: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    sequence: int | None = None
    at: float = 0.0
    dropped: int = 0
    faults: int = 0
    changed: bool = True

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column ``[S]``, NaN where unknown."""
        found = self.columns.get(name)
        return np.full(len(self.states), np.nan, np.float32) if found is None else found

    def grow(self, seeds: int) -> None:
        """Make room for ``seeds`` seeds; those nothing was said of are dormant, because a seed sleeps until woken."""
        more = seeds - len(self.states)
        if more > 0:
            self.states = np.concatenate([self.states, np.zeros(more, np.uint8)])
            for name, values in self.columns.items():
                self.columns[name] = np.concatenate([values, np.full(more, np.nan, values.dtype)])

    def set(self, seed_idx: int, state: int | None, values: Mapping[str, float]) -> None:
        """Change single values of one seed; arrays that came with a message are copied first, being read-only."""
        self.grow(seed_idx + 1)
        if state is not None:
            self.states = self.states.copy()
            self.states[seed_idx] = state
        for name, value in values.items():
            column = self.column(name).copy()
            column[seed_idx] = value
            self.columns[name] = column
        self.changed = True


@dataclass(slots=True)
class Totals:
    """One row a layer; ``sum`` over rows gives the run's.

    Attributes:
        counts: int64 ``[L, 8]``, seeds by state.
        health_bins: int64 ``[L, HEALTH_BINS]``.
        health_sum, health_number, health_min: float64 ``[L]``, over seeds whose health is known; minimum inf for none.
        alpha_sum, awake_number: float64 ``[L]``, over awake seeds.
        dead_sum, correlation_sum, watched: float64 ``[L]``, over seeds that have been watched.
        latency_max: float64 ``[L]``, microseconds; 0 where nothing was measured.
        nonfinite: float64 ``[L]``, NaN and infinite values in the last windows.
        failing: int64 ``[L]``, seeds with consecutive faults now.
    """

    counts: npt.NDArray[np.int64]
    health_bins: npt.NDArray[np.int64]
    health_sum: FloatArray
    health_number: FloatArray
    health_min: FloatArray
    alpha_sum: FloatArray
    awake_number: FloatArray
    dead_sum: FloatArray
    correlation_sum: FloatArray
    watched: FloatArray
    latency_max: FloatArray
    nonfinite: FloatArray
    failing: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, layers: int) -> Totals:
        """Rows of layers without seeds."""
        columns: dict[str, Any] = {name: np.zeros(layers) for name in cls.__slots__}
        columns["counts"] = np.zeros((layers, len(STATES)), np.int64)
        columns["health_bins"] = np.zeros((layers, HEALTH_BINS), np.int64)
        columns["health_min"] = np.full(layers, np.inf)
        columns["failing"] = np.zeros(layers, np.int64)
        return cls(**columns)

    def by_state(self) -> dict[str, int]:
        """Seeds of all rows by name of their state."""
        sums = self.counts.sum(0)
        return {name: int(sums[number]) for number, name in enumerate(STATES)}

    def resize(self, layers: int) -> None:
        """Make room for ``layers`` rows."""
        more = Totals.empty(layers - len(self.counts))
        for name in self.__slots__:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(more, name)]))

    def put(self, rows: npt.NDArray[np.int64], other: Totals) -> None:
        """Overwrite ``rows`` with those of ``other``, in order."""
        for name in self.__slots__:
            getattr(self, name)[rows] = getattr(other, name)


def summarise(layers: Sequence[LayerState]) -> Totals:
    """The rows of ``layers``, in one pass over all their seeds."""
    number = len(layers)
    totals = Totals.empty(number)
    lengths = np.fromiter((len(layer.states) for layer in layers), np.int64, number)
    if not lengths.sum():
        return totals
    row = np.repeat(np.arange(number), lengths)
    states = np.concatenate([layer.states for layer in layers])
    totals.counts = np.bincount(row * len(STATES) + states, minlength=number * len(STATES)).reshape(number, -1)
    columns = {name: _joined(layers, name) for name in COLUMNS}

    def total(values: npt.NDArray[Any]) -> FloatArray:
        return np.bincount(row, weights=values, minlength=number).astype(np.float64, copy=False)

    health = columns["health_score"]
    known = np.isfinite(health)
    sane = np.where(known, np.clip(health, 0.0, 1.0), 0.0)
    totals.health_sum, totals.health_number = total(sane), total(known)
    place = np.minimum((sane * HEALTH_BINS).astype(np.int64), HEALTH_BINS - 1)
    totals.health_bins = np.bincount((row * HEALTH_BINS + place)[known], minlength=number * HEALTH_BINS).reshape(
        number, -1
    )
    np.minimum.at(totals.health_min, row[known], sane[known])

    awake = _AWAKE[states]
    alpha = columns["alpha"]
    ramped = awake & np.isfinite(alpha)
    totals.alpha_sum, totals.awake_number = total(np.where(ramped, alpha, 0.0)), total(ramped)

    dead, correlation = columns["dead_neuron_ratio"], columns["avg_correlation"]
    watched = known & np.isfinite(dead) & np.isfinite(correlation)
    totals.dead_sum = total(np.where(watched, dead, 0.0))
    totals.correlation_sum = total(np.where(watched, correlation, 0.0))
    totals.watched = total(watched)

    np.maximum.at(totals.latency_max, row, np.nan_to_num(columns["exec_latency_us"]))
    totals.nonfinite = total(np.nan_to_num(columns["nonfinite_count"]))
    totals.failing = np.bincount(row[columns["error_count"] > 0], minlength=number)
    return totals


def _joined(layers: Sequence[LayerState], name: str) -> FloatArray:
    return np.concatenate([layer.column(name) for layer in layers]).astype(np.float64, copy=False)
