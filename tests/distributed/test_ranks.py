"""Two processes train one network: everything that seeds do, they do on both at the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.telemetry import EventKind, HealthWindow, RunEvent, read_payload
from tests.distributed import scenarios
from tests.distributed.ranks import Ranks
from tests.servers import redis_server


def same(results: list[dict[str, Any]], *keys: str) -> None:
    for key in keys:
        assert results[0][key] == results[1][key], key


DDP_OPTIONS = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


@pytest.mark.parametrize("options", DDP_OPTIONS.values(), ids=DDP_OPTIONS)
def test_asleep_it_trains_as_the_bare_network_under_ddp(options: dict[str, Any], ranks: Ranks) -> None:
    for result in ranks.run(scenarios.sleeps, options, None):
        assert result["ours"] == result["bare"]


@pytest.mark.parametrize(
    ("kind", "options", "compiled"),
    [
        ("ddp", {}, None),
        ("ddp", {"gradient_as_bucket_view": True}, None),
        ("ddp", {"static_graph": True}, None),
        ("ddp", {}, "aot_eager"),
        ("fsdp", {}, None),
        ("fsdp", {"reshard_after_forward": True}, None),
    ],
    ids=["ddp", "ddp-views", "ddp-static", "ddp-compiled", "fsdp", "fsdp-resharded"],
)
def test_seeds_wake_together_whatever_the_fetch_takes(
    kind: str, options: dict[str, Any], compiled: str | None, ranks: Ranks
) -> None:
    fast, slow = ranks.run(scenarios.wakes_together, kind, options, compiled)
    assert fast["done"] == slow["done"] == [True, True]
    assert fast["grown"] == slow["grown"]
    assert fast["end"] == slow["end"]
    states = fast["end"]["states"]
    # Requests after three steps; rank 0 has its artifacts long before rank 1, and waits.
    awake = states.index("GRAFTING")
    assert states[3] == "LOADING"
    assert fast["own"] <= slow["own"] <= awake + 1
    assert not fast["still_awake"] and not slow["still_awake"]
    assert "ACTIVE" in states
    assert states[-1] == "CULLED"
    assert all(norm > 0 for norm in fast["awake"])


def test_fsdp_trains_what_ddp_trains(ranks: Ranks) -> None:
    reference, other = ranks.run(scenarios.trains, "ddp", {})
    assert reference == other
    assert reference["states"][:3] == ["LOADING", "ACTIVE", "ACTIVE"]
    for options in ({}, {"reshard_after_forward": True}):
        for result in ranks.run(scenarios.trains, "fsdp", options):
            assert result["states"] == reference["states"]
            assert result["weights"].keys() == reference["weights"].keys()
            for name, weights in reference["weights"].items():
                # Twelve steps of AdamW at 0.01; gradients averaged in another order differ by some 1e-7 of themselves.
                torch.testing.assert_close(
                    torch.tensor(result["weights"][name]), torch.tensor(weights), rtol=1e-4, atol=1e-5, msg=name
                )


def test_gradients_are_the_same_under_the_older_fsdp_with_checkpoints(ranks: Ranks) -> None:
    one, two = (ranks.run(scenarios.gathers_under_checkpoints, together) for together in (True, False))
    assert one == two
    assert all({"x", "seed0.down.weight", "seed0.up.weight"} < result.keys() for result in one)


@pytest.mark.parametrize("bad", [False, True], ids=["missing", "bad"])
def test_what_one_rank_cannot_have_none_gets(bad: bool, ranks: Ranks) -> None:
    results = ranks.run(scenarios.one_rank_fails, bad)
    same(results, "parameters", "crc", "states", "plans", "done", "error")
    assert results[0]["done"] is False
    assert results[0]["states"][-1] == ("ERROR_RECOVERY" if bad else "DORMANT")
    assert "rank 1: " in results[0]["error"]
    assert ("hash is wrong" if bad else "gone") in results[0]["error"]


def test_a_fault_on_one_rank_counts_on_all(ranks: Ranks) -> None:
    results = ranks.run(scenarios.one_rank_overflows)
    same(results, "parameters", "crc", "states", "plans", "faults")
    assert results[0]["states"][-1] == "ERROR_RECOVERY"
    # One more each step, from the step after the first.
    assert results[0]["faults"][:3] == [0, 1, 2]


def test_ranks_that_ask_for_different_kernels_get_none(ranks: Ranks) -> None:
    results = ranks.run(scenarios.different_programs)
    same(results, "parameters", "crc", "states", "done")
    assert results[0]["done"] is False
    assert all("different kernels" in result["error"] for result in results)


def test_a_request_that_one_rank_cancels_is_refused_on_all(ranks: Ranks) -> None:
    results = ranks.run(scenarios.cancelled_on_one_rank)
    same(results, "parameters", "crc", "states", "error")
    assert "rank 0: the request was cancelled" in results[0]["error"]
    assert results[0]["states"][-1] == "DORMANT"


def test_commands_given_while_loading_stand_on_all(ranks: Ranks) -> None:
    results = ranks.run(scenarios.commands_while_loading)
    same(results, "parameters", "crc", "states", "plans", "done", "artifacts", "error")
    assert results[0]["done"] == [False, False, True]
    assert results[0]["artifacts"] == results[0]["wanted"]
    assert results[0]["states"][-1] == "FOSSILIZED"
    assert "fossilized while it was loading" in results[0]["error"]


def test_samples_and_latencies_reach_all_lattices_alike(ranks: Ranks) -> None:
    results = ranks.run(scenarios.watched)
    same(results, "crc", "states", "health", "done")
    assert results[0]["done"] is True
    assert all(result["samples"] > 0 for result in results)


def test_health_over_all_ranks(ranks: Ranks) -> None:
    results = ranks.run(scenarios.merged_health)
    same(results, "health", "nothing", "one")
    y = torch.cat([torch.tensor(result["y"], dtype=torch.float64) for result in results])
    health = results[0]["health"]
    assert health["probes"] == 2
    for seed, columns in enumerate(y.split(2, 1)):  # four seeds watch eight features
        assert health["samples"][seed] == columns.numel()
        # float64 over float32 values.
        assert abs(health["mean"][seed] - columns.mean().item()) < 1e-9
        assert abs(health["variance"][seed] - columns.var(correction=0).item()) < 1e-9
    assert results[0]["nothing"]["probes"] == 0
    assert results[0]["one"]["probes"] == 1
    assert results[0]["one"]["samples"] == [8, 8, 8, 8]


def test_ranks_publish_one_run(ranks: Ranks, tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", appendfsync="no") as server:
        results = ranks.run(scenarios.publishes, server.url, str(tmp_path / "spool"))
        with server.client(text=False) as client:
            found = [
                OonaMessage.from_bytes(fields[b"message"])
                for topic in (TopicNames.TELEMETRY_SEED_HEALTH, TopicNames.INNOVATION_FIELD_REPORTS)
                for _, fields in client.xrange(topic.value)
            ]
    for result in results:
        stats = result["stats"]
        assert result["done"] is True
        assert stats["produced"] == stats["delivered"] > 0
    assert len({message.sender_id for message in found}) == 2
    assert {message.trace_id for message in found} == {"together"}
    payloads = [read_payload(message) for message in found]
    windows = [payload for payload in payloads if isinstance(payload, HealthWindow)]
    for layer in ("0", "2"):
        ends = []
        for rank in (0, 1):
            mine = [window for window in windows if (window.layer_name, window.rank) == (layer, rank)]
            assert [window.sequence for window in mine] == list(range(len(mine)))
            assert {window.world_size for window in mine} == {2}
            ends.append(mine[-1].arrays()["lifecycle_state"].tolist())
        assert ends[0] == ends[1]
        assert ends[0][1] == (results[0]["state"] if layer == "0" else 0)
    woke = [event.rank for event in payloads if isinstance(event, RunEvent) and event.kind is EventKind.SEED_WOKEN]
    assert sorted(woke) == [0, 1]


def test_what_several_ranks_may_not_do(ranks: Ranks) -> None:
    for told in ranks.run(scenarios.refusals):
        assert len(told) == 4, told
        for text, words in zip(
            told,
            ["attach(model) was not called", "request_kernel", "needs a model that esper.wrap gave", "period"],
            strict=True,
        ):
            assert words in text
