"""The picture at several widths, its pages, filters and orders, and the keys that lead there."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("rich")

from rich.cells import cell_len

from esper.watch.facts import STATES, Level, RunReport, SeedChange, Unreadable
from esper.watch.format import bars, compact, duration, fit, fit_end, number, rate, seconds
from esper.watch.keys import KeyDecoder
from esper.watch.state import JobState
from esper.watch.ui import FILTERS, Action, Order, Page, Ui, layer_rows
from esper.watch.view import Heading, draw, once
from tests.watch.scenes import T0, window

HEADING = Heading("redis://127.0.0.1:6379/0", "live", T0)


def job() -> JobState:
    """Twelve layers of four seeds; seed states go through all eight, layer 7 is sick."""
    state = JobState()
    for number_ in range(12):
        health = [0.1, 0.2, 0.3, 0.4] if number_ == 7 else [0.9, 0.8, 0.7, np.nan]
        for sequence in range(2):
            fact = window(
                f"enc.layers.{number_}.linear",
                [0, number_ % 8, 2, 0],
                T0 - 1 + sequence,
                sequence=sequence,
                step=100 * sequence,
                epoch=3,
                alpha=[0, 0.25, 1, 0],
                health_score=health,
                error_count=[0, 0, sequence if number_ == 7 else 0, 0],
                dead_neuron_ratio=[0.5] * 4,
                avg_correlation=[0.1] * 4,
                activation_mean=[1.5] * 4,
                activation_variance=[2.5] * 4,
                nonfinite_count=[0] * 4,
                exec_latency_us=[0, 120, 80, 0],
            )
            state.apply(fact, fact.at + 0.004)
    state.apply(RunReport(run="job", at=T0 + 1, text="run started", metrics={"loss": 0.25}), T0 + 1)
    state.apply(
        SeedChange(run="job", at=T0 + 2, layer="enc.layers.7.linear", seed_idx=2, kind="fault", level=Level.BAD), T0
    )
    return state


def shown(state: JobState, ui: Ui | None = None, width: int = 80, height: int = 24) -> list[str]:
    return [line.plain for line in draw(state, ui or Ui(), HEADING, width, height)]


@pytest.mark.parametrize("page", list(Page))
@pytest.mark.parametrize("height", [3, 5, 8, 12, 24, 50])
@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 100, 132, 250])
def test_the_picture_fits_every_size(page: Page, width: int, height: int):
    for state in (JobState(), job()):
        ui = Ui(page=page, layer="enc.layers.3.linear")
        lines = shown(state, ui, width, height)
        assert len(lines) == height
        assert max(cell_len(line) for line in lines) <= width


def test_what_is_on_the_screen_at_80_columns():
    text = "\n".join(shown(job()))
    for words in (
        "esper monitor  redis://127.0.0.1:6379/0",
        "live",
        "run job",
        "epoch 3",
        "step 100",
        "100 steps/s",
        "lag 4 ms",
        "dropped 0  missing 0  late 0",
        "48 seeds",
        "faults 1",
        "loads 2 under way, 0 done, 0 refused",
        "loss 0.250",
        "layer                  dorm load graf trai acti foss erro cull heal alpha faults",
        "all 12 layers",
        "run started",
        "fault",
        "q quit",
    ):
        assert words in text, words
    row = next(line for line in text.splitlines() if line.startswith("enc.layers.6"))
    # Seed 1 of layer 6 is in training, seed 2 active, two are dormant; alpha is the mean of 0.25 and 1.
    assert row.split() == ["enc.layers.6.linear", "2", "·", "·", "1", "1", "·", "·", "·", "0.80", "0.62", "·"]


def test_wide_screens_show_more_columns_and_narrow_ones_fewer():
    def header(width: int) -> str:
        return next(line for line in shown(job(), width=width) if line.startswith("layer"))

    assert "alpha" in header(80)
    assert "faults" in header(80)
    assert header(132).split()[-4:] == ["worst", "dead", "corr", "us"]
    assert "heal" in header(60)
    assert "faults" not in header(64)


def test_names_keep_their_end():
    state = JobState()
    state.apply(window("model.transformer.enc.layers.11.mlp.linear"), T0)
    assert any("…" in line and "yers.11.mlp.linear" in line for line in shown(state))


def test_filter_by_name_as_it_is_typed():
    state, ui = job(), Ui()
    for key in "/", "L", "A", "Y", "E", "R", "S", ".", "1":
        ui.press(key, state)
    assert ui.typing
    assert "layer name contains: LAYERS.1_" in "\n".join(shown(state, ui))
    rows = [line for line in shown(state, ui) if line.startswith("enc.")]
    assert [line.split(".")[2] for line in rows] == ["1", "10", "11"]
    ui.press("backspace", state)
    ui.press("q", state)
    assert ui.draft == "LAYERS.q"
    ui.press("escape", state)
    assert (ui.typing, ui.name_filter) == (False, "")
    for key in "/", "7", "enter":
        ui.press(key, state)
    run = state.current()
    assert run is not None
    assert layer_rows(run, ui) == [7]
    assert "name:7" in shown(state, ui)[-1]
    ui.press("escape", state)
    assert len(layer_rows(run, ui)) == 12


def test_filter_by_state():
    state = job()
    run = state.current()
    assert run is not None
    for name in FILTERS[1:]:
        rows = layer_rows(run, Ui(state_filter=name))
        wanted = ["active", "grafting", "training", "fossilized"] if name == "awake" else [name]
        layers = list(run.layers.values())
        assert rows == [n for n, layer in enumerate(layers) if any(STATES[s] in wanted for s in layer.states)]
    ui = Ui()
    for _ in FILTERS:
        assert ui.press("s", state) is None
    assert ui.state_filter == ""
    ui.press("S", state)
    assert ui.state_filter == FILTERS[-1]


def test_nothing_matches():
    assert "no layer matches" in "\n".join(shown(job(), Ui(name_filter="decoder")))


def test_orders():
    state, ui = job(), Ui()
    run = state.current()
    assert run is not None
    orders = {}
    for order in Order:
        assert ui.order is order
        orders[order] = layer_rows(run, ui)
        ui.press("o", state)
    assert orders[Order.NETWORK] == list(range(12))
    assert orders[Order.HEALTH][0] == orders[Order.FAULTS][0] == 7
    assert orders[Order.NAME] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_seeds_of_a_layer():
    state, ui = job(), Ui()
    for key in ("down", "down", "up", "end", "pageup", "down", "enter"):
        ui.press(key, state)
    # From the last of twelve, ten up, one down.
    assert (ui.page, ui.layer) == (Page.SEEDS, "enc.layers.2.linear")
    lines = shown(state, ui)
    assert any("enc.layers.2.linear  4 of 4 seeds" in line for line in lines)
    row = next(line for line in lines if line.startswith("#1"))
    assert row.split() == ["#1", "active", "0.25", "0.80", "0.50", "0.10", "1.500", "2.500", "·", "·"]
    ui.state_filter = "active"
    assert [line.split()[0] for line in shown(state, ui) if line.startswith("#")] == ["#1", "#2"]
    ui.press("escape", state)
    assert ui.page is Page.LAYERS
    assert ui.state_filter == "active"


def test_a_long_list_follows_the_mark():
    state = JobState()
    state.apply(window("big", [0] * 1000), T0)
    ui = Ui(page=Page.SEEDS, layer="big")
    ui.press("end", state)
    marked = [line for line in draw(state, ui, HEADING, 80, 24) if any("reverse" in str(s.style) for s in line.spans)]
    assert [line.plain.split()[0] for line in marked] == ["#999"]
    for key in ("home", "j", "k", "pagedown"):
        ui.press(key, state)
    assert ui.cursor[Page.SEEDS] == 10


def test_runs_and_ranks():
    state = job()
    for rank in range(3):
        state.apply(window(run="other", rank=rank, world_size=3, at=T0 + 5), T0 + 5)
    ui = Ui()
    assert "run other  rank 0 of 3" in "\n".join(shown(state, ui))
    ui.press("tab", state)
    assert "rank 1 of 3" in "\n".join(shown(state, ui))
    ui.press("r", state)
    lines = shown(state, ui)
    assert sum(line.startswith(("  job", "  other", "* other")) for line in lines) == 4
    for key in ("home", "enter"):
        ui.press(key, state)
    assert ui.chosen == ("job", 0)
    assert "run job" in "\n".join(shown(state, ui))


def test_a_chosen_run_that_was_forgotten_gives_way():
    assert "run job" in "\n".join(shown(job(), Ui(chosen=("gone", 0))))


def test_help_names_every_key_and_state():
    text = "\n".join(shown(job(), Ui(page=Page.HELP), height=30))
    for words in ("quit", "pause", "faster", "grafting", "error_recovery", "filters off"):
        assert words in text
    ui = Ui()
    ui.press("?", job())
    ui.press("?", job())
    assert ui.page is Page.LAYERS


def test_actions():
    ui, state = Ui(), job()
    assert ui.press("q", state) is Action.QUIT
    assert ui.press("p", state) is Action.PAUSE
    assert ui.paused
    assert ui.press(" ", state) is Action.PAUSE
    assert not ui.paused
    assert ui.press("+", state) is Action.FASTER
    assert ui.press("-", state) is Action.SLOWER
    assert ui.press("x", state) is None


def test_keys_without_any_run():
    state, ui = JobState(), Ui()
    for key in ("enter", "tab", "down", "end", "r", "enter", "escape", "s", "o", "?", "enter"):
        assert ui.press(key, state) is None
        assert "no run heard of yet" in "\n".join(shown(state, ui))


def test_losses_are_in_sight():
    state = job()
    state.apply(window("enc.layers.0.linear", [0] * 4, T0 + 9, sequence=9, dropped=5), T0 + 9)
    state.apply(Unreadable("version 9 is unknown"), T0 + 9)
    state.skipped_s = 61.0
    text = "\n".join(shown(state))
    assert re.search(r"dropped 5 +missing 7 +late 0", text)
    assert "skipped 1:01" in text
    assert "unreadable 1: version 9 is unknown" in text


def test_once_prints_every_layer():
    lines = [line.plain for line in once(job(), Ui(), HEADING, 80)]
    assert sum(line.startswith("enc.layers") for line in lines) == 12
    assert max(map(cell_len, lines)) <= 80
    assert not any(line.endswith(" ") for line in lines)
    only = [line.plain for line in once(job(), Ui(name_filter="7"), HEADING, 80)]
    assert sum(line.startswith("enc.layers") for line in only) == 1


def test_hostile_names_do_not_reach_the_terminal():
    # What comes over the bus is checked to be printable; this is what would happen to wide characters.
    state = JobState()
    state.apply(window("層" * 100), T0)
    assert max(cell_len(line) for line in shown(state)) <= 80


@pytest.mark.parametrize(
    ("function", "cases"),
    [
        (compact, {0: "0", 999: "999", 1000: "1.0k", 9940: "9.9k", 9960: "10k", 999_499: "999k", 999_500: "1.0M"}),
        (rate, {None: "-", 0.0: "0", 0.31: "0.3", 99.94: "99.9", 100.4: "100", 12_000.0: "12k"}),
        (seconds, {4e-5: "40 us", 0.0042: "4 ms", 1.25: "1.2 s", -3.0: "-3.0 s", 754.0: "12:34"}),
        (duration, {0: "0:00", 67: "1:07", 3723: "1:02:03", 100_000: "1d 3h"}),
        (number, {0.5: "0.50", 0.0: "0.00", float("nan"): "-", 0.001: "1.0e-3", 123456.0: "1.2e5", -0.25: "-0.25"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_formats(function, cases):
    assert {value: function(value) for value in cases} == cases


def test_bars():
    assert bars([0, 1, 1000, 500]) == " ▁█▄"
    assert bars([0, 0]) == "  "


def test_fit():
    assert fit("abc", 5) == "abc  "
    assert fit("abcdef", 4) == "…def"
    assert fit_end("abcdef", 4) == "abc…"
    assert cell_len(fit("層層層層", 5)) == 5
    assert cell_len(fit_end("層層層層", 5)) <= 5


def test_keys_from_bytes():
    decoder = KeyDecoder()
    assert decoder.feed(b"qP \t\r\x7f") == ["q", "P", " ", "tab", "enter", "backspace"]
    assert decoder.feed(b"\x1b[A\x1b[B\x1bOC\x1b[5~\x1b[6~\x1b[H\x1bOF") == [
        *("up", "down", "right", "pageup", "pagedown", "home", "end"),
    ]
    assert decoder.feed("é".encode()[:1]) == []
    assert decoder.feed("é".encode()[1:]) == ["é"]


def test_cut_and_unknown_sequences():
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.waiting
    assert decoder.flush() == ["escape"]
    assert decoder.feed(b"\x1b[") == []
    assert decoder.feed(b"A") == ["up"]
    # A sequence nobody knows is swallowed: its letters are no keys.
    assert decoder.feed(b"\x1b[200~\x1b[1;5Pq") == ["q"]
    assert decoder.feed(b"\x1bq") == ["escape", "q"]
    assert decoder.feed(b"\x1b[12") == []
    assert decoder.flush() == []
