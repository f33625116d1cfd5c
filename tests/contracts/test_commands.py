"""Commands: signed as a whole, so that nobody without the key can make or change one."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
from typing import Any

import pytest

from esper.contracts.commands import CommandAction, CommandOutcome, KasminaCommand, control_key
from esper.contracts.errors import EsperError
from esper.contracts.messages import MessageError

KEY = b"0123456789abcdef0123456789abcdef"

LOAD: dict[str, Any] = {
    "action": "load",
    "layer_name": "body.0",
    "seed_idx": 1,
    "artifact_id": "abc-64-fast-1",
    "alpha": 0.5,
    "ramp_steps": 10,
}


def again(command: KasminaCommand) -> KasminaCommand:
    return KasminaCommand.from_payload(json.loads(json.dumps(command.to_payload())))


@pytest.mark.parametrize(
    "fields",
    [
        LOAD,
        {"action": "unload", "layer_name": "0", "seed_idx": 0},
        {"action": "set_alpha", "layer_name": "0", "seed_idx": 0, "alpha": 1},
        {"action": "ramp", "layer_name": "0", "seed_idx": 0, "alpha": 0.25, "ramp_steps": 3},
        {"action": "cull", "layer_name": "0", "seed_idx": 0, "run_id": "run-7"},
        {"action": "fossilize", "layer_name": "0", "seed_idx": 0},
    ],
)
def test_a_signed_command_comes_back_and_verifies(fields: dict[str, Any]) -> None:
    sent = KasminaCommand(**fields).signed(KEY)
    got = again(sent)
    assert got == sent
    assert got.verify(KEY)
    assert not got.verify(KEY[:-1] + b"x")


def test_the_signature_is_the_documented_one() -> None:
    command = KasminaCommand(**LOAD, issued_at=1.5, nonce="0" * 32)
    text = (
        '{"action":"load","alpha":0.5,"artifact_id":"abc-64-fast-1","issued_at":1.5,"layer_name":"body.0",'
        f'"nonce":"{"0" * 32}","ramp_steps":10,"run_id":"*","seed_idx":1,"type":"kasmina_command","version":1}}'
    )
    expected = hmac.new(KEY, b"esper.kasmina.command.v1\n" + text.encode(), hashlib.sha256).hexdigest()
    assert command.signed(KEY).signature == expected


@pytest.mark.parametrize(
    "change",
    [
        {"action": "ramp", "artifact_id": None},
        {"layer_name": "body.1"},
        {"seed_idx": 0},
        {"artifact_id": "abd-64-fast-1"},
        {"alpha": 0.51},
        {"ramp_steps": 11},
        {"run_id": "other"},
        {"issued_at": 2.0},
        {"nonce": "f" * 32},
        {"signature": "0" * 64},
        {"signature": ""},
    ],
)
def test_no_field_can_be_altered(change: dict[str, Any]) -> None:
    assert not dataclasses.replace(KasminaCommand(**LOAD).signed(KEY), **change).verify(KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"action": "explode"},
        {"action": "unload"},
        {"layer_name": ""},
        {"seed_idx": -1},
        {"seed_idx": True},
        {"artifact_id": None},
        {"artifact_id": "x" * 513},
        {"alpha": None},
        {"alpha": 1.01},
        {"alpha": math.nan},
        {"ramp_steps": -1},
        {"ramp_steps": None},
        {"run_id": ""},
        {"run_id": "**"},
        {"issued_at": math.inf},
        {"nonce": "0" * 31},
        {"nonce": "G" * 32},
        {"signature": "0" * 63},
    ],
)
def test_bad_fields_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        KasminaCommand(**{**LOAD, **change})


def test_nonces_differ() -> None:
    assert len({KasminaCommand(**LOAD).nonce for _ in range(100)}) == 100
    assert KasminaCommand(**LOAD).action is CommandAction.LOAD


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_CONTROL_KEY", raising=False)
    assert control_key() is None
    monkeypatch.setenv("ESPER_CONTROL_KEY", KEY.decode())
    assert control_key() == KEY
    assert control_key("x" * 16) == b"x" * 16
    monkeypatch.setenv("ESPER_CONTROL_KEY", "short")
    with pytest.raises(EsperError, match="has 5 bytes"):
        control_key()


def outcome(**changes: Any) -> CommandOutcome:
    values: dict[str, Any] = {
        "command_id": "0" * 32,
        "status": "done",
        "reason": None,
        "run_id": "run-1",
        "rank": 0,
        "step": 3,
        "answered_at": 1.0,
    }
    return CommandOutcome(**{**values, **changes})


def test_outcomes_come_back() -> None:
    for sent in (outcome(), outcome(status="refused", reason="stale", command_id="")):
        assert CommandOutcome.from_payload(json.loads(json.dumps(sent.to_payload()))) == sent
    assert outcome().done
    assert not outcome(status="refused", reason="stale").done


@pytest.mark.parametrize(
    "changes",
    [
        {"command_id": "x"},
        {"status": "maybe"},
        {"reason": "done, but"},
        {"status": "refused"},
        {"status": "refused", "reason": "x" * 1001},
        {"run_id": ""},
        {"rank": -1},
        {"step": -1},
        {"answered_at": -1.0},
    ],
)
def test_bad_outcomes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        outcome(**changes)
