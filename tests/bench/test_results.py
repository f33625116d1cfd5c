"""Judging ratios: what is a regression, and what is noise."""

from __future__ import annotations

from typing import Any

import pytest

from bench.results import check, judge, kept, table


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


def test_keeping_adds_to_what_one_machine_has_and_drops_another_s() -> None:
    latest = {"machine": {"processor": "a"}, "ratios": {"new": {}, "both": {"x": row(2.0)}}}
    stored = {"machine": {"processor": "a"}, "ratios": {"old": {}, "both": {"x": row(1.0)}}}
    assert kept(latest, stored)["ratios"] == {"old": {}, "new": {}, "both": {"x": row(2.0)}}
    assert kept(latest, {**stored, "machine": {"processor": "b"}}) == latest
    assert kept(latest, {"ratios": {}}) == latest
