"""The envelope of every message: strict in both directions, whatever the bytes."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import EsperError
from esper.contracts.messages import MAX_MESSAGE_BYTES, MessageError, OonaMessage, TopicNames

TOPIC = TopicNames.COMPILATION_KERNEL_READY


def message(**changes) -> OonaMessage:
    return OonaMessage(**{"sender_id": "me", "trace_id": "t", "topic": TOPIC, "payload": {"a": 1}, **changes})


def test_positional_with_an_identity_of_its_own():
    before = time.time()
    one, two = (OonaMessage("me", "trace", TOPIC, {}) for _ in range(2))
    assert one.event_id != two.event_id
    assert str(uuid.UUID(one.event_id)) == one.event_id
    assert before <= one.timestamp <= time.time()
    assert (one.sender_id, one.trace_id, one.topic, one.version) == ("me", "trace", TOPIC, 1)


def test_topics():
    assert {topic.value for topic in TopicNames} == {
        "telemetry.seed.health",
        "control.kasmina.commands",
        "compilation.blueprint.submitted",
        "compilation.kernel.ready",
        "validation.kernel.characterized",
        "system.events.epoch",
        "innovation.field_reports",
    }
    assert message(topic="system.events.epoch").topic is TopicNames.SYSTEM_EVENTS_EPOCH


def test_the_envelope_on_the_wire():
    sent = message()
    assert json.loads(sent.to_json()) == {
        "version": 1,
        "event_id": sent.event_id,
        "sender_id": "me",
        "timestamp": sent.timestamp,
        "trace_id": "t",
        "topic": "compilation.kernel.ready",
        "payload": {"a": 1},
    }


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates are not text that can be sent.
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=12,
)


def test_an_attachment_on_the_wire_and_in_a_file():
    sent = message(attachment=b"\0\1\xff")
    text, _, rest = sent.to_bytes().partition(b"\0")
    assert json.loads(text) == message(event_id=sent.event_id, timestamp=sent.timestamp).to_dict()
    assert rest == b"\0\1\xff"
    assert json.loads(sent.to_json())["attachment"] == "AAH/"
    plain = message()
    assert plain.to_bytes() == plain.to_json().encode()


@given(
    payload=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4),
    topic=st.sampled_from(TopicNames),
    attachment=st.binary(max_size=40),
)
def test_round_trip(payload, topic, attachment):
    sent = OonaMessage("sender", "trace", topic, payload, attachment=attachment)
    text = sent.to_json()
    for form in (text, text.encode()):
        assert OonaMessage.from_json(form) == sent
    assert OonaMessage.from_bytes(sent.to_bytes()) == sent
    assert OonaMessage.from_dict(sent.to_dict()) == sent


def test_the_payload_is_a_copy_of_plain_values():
    payload = {"list": [1, 2], "tuple": (1, {"x": None})}
    sent = message(payload=payload)
    payload["list"].append(3)
    assert sent.payload == {"list": [1, 2], "tuple": [1, {"x": None}]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        sent.topic = TOPIC


def test_a_reply_keeps_the_trace():
    asked = message(topic=TopicNames.COMPILATION_BLUEPRINT_SUBMITTED)
    answer = asked.reply("worker", TOPIC, {"done": True})
    assert (answer.trace_id, answer.sender_id, answer.topic) == (asked.trace_id, "worker", TOPIC)
    assert answer.event_id != asked.event_id


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2 is unknown; this Esper reads version 1"),
        ({"version": True}, "version True is unknown"),
        ({"sender_id": ""}, "sender_id is ''"),
        ({"sender_id": 7}, "sender_id is 7"),
        ({"trace_id": "a\nb"}, "trace_id is"),
        ({"trace_id": "x" * 257}, "1 to 256 characters"),
        ({"event_id": "1"}, "event_id is '1'"),
        ({"event_id": "A" * 32}, "need a UUID"),
        ({"event_id": None}, "event_id is None"),
        ({"timestamp": "now"}, "timestamp is 'now'"),
        ({"timestamp": True}, "timestamp is True"),
        ({"timestamp": float("nan")}, "timestamp is nan"),
        ({"timestamp": -1.0}, "timestamp is -1.0"),
        ({"topic": "gossip"}, "topic 'gossip' is unknown; known: telemetry.seed.health"),
        ({"topic": []}, "topic"),
        ({"payload": [1]}, "payload is a list; need a mapping"),
        ({"payload": {"a": {"b": [float("inf")]}}}, r"payload.a.b\[0\] is inf"),
        ({"payload": {"a": {1: 2}}}, "payload.a has the key 1; keys are strings"),
        ({"payload": {"a": b"x"}}, "payload.a is a bytes"),
        ({"attachment": 7}, "attachment is "),
    ],
)
def test_refused_when_made_and_when_read(changes, said):
    with pytest.raises(MessageError, match=said):
        message(**changes)
    with pytest.raises(MessageError, match=said):
        OonaMessage.from_dict({**message().to_dict(), **changes})


def test_depth():
    value: object = 0
    for _ in range(30):
        value = [value]
    with pytest.raises(MessageError, match="nested deeper than 23 levels"):
        message(payload={"deep": value})
    for levels, good in ((22, True), (23, False)):
        inner: object = 0
        for _ in range(levels - 1):
            inner = [inner]
        if good:
            sent = message(payload={"deep": inner})
            assert OonaMessage.from_json(sent.to_json()) == sent
        else:
            with pytest.raises(MessageError):
                message(payload={"deep": [inner]})


def test_fields():
    whole = message().to_dict()
    for name in whole:
        part = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(MessageError, match=f"lacks {name}" if name != "version" else "version None"):
            OonaMessage.from_dict(part)
    with pytest.raises(MessageError, match="unknown fields: extra"):
        OonaMessage.from_dict({**whole, "extra": 1})
    with pytest.raises(MessageError, match="an object, not list"):
        OonaMessage.from_dict([])


def test_size():
    with pytest.raises(MessageError, match=f"more than the limit of {MAX_MESSAGE_BYTES}"):
        message(payload={"a": "x" * MAX_MESSAGE_BYTES}).to_json()
    with pytest.raises(MessageError, match="more than the limit"):
        OonaMessage.from_json(b" " * (MAX_MESSAGE_BYTES + 1))
    long = message(attachment=bytes(MAX_MESSAGE_BYTES))
    for form in (long.to_json, long.to_bytes):
        with pytest.raises(MessageError, match="more than the limit"):
            form()
    with pytest.raises(MessageError, match="more than the limit"):
        OonaMessage.from_bytes(message().to_bytes() + bytes(MAX_MESSAGE_BYTES))


def test_attachments_that_are_none():
    whole = message().to_dict()
    for bad, said in ((7, "attachment is 7; need base64"), ("A", "not base64"), ("A\nA=", "not base64")):
        with pytest.raises(MessageError, match=said):
            OonaMessage.from_dict({**whole, "attachment": bad})
    with pytest.raises(MessageError, match="two attachments"):
        OonaMessage.from_bytes(message(attachment=b"x").to_json().encode() + b"\0y")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b'{"version":1,"version":1}', b"NaN", b'{"a":1e999}', b"[" * 5000, "nul"]
)
def test_rubbish(text):
    with pytest.raises(MessageError) as caught:
        OonaMessage.from_json(text)
    assert isinstance(caught.value, EsperError)


@given(st.binary(max_size=200))
def test_any_bytes(data):
    for read in (OonaMessage.from_json, OonaMessage.from_bytes):
        with pytest.raises(MessageError):
            read(data)
