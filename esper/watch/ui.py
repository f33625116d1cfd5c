"""What the viewer has chosen to see, and how keys change it. Nothing here draws or reads anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np

from esper.watch.facts import AWAKE, STATES
from esper.watch.state import JobState, RunKey, RunState
from esper.watch.summary import LayerState

__all__ = ["FILTERS", "Action", "Order", "Page", "Ui", "layer_rows", "rows_of", "run_of", "seed_rows"]


class Page(StrEnum):
    """What fills the middle of the screen."""

    LAYERS = "layers"
    SEEDS = "seeds"
    RUNS = "runs"
    HELP = "help"


class Order(StrEnum):
    """How layers are ordered."""

    NETWORK = "network"
    HEALTH = "health"
    FAULTS = "faults"
    NAME = "name"


class Action(StrEnum):
    """What a key asks of whoever runs the view."""

    QUIT = "quit"
    PAUSE = "pause"
    FASTER = "faster"
    SLOWER = "slower"


#: The states one may ask for, in the order that the key goes through them; "awake" stands for several.
FILTERS: Final = (
    "",
    "awake",
    "loading",
    "grafting",
    "training",
    "active",
    "fossilized",
    "error_recovery",
    "culled",
    "dormant",
)
_PAGE: Final = 10
_LONGEST_FILTER: Final = 60


@dataclass(slots=True)
class Ui:
    """The viewer's choices.

    Attributes:
        page: What fills the middle.
        chosen: Run and rank to show; None follows :meth:`JobState.current`.
        layer: Whose seeds the page of seeds shows.
        name_filter: Only layers whose name contains this, whatever the case.
        state_filter: One of :data:`FILTERS`: only layers that have a seed in this state, and only such seeds.
        order: Of layers.
        cursor: Row that is marked, by page.
        typing: The name filter is being typed.
        draft: What has been typed so far.
        paused: The picture stands still.
    """

    page: Page = Page.LAYERS
    chosen: RunKey | None = None
    layer: str = ""
    name_filter: str = ""
    state_filter: str = ""
    order: Order = Order.NETWORK
    cursor: dict[Page, int] = field(default_factory=dict)
    typing: bool = False
    draft: str = ""
    paused: bool = False

    def press(self, key: str, state: JobState) -> Action | None:
        """Act on one key, named as :mod:`esper.watch.keys` names them."""
        if self.typing:
            self._type(key)
            return None
        match key:
            case "q" | "Q":
                return Action.QUIT
            case "p" | " ":
                self.paused = not self.paused
                return Action.PAUSE
            case "+" | "=":
                return Action.FASTER
            case "-":
                return Action.SLOWER
            case "?" | "h":
                self.page = Page.LAYERS if self.page is Page.HELP else Page.HELP
            case "/":
                self.typing, self.draft = True, self.name_filter
            case "s" | "S":
                step = 1 if key == "s" else -1
                self.state_filter = FILTERS[(FILTERS.index(self.state_filter) + step) % len(FILTERS)]
                self._to_top()
            case "o":
                orders = list(Order)
                self.order = orders[(orders.index(self.order) + 1) % len(orders)]
                self._to_top()
            case "r":
                self.page = Page.LAYERS if self.page is Page.RUNS else Page.RUNS
            case "tab":
                self._next_run(state)
            case "enter":
                self._open(state)
            case "escape" | "backspace":
                self._back()
            case _:
                self._move(key, state)
        return None

    def _type(self, key: str) -> None:
        if key == "enter":
            self.typing, self.name_filter = False, self.draft
            self._to_top()
        elif key == "escape":
            self.typing = False
        elif key == "backspace":
            self.draft = self.draft[:-1]
        elif len(key) == 1 and key.isprintable() and len(self.draft) < _LONGEST_FILTER:
            self.draft += key

    def _to_top(self) -> None:
        self.cursor.clear()

    def _back(self) -> None:
        """One step back: from a page to the layers, and there the filters go."""
        if self.page is not Page.LAYERS:
            self.page = Page.LAYERS
        else:
            self.name_filter = self.state_filter = ""
            self._to_top()

    def _next_run(self, state: JobState) -> None:
        keys = list(state.runs)
        run = run_of(state, self)
        if run is not None:
            self.chosen = keys[(keys.index(run.key) + 1) % len(keys)]
            self._to_top()

    def _open(self, state: JobState) -> None:
        if self.page is Page.RUNS:
            keys = list(state.runs)
            if keys:
                self.chosen = keys[min(self.cursor.get(Page.RUNS, 0), len(keys) - 1)]
                self.page = Page.LAYERS
                self.cursor.pop(Page.LAYERS, None)
        elif self.page is Page.LAYERS:
            run = run_of(state, self)
            rows = [] if run is None else layer_rows(run, self)
            if run is not None and rows:
                self.layer = list(run.layers)[rows[min(self.cursor.get(Page.LAYERS, 0), len(rows) - 1)]]
                self.page = Page.SEEDS
                self.cursor.pop(Page.SEEDS, None)

    def _move(self, key: str, state: JobState) -> None:
        moves = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -_PAGE, "pagedown": _PAGE}
        last = rows_of(state, self) - 1
        here = min(self.cursor.get(self.page, 0), max(0, last))
        if key in moves:
            here += moves[key]
        elif key in ("home", "g"):
            here = 0
        elif key in ("end", "G"):
            here = last
        else:
            return
        self.cursor[self.page] = max(0, min(here, last))


def run_of(state: JobState, ui: Ui) -> RunState | None:
    """The run that is shown; a chosen one that was forgotten gives way to the current one."""
    found = None if ui.chosen is None else state.runs.get(ui.chosen)
    return found if found is not None else state.current()


def _wanted(state_filter: str) -> list[int]:
    return [*AWAKE] if state_filter == "awake" else [STATES.index(state_filter)]


def layer_rows(run: RunState, ui: Ui) -> list[int]:
    """Rows of ``run.totals`` to show, in order."""
    totals = run.refresh()
    number = len(run.layers)
    keep = np.ones(number, bool)
    if ui.state_filter:
        keep &= totals.counts[:, _wanted(ui.state_filter)].sum(1) > 0
    # While a filter is typed its effect is seen.
    text = (ui.draft if ui.typing else ui.name_filter).lower()
    if text:
        keep &= np.fromiter((text in name.lower() for name in run.layers), bool, number)
    rows = np.flatnonzero(keep)
    if ui.order is Order.HEALTH:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (totals.health_sum / totals.health_number)[rows]
        # NaN sorts last: nothing is known to be wrong there.
        rows = rows[np.argsort(mean, kind="stable")]
    elif ui.order is Order.FAULTS:
        faults = np.fromiter((layer.faults for layer in run.layers.values()), np.int64, number)[rows]
        rows = rows[np.lexsort((-totals.failing[rows], -faults))]
    elif ui.order is Order.NAME:
        names = list(run.layers)
        return sorted(rows.tolist(), key=lambda row: names[row])
    found: list[int] = rows.tolist()
    return found


def seed_rows(layer: LayerState, ui: Ui) -> list[int]:
    """Indices of the layer's seeds to show."""
    keep = np.isin(layer.states, _wanted(ui.state_filter)) if ui.state_filter else np.ones(len(layer.states), bool)
    found: list[int] = np.flatnonzero(keep).tolist()
    return found


def rows_of(state: JobState, ui: Ui) -> int:
    """How many rows the present page has."""
    if ui.page is Page.RUNS:
        return len(state.runs)
    run = run_of(state, ui)
    if run is None or ui.page is Page.HELP:
        return 0
    if ui.page is Page.SEEDS:
        layer = run.layers.get(ui.layer)
        return 0 if layer is None else len(seed_rows(layer, ui))
    return len(layer_rows(run, ui))
