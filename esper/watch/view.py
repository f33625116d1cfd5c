"""The picture as lines of text: a pure function of the state, the viewer's choices, the time and the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.text import Text

from esper.watch.facts import STATES, Level
from esper.watch.format import bars, clock, compact, duration, fit, fit_end, number, rate, seconds
from esper.watch.state import Happening, JobState, RunState
from esper.watch.tables import LIFE, STYLES, health_style, layer_lines, run_lines, seed_lines
from esper.watch.ui import Order, Page, Ui, layer_rows, run_of, seed_rows

__all__ = ["Heading", "draw", "once"]

#: Lines of the story that are shown where there is room.
_STORY: Final = 5
_NARROWEST: Final = 20
_LEVELS: Final = {Level.INFO: "", Level.GOOD: "green", Level.BAD: "red"}
_HELP: Final = (
    ("up down j k", "mark a row; PageUp PageDown Home End"),
    ("enter", "seeds of the marked layer; on the page of runs: watch the marked run"),
    ("esc", "back; on the page of layers: all filters off"),
    ("/", "only layers whose name contains what you type"),
    ("s S", "only seeds in a state: awake, loading, grafting, ... (S: backwards)"),
    ("o", "order of layers: network, worst health, most faults, name"),
    ("r tab", "all runs and ranks; the next one"),
    ("p space", "pause: the picture stands still, a bus is listened to meanwhile"),
    ("+ -", "a replay goes faster, slower"),
    ("q", "quit"),
)


@dataclass(frozen=True, slots=True)
class Heading:
    """What the first line says.

    Attributes:
        source: Where it comes from, without credentials.
        mode: ``live``, ``paused``, ``replay x10``, ``ended``, ``no answer``, ...
        now: The time that is shown.
        alarm: What is wrong; empty if nothing is.
        measures_lag: Whether the time since capture means something: not in a replay.
    """

    source: str
    mode: str
    now: float
    alarm: str = ""
    measures_lag: bool = True


@dataclass(frozen=True, slots=True)
class _Field:
    text: str
    style: str = ""


def draw(state: JobState, ui: Ui, heading: Heading, width: int, height: int) -> list[Text]:
    """Exactly ``height`` lines of at most ``width`` cells."""
    if width < _NARROWEST or height < 3:
        return _sized([Text(fit_end("too small", width))], height)
    run = run_of(state, ui)
    top = [_title(heading, width), *_facts(state, run, heading, width)]
    bottom = [_footer(ui, width)]
    if height < 12:
        top = top[: max(1, height - 6)]
    room = height - len(top) - len(bottom)
    story = _story(run, ui, min(_STORY, room - 8), width)
    room -= len(story)
    lines = _sized([*top, *_page(state, run, ui, heading, width, room), *story, *bottom], height)
    for line in lines:
        line.truncate(width)
    return lines


def once(state: JobState, ui: Ui, heading: Heading, width: int) -> list[Text]:
    """The same picture for a page without end: all rows, and the whole of the latest story."""
    run = run_of(state, ui)
    rows = len(run.layers) + 2 if run is not None else 1
    lines = [_title(heading, width), *_facts(state, run, heading, width)]
    lines += [line for line in _page(state, run, ui, heading, width, rows) if line.plain.strip()]
    if len(state.runs) > 1:
        header, runs = run_lines(list(state.runs.values()), run, None, heading.now, width)
        lines += [_rule("runs", width), header, *runs]
    lines += _story(run, ui, 2 * _STORY, width)
    for line in lines:
        line.rstrip()
    return lines


def _sized(lines: list[Text], height: int) -> list[Text]:
    # What is too much goes before the footer.
    if len(lines) > height:
        lines = [*lines[: height - 1], lines[-1]] if height > 1 else lines[:1]
    return lines + [Text()] * (height - len(lines))


# -- top --


def _title(heading: Heading, width: int) -> Text:
    right = f"{heading.mode}  {clock(heading.now)} "
    left = " esper monitor  "
    room = width - cell_len(right) - cell_len(left) - 1
    if room < 4:
        left, room = " ", width - cell_len(right) - 2
    line = Text(left + fit(heading.source, max(0, room)) + " " + right, style="reverse")
    if heading.alarm:
        line.stylize("red")
    line.truncate(width)
    return line


def _facts(state: JobState, run: RunState | None, heading: Heading, width: int) -> list[Text]:
    """What is known of the run in fields, over as many lines as they need."""
    alarm = [Text(fit_end(heading.alarm, width), style="bold red")] if heading.alarm else []
    if run is None:
        trouble = _flow(_trouble(state, None), width)
        return [*alarm, Text(fit_end("no run heard of yet", width), style="bright_black"), *trouble]
    fields = [_Field(f"run {run.run}", "bold")]
    if run.world_size > 1 or run.rank:
        fields.append(_Field(f"rank {run.rank} of {max(run.world_size, run.rank + 1)}"))
    fields.append(_Field(run.status.value))
    if run.epoch is not None:
        fields.append(_Field(f"epoch {run.epoch}"))
    if run.step is not None:
        fields.append(_Field(f"step {run.step}"))
    if (pace := run.pace.per_second()) is not None:
        fields.append(_Field(f"{rate(pace)} steps/s"))
    fields.append(_Field(f"for {duration(run.last_at - run.first_at)}"))
    if len(state.runs) > 1:
        fields.append(_Field(f"({list(state.runs).index(run.key) + 1} of {len(state.runs)} runs)", "bright_black"))
    lines = [*alarm, *_flow(fields, width)]

    flow = [_Field(f"{rate(run.windows.per_second(heading.now))} windows/s")]
    flow.append(_Field(f"{rate(run.seeds.per_second(heading.now))} seeds/s"))
    if heading.measures_lag and run.lags:
        recent = sorted(run.lags)
        flow.append(_Field(f"lag {seconds(recent[len(recent) // 2])}, max {seconds(recent[-1])}"))
    lines += _flow([*flow, *_trouble(state, run)], width)

    totals = run.refresh()
    known = float(totals.health_number.sum())
    mean = float(totals.health_sum.sum()) / known if known else float("nan")
    seeds = [
        _Field(f"{run.seed_count} seeds"),
        _Field(f"health {number(mean)}", health_style(mean)),
        _Field(f"0[{bars(totals.health_bins.sum(0).tolist())}]1"),
        _Field(f"faults {run.faults}", "bold red" if run.faults else "bright_black"),
        _loads(run, int(totals.counts[:, 1].sum())),
    ]
    if nonfinite := int(totals.nonfinite.sum()):
        seeds.append(_Field(f"nonfinite {compact(nonfinite)}", "bold red"))
    lines += _flow(seeds, width)
    if run.metrics:
        lines += _flow([_Field(f"{name} {number(value, 3)}") for name, value in run.metrics.items()], width)[:2]
    return lines


def _loads(run: RunState, loading: int) -> _Field:
    under_way = max(loading, run.loads_asked - run.loads_done - run.loads_refused)
    text = f"loads {under_way} under way, {run.loads_done} done, {run.loads_refused} refused"
    return _Field(text, "yellow" if under_way else "")


def _trouble(state: JobState, run: RunState | None) -> list[_Field]:
    """What got lost: the three that matter always, others when there are any."""
    fields = []
    if run is not None:
        for name, count in (("dropped", run.dropped), ("missing", run.missing), ("late", run.late)):
            fields.append(_Field(f"{name} {compact(count)}", "bold red" if count else "bright_black"))
        if run.left_out:
            fields.append(_Field(f"left out {compact(run.left_out)}", "bold red"))
    if state.duplicates:
        fields.append(_Field(f"twice {compact(state.duplicates)}", "yellow"))
    if state.forgotten:
        fields.append(_Field(f"runs forgotten {compact(state.forgotten)}", "yellow"))
    if state.skipped_s:
        fields.append(_Field(f"skipped {duration(state.skipped_s)}", "yellow"))
    if state.unreadable:
        fields.append(_Field(f"unreadable {compact(state.unreadable)}: {state.unreadable_reason}", "red"))
    return fields


def _flow(fields: Sequence[_Field], width: int) -> list[Text]:
    """Fields one after the other, two spaces apart, on as many lines as they take."""
    lines: list[Text] = []
    for item in fields:
        text = fit_end(item.text, width)
        if not lines or lines[-1].cell_len + 2 + cell_len(text) > width:
            lines.append(Text())
        else:
            lines[-1].append("  ")
        lines[-1].append(text, item.style)
    return lines


# -- middle --


def _page(state: JobState, run: RunState | None, ui: Ui, heading: Heading, width: int, room: int) -> list[Text]:
    if room < 1:
        return []
    if ui.page is Page.HELP:
        return _sized([Text(), *_help(width)][:room], room)
    if ui.page is Page.RUNS:
        runs = list(state.runs.values())
        first, last, marked = _window(ui, Page.RUNS, len(runs), room - 1)
        header, lines = run_lines(runs, run, marked, heading.now, width)
        return _sized([header, *lines[first:last]], room)
    if run is None:
        return [Text()] * room
    if ui.page is Page.SEEDS and ui.layer in run.layers:
        layer = run.layers[ui.layer]
        rows = seed_rows(layer, ui)
        first, last, place = _window(ui, Page.SEEDS, len(rows), room - 2)
        title = _rule(f"{ui.layer}  {len(rows)} of {len(layer.states)} seeds", width)
        header, lines = seed_lines(layer, rows[first:last], rows[place] if rows else None, width)
        return _sized([title, header, *lines], room)
    rows = layer_rows(run, ui)
    first, last, place = _window(ui, Page.LAYERS, len(rows), room - 2)
    header, total, lines = layer_lines(run, rows[first:last], rows[place] if rows else None, width)
    if not rows:
        words = "no layer matches: esc takes the filters off" if run.layers else "no layer heard of yet"
        lines = [Text(fit_end(words, width), style="bright_black")]
    return _sized([header, total, *lines], room)


def _window(ui: Ui, page: Page, rows: int, room: int) -> tuple[int, int, int]:
    """First and last row in sight, and the marked one, which is always in sight."""
    room = max(1, room)
    place = max(0, min(ui.cursor.get(page, 0), rows - 1))
    first = max(0, min(place - room // 2, rows - room))
    return first, first + room, place


def _help(width: int) -> list[Text]:
    lines = []
    for keys, meaning in _HELP:
        line = Text("  ")
        line.append(fit(keys, 13), "bold").append(fit_end(meaning, max(1, width - 15)))
        lines.append(line)
    lines.append(Text())
    states = [_Field(STATES[state], STYLES[STATES[state]]) for state in LIFE]
    return [*lines, *_flow([_Field("  states, in the order of a seed's life:"), *states], width)]


# -- bottom --


def _story(run: RunState | None, ui: Ui, room: int, width: int) -> list[Text]:
    if run is None or room < 2 or not run.happenings or ui.page in (Page.HELP, Page.RUNS):
        return []
    latest = list(run.happenings)[-(room - 1) :]
    return [_rule("what happened", width), *(_happening(each, width) for each in latest)]


def _happening(happening: Happening, width: int) -> Text:
    line = Text(f"{clock(happening.at)} ", style="bright_black")
    place = f"{fit(happening.place, min(len(happening.place), 24))} " if happening.place else ""
    line.append(place, "default")
    line.append(fit_end(happening.text, max(1, width - line.cell_len)), _LEVELS[happening.level] or "default")
    line.truncate(width)
    return line


def _rule(text: str, width: int) -> Text:
    inside = f"── {fit_end(text, max(1, width - 7))} "
    return Text(inside + "─" * max(0, width - cell_len(inside)), style="bright_black")


def _footer(ui: Ui, width: int) -> Text:
    if ui.typing:
        line = Text("layer name contains: ", style="bold")
        line.append(fit_end(ui.draft, max(1, width - 46)), "reverse").append("_  enter takes it, esc not")
    else:
        line = Text(style="bright_black")
        chosen = []
        if ui.name_filter:
            chosen.append(f"name:{fit_end(ui.name_filter, 16)}")
        if ui.state_filter:
            chosen.append(f"state:{ui.state_filter}")
        if ui.order is not Order.NETWORK:
            chosen.append(f"order:{ui.order.value}")
        if chosen:
            line.append(" ".join(chosen) + "  ", "bold yellow")
        line.append("q quit  ? help  / name  s state  o order  enter seeds  r runs  p pause")
    line.truncate(width)
    return line
