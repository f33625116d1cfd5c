"""Health windows and run events: packed and unpacked without loss, and refused when anything in them is off."""

from __future__ import annotations

import dataclasses
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


def carried(payload: dict[str, Any], topic: TopicNames) -> OonaMessage:
    return on_the_wire(OonaMessage("trainer", "run-1", topic, payload))


def on_the_wire(message: OonaMessage) -> OonaMessage:
    return OonaMessage.from_bytes(message.to_bytes())


def in_a_file(message: OonaMessage) -> OonaMessage:
    return OonaMessage.from_json(message.to_json())


@pytest.mark.parametrize("through", [on_the_wire, in_a_file])
@given(rows=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_columns_come_back_bit_for_bit(through: Any, rows: int, seed: int) -> None:
    sent = window(rows, columns=columns(rows, seed))
    got = read_payload(through(sent.to_message("trainer", "run-1")))
    assert isinstance(got, HealthWindow)
    for name, dtype in COLUMNS.items():
        assert got.columns[name].dtype == dtype
        np.testing.assert_array_equal(got.columns[name], sent.columns[name])
    for name in ("run_id", "rank", "layer_name", "sequence", "step", "epoch", "captured_at", "dropped_windows"):
        assert getattr(got, name) == getattr(sent, name)


def test_the_largest_window_fits_a_message() -> None:
    sent = window(MAX_SEEDS_PER_MESSAGE, layer_name="\N{GREEK SMALL LETTER ALPHA}" * 512)
    message = sent.to_message("s" * 256, "t" * 256)
    assert len(message.to_bytes()) < len(message.to_json()) <= MAX_MESSAGE_BYTES
    for got in (on_the_wire(message), in_a_file(message)):
        assert got == message
        assert len(read_payload(got)) == MAX_SEEDS_PER_MESSAGE


def test_how_a_window_travels() -> None:
    """What a reader in another language has to know."""
    sent = window(3)
    message = sent.to_message("trainer", "run-1")
    assert message.payload["layout"] == (
        "alpha:<f4 activation_mean:<f4 activation_variance:<f4 dead_neuron_ratio:<f4 avg_correlation:<f4 "
        "health_score:<f4 nonfinite_count:<i4 error_count:<i4 exec_latency_us:<i4 lifecycle_state:u1"
    )
    assert len(message.attachment) == 3 * 37
    np.testing.assert_array_equal(
        np.frombuffer(message.attachment, "<f4", 3, offset=12), sent.columns["activation_mean"]
    )
    np.testing.assert_array_equal(np.frombuffer(message.attachment, "<i4", 3, offset=84), sent.columns["error_count"])
    assert list(message.attachment[-3:]) == sent.columns["lifecycle_state"].tolist()


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


@pytest.mark.parametrize(
    ("attachment", "complaint"),
    [
        (b"", "columns has 0 bytes"),
        (bytes(4 * 37 - 1), "columns has 147 bytes; need a multiple of the 37"),
        (bytes(5 * 37), "columns has 5 seeds; need 1 to 4"),
        (bytes(37 * (MAX_SEEDS_PER_MESSAGE + 1)), "columns has 16385 seeds"),
        (b"\xff" * 37, r"columns\.alpha has values from nan"),
    ],
)
def test_a_bad_attachment_is_named(attachment: bytes, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        HealthWindow.from_payload(window(4).to_message("s", "t").payload, attachment)


def test_another_type_version_layout_or_field() -> None:
    message = window(4).to_message("s", "t")
    payload = dict(message.payload)
    for change, complaint in (
        ({"type": "x"}, "type 'x'"),
        ({"version": 1}, "version 1 is unknown"),
        ({"version": True}, "version True"),
        ({"layout": "alpha:<f8"}, "layout is 'alpha:<f8'; need 'alpha:<f4 "),
        ({"surprise": 1}, "unknown fields: surprise"),
    ):
        with pytest.raises(MessageError, match=complaint):
            HealthWindow.from_payload(payload | change, message.attachment)
    del payload["rank"]
    with pytest.raises(MessageError, match="lacks rank"):
        HealthWindow.from_payload(payload, message.attachment)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_whatever_comes_is_a_window_or_refused(data: st.DataObject) -> None:
    message = window(2).to_message("s", "t")
    payload, attachment = dict(message.payload), message.attachment
    if data.draw(st.booleans()):
        attachment = data.draw(st.binary(max_size=100) | st.binary(min_size=74, max_size=74))
    else:
        payload[data.draw(st.sampled_from(sorted(payload)))] = data.draw(JSON)
    try:
        HealthWindow.from_payload(payload, attachment).signals()
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
    message = OonaMessage("trainer", "run-1", sent.topic, sent.to_payload())
    assert read_payload(on_the_wire(message)) == read_payload(in_a_file(message)) == sent


def test_an_event_with_an_attachment_is_none() -> None:
    message = OonaMessage("trainer", "run-1", event().topic, event().to_payload(), attachment=b"abc")
    with pytest.raises(MessageError, match="run_event has no attachment, and this one has one of 3 bytes"):
        read_payload(message)


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
        assert read_payload(carried(payload.to_payload(), topic)) == payload
    for topic, payload in (
        (TopicNames.COMPILATION_KERNEL_READY, event().to_payload()),
        (TopicNames.TELEMETRY_SEED_HEALTH, event().to_payload()),
        (TopicNames.INNOVATION_FIELD_REPORTS, {"type": ["x"]}),
        (TopicNames.INNOVATION_FIELD_REPORTS, {}),
    ):
        with pytest.raises(MessageError, match="nothing here reads"):
            read_payload(carried(payload, topic))


def test_fields_are_all_in_the_payload() -> None:
    names = {each.name for each in dataclasses.fields(HealthWindow)} - {"columns"}
    assert window(2).to_message("s", "t").payload.keys() == names | {"type", "version", "layout"}
    names = {each.name for each in dataclasses.fields(RunEvent)}
    assert event().to_payload().keys() == names | {"type", "version"}
