"""The paired runner's statistics, on a clock that the test turns: nothing here depends on the machine's speed."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.paired import Ratio, compare, compare_in_processes, mean_interval, median_interval, student


class World:
    """A machine whose speed drifts: every call takes its cost, times what the machine is doing just then."""

    def __init__(self, seed: int = 1, noise: float = 0.0, spikes: float = 0.0) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.random = random.Random(seed)
        self.noise, self.spikes = noise, spikes

    def candidate(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            slow = 1 + 0.4 * math.sin(self.now / 1e9)
            jitter = 1 + self.noise * self.random.uniform(-1, 1)
            spike = 30 if self.random.random() < self.spikes else 1
            self.now += round(cost * slow * jitter * spike)

        return call

    def clock(self) -> int:
        return self.now


def test_drift_cancels_and_spikes_do_not_matter() -> None:
    world = World(noise=0.02, spikes=0.002)
    candidates = {
        "bare": world.candidate("bare", 100_000),
        "same": world.candidate("same", 100_000),
        "slower": world.candidate("slower", 103_000),
        "twice": world.candidate("twice", 200_000),
    }
    ratios = compare(candidates, "bare", rounds=201, inner=10, clock=world.clock)
    assert set(ratios) == {"same", "slower", "twice"}
    # A block of ten calls has a relative deviation of 0.02 / sqrt(3) / sqrt(10) = 0.37 %, a ratio of two blocks sqrt(2)
    # times that, the median of 201 about 1.25 / sqrt(201) of it: 0.046 %. Five of these are 0.23 %.
    for name, truth in [("same", 1.0), ("slower", 1.03), ("twice", 2.0)]:
        ratio = ratios[name]
        assert abs(ratio.median / truth - 1) < 0.0023
        assert ratio.low <= ratio.median <= ratio.high
        assert ratio.high - ratio.low < 0.005 * truth
        assert (ratio.rounds, ratio.inner) == (201, 10)
    assert ratios["slower"].low > 1
    assert ratios["twice"].seconds > 1.5 * ratios["twice"].baseline_seconds


def test_every_round_runs_everyone_in_a_new_order() -> None:
    world = World()
    names = ["a", "b", "c"]
    compare({n: world.candidate(n, 10) for n in names}, "a", rounds=50, inner=2, warmup=1, clock=world.clock)
    timed = world.calls[len(names) :]  # after one warm-up call each
    blocks = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(len(set(block)) == 1 for block in blocks)  # one call to warm up, two that count
    rounds = [tuple(block[0] for block in blocks[i : i + 3]) for i in range(0, len(blocks), 3)]
    assert len(rounds) == 50
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) == 6  # all orders of three come up in fifty draws


def test_block_length_and_rounds_follow_the_cost() -> None:
    world = World()
    fast = {n: world.candidate(n, 1_000) for n in "ab"}
    assert 1_000 < compare(fast, "a", rounds=5, clock=world.clock)["b"].inner < 4_000
    slow = {n: world.candidate(n, 100_000_000) for n in "ab"}
    ratio = compare(slow, "a", rounds=500, seconds=1.0, clock=world.clock)["b"]
    assert (ratio.inner, ratio.rounds) == (1, 31)
    assert compare(slow, "a", rounds=40, seconds=None, clock=world.clock)["b"].rounds == 40


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    trials, covered = 300, 0
    for trial in range(trials):
        sample = np.exp(rng.normal(0.0, 0.1, size=61)) * 1.5
        _, low, high = median_interval(sample.tolist(), seed=trial)
        covered += low <= 1.5 <= high
    # 300 trials at 95 % have a standard deviation of 1.3 %; the bootstrap of a median is known to be a little
    # conservative.
    assert 0.95 - 4 * 0.013 <= covered / trials <= 1.0
    assert covered < trials


def test_interval_of_constant_values_is_a_point() -> None:
    assert median_interval([2.0] * 9) == (2.0, 2.0, 2.0)


def test_interval_narrows_with_more_values() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for size in (25, 2500):
        _, low, high = median_interval(rng.normal(1, 0.1, size).tolist())
        widths.append(high - low)
    assert widths[1] < widths[0] / 4


def test_result_is_written(tmp_path: Path) -> None:
    world = World()
    target = tmp_path / "deep" / "result.json"
    ratios = compare({n: world.candidate(n, 10) for n in "ab"}, "a", rounds=5, inner=1, clock=world.clock, path=target)
    written = json.loads(target.read_text())
    assert written["baseline"] == "a"
    assert written["level"] == 0.95
    assert written["ratios"]["b"]["median"] == ratios["b"].median
    assert [p.name for p in target.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("names", "baseline", "options", "complaint"),
    [
        ("ab", "c", {}, "baseline 'c' is not among the candidates: a, b"),
        ("a", "a", {}, "nothing to compare 'a' with"),
        ("ab", "a", {"rounds": 4}, "at least 5"),
        ("ab", "a", {"inner": 0}, "inner must be at least 1"),
    ],
)
def test_what_is_refused(names: str, baseline: str, options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compare({n: lambda: None for n in names}, baseline, **options)


def test_long_calls_do_without_the_untimed_one() -> None:
    world = World()
    slow = {n: world.candidate(n, 1_000_000_000) for n in "ab"}
    ratio = compare(slow, "a", rounds=5, warmup=1, settle=False, clock=world.clock)["b"]
    assert world.calls.count("a") == world.calls.count("b") == 1 + 5
    assert (ratio.rounds, ratio.inner) == (5, 1)


def test_turns_of_a_round_are_added_up_and_cancel_drift() -> None:
    world = World()
    candidates = {"bare": world.candidate("bare", 100_000), "slower": world.candidate("slower", 103_000)}
    ratio = compare(candidates, "bare", rounds=21, inner=5, turns=8, clock=world.clock)["slower"]
    # Per round 8 blocks and the 8 untimed calls before them; besides three warm-up calls of each.
    assert world.calls.count("bare") == 3 + 21 * 8 * 6
    assert (ratio.rounds, ratio.inner) == (21, 40)
    assert abs(ratio.median / 1.03 - 1) < 0.001
    with pytest.raises(ValueError, match="turns must be at least 1, not 0"):
        compare(candidates, "bare", turns=0, clock=world.clock)


def test_students_interval() -> None:
    # By hand: mean 3, standard deviation sqrt(2.5), t = 2.776 at 4 degrees of freedom.
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))


def in_process(base: float, number: int) -> dict[str, Ratio]:
    found = {"wrapped": Ratio(base + number / 100, 0.9, 1.1, 5, 7, 2e-3 * os.getpid(), 1e-3)}
    return found | ({"first": Ratio(2.0, 1.9, 2.1, 5, 7, 1e-3, 1e-3)} if number == 0 else {})


def test_processes_are_pooled_and_are_processes() -> None:
    pooled = compare_in_processes(in_process, 1.0, processes=3)
    wrapped = pooled["wrapped"]
    assert wrapped.median == pytest.approx(1.01)
    assert wrapped.high - wrapped.median == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert (wrapped.rounds, wrapped.inner, wrapped.baseline_seconds) == (15, 7, 1e-3)
    assert wrapped.seconds != 2e-3 * os.getpid()
    # Measured in one process alone: that process's own interval.
    assert pooled["first"] == Ratio(2.0, 1.9, 2.1, 5, 7, 1e-3, 1e-3)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (15, 2.131), (16, 2.120), (23, 2.069), (120, 1.980)])
def test_quantiles_of_student(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=6e-4)  # printed tables have three decimals
