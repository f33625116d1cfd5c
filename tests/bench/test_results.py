"""Judging ratios: what is a regression, and what is noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.results import check, differences, judge, kept, main, table


def row(ratio: float, spread: float = 0.001, **more: float) -> dict[str, float]:
    return {"ratio": ratio, "low": ratio - spread, "high": ratio + spread, **more}


def results(**rows: dict[str, float]) -> dict[str, Any]:
    return {"ratios": {"key": rows}}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0, "kept"), (1.0045, "undecided"), (1.0055, "undecided"), (1.01, "missed")]
)
def test_a_limit_is_judged_by_the_whole_interval(ratio: float, verdict: str) -> None:
    assert judge(row(ratio, limit=1.005)) == verdict


def test_worse_beyond_noise_is_a_problem() -> None:
    before = results(wrapped=row(1.00))
    assert check(results(wrapped=row(1.05)), before) == ["key: wrapped went from 1.0000 to 1.0500"]
    # Moved, but by less than two runs of one program differ.
    assert check(results(wrapped=row(1.02)), before) == []
    # Far, but nobody can tell: the intervals overlap.
    assert check(results(wrapped=row(1.05, spread=0.1)), before) == []
    # Better is no problem, and neither is a measurement that was never stored.
    assert check(results(wrapped=row(0.5)), before) == []
    assert check(results(wrapped=row(5.0)), {"ratios": {}}) == []


def test_a_missed_limit_is_a_problem_whatever_was_stored() -> None:
    (problem,) = check(results(wrapped=row(1.02, limit=1.005)), results(wrapped=row(1.02)))
    assert "is over 1.005" in problem


def test_table() -> None:
    text = table(results(again=row(1.0), wrapped=row(1.25)))
    assert "| key | 1.000 [0.999, 1.001] | 1.250 [1.249, 1.251] |" in text


HERE, THERE = {"processor": "a", "torch": "2"}, {"processor": "b", "torch": "2"}


def test_another_machine_s_ratios_are_no_measure() -> None:
    latest = {"machine": HERE, **results(wrapped=row(1.05, limit=2.0), over=row(3.0, limit=2.0))}
    stored = {"machine": THERE, **results(wrapped=row(1.00))}
    assert differences(latest, stored) == "processor a and not b"
    (problem,) = check(latest, stored)
    assert "over" in problem and "is over 2.0" in problem
    assert len(check(latest, {**stored, "machine": HERE})) == 2
    assert differences(latest, {"ratios": {}}) == "", "nothing is stored"


def test_keeping_adds_to_what_one_machine_has() -> None:
    latest = {"machine": HERE, "ratios": {"new": {}, "both": {"x": row(2.0)}}}
    stored = {"machine": HERE, "ratios": {"old": {}, "both": {"x": row(1.0)}}}
    assert kept(latest, stored)["ratios"] == {"old": {}, "new": {}, "both": {"x": row(2.0)}}
    assert kept(latest, {"ratios": {}}) == latest


def test_keeping_drops_another_machine_s_only_if_told() -> None:
    latest = {"machine": HERE, "ratios": {"new": {}}}
    stored = {"machine": THERE, "ratios": {"old": {}}}
    with pytest.raises(ValueError, match=r"1 measurements of another machine are stored \(processor a and not b"):
        kept(latest, stored)
    assert kept(latest, stored, replace=True) == latest


def test_the_command_says_what_it_did_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.results.LATEST", tmp_path / "latest.json")
    monkeypatch.setattr("bench.results.stored_path", lambda: tmp_path / "cpu.json")
    here = {"machine": HERE, **results(wrapped=row(1.05, limit=2.0))}
    there = json.dumps({"machine": THERE, **results(wrapped=row(1.00))})
    (tmp_path / "latest.json").write_text(json.dumps(here))
    (tmp_path / "cpu.json").write_text(there)
    assert main(["check"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "cpu.json is of another machine, so that only the limits are judged: here processor a and not b"
    assert last == "1 measurements, no limit missed"
    assert main(["keep"]) == 1
    assert "python -m bench.results keep --replace" in capsys.readouterr().err
    assert (tmp_path / "cpu.json").read_text() == there
    assert main(["keep", "--replace"]) == 0
    assert json.loads((tmp_path / "cpu.json").read_text()) == here
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "1 measurements, none worse beyond noise\n"
