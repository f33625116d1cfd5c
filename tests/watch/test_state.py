"""The state model: what it makes of facts in order, out of order, again, too many."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.execution.lifecycle import AWAKE as LIFECYCLE_AWAKE
from esper.execution.lifecycle import SeedLifecycleState
from esper.watch.facts import AWAKE, COLUMNS, STATES, Level, RunReport, RunStatus, SeedChange, Unreadable, clean
from esper.watch.state import JobState, Limits, RunState
from esper.watch.summary import HEALTH_BINS, LayerState, summarise
from tests.watch.scenes import T0, window


def told(*facts: object, limits: Limits | None = None) -> JobState:
    state = JobState(limits)
    for fact in facts:
        state.apply(fact, getattr(fact, "at", T0) + 0.004)
    return state


def only(state: JobState) -> RunState:
    (run,) = state.runs.values()
    return run


def test_states_are_those_of_the_lattice():
    assert [state.name.lower() for state in SeedLifecycleState] == list(STATES)
    assert set(AWAKE) == set(LIFECYCLE_AWAKE)


def test_a_window_is_the_layers_state():
    state = told(window(states=[0, 4, 6], alpha=[0, 1, 0.5], health_score=[0.2, np.nan, 0.8], step=7, epoch=2))
    run = only(state)
    totals = run.refresh()
    assert totals.by_state() == {name: 0 for name in STATES} | {"dormant": 1, "fossilized": 1, "training": 1}
    assert (run.step, run.epoch, run.seed_count) == (7, 2, 3)
    assert totals.health_sum[0] == pytest.approx(1.0)
    assert (totals.health_number[0], totals.awake_number[0], totals.alpha_sum[0]) == (2, 2, 1.5)
    assert totals.health_min[0] == pytest.approx(0.2)
    assert run.lags[0] == pytest.approx(0.004, abs=1e-6)


def test_a_copy_is_counted_and_changes_nothing():
    first = window(states=[2, 0], sequence=0, event_id="a")
    state = told(first, window(states=[7, 7], sequence=1, at=T0 + 1, event_id="a"))
    assert state.duplicates == 1
    assert only(state).layers["fc"].states.tolist() == [2, 0]
    assert only(state).windows.total == 1


def test_gaps_are_counted_and_late_windows_left_out():
    state = told(
        window(states=[0], sequence=0, at=T0),
        window(states=[2], sequence=3, at=T0 + 3),
        window(states=[1], sequence=2, at=T0 + 2),
    )
    run = only(state)
    # Two were missing; one of them came after all.
    assert (run.missing, run.late) == (1, 1)
    assert run.layers["fc"].states.tolist() == [2]


def test_a_run_started_again_counts_from_the_beginning():
    state = told(
        window(states=[0], sequence=500, step=9000, epoch=9, at=T0, dropped=4),
        window(states=[5], sequence=0, step=16, epoch=0, at=T0 + 60, dropped=1),
        window(states=[6], sequence=1, step=32, epoch=0, at=T0 + 61, dropped=1),
    )
    run = only(state)
    assert (run.missing, run.late, run.step, run.epoch, run.dropped) == (0, 0, 32, 0, 5)
    assert run.layers["fc"].states.tolist() == [6]


def test_the_senders_clock_may_be_set_back():
    state = told(window(states=[0], sequence=0, at=T0), window(states=[2], sequence=1, at=T0 - 3600))
    assert only(state).late == 0
    assert only(state).layers["fc"].states.tolist() == [2]


def test_parts_of_a_large_layer():
    parts = [
        window(states=[2, 2, 2], alpha=[0.1, 0.2, 0.3], sequence=4, num_seeds=5),
        window(states=[4, 4], alpha=[0.4, 0.5], sequence=4, num_seeds=5, seed_offset=3),
    ]
    run = only(told(*parts))
    layer = run.layers["fc"]
    assert layer.states.tolist() == [2, 2, 2, 4, 4]
    assert layer.column("alpha").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (run.missing, run.late, run.seed_count) == (0, 0, 5)
    # What came with a message stays as it came.
    assert parts[0].states.tolist() == [2, 2, 2]


def test_faults_are_rises_of_the_error_count():
    run = only(
        told(
            window(states=[2, 2], error_count=[1, 0], sequence=0),
            window(states=[2, 2], error_count=[2, 1], sequence=1, at=T0 + 1),
            window(states=[2, 3], error_count=[0, 3], sequence=2, at=T0 + 2),
        )
    )
    assert run.faults == run.layers["fc"].faults == 2 + 2
    assert run.refresh().failing.tolist() == [1]


def test_changes_of_single_seeds_make_a_story_and_count_loads():
    common = {"run": "job", "layer": "fc", "seed_idx": 2}
    run = only(
        told(
            SeedChange(**common, at=T0, kind="requested", state=1, text="loading lowrank"),
            SeedChange(**common, at=T0 + 1, kind="bound", state=5, values={"alpha": 0.25}),
            SeedChange(**{**common, "seed_idx": 0}, at=T0 + 2, kind="refused", state=0, text="gone", level=Level.BAD),
        )
    )
    assert run.layers["fc"].states.tolist() == [0, 0, 5]
    assert run.layers["fc"].column("alpha")[2] == 0.25
    assert (run.loads_asked, run.loads_done, run.loads_refused) == (1, 1, 1)
    assert [(each.place, each.text) for each in run.happenings] == [
        ("fc#2", "loading lowrank"),
        ("fc#2", "bound"),
        ("fc#0", "gone"),
    ]


def test_a_window_captured_later_knows_better_than_an_event():
    run = only(
        told(
            window(states=[4], at=T0 + 5),
            SeedChange(run="job", layer="fc", seed_idx=0, at=T0, kind="bound", state=5, text="woken"),
        )
    )
    assert run.layers["fc"].states.tolist() == [4]
    assert len(run.happenings) == 1


def test_reports():
    run = only(
        told(
            RunReport(run="job", at=T0, status=RunStatus.RUNNING, text="started"),
            RunReport(run="job", at=T0 + 1, epoch=1, metrics={"loss": 0.5}),
            RunReport(run="job", at=T0 + 2, epoch=2, metrics={"loss": 0.25, "accuracy": 0.9}, dropped=3),
            RunReport(run="job", at=T0 + 3, status=RunStatus.FINISHED, text="done"),
        )
    )
    assert (run.epoch, run.metrics, run.dropped) == (2, {"loss": 0.25, "accuracy": 0.9}, 3)
    assert run.status is RunStatus.FINISHED
    assert [each.text for each in run.happenings] == ["started", "done"]


def test_steps_a_second_by_the_senders_clock():
    run = only(told(*(window(states=[0], sequence=n, step=50 * n, at=T0 + n / 2) for n in range(10))))
    assert run.pace.per_second() == pytest.approx(100.0)


def test_steps_a_second_are_those_of_the_last_ten_seconds():
    slow = [window(states=[0], sequence=n, step=10 * n, at=T0 + n) for n in range(60)]
    fast = [window(states=[0], sequence=60 + n, step=600 + 100 * n, at=T0 + 60 + n) for n in range(20)]
    assert only(told(*slow, *fast)).pace.per_second() == pytest.approx(100.0)
    rare = [window(states=[0], sequence=n, step=600 * n, at=T0 + 60 * n) for n in range(3)]
    assert only(told(*rare)).pace.per_second() == pytest.approx(10.0)


def test_windows_a_second():
    state = JobState()
    for n in range(400):
        now = T0 + n / 20
        state.apply(window(states=[0, 0], sequence=n, at=now), now)
    run = only(state)
    # The oldest of the eleven buckets of a second is whole, the newest not: at most one in eleven too many.
    assert run.windows.per_second(T0 + 20) == pytest.approx(20.0, rel=1 / 11)
    assert run.seeds.per_second(T0 + 20) == pytest.approx(40.0, rel=1 / 11)
    assert run.windows.per_second(T0 + 60) == 0.0


def test_which_run_is_shown_when_nobody_chose():
    state = JobState()
    assert state.current() is None
    state.apply(window(run="old"), T0)
    state.apply(window(run="new", rank=1), T0)
    state.apply(window(run="new", rank=0), T0)
    state.apply(RunReport(run="without-layers", at=T0), T0)
    current = state.current()
    assert current is not None
    assert current.key == ("new", 0)


def test_unreadable_messages_are_counted_with_the_reason():
    state = told(Unreadable("not a message"), window())
    assert (state.unreadable, state.unreadable_reason) == (1, "not a message")
    assert only(state).windows.total == 1


def test_bounds():
    limits = Limits(runs=2, layers=2, seeds=6, happenings=3, ids=2)
    state = JobState(limits)
    for number in range(4):
        state.apply(window(run=f"run{number}", at=T0 + number, event_id=str(number)), T0 + number)
    assert [key for key, _ in state.runs] == ["run2", "run3"]
    assert state.forgotten == 2
    for layer in ("a", "b"):
        state.apply(window(run="run3", layer=layer, states=[0] * 4, at=T0 + 9), T0 + 9)
    for number in range(9):
        state.apply(RunReport(run="run3", at=T0, text=str(number)), T0 + 9)
    run = state.runs["run3", 0]
    # The first layer had two seeds, the second four more; there is no room for a third layer nor for more seeds.
    assert (list(run.layers), run.seed_count, run.left_out) == (["fc", "a"], 6, 1)
    assert [each.text for each in run.happenings] == ["6", "7", "8"]
    # Only the last two ids are known: the oldest of three comes through again.
    assert len(state._seen) == 2


def test_a_copy_of_the_state_stands_still():
    state = told(window(states=[0, 2]))
    still = copy.deepcopy(state)
    state.apply(window(states=[4, 4], at=T0 + 1), T0 + 1)
    assert only(still).layers["fc"].states.tolist() == [0, 2]
    assert only(state).layers["fc"].states.tolist() == [4, 4]


FLOATS = st.floats(0, 1, width=32) | st.just(float("nan"))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 7), FLOATS, FLOATS, st.integers(0, 3)), max_size=6), min_size=1, max_size=5
    )
)
def test_summaries_agree_with_a_plain_loop(layers):
    built = []
    for number, seeds in enumerate(layers):
        columns = {
            "alpha": np.array([seed[1] for seed in seeds], np.float32),
            "health_score": np.array([seed[2] for seed in seeds], np.float32),
            "error_count": np.array([seed[3] for seed in seeds], np.int32),
        }
        built.append(LayerState(str(number), np.array([seed[0] for seed in seeds], np.uint8), columns))
    totals = summarise(built)
    for row, seeds in enumerate(layers):
        health = [seed[2] for seed in seeds if seed[2] == seed[2]]
        alpha = [seed[1] for seed in seeds if seed[0] in AWAKE and seed[1] == seed[1]]
        assert totals.counts[row].tolist() == [sum(seed[0] == state for seed in seeds) for state in range(8)]
        assert totals.health_number[row] == len(health)
        # float64 sums of at most six float32 numbers: exact to the last bit of the order of summing.
        assert totals.health_sum[row] == pytest.approx(sum(health), abs=1e-12)
        assert totals.health_min[row] == min(health, default=np.inf)
        assert totals.health_bins[row].sum() == len(health)
        assert totals.health_bins[row].shape == (HEALTH_BINS,)
        assert (totals.awake_number[row], totals.alpha_sum[row]) == (len(alpha), pytest.approx(sum(alpha), abs=1e-12))
        assert totals.failing[row] == sum(seed[3] > 0 for seed in seeds)


def test_only_layers_that_changed_are_summarised_again():
    state = told(window("a", [0]), window("b", [2]))
    run = only(state)
    run.refresh()
    assert not any(layer.changed for layer in run.layers.values())
    run.totals.counts[0, 7] = 99
    state.apply(window("b", [4], at=T0 + 1), T0 + 1)
    assert run.refresh().counts[:, [4, 7]].tolist() == [[0, 99], [1, 0]]


def test_every_column_has_a_place():
    layer = LayerState("a")
    layer.set(1, 2, {name: 0.5 for name in COLUMNS})
    assert [layer.column(name)[1] for name in COLUMNS] == [0.5] * len(COLUMNS)
    assert np.isnan([layer.column(name)[0] for name in COLUMNS]).all()


def test_text_for_a_terminal_is_safe():
    assert clean("a\x1b[2Jb\nc\u202e") == "a\ufffd[2Jb c\ufffd"
    assert clean("x" * 500) == "x" * 399 + "…"
    assert clean("plain") == "plain"


def test_a_layer_may_come_back_with_fewer_seeds():
    run = only(told(window(states=[2] * 5, num_seeds=5), window(states=[0, 4], num_seeds=2, at=T0 + 9)))
    assert run.layers["fc"].states.tolist() == [0, 4]
    assert run.seed_count == run.refresh().counts.sum() == 2


@st.composite
def any_window(draw):
    seeds = draw(st.integers(1, 6))
    offset = draw(st.integers(0, seeds - 1))
    part = draw(st.lists(st.integers(0, 7), min_size=1, max_size=seeds - offset))
    return window(
        draw(st.sampled_from("abc")),
        part,
        T0 + draw(st.integers(-3, 9)),
        alpha=[0.5] * len(part),
        error_count=[draw(st.integers(0, 3))] * len(part),
        sequence=draw(st.none() | st.integers(0, 9)),
        event_id=draw(st.sampled_from(["", "x", "y"])),
        seed_offset=offset,
        num_seeds=seeds,
        dropped=draw(st.integers(0, 3)),
        rank=draw(st.integers(0, 1)),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(any_window(), max_size=25))
def test_whatever_order_they_come_in_the_sums_are_right(facts):
    state = JobState(Limits(layers=2, seeds=9))
    for fact in facts:
        state.apply(fact, T0)
    assert state.messages.total == len(facts)
    assert sum(run.windows.total for run in state.runs.values()) + state.duplicates == len(facts)
    for run in state.runs.values():
        totals = run.refresh()
        assert totals.counts.sum() == run.seed_count == sum(len(layer.states) for layer in run.layers.values()) <= 9
        assert all(
            len(values) == len(layer.states) for layer in run.layers.values() for values in layer.columns.values()
        )
        assert min(run.missing, run.late, run.dropped, run.faults, run.left_out) >= 0
