"""Commands: what is not signed, new and for this run changes nothing; what is, acts between two steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.contracts.commands import CommandOutcome, KasminaCommand
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.telemetry.commands import Accepted, Inbox
from esper.execution.telemetry.identity import Identity
from tests.execution.telemetry.fakes import FakeBus, published, settled

KEY = b"0123456789abcdef"
WHO = Identity("run-1", 0, 1, "esper-train-here")
NOW = 1_000_000.0
FORGED: dict[str, Any] = {"action": "cull", "layer_name": "0", "seed_idx": 0, "issued_at": NOW + 1}


def command(**changes: Any) -> KasminaCommand:
    values = {"action": "unload", "layer_name": "0", "seed_idx": 0, "issued_at": NOW + 1, **changes}
    return KasminaCommand(**values).signed(KEY)


class Post:
    """An inbox with a clock of the test's own."""

    def __init__(self) -> None:
        self.bus, self.now = FakeBus(), NOW
        self.inbox = Inbox(self.bus, WHO, KEY, clock=lambda: self.now)
        self.now += 2

    def receive(self, *payloads: dict[str, Any], published_at: float | None = None) -> tuple[list[Accepted], list[str]]:
        for payload in payloads:
            self.bus.command(payload, self.now if published_at is None else published_at)
        accepted, answers = self.inbox.poll()
        return accepted, [answer.reason or "" for answer in answers]


@pytest.fixture
def post() -> Post:
    return Post()


def test_a_signed_new_command_is_let_through(post: Post) -> None:
    sent = command(run_id="run-1")
    accepted, refused = post.receive(sent.to_payload())
    assert accepted == [Accepted(sent, "trace-7")]
    assert refused == []
    assert post.receive() == ([], [])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (KasminaCommand(action="unload", layer_name="0", seed_idx=0, issued_at=NOW + 1).to_payload(), "signature"),
        (dataclasses.replace(command(), seed_idx=1).to_payload(), "signature"),
        (
            KasminaCommand(action="cull", layer_name="0", seed_idx=0, issued_at=NOW + 1).signed(b"x" * 16).to_payload(),
            "signature",
        ),
        (command(issued_at=NOW - 1).to_payload(), "stale: issued before this run began"),
        (command(issued_at=NOW + 2 + 61).to_payload(), "stale: issued -61 s ago"),
        ({**command().to_payload(), "alpha": 2.0}, "alpha is 2.0"),
        ({**command().to_payload(), "version": 9}, "version 9"),
        ({"type": "something"}, "type 'something'"),
        ({}, "type None"),
    ],
)
def test_what_is_refused_is_reported(post: Post, payload: dict[str, Any], reason: str) -> None:
    accepted, refused = post.receive(payload)
    assert accepted == []
    assert len(refused) == 1
    assert reason in refused[0]
    assert post.inbox.refused == 1


def test_a_late_command_is_stale(post: Post) -> None:
    post.now += 100
    accepted, refused = post.receive(command().to_payload())
    assert accepted == []
    assert "stale: issued 101 s ago" in refused[0]


def test_a_replayed_command_is_refused_however_often_and_late(post: Post) -> None:
    sent = command().to_payload()
    assert len(post.receive(sent)[0]) == 1
    for later in (0.0, 30.0, 200.0, 1000.0):
        post.now += later
        accepted, refused = post.receive(sent)
        assert accepted == []
        assert "replayed" in refused[0] or "stale" in refused[0]
    other = command(issued_at=post.now).to_payload()
    assert len(post.receive(other)[0]) == 1


def test_the_same_command_twice_in_one_read(post: Post) -> None:
    sent = command().to_payload()
    accepted, refused = post.receive(sent, sent)
    assert len(accepted) == 1
    assert "replayed" in refused[0]


def test_a_refused_command_uses_up_no_nonce(post: Post) -> None:
    good = command()
    forged = dataclasses.replace(good, signature="0" * 64)
    assert post.receive(forged.to_payload())[0] == []
    assert len(post.receive(good.to_payload())[0]) == 1


def test_what_is_for_others_or_from_before_is_none_of_its_business(post: Post) -> None:
    for payload, published_at in (
        (command(run_id="run-2").to_payload(), None),
        (command(issued_at=NOW - 500).to_payload(), NOW - 500),
        ({"type": "junk"}, NOW - 1),
        ({"run_id": "run-2"}, None),
        # Signed with another key, or tampered with: what it says of its time is no evidence.
        (KasminaCommand(**FORGED).signed(b"x" * 16).to_payload(), NOW - 1),
        (KasminaCommand(**FORGED, run_id="run-1").signed(b"x" * 16).to_payload(), NOW - 1),
        (dataclasses.replace(command(), seed_idx=1).to_payload(), NOW - 1),
    ):
        assert post.receive(payload, published_at=published_at) == ([], [])
    assert (post.inbox.ignored, post.inbox.refused) == (7, 0)


def test_one_for_this_run_by_name_from_before_it_is_answered(post: Post) -> None:
    accepted, refused = post.receive(command(run_id="run-1", issued_at=NOW - 5).to_payload(), published_at=NOW - 5)
    assert (accepted, refused) == ([], ["stale: issued before this run began"])


def test_a_bus_whose_clock_is_behind_loses_no_command(post: Post) -> None:
    sent = command()
    assert post.receive(sent.to_payload(), published_at=NOW - 30)[0] == [Accepted(sent, "trace-7")]


def test_a_flood_is_counted_and_answered_in_part(post: Post) -> None:
    accepted, refused = post.receive(*[{"type": "junk"}] * 60)
    assert accepted == []
    assert 0 < len(refused) < 60
    assert post.inbox.refused == 60


def test_entries_that_are_no_messages_are_reported_by_number(post: Post) -> None:
    post.receive()
    post.bus.skipped = 3
    assert post.receive() == ([], ["3 entries of the command stream are no messages"])
    assert post.receive() == ([], [])


# -- in a model --


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def model(bus: FakeBus, tmp_path: Path) -> Iterator[esper.MorphableModel]:
    made = published(bus, tmp_path, control_key=KEY, command_interval_s=0.005)
    # The first step starts the thread, which begins to read.
    made.step()
    yield made
    made.close()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    return esper.compile("lowrank", d_in=8, d_out=8, rank=2, registry=str(tmp_path / "registry"))


def order(model: esper.MorphableModel, bus: FakeBus, action: str, key: bytes = KEY, **fields: Any) -> CommandOutcome:
    """Send a command and step until its outcome is on the bus."""
    sent = KasminaCommand(**{"action": action, "layer_name": "0", "seed_idx": 0, **fields}).signed(key)
    bus.command(sent.to_payload())

    def answered(_: object) -> Any:
        model.step()
        return any(outcome.command_id == sent.command_id for outcome in bus.outcomes())

    settled(model, answered)
    found = [outcome for outcome in bus.outcomes() if outcome.command_id == sent.command_id]
    assert len(found) == 1
    assert isinstance(found[0], CommandOutcome)
    return found[0]


def test_a_seeds_life_by_command(kernel: str, bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path, control_key=KEY, command_interval_s=0.005)
    model.step()
    layout = model.layer("0").state_layout
    x = torch.randn(4, 8)
    host = model(x)

    assert order(model, bus, "load", artifact_id=kernel, alpha=0.25, ramp_steps=0).done
    assert layout.state_of(0) is SeedLifecycleState.ACTIVE
    assert layout.alpha_of(0) == 0.25
    assert order(model, bus, "set_alpha", alpha=0.5).done
    assert layout.alpha_of(0) == 0.5
    assert order(model, bus, "ramp", alpha=1.0, ramp_steps=4).done
    for _ in range(5):
        model.step()
    assert layout.alpha_of(0) == 1.0
    assert order(model, bus, "unload").done
    assert layout.state_of(0) is SeedLifecycleState.DORMANT
    assert torch.equal(model(x), host)
    assert order(model, bus, "load", artifact_id=kernel, alpha=1.0, ramp_steps=3).done
    assert order(model, bus, "cull").done
    assert layout.state_of(0) is SeedLifecycleState.CULLED
    assert order(model, bus, "load", seed_idx=1, artifact_id=kernel, alpha=1.0, ramp_steps=0).done
    assert order(model, bus, "fossilize", seed_idx=1).done
    assert layout.state_of(1) is SeedLifecycleState.FOSSILIZED
    model.close()
    assert all(
        message.trace_id == "trace-7" for message in bus.messages if message.payload["type"] == CommandOutcome.TYPE
    )


@pytest.mark.parametrize(
    ("action", "fields", "reason"),
    [
        ("unload", {"layer_name": "nowhere"}, "Layer 'nowhere' not found"),
        ("unload", {"seed_idx": 7}, "Invalid seed index 7"),
        ("unload", {}, "dormant already"),
        ("set_alpha", {"alpha": 0.5}, "only an awake seed"),
        ("ramp", {"alpha": 0.5, "ramp_steps": 3}, "only an awake seed"),
        ("cull", {}, "cannot go from DORMANT to CULLED"),
        ("fossilize", {}, "cannot go from DORMANT to FOSSILIZED"),
        ("load", {"artifact_id": "no-such-kernel", "alpha": 1.0, "ramp_steps": 0}, "no-such-kernel"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    model: esper.MorphableModel, bus: FakeBus, action: str, fields: dict[str, Any], reason: str
) -> None:
    before = model.lattice.lifecycle_states.clone(), model.lattice.alpha_blend.clone()
    outcome = order(model, bus, action, **fields)
    assert not outcome.done
    assert outcome.reason is not None
    assert reason in outcome.reason
    assert torch.equal(model.lattice.lifecycle_states, before[0])
    assert torch.equal(model.lattice.alpha_blend, before[1])


def test_a_wrong_key_changes_nothing(model: esper.MorphableModel, bus: FakeBus) -> None:
    outcome = order(model, bus, "unload", key=b"y" * 16)
    assert not outcome.done
    assert "signature" in str(outcome.reason)


def test_a_load_under_way_when_the_model_closes_is_answered(
    model: esper.MorphableModel, bus: FakeBus, kernel: str
) -> None:
    sent = KasminaCommand(
        action="load", layer_name="0", seed_idx=0, artifact_id=kernel, alpha=1.0, ramp_steps=0
    ).signed(KEY)
    bus.command(sent.to_payload())
    settled(model, lambda _: model._publisher is not None and model._publisher.wanted_now)
    model.step()  # begins the load; nothing commits it
    model.close()
    (outcome,) = (each for each in bus.outcomes() if each.command_id == sent.command_id)
    assert outcome.status == "refused"
    assert "closed" in outcome.reason


def test_ranks_that_train_together_take_no_commands(
    bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = published(bus, tmp_path, control_key=KEY, command_interval_s=0.005)
    model.step()
    outcome = order(model, bus, "unload")
    assert (outcome.done, outcome.rank) == (False, 1)
    assert "2 ranks train together" in str(outcome.reason)
    model.close()


def test_without_a_key_nothing_is_read(bus: FakeBus, tmp_path: Path) -> None:
    model = published(bus, tmp_path)
    bus.command(KasminaCommand(action="unload", layer_name="0", seed_idx=0).signed(KEY).to_payload())
    for _ in range(20):
        model.step()
        time.sleep(0.002)
    model.close()
    assert bus.outcomes() == []


def test_a_bus_that_cannot_be_followed_takes_no_key(tmp_path: Path) -> None:
    class Deaf(FakeBus):
        follow = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="has no follow"):
        published(Deaf(), tmp_path, control_key=KEY)
