"""Real messages, as the contract packs them, to facts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from esper.contracts.commands import CommandAction, CommandOutcome, KasminaCommand
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.telemetry import COLUMNS as CONTRACT_COLUMNS
from esper.contracts.telemetry import EventKind
from esper.watch.decode import decode
from esper.watch.facts import COLUMNS, LayerWindow, Level, RunReport, RunStatus, SeedChange, Unreadable
from tests.watch.scenes import T0, event_message, window_message


def test_columns_are_those_of_the_contract():
    assert set(COLUMNS) == set(CONTRACT_COLUMNS) - {"lifecycle_state"}


def test_a_window():
    message = window_message(
        "a.b", 7, T0, lifecycle_state=[0, 2, 4], alpha=[0, 0.5, 1], health_score=[np.nan, 0.25, 1], epoch=3
    )
    # As it comes over the bus.
    fact = decode(OonaMessage.from_json(message.to_json()))
    assert isinstance(fact, LayerWindow)
    assert (fact.run, fact.rank, fact.world_size, fact.layer, fact.sequence) == ("job", 0, 1, "a.b", 7)
    assert (fact.step, fact.epoch, fact.at, fact.event_id) == (128, 3, T0, message.event_id)
    assert fact.states.tolist() == [0, 2, 4]
    assert fact.columns["alpha"].tolist() == [0, 0.5, 1]
    assert np.isnan(fact.columns["health_score"][0])
    assert set(fact.columns) == set(COLUMNS)


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_kind_of_event_is_understood(kind: EventKind):
    about_a_seed = kind.value.startswith("seed")
    more = {"layer_name": "fc", "seed_idx": 1, "reason": "because"} if about_a_seed else {"loss": 0.5, "accuracy": 0.75}
    fact = decode(event_message(kind, **more))
    assert isinstance(fact, SeedChange if about_a_seed else RunReport)
    assert (fact.run, fact.at, fact.step, fact.epoch) == ("job", T0, 100, 1)
    if isinstance(fact, SeedChange):
        assert (fact.layer, fact.seed_idx) == ("fc", 1)
        assert fact.text.endswith("because")
        assert fact.state is not None
    else:
        assert fact.metrics == {"loss": 0.5, "accuracy": 0.75}


def test_what_a_run_begins_with_is_told_once():
    fact = decode(event_message(EventKind.RUN_STARTED, values={"layers": 10, "seeds": 40.0}))
    assert isinstance(fact, RunReport)
    assert (fact.text, fact.metrics) == ("run started: layers 10, seeds 40", {})


def test_the_state_a_run_is_in():
    assert decode(event_message(EventKind.RUN_STARTED)).status is RunStatus.RUNNING
    assert decode(event_message(EventKind.RUN_ENDED)).status is RunStatus.FINISHED


def test_an_outcome_is_a_line_of_the_story():
    outcome = CommandOutcome(
        command_id="ab" * 16, status="refused", reason="too old", run_id="job", rank=1, step=5, answered_at=T0
    )
    fact = decode(OonaMessage("t", "x", TopicNames.INNOVATION_FIELD_REPORTS, outcome.to_payload()))
    assert isinstance(fact, RunReport)
    assert (fact.rank, fact.text, fact.level) == (1, "command abababab refused: too old", Level.BAD)


def unreadable(message: OonaMessage) -> str:
    fact = decode(message)
    assert isinstance(fact, Unreadable)
    return fact.reason


def test_what_is_not_understood_says_why():
    window = window_message()
    for change, said in (({"version": 99}, "version 99 is unknown"), ({"step": -1}, "step")):
        assert said in unreadable(dataclasses.replace(window, payload={**window.payload, **change}))
    assert "nothing here reads" in unreadable(OonaMessage("t", "x", TopicNames.SYSTEM_EVENTS_EPOCH, {"type": "news"}))
    command = KasminaCommand(action=CommandAction.CULL, layer_name="fc", seed_idx=0)
    assert "not for watchers" in unreadable(
        OonaMessage("t", "x", TopicNames.CONTROL_KASMINA_COMMANDS, command.to_payload())
    )
