"""Compare the speed of callables so that what the machine does meanwhile hits all of them alike.

    ratios = compare({"bare": bare, "wrapped": wrapped}, baseline="bare")
    print(ratios["wrapped"])            # 1.0021 [1.0004, 1.0038] (201 rounds of 24 calls)

Clock speed, other programs and memory layout move a single timing by several percent from second to second. So every
round times every candidate, in an order drawn anew, and only times of the same round are divided by each other: what is
slow for a whole round cancels. The result is the median of these ratios, which a few disturbed rounds cannot move, with
a percentile bootstrap interval of that median (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter
13).

Some of the noise stays the same as long as a process lives: where its memory lies, in which order its graphs were
compiled. More rounds do not remove it; :func:`compare_in_processes` starts several processes and takes the spread
between them for the error.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Ratio", "compare", "compare_in_processes", "mean_interval", "median_interval", "write"]

#: Confidence level of every interval.
LEVEL = 0.95
#: Times are meant to be compared by blocks of at least this length, long beside the clock's grain and cost (some 50
#: ns).
BLOCK_SECONDS = 2e-3
_RESAMPLES = 4000
#: Two-sided 95 % quantile of Student's t by degrees of freedom, from 1.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over time of the baseline.

    Attributes:
        median: Median of the rounds' ratios (of several processes: the mean of their medians).
        low: Lower end of its 95 % interval.
        high: Its upper end.
        rounds: Number of rounds.
        inner: Calls timed in each round.
        seconds: Median time of one call of the candidate.
        baseline_seconds: Median time of one call of the baseline.
    """

    median: float
    low: float
    high: float
    rounds: int
    inner: int
    seconds: float
    baseline_seconds: float

    def __str__(self) -> str:
        return f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}] ({self.rounds} rounds of {self.inner} calls)"


def compare(
    candidates: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 201,
    inner: int | None = None,
    turns: int = 1,
    seconds: float | None = 30.0,
    warmup: int = 3,
    settle: bool = True,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Ratio]:
    """Time all candidates against one of them.

    Each timing follows one untimed call of the same candidate (``settle``), so that nobody pays for what the one before
    left in the caches. Garbage collection is off while blocks run and done between rounds. CUDA is waited for before
    and after each block, where it is in use.

    Args:
        candidates: Callables by name; each is called many times and must leave things as it found them. One that keeps
            time may have methods ``resume`` and ``pause``, called untimed around each of its turns.
        baseline: Name of the one that the others are divided by.
        rounds: How many rounds; at least 5. Odd numbers have a median that was measured.
        inner: Calls per block; None chooses so many that the fastest candidate's block takes 2 ms.
        turns: Blocks that each candidate runs in a round, in turn with the others; their times are added up. Many short
            blocks cancel more of the machine's drift than a long one, and rare costs still fall into every round.
        seconds: Fewer rounds (never under 31, or ``rounds`` if that is less) are run when this time would be exceeded;
            None for no limit.
        warmup: Calls of each candidate before anything is timed.
        settle: Whether each timing follows an untimed call. Calls of many seconds can do without: what the one before
            left in the caches is gone in milliseconds.
        seed: Of the order of candidates and of the bootstrap.
        clock: Nanoseconds, rising.
        path: A JSON file to write the result to.

    Returns:
        A ratio for each candidate but the baseline.

    Raises:
        ValueError: for an unknown baseline, no candidate beside it, too few rounds, or ``inner`` or ``turns`` below 1.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not among the candidates: {', '.join(candidates)}")
    if len(candidates) < 2:
        raise ValueError(f"there is nothing to compare {baseline!r} with")
    if rounds < 5:
        raise ValueError(f"{rounds} rounds tell nothing of their spread; use at least 5")
    if inner is not None and inner < 1:
        raise ValueError(f"inner must be at least 1, not {inner}")
    if turns < 1:
        raise ValueError(f"turns must be at least 1, not {turns}")

    wait = _waiter()
    rough = {
        name: min(_block(call, 1, clock, wait) for _ in range(max(1, warmup))) for name, call in candidates.items()
    }
    if inner is None:
        inner = max(1, round(BLOCK_SECONDS * 1e9 / max(1.0, min(rough.values()))))
    if seconds is not None:
        round_seconds = sum(rough.values()) * (inner + settle) * turns * 1e-9
        rounds = min(rounds, max(31, int(seconds / max(round_seconds, 1e-9))))

    times = _rounds(candidates, rounds, inner, turns, settle, random.Random(seed), clock, wait)
    ratios = {
        name: _ratio(mine, times[baseline], inner * turns, seed) for name, mine in times.items() if name != baseline
    }
    if path is not None:
        write(path, ratios, baseline=baseline)
    return ratios


def median_interval(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> tuple[float, float, float]:
    """The median of ``values`` and its percentile bootstrap interval.

    Args:
        values: Independent measurements of the same thing; at least one.
        level: Confidence level, in (0, 1).
        seed: Of the resampling.

    Returns:
        (median, low, high)
    """
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(_RESAMPLES, len(data)))
    medians = np.median(data[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(data)), float(low), float(high)


def compare_in_processes(
    measure: Callable[..., Mapping[str, Ratio]], *args: Any, processes: int = 5
) -> dict[str, Ratio]:
    """Run ``measure(*args, seed)`` in fresh processes, one after the other, and pool what they found.

    Args:
        measure: A function that can be imported by name, returning :func:`compare`'s result; a candidate that some
            processes leave out is pooled over the others.
        args: Its arguments, picklable; the number of the process (from 0) follows them.
        processes: How many; at least 1.

    Returns:
        For each candidate the mean over the processes of their medians with Student's interval, which takes only the
        spread between processes for the error (one process alone: that process's own ratio).
    """
    found: dict[str, list[Ratio]] = {}
    for number in range(processes):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for name, ratio in pool.apply(measure, (*args, number)).items():
                found.setdefault(name, []).append(ratio)
    return {name: _pool(ratios) for name, ratios in found.items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or more independent measurements and Student's 95 % interval: (mean, low, high)."""
    mean = statistics.fmean(values)
    reach = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def student(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: tabulated up to 15 degrees of freedom, then the first terms of its
    expansion about the normal quantile (Abramowitz and Stegun 1964, 26.7.5), exact to three decimals there."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + third


def write(path: str | os.PathLike[str], ratios: Mapping[str, Ratio], **facts: Any) -> None:
    """Write ratios and any other JSON values to ``path``, in one step: a reader sees all of the file or the old one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {**facts, "level": LEVEL, "ratios": {name: asdict(ratio) for name, ratio in ratios.items()}}
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    partial.replace(target)


def _rounds(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    inner: int,
    turns: int,
    settle: bool,
    order: random.Random,
    clock: Callable[[], int],
    wait: Callable[[], None],
) -> dict[str, list[float]]:
    """Nanoseconds for one call, by candidate and round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            spent = dict.fromkeys(names, 0)
            for _ in range(turns):
                order.shuffle(names)
                for name in names:
                    call = candidates[name]
                    getattr(call, "resume", _nothing)()
                    if settle:
                        call()
                    spent[name] += _block(call, inner, clock, wait)
                    getattr(call, "pause", _nothing)()
            for name, nanoseconds in spent.items():
                times[name].append(nanoseconds / (inner * turns))
            if collecting:
                gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return times


def _nothing() -> None:
    """What a candidate without a sense of time does when its turn begins or ends."""


def _block(call: Callable[[], object], inner: int, clock: Callable[[], int], wait: Callable[[], None]) -> int:
    wait()
    start = clock()
    for _ in range(inner):
        call()
    wait()
    return clock() - start


def _ratio(mine: Sequence[float], theirs: Sequence[float], inner: int, seed: int) -> Ratio:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    median, low, high = median_interval(ratios, seed=seed)
    to_seconds = 1e-9
    return Ratio(
        median,
        low,
        high,
        len(ratios),
        inner,
        float(np.median(mine)) * to_seconds,
        float(np.median(theirs)) * to_seconds,
    )


def _pool(ratios: Sequence[Ratio]) -> Ratio:
    if len(ratios) == 1:
        return ratios[0]
    mean, low, high = mean_interval([ratio.median for ratio in ratios])
    return Ratio(
        mean,
        low,
        high,
        sum(ratio.rounds for ratio in ratios),
        ratios[0].inner,
        statistics.median(ratio.seconds for ratio in ratios),
        statistics.median(ratio.baseline_seconds for ratio in ratios),
    )


def _waiter() -> Callable[[], None]:
    """What waits for the GPU, or does nothing where none is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        synchronize: Callable[[], None] = torch.cuda.synchronize
        return synchronize
    return lambda: None
