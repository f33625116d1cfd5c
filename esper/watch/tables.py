"""The rows of the three pages: layers of a run, seeds of a layer, runs. Each column has a width and a rank.

Where there is little room the columns of the highest rank go first, until names have :data:`MIN_NAME` characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from esper.watch.facts import AWAKE, STATES
from esper.watch.format import compact, duration, fit, number, rate
from esper.watch.state import RunState
from esper.watch.summary import LayerState, Totals

__all__ = ["LIFE", "STYLES", "Column", "health_style", "layer_lines", "run_lines", "seed_lines", "widths"]

MIN_NAME: Final = 14
#: Columns above this rank have to leave room for whole names, as far as those are not longer than _LONG_NAME.
_EXTRA: Final = 5
_LONG_NAME: Final = 36

#: Numbers of the states in the order of a seed's life.
LIFE: Final = (0, 1, 5, 6, 2, 4, 3, 7)
#: Colours add to what words say, and say nothing by themselves.
STYLES: Final = {
    "dormant": "bright_black",
    "loading": "yellow",
    "active": "green",
    "error_recovery": "bold red",
    "fossilized": "magenta",
    "grafting": "cyan",
    "training": "blue",
    "culled": "red",
}
#: How soon the column of a state goes on a narrow screen, by number of the state.
_RANKS: Final = {0: 1, 1: 3, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3}

Row = TypeVar("Row")
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """One column: its title, cells it takes, how soon it may go (0 never), and what a row has in it."""

    title: str
    width: int
    rank: int
    cell: Callable[[Row], Cell]


def widths(columns: Sequence[Column[Row]], width: int, longest: int) -> tuple[int, list[Column[Row]]]:
    """The room for names and the columns that fit beside them, each with a space before it.

    Args:
        columns: All there are.
        width: Cells of a line.
        longest: Cells of the longest name.
    """
    kept = list(columns)
    while kept:
        room = width - sum(column.width + 1 for column in kept)
        highest = max(column.rank for column in kept)
        needed = max(MIN_NAME, min(longest, _LONG_NAME)) if highest > _EXTRA else MIN_NAME
        if room >= needed or highest == 0:
            return max(1, room), kept
        last = max(place for place, column in enumerate(kept) if column.rank == highest)
        del kept[last]
    return width, kept


def _line(name: str, name_style: str, room: int, columns: Sequence[Column[Row]], row: Row) -> Text:
    line = Text(fit(name, room), style=name_style)
    for column in columns:
        text, style = column.cell(row)
        line.append(" ")
        line.append(fit(text.rjust(column.width), column.width), style)
    return line


def _header(name: str, room: int, columns: Sequence[Column[Row]]) -> Text:
    line = Text(fit(name, room), style="bold")
    for column in columns:
        line.append(" " + column.title.rjust(column.width))
    return line


# -- layers --


@dataclass(frozen=True, slots=True)
class _Layer:
    """One row of the totals, or the sum of all."""

    counts: Sequence[int]
    health: float
    lowest: float
    alpha: float
    dead: float
    correlation: float
    latency: float
    failing: int
    faults: int


def _mean(total: float, number: float) -> float:
    return total / number if number else math.nan


def _layer(totals: Totals, row: int | None, faults: int) -> _Layer:
    rows = slice(None) if row is None else slice(row, row + 1)

    def summed(values: np.ndarray) -> float:
        return float(values[rows].sum())

    lowest = totals.health_min[rows]
    latency = totals.latency_max[rows]
    return _Layer(
        counts=totals.counts[rows].sum(0).tolist(),
        health=_mean(summed(totals.health_sum), summed(totals.health_number)),
        lowest=float(lowest.min()) if len(lowest) else math.inf,
        alpha=_mean(summed(totals.alpha_sum), summed(totals.awake_number)),
        dead=_mean(summed(totals.dead_sum), summed(totals.watched)),
        correlation=_mean(summed(totals.correlation_sum), summed(totals.watched)),
        latency=float(latency.max()) if len(latency) else 0.0,
        failing=int(totals.failing[rows].sum()),
        faults=faults,
    )


def _counted(state: int) -> Callable[[_Layer], Cell]:
    def cell(row: _Layer) -> Cell:
        count = row.counts[state]
        return (compact(count), STYLES[STATES[state]]) if count else ("·", "bright_black")

    return cell


def health_style(value: float) -> str:
    """Red below a quarter, yellow below a half."""
    return "" if not value < 0.5 else "red" if value < 0.25 else "yellow"


def _health(value: float) -> Cell:
    return number(value), health_style(value)


def _fault_cell(row: _Layer) -> Cell:
    if row.failing:
        return f"{compact(row.faults)}!", "bold red"
    return (compact(row.faults), "red") if row.faults else ("·", "bright_black")


_LAYER_COLUMNS: Final[list[Column[_Layer]]] = [
    *(Column(STATES[state][:4], 4, _RANKS[state], _counted(state)) for state in LIFE),
    Column("heal", 4, 0, lambda row: _health(row.health)),
    Column("alpha", 5, 4, lambda row: (number(row.alpha), "")),
    Column("faults", 6, 5, _fault_cell),
    Column("worst", 5, 6, lambda row: _health(row.lowest)),
    Column("dead", 5, 7, lambda row: (number(row.dead), "")),
    Column("corr", 5, 8, lambda row: (number(row.correlation), "")),
    Column("us", 6, 9, lambda row: (compact(int(row.latency)) if row.latency else "·", "")),
]


def layer_lines(run: RunState, rows: Sequence[int], marked: int | None, width: int) -> tuple[Text, Text, list[Text]]:
    """Header, the line of all layers, and one line for each of ``rows``; ``marked`` is one of them, or None."""
    totals = run.refresh()
    layers = list(run.layers.values())
    longest = max((cell_len(layer.name) for layer in layers), default=0)
    room, columns = widths(_LAYER_COLUMNS, width, longest)
    header = _header("layer", room, columns)
    total = _line(f"all {len(layers)} layers", "bold", room, columns, _layer(totals, None, run.faults))
    lines = []
    for row in rows:
        line = _line(layers[row].name, "", room, columns, _layer(totals, row, layers[row].faults))
        if row == marked:
            line.stylize("reverse")
        lines.append(line)
    return header, total, lines


# -- seeds --


def _column(layer: LayerState, name: str) -> Callable[[int], float]:
    values = layer.column(name)
    return lambda row: float(values[row])


def _whole(value: float) -> str:
    return compact(int(value)) if math.isfinite(value) else "-"


def seed_lines(layer: LayerState, rows: Iterable[int], marked: int | None, width: int) -> tuple[Text, list[Text]]:
    """Header and one line for each of ``rows``, which are seed indices."""
    alpha, health = _column(layer, "alpha"), _column(layer, "health_score")
    dead, correlation = _column(layer, "dead_neuron_ratio"), _column(layer, "avg_correlation")
    mean, variance = _column(layer, "activation_mean"), _column(layer, "activation_variance")
    nonfinite, latency = _column(layer, "nonfinite_count"), _column(layer, "exec_latency_us")
    errors = _column(layer, "error_count")

    def state(row: int) -> Cell:
        name = STATES[layer.states[row]]
        return name.ljust(14), STYLES[name]

    def bad(value: float) -> Cell:
        return ("·", "bright_black") if value == 0 else (_whole(value), "bold red" if value > 0 else "")

    columns: list[Column[int]] = [
        Column("state".ljust(14), 14, 0, state),
        Column("alpha", 5, 0, lambda row: (number(alpha(row)), "" if layer.states[row] in AWAKE else "bright_black")),
        Column("health", 6, 0, lambda row: _health(health(row))),
        Column("dead", 5, 1, lambda row: (number(dead(row)), "")),
        Column("corr", 5, 2, lambda row: (number(correlation(row)), "")),
        Column("mean", 8, 4, lambda row: (number(mean(row), 3), "")),
        Column("variance", 8, 5, lambda row: (number(variance(row), 3), "")),
        Column("faults", 6, 0, lambda row: bad(errors(row))),
        Column("nonfin", 6, 3, lambda row: bad(nonfinite(row))),
        Column("us", 5, 6, lambda row: (_whole(latency(row)), "")),
    ]
    # Seeds have numbers for names, so more columns fit.
    kept = list(columns)
    while sum(column.width + 1 for column in kept) + 5 > width and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    room = max(5, width - sum(column.width + 1 for column in kept)) if width < 90 else 12
    lines = []
    for row in rows:
        line = _line(f"#{row}", "", room, kept, row)
        if row == marked:
            line.stylize("reverse")
        lines.append(line)
    return _header("seed", room, kept), lines


# -- runs --


def run_lines(
    runs: Sequence[RunState], shown: RunState | None, marked: int | None, now: float, width: int
) -> tuple[Text, list[Text]]:
    """Header and one line for each of ``runs``; the one that is shown has a star."""

    def awake(run: RunState) -> Cell:
        return compact(int(run.refresh().counts[:, list(AWAKE)].sum())), ""

    def health(run: RunState) -> Cell:
        totals = run.refresh()
        return _health(_mean(float(totals.health_sum.sum()), float(totals.health_number.sum())))

    columns: list[Column[RunState]] = [
        Column("rank", 4, 0, lambda run: (str(run.rank), "")),
        Column("status", 11, 0, lambda run: (run.status.value, "")),
        Column("epoch", 5, 1, lambda run: ("-" if run.epoch is None else compact(run.epoch), "")),
        Column("step", 5, 2, lambda run: ("-" if run.step is None else compact(run.step), "")),
        Column("seeds", 5, 3, lambda run: (compact(run.seed_count), "")),
        Column("awake", 5, 0, awake),
        Column("health", 6, 0, health),
        Column("faults", 6, 0, lambda run: (compact(run.faults), "red" if run.faults else "bright_black")),
        Column("heard", 8, 4, lambda run: (duration(now - run.heard_at), "")),
        Column("steps/s", 7, 5, lambda run: (rate(run.pace.per_second()), "")),
    ]
    room, kept = widths(columns, width, max((len(run.run) for run in runs), default=0) + 2)
    lines = []
    for row, run in enumerate(runs):
        line = _line(f"{'*' if run is shown else ' '} {run.run}", "", room, kept, run)
        if row == marked:
            line.stylize("reverse")
        lines.append(line)
    return _header("  run", room, kept), lines
