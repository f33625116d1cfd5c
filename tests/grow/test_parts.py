"""The plain rule, the sizes of networks, the event log, the trainer and the report."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from esper.grow import events
from esper.grow.data import load_digits, prepare
from esper.grow.experiment import NetworkResult
from esper.grow.model import build, count_parameters, host_width, width_for
from esper.grow.policy import Candidate, LevelOff, WorstHealthFirst
from esper.grow.report import build_report, table_rows, verdict, write_report
from esper.grow.trainer import EpochRecord, Interrupted, Trainer, evaluate


def test_level_off() -> None:
    detector = LevelOff(window=3, min_gain=0.05)
    falling = [detector.add(2.0 * 0.8**i) for i in range(12)]
    assert not any(falling)
    level = [detector.add(0.1) for _ in range(6)]
    assert level[-1]
    detector.restart()
    assert not any(detector.add(0.1) for _ in range(5))
    assert detector.add(0.1)
    detector.restart()
    assert not any(detector.add(math.nan) for _ in range(12))


def test_worst_health_first_then_what_was_tried_least() -> None:
    policy = WorstHealthFirst(("a", "b"))
    candidates = [Candidate("0", 0, 0.9), Candidate("0", 1, 0.2), Candidate("1", 0, math.nan), Candidate("1", 1, 0.9)]
    chosen = []
    while (proposal := policy.choose(candidates)) is not None:
        chosen.append((proposal.candidate.layer, proposal.candidate.seed_idx, proposal.blueprint))
    assert chosen == [
        ("0", 1, "a"),
        ("0", 1, "b"),
        ("0", 0, "a"),
        ("1", 1, "a"),
        ("0", 0, "b"),
        ("1", 1, "b"),
        ("1", 0, "a"),
        ("1", 0, "b"),
    ]


def test_a_failure_sends_the_search_to_another_layer() -> None:
    policy = WorstHealthFirst(("a",))
    candidates = [Candidate("0", 0, 0.1), Candidate("0", 1, 0.2), Candidate("1", 0, 0.9)]
    first = policy.choose(candidates)
    assert first is not None
    assert first.candidate == candidates[0]
    policy.failed(first.candidate)
    second = policy.choose(candidates)
    assert second is not None
    assert second.candidate == candidates[2]
    policy.failed(second.candidate)
    third = policy.choose(candidates)
    assert third is not None
    assert third.candidate == candidates[1]


@pytest.mark.parametrize(
    ("before", "after", "kept"), [(1.0, 0.9, True), (1.0, 0.995, False), (1.0, 1.1, False), (1.0, math.nan, False)]
)
def test_keep_on_improved_validation_loss(before: float, after: float, kept: bool) -> None:
    assert WorstHealthFirst(("a",), min_gain=0.01).keep(before, after) is kept


@pytest.mark.parametrize("parameters", [1, 100, 330, 1500, 2144, 10_000])
def test_static_width_is_the_nearest(parameters: int) -> None:
    width = width_for(64, 10, parameters)
    gaps = {w: abs(count_parameters(build(64, 10, width=w, seed=0)) - parameters) for w in range(1, width + 4)}
    assert gaps[width] == min(gaps.values())


def test_host_is_small_and_starts_from_its_seed() -> None:
    assert [host_width(classes) for classes in (2, 3, 10, 100)] == [2, 2, 4, 40]
    state = torch.random.get_rng_state()
    first, second, other = (build(4, 3, width=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_event_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with events.EventLog(path) as log:
        log.write(events.LevelledOff(seed=1, epoch=3, validation_loss=0.5))
        log.write(events.EpochEnded("host", 1, 4, math.nan, math.inf, 0.5))
        log.write(events.RunFinished(True, 1.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [0, 1, 2]
    assert [line["event"] for line in lines] == ["levelled_off", "epoch_ended", "run_finished"]
    assert [line["elapsed_s"] for line in lines] == sorted(line["elapsed_s"] for line in lines)
    assert lines[1]["train_loss"] is None
    assert lines[1]["validation_loss"] is None
    with pytest.raises(FileExistsError):
        events.EventLog(path)


def test_event_types_are_distinct_and_none_hides_a_field_of_the_line() -> None:
    kinds = [kind.kind for kind in events.Event.__subclasses__()]
    assert len(kinds) == len(set(kinds)) == 12
    for kind in events.Event.__subclasses__():
        assert not {field.name for field in fields(kind)} & {"seq", "time", "elapsed_s", "event"}


def test_trainer_learns_reports_what_evaluate_says_and_repeats() -> None:
    split = prepare(load_digits(), seed=0, device=torch.device("cpu"))
    losses = []
    for _ in range(2):
        model = build(64, 10, width=16, seed=0)
        steps: list[int] = []
        trainer = Trainer(model, split, seed=5)
        records = [trainer.epoch(lambda steps=steps: steps.append(1)) for _ in range(3)]
        assert len(steps) == 3 * trainer.steps_per_epoch
        losses.append([record.train_loss for record in records])
        assert (records[-1].validation_loss, records[-1].validation_accuracy) == evaluate(
            model, split.validation_x, split.validation_y
        )
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]
    assert model.training


def test_trainer_stops_between_steps() -> None:
    split = prepare(load_digits(), seed=0, device=torch.device("cpu"))
    trainer = Trainer(build(64, 10, width=4, seed=0), split, seed=0)
    steps: list[int] = []
    with pytest.raises(Interrupted):
        trainer.epoch(lambda: steps.append(1), lambda: len(steps) == 2)
    assert len(steps) == 2
    assert trainer.epochs_done == 0


def test_evaluate_leaves_the_mode_alone_and_uses_eval() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    x, y = torch.randn(50, 2), torch.zeros(50, dtype=torch.long)
    assert evaluate(model, x, y) == evaluate(model, x, y)
    assert model.training


def _result(network: str, seed: int, accuracy: float, epochs: int = 2) -> NetworkResult:
    history = [EpochRecord(i + 1, 1.0, math.nan, 0.5) for i in range(epochs)]
    return NetworkResult(network, seed, 100, history, 1.0 - accuracy, accuracy, 0.5)  # type: ignore[arg-type]


def test_report_gives_mean_spread_and_paired_differences(tmp_path: Path) -> None:
    results = [
        *(_result("host", seed, 0.5 + 0.1 * seed) for seed in range(3)),
        *(_result("grown", seed, 0.6 + 0.1 * seed) for seed in range(3)),
        _result("static", 0, 0.9),
        _result("static", 1, 0.1, epochs=1),
    ]
    report = build_report(
        load_digits(), results, epochs=2, device="cpu", registry="file:///r", seconds=1.0, interrupted=True
    )
    host = report["networks"]["host"]["test_accuracy"]
    # Sample standard deviation of 0.5, 0.6, 0.7.
    assert (host["mean"], host["std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert report["networks"]["static"]["count"] == 1
    paired = report["paired"]["grown_minus_host"]
    assert paired["count"] == paired["grown_ahead"] == 3
    assert paired["test_accuracy"]["mean"] == pytest.approx(0.1)
    assert paired["test_accuracy"]["std"] == pytest.approx(0.0, abs=1e-12)
    assert report["paired"]["grown_minus_static"]["grown_ahead"] == 0
    assert [run["complete"] for run in report["runs"]] == [True] * 7 + [False]
    assert len(table_rows(report)) == 3
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["history"][0]["validation_loss"] is None


def test_verdict_says_why_no_seed_was_asked_for() -> None:
    pair = [_result("host", 0, 0.5), _result("grown", 0, 0.5)]
    assert "No seed was asked for: the validation loss never levelled off; train longer" in verdict(pair)
    pair[1].levels = 1
    assert "No seed was asked for: the validation loss levelled off too late" in verdict(pair)
    other = [_result("host", 1, 0.5), _result("grown", 1, 0.6)]
    other[1].seeds_asked = 1
    assert "No seed was asked for in 1 of 2 runs: " in verdict([*pair, *other])
    assert "No seed" not in verdict(other)


def test_verdict_says_whatever_came_out() -> None:
    assert "10.0 points above" in verdict([_result("host", 0, 0.5), _result("grown", 0, 0.6)])
    assert "10.0 points below" in verdict([_result("host", 0, 0.6), _result("grown", 0, 0.5)])
    assert "ends level with" in verdict([_result("host", 0, 0.5), _result("grown", 0, 0.5)])
    assert "nothing to compare" in verdict([_result("host", 0, 0.5)])
