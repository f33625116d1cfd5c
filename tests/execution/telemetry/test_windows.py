"""When windows are taken: a fixed distance, or as time and the sender's cost allow."""

from __future__ import annotations

import itertools
import math

import pytest

from esper.execution.telemetry.options import TelemetryOptions
from esper.execution.telemetry.windows import WindowPacer


def run(pacer: WindowPacer, step_s: float, steps: int, cpu_s: float = 0.0, work: float = 1.0) -> list[int]:
    """The steps at which windows were taken, in a loop whose steps take so long, and work for a share of it."""
    due, taken = 1, []
    for n in range(1, steps + 1):
        if n >= due:
            taken.append(n)
            due = pacer.next_due(n, int(n * step_s * 1e9), int(n * step_s * work * 1e9), cpu_s)
    return taken


def test_a_fixed_distance() -> None:
    assert run(WindowPacer(5, 0.5, 0.005), 1e-3, 22) == [1, 6, 11, 16, 21]


@pytest.mark.parametrize("step_s", [1e-4, 1e-2, 0.3, 2.0])
def test_windows_are_an_interval_apart_whatever_a_step_takes(step_s: float) -> None:
    taken = run(WindowPacer(None, 0.5, 0.005), step_s, 60_000 if step_s < 1e-2 else 3000)
    apart = math.ceil(0.5 / step_s * (1 - 1e-9))
    later = taken[-3:]
    assert [b - a for a, b in itertools.pairwise(later)] == [apart, apart]


def test_the_senders_cost_moves_them_apart() -> None:
    # 20 ms of processor at 0.5 % is one window in 4 s: 400 steps of 10 ms.
    taken = run(WindowPacer(None, 0.5, 0.005), 1e-2, 4000, cpu_s=0.02)
    assert taken[-1] - taken[-2] == 400


@pytest.mark.parametrize(("work", "apart"), [(0.5, 800), (0.25, 1600), (0.01, 1600)])
def test_the_sender_has_a_share_of_the_work_and_not_of_the_time(work: float, apart: int) -> None:
    taken = run(WindowPacer(None, 0.5, 0.005), 1e-2, 9000, cpu_s=0.02, work=work)
    assert taken[-1] - taken[-2] == apart


def test_a_long_pause_does_not_decide_for_long() -> None:
    pacer = WindowPacer(None, 0.5, 0.005)
    assert pacer.next_due(1, 0, 0, 0.0) == 17
    # An hour went by in sixteen steps, then a millisecond a step again.
    hour = int(3600e9)
    assert pacer.next_due(17, hour, 0, 0.0) == 18
    assert pacer.next_due(18, hour + 1_000_000, 0, 0.0) == 18 + 16
    assert pacer.next_due(34, hour + 17_000_000, 0, 0.0) == 34 + 256
    assert pacer.next_due(290, hour + 273_000_000, 0, 0.0) == 290 + 500


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"run_id": "a b"}, "run_id"),
        ({"every_steps": 0}, "every_steps is 0"),
        ({"every_steps": 1.5}, "every_steps is 1.5"),
        ({"interval_s": 0.0}, "interval_s is 0.0"),
        ({"sender_share": math.nan}, "sender_share is nan"),
        ({"spool_mb": 1.0}, "spool_mb is 1"),
        ({"spool_mb": -1.0}, "spool_mb is -1"),
        ({"queue_mb": 0.0}, "queue_mb"),
        ({"command_age_s": math.inf}, "command_age_s"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TelemetryOptions(**options)  # type: ignore[arg-type]
