"""How many steps lie between two probes, so that watching stays within its share of the host's time."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

__all__ = ["NEVER", "GraphPacer", "ProbePacer"]

#: A step that does not come.
NEVER = 1 << 62

#: Of what the budget leaves after the fixed cost, this much is spent. The rest is for what cannot be measured from
#: inside: above all that counting, which takes 0.1 us in a loop, takes 1 to 2 us after a forward that has emptied the
#: caches (on a slow server CPU 0.3 % of a forward of 570 us); then caches that a probe disturbs, and a noisy clock.
HEADROOM = 0.2
#: Steps without a probe at the start, to learn what a step takes.
_WARM_UP_STEPS = 16
#: Assumed cost of a probe before one was measured.
_FIRST_PROBE_NS = 50_000.0
#: Cost of a probe that the clock around it does not see. Most of it is that the forwards after it find caches and
#: branch history disturbed: with 20 to 100 steps between probes, runs with and without them differed by about 90 us a
#: probe more than the clock had counted (measured on a server CPU, networks of 80 and 360 us a forward). On a machine
#: three times as slow it was some 250 us, twice what the clock had counted: so the larger of the two is charged.
_UNSEEN_NS = 100_000.0
_UNSEEN_TIMES = 2.0
#: The controller looks again after so many steps at most, however long the period.
_LONGEST_PERIOD = 1 << 16
#: Inside a compiled graph the monitor looks this often whether it may sample. A look disturbs as a probe does: this is
#: 0.05 % of the time. The first look, which tells how long a step takes, comes after so many steps.
_LOOK_EVERY_NS = 300e6
_FIRST_LOOK = 16
#: The time of a step is the least mean over so many intervals: a pause of the user's is not the host's speed.
_INTERVALS = 8
#: The next probe will cost the median of so many.
_COSTS = 5
#: A probe that took at least so long, and so many times what one costs, was not watching: something was compiled or
#: loaded in it, and the next will be an ordinary one. What took less is earned before the next probe, as any other:
#: at a budget of 0.5 % that is two and a half minutes for 50 ms.
_OUTLIER_NS = 50e6
_OUTLIER_TIMES = 50.0
#: An outlier is owed, and this much of what the host's time earns pays it off; the probes have the rest.
_REPAYMENT = 0.5
#: With so much owed, the next outlier is charged as an ordinary probe: debts that only grow would be no budget.
_MOST_OWED_NS = 10e9


class ProbePacer:
    """Decides when to probe; knows nothing of layers or tensors, and reads no clock.

    Two rules, both of which must allow a probe. The sum: everything spent so far, and the probe, stay within the share
    of all the host's time so far. The rate: at the present speed of the host and cost of a probe, probes this far
    apart stay within it; so a long pause saves up no burst.

    What one outlier took, a compilation for instance, is not held against the next probe, which would come an hour
    later, but owed. While something is owed, half of what is earned pays it off, and probes come half as often. So all
    that was spent exceeds the share by no more than ``owed_ns``, which is bounded.

    Args:
        budget: Share of the host's own time, in [0, 1].
        fixed_ns_per_step: Spent on every step whether or not something is due.

    Raises:
        ValueError: if one is out of range.
    """

    def __init__(self, budget: float, fixed_ns_per_step: float = 0.0) -> None:
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"budget is {budget}; it is a share of the host's time, between 0 and 1")
        if not 0.0 <= fixed_ns_per_step < math.inf:
            raise ValueError(f"fixed_ns_per_step is {fixed_ns_per_step}; need a time in nanoseconds, 0 or more")
        self.budget = budget
        self.fixed_ns_per_step = fixed_ns_per_step
        self.due = 0
        self.period = 0
        self.host_ns = 0.0
        self.probes_ns = 0.0
        self.steps = 0
        self.warm_up_ns = 0.0
        self.owed_ns = 0.0
        self._cost = _FIRST_PROBE_NS
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._overhead = 0.0
        self._step_times: deque[float] = deque(maxlen=_INTERVALS)
        self._observed = 0.0
        self._mark_step: int | None = None
        self._mark_ns = 0
        self._entered_ns = 0

    @property
    def enabled(self) -> bool:
        """Whether there is anything to spend."""
        return self.budget > 0.0

    @property
    def spent_ns(self) -> float:
        """Probes, with what is owed for some of them, and the fixed cost of the steps so far."""
        return self.probes_ns + self.owed_ns + self.fixed_ns_per_step * self.steps

    @property
    def share(self) -> float:
        """Spent over the host's own time, 0 before the first measurement."""
        return self.spent_ns / self.host_ns if self.host_ns > 0 else 0.0

    def probed(self, observed_ns: float, *, warm_up: bool = False) -> None:
        """The last probe fired.

        Args:
            observed_ns: What it took, arming not included.
            warm_up: It was its layer's first, or the first that closed a window: memory was allocated, on a GPU a
                kernel loaded or even compiled. That is the cost of starting, like an allocator's or an autotuner's, and
                is kept apart in ``warm_up_ns``.
        """
        self._observed = observed_ns
        if warm_up:
            self.warm_up_ns += observed_ns
            return
        if observed_ns >= max(_OUTLIER_NS, _OUTLIER_TIMES * self._cost) and self.owed_ns < _MOST_OWED_NS:
            # Caches cannot be emptied more than once, so that the unseen part does not grow with it.
            self.owed_ns += observed_ns + _UNSEEN_NS
            return
        charged = observed_ns + max(_UNSEEN_NS, _UNSEEN_TIMES * observed_ns)
        self._costs.append(charged + self._overhead)
        # The median: one probe that was interrupted says nothing about the next. The sum remembers it all the same.
        self._cost = statistics.median(self._costs)
        self.probes_ns += charged

    def excuse(self, observed_ns: float) -> None:
        """Probes that somebody asked for took this long: not the host's time, and not charged."""
        self._observed = observed_ns

    def ready(self, n: int, now_ns: int) -> bool:
        """Whether to probe at step ``n``; sets ``due`` and ``period`` either way."""
        self._entered_ns = now_ns
        if self._mark_step is None:
            self.due = n + _WARM_UP_STEPS
            return False
        steps = n - self._mark_step
        interval = max(0.0, now_ns - self._mark_ns - self._observed - self.fixed_ns_per_step * steps)
        self._observed = 0.0
        if steps <= 0:
            self.due = n + 1
            return False
        self.steps += steps
        self.host_ns += interval
        self._step_times.append(interval / steps)
        self._pay_off(HEADROOM * (self.budget * interval - self.fixed_ns_per_step * steps))
        rate = HEADROOM * (self.budget * min(self._step_times) - self.fixed_ns_per_step)
        if self.owed_ns > 0.0:
            rate *= 1.0 - _REPAYMENT
        if rate <= 0.0:
            # Knowing what is due costs more than the budget already: look again much later.
            self.period = _LONGEST_PERIOD
            self.due = n + self.period
            return False
        self.period = min(_LONGEST_PERIOD, math.ceil(self._cost / rate) + 1)
        fixed = self.fixed_ns_per_step * self.steps
        lacking = self.probes_ns + self._cost - HEADROOM * (self.budget * self.host_ns - fixed)
        if lacking > 0.0:
            # This look costs as well, so the next one has it to earn too.
            wait = math.ceil((lacking + self._overhead) / rate) + 1
            self.due = n + min(_LONGEST_PERIOD, wait)
            return False
        self.due = n + self.period
        return True

    def _pay_off(self, earned_ns: float) -> None:
        """Turn a part of what is owed into what is spent, for which ``earned_ns`` are there."""
        paid = min(self.owed_ns, _REPAYMENT * max(0.0, earned_ns))
        self.owed_ns -= paid
        self.probes_ns += paid

    def finish(self, n: int, now_ns: int) -> None:
        """The slow path ends: what it took is spent, and the host's time runs again."""
        took = float(now_ns - self._entered_ns)
        if self._mark_step is not None:
            self.probes_ns += took
        self._overhead = took if took > self._overhead else self._overhead + (took - self._overhead) / 4
        self._mark_step, self._mark_ns = n, now_ns

    def restart(self, due: int) -> None:
        """Forget when the last look was, and look again at step ``due``: the host runs where it cannot be watched."""
        self._mark_step = None
        self._observed = 0.0
        self.due = due

    def __getstate__(self) -> dict[str, object]:
        """Times since the last look belong to this process."""
        state = self.__dict__.copy()
        state["_mark_step"] = None
        state["_observed"] = 0.0
        return state


class GraphPacer:
    """Decides when to sample a model that runs inside a compiled graph.

    Such a sample runs a second graph, in which all layers are observed. Its first use compiles it, which costs about
    what compiling the first graph did; the budget has to have earned that before. What a sample took is found from
    the time of its step.

    Args:
        budget: Share of the host's own time, in [0, 1].
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.host_ns = 0.0
        self.spent_ns = 0.0
        self._cost: float | None = None
        self._compiled_ns = 0
        self._mark: tuple[int, int] | None = None
        self._sampling = False
        self._step_ns = math.inf
        #: Steps between two looks.
        self.period = _FIRST_LOOK

    def look(self, n: int, now_ns: int) -> bool:
        """Whether to sample the next step; to be asked again after it if so, else after :attr:`period` steps.

        Args:
            n: The training step.
            now_ns: Present time, nanoseconds.
        """
        mark, self._mark = self._mark, (n, now_ns)
        if mark is None or n <= mark[0]:
            self._sampling = False
            return False
        elapsed, steps = now_ns - mark[1], n - mark[0]
        if self._sampling:
            self._sampling = False
            self._settle(max(0.0, elapsed - self._step_ns))
            return False
        self._step_ns = min(self._step_ns, elapsed / steps)
        self.period = max(_FIRST_LOOK, min(_LONGEST_PERIOD, math.ceil(_LOOK_EVERY_NS / max(1.0, self._step_ns))))
        self.host_ns += elapsed
        if self._cost is None:
            self._compiled_ns = _nanoseconds_compiling()
            # Without a compilation there is no compiled graph, but one captured by other means: it cannot be changed.
            expected = self._compiled_ns or math.inf
        else:
            expected = self._cost
        self._sampling = self.spent_ns + expected <= HEADROOM * self.budget * self.host_ns
        return self._sampling

    def restart(self) -> None:
        """The host was seen outside a graph: times between two looks mean nothing."""
        self._mark = None

    def _settle(self, extra_ns: float) -> None:
        self.spent_ns += extra_ns
        if self._cost is None and _nanoseconds_compiling() == self._compiled_ns:
            self.budget = 0.0  # nothing was compiled for it: the graph that runs does not see the probes
        # The first sample's cost was the compilation; the next one is guessed at one step and measured.
        self._cost = self._step_ns if self._cost is None else extra_ns

    def __getstate__(self) -> dict[str, object]:
        """Times since the last look belong to this process."""
        return self.__dict__ | {"_mark": None, "_sampling": False}


def _nanoseconds_compiling() -> int:
    """Time that torch.compile has spent in this process, nanoseconds; 0 if it was never used or does not say."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    spent = getattr(dynamo, "cumulative_time_spent_ns", {})
    return int(spent.get("entire_frame_compile", 0))
