"""Health windows and run events: packed and unpacked without loss, and refused when anything in them is off."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.commands import CommandOutcome, KasminaCommand
from esper.contracts.messages import MAX_MESSAGE_BYTES, MessageError, OonaMessage, TopicNames
from esper.contracts.telemetry import (
    COLUMNS,
    MAX_SEEDS_PER_MESSAGE,
    EventKind,
    HealthWindow,
    RunEvent,
    encode_window,
    printable,
    read_payload,
)

BIG = float(np.finfo(np.float32).max)


def columns(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {
        "lifecycle_state": rng.integers(0, 8, rows),
        "alpha": rng.random(rows),
        "activation_mean": rng.standard_normal(rows) * 1e3,
        "activation_variance": rng.random(rows) * 1e6,
        "dead_neuron_ratio": rng.random(rows),
        "avg_correlation": rng.random(rows) * 2 - 1,
        "nonfinite_count": rng.integers(0, 2**31, rows),
        "health_score": np.where(rng.random(rows) < 0.3, np.nan, rng.random(rows)),
        "error_count": rng.integers(0, 4, rows),
        "exec_latency_us": rng.integers(0, 2**31, rows),
    }
    return {name: found[name].astype(dtype) for name, dtype in COLUMNS.items()}


def window(rows: int = 4, **changes: Any) -> HealthWindow:
    values: dict[str, Any] = {
        "run_id": "run-1",
        "rank": 1,
        "world_size": 4,
        "layer_name": "body.0",
        "sequence": 7,
        "step": 1000,
        "epoch": 3,
        "captured_at": 1.7e9,
        "dropped_windows": 2,
        "num_seeds": rows,
        "seed_offset": 0,
        "window_samples": 16,
        "columns": columns(rows),
    }
    return HealthWindow(**{**values, **changes})


def through_json(payload: dict[str, Any], topic: TopicNames = TopicNames.TELEMETRY_SEED_HEALTH) -> OonaMessage:
    return OonaMessage.from_json(OonaMessage("trainer", "run-1", topic, payload).to_json())


@given(rows=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_columns_come_back_bit_for_bit(rows: int, seed: int) -> None:
    sent = window(rows, columns=columns(rows, seed))
    got = read_payload(through_json(sent.to_payload()))
    assert isinstance(got, HealthWindow)
    for name, dtype in COLUMNS.items():
        assert got.columns[name].dtype == dtype
        np.testing.assert_array_equal(got.columns[name], sent.columns[name])
    for name in ("run_id", "rank", "layer_name", "sequence", "step", "epoch", "captured_at", "dropped_windows"):
        assert getattr(got, name) == getattr(sent, name)


def test_the_largest_window_fits_a_message() -> None:
    sent = window(MAX_SEEDS_PER_MESSAGE, layer_name="\N{GREEK SMALL LETTER ALPHA}" * 512)
    text = OonaMessage("s" * 256, "t" * 256, TopicNames.TELEMETRY_SEED_HEALTH, sent.to_payload()).to_json()
    assert len(text) <= MAX_MESSAGE_BYTES
    assert len(read_payload(OonaMessage.from_json(text))) == MAX_SEEDS_PER_MESSAGE


@given(rows=st.integers(1, 60), layer=st.text(min_size=1, max_size=20).filter(str.isprintable))
def test_the_quick_way_to_a_message_gives_the_same_message(rows: int, layer: str) -> None:
    sent = window(rows, layer_name=layer)
    fields = {each.name: getattr(sent, each.name) for each in dataclasses.fields(sent) if each.name != "columns"}
    quick = encode_window("sender", "trace", fields, sent.columns)
    plain = OonaMessage(
        "sender",
        "trace",
        TopicNames.TELEMETRY_SEED_HEALTH,
        sent.to_payload(),
        event_id=quick.event_id,
        timestamp=quick.timestamp,
    )
    assert quick.to_json() == plain.to_json()
    assert quick.to_dict() == plain.to_dict()
    assert OonaMessage.from_json(quick.to_json()) == plain


def test_signals_are_the_columns_row_by_row() -> None:
    part = window(10, num_seeds=30, seed_offset=20)
    signals = part.signals()
    assert [signal.seed_idx for signal in signals] == list(range(20, 30))
    arrays = part.arrays()
    for row, signal in enumerate(signals):
        assert signal.layer_name == "body.0"
        assert (signal.epoch, signal.window_samples) == (3, 16)
        for name in COLUMNS:
            expected = part.columns[name][row].item()
            if name == "health_score" and math.isnan(expected):
                expected = None
            assert getattr(signal, name) == expected
        assert signal.ready == arrays["ready"][row]
        assert signal.seed_idx == arrays["seed_idx"][row]


def test_ready_needs_a_settled_state_a_score_and_samples() -> None:
    states = np.arange(8, dtype=np.uint8)
    table = columns(8) | {"lifecycle_state": states, "health_score": np.full(8, 0.5, np.float32)}
    assert window(8, columns=table).ready.tolist() == [True, False, True, True, False, False, True, False]
    assert not window(8, columns=table, window_samples=0).ready.any()
    assert not window(8, columns=table | {"health_score": np.full(8, np.nan, np.float32)}).ready.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lifecycle_state", 8),
        ("alpha", 1.5),
        ("alpha", math.nan),
        ("activation_mean", math.inf),
        ("activation_variance", -1.0),
        ("activation_variance", math.nan),
        ("dead_neuron_ratio", 1.1),
        ("avg_correlation", -1.1),
        ("nonfinite_count", -1),
        ("health_score", -0.1),
        ("health_score", math.inf),
        ("error_count", -1),
        ("exec_latency_us", -1),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    table = columns(4)
    table[name][2] = value
    with pytest.raises(MessageError, match=f"columns.{name}"):
        window(4, columns=table)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "a b"),
        ("run_id", ""),
        ("rank", 4),
        ("rank", True),
        ("world_size", 0),
        ("layer_name", ""),
        ("layer_name", "x" * 513),
        ("layer_name", "a\nb"),
        ("sequence", -1),
        ("step", 1.0),
        ("epoch", None),
        ("captured_at", math.nan),
        ("dropped_windows", -1),
        ("num_seeds", 3),
        ("num_seeds", 0),
        ("seed_offset", 4),
        ("seed_offset", 1),
        ("window_samples", 2**53),
        ("columns", {}),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(MessageError, match=f"{field}|columns has"):
        window(4, **{field: value})


def _spoilt(**changes: Any) -> dict[str, Any]:
    payload = json.loads(json.dumps(window(4).to_payload()))
    payload["columns"] |= changes
    return payload


@pytest.mark.parametrize(
    "column",
    [
        None,
        "abc",
        ["<f4"],
        ["<f8", base64.b64encode(bytes(32)).decode()],
        ["<f4", 3],
        ["<f4", "not base64!"],
        ["<f4", base64.b64encode(bytes(15)).decode()],
        ["<f4", base64.b64encode(bytes(12)).decode()],
        ["<f4", base64.b64encode(bytes(4 * (MAX_SEEDS_PER_MESSAGE + 1))).decode()],
    ],
)
def test_a_bad_column_is_named(column: Any) -> None:
    with pytest.raises(MessageError, match=r"columns\.activation_mean"):
        HealthWindow.from_payload(_spoilt(activation_mean=column))


def test_another_type_version_or_field() -> None:
    payload = window(4).to_payload()
    for change, complaint in (
        ({"type": "x"}, "type 'x'"),
        ({"version": 2}, "version 2 is unknown"),
        ({"version": True}, "version True"),
        ({"surprise": 1}, "unknown fields: surprise"),
    ):
        with pytest.raises(MessageError, match=complaint):
            HealthWindow.from_payload(payload | change)
    del payload["rank"]
    with pytest.raises(MessageError, match="lacks rank"):
        HealthWindow.from_payload(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_whatever_comes_is_a_window_or_refused(data: st.DataObject) -> None:
    payload = _spoilt()
    place = data.draw(st.sampled_from([payload, payload["columns"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        HealthWindow.from_payload(payload).signals()
    except MessageError as error:
        assert len(str(error)) < 400


def event(**changes: Any) -> RunEvent:
    values: dict[str, Any] = {
        "kind": EventKind.SEED_WOKEN,
        "run_id": "run-1",
        "rank": 0,
        "world_size": 1,
        "sequence": 0,
        "step": 5,
        "epoch": 0,
        "occurred_at": 1.7e9,
        "layer_name": "0",
        "seed_idx": 2,
        "artifact_id": "a-b",
    }
    return RunEvent(**{**values, **changes})


EPOCH: dict[str, Any] = {
    "kind": "epoch_ended",
    "layer_name": None,
    "seed_idx": None,
    "artifact_id": None,
    "loss": 0.25,
    "accuracy": 0.5,
    "values": {"lr": 0.1},
}


@pytest.mark.parametrize("changes", [{}, {"reason": "because"}, EPOCH])
def test_events_come_back(changes: dict[str, Any]) -> None:
    sent = event(**changes)
    assert read_payload(through_json(sent.to_payload(), sent.topic)) == sent


def test_events_of_a_run_and_of_seeds_travel_apart() -> None:
    assert event(**EPOCH).topic is TopicNames.SYSTEM_EVENTS_EPOCH
    assert event().topic is TopicNames.INNOVATION_FIELD_REPORTS


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "danced"},
        {"seed_idx": None},
        {"layer_name": None},
        {"layer_name": None, "seed_idx": None},
        {**EPOCH, "seed_idx": 1},
        {**EPOCH, "accuracy": 1.5},
        {**EPOCH, "loss": math.nan},
        {**EPOCH, "values": {str(i): 0.0 for i in range(33)}},
        {**EPOCH, "values": {"x": math.inf}},
        {**EPOCH, "values": {"x": "1"}},
        {"reason": "x" * 1001},
        {"reason": ""},
        {"rank": 1},
    ],
)
def test_bad_events_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        event(**changes)


def test_printable_makes_a_reason_that_fits() -> None:
    assert printable("a\nb\x1b[31m") == "a b [31m"
    assert printable("\n\t") is None
    found = printable("x" * 5000)
    assert found is not None
    assert event(reason=found).reason == "x" * 1000


def test_payloads_are_told_apart() -> None:
    outcome = CommandOutcome(
        command_id="", status="refused", reason="unreadable", run_id="r", rank=0, step=1, answered_at=1.0
    )
    command = KasminaCommand(action="unload", layer_name="0", seed_idx=0)
    for payload, topic in (
        (outcome, TopicNames.INNOVATION_FIELD_REPORTS),
        (command, TopicNames.CONTROL_KASMINA_COMMANDS),
        (event(), TopicNames.INNOVATION_FIELD_REPORTS),
    ):
        assert read_payload(through_json(payload.to_payload(), topic)) == payload
    for topic, payload in (
        (TopicNames.COMPILATION_KERNEL_READY, event().to_payload()),
        (TopicNames.TELEMETRY_SEED_HEALTH, event().to_payload()),
        (TopicNames.INNOVATION_FIELD_REPORTS, {"type": ["x"]}),
        (TopicNames.INNOVATION_FIELD_REPORTS, {}),
    ):
        with pytest.raises(MessageError, match="nothing here reads"):
            read_payload(through_json(payload, topic))


def test_fields_are_all_in_the_payload() -> None:
    for sample in (window(2), event()):
        assert sample.to_payload().keys() == {each.name for each in dataclasses.fields(sample)} | {"type", "version"}
