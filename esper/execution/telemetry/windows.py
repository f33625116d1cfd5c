"""How many steps lie between two windows."""

from __future__ import annotations

import math
from typing import Final

__all__ = ["WindowPacer"]

#: Steps to the second window, from which on the speed of the host is known.
_FIRST_STEPS: Final = 16
#: The pacer looks again after so many steps at most, and no window is so much further away than the one before.
_LONGEST: Final = 1 << 16
_GROWTH: Final = 16
#: On a busy machine a step takes longer than the training works, and the sender may only have its share of the work. A
#: training that mostly waits is seen all the same: so much of the time counts as its work at least.
_LEAST_WORK: Final = 0.25


class WindowPacer:
    """Decides at which step the next window is taken; reads no clock.

    Args:
        every_steps: A fixed distance, or None.
        interval_s: Least seconds between two windows, where the distance is not fixed.
        sender_share: Share of the training thread's processor time that the sender may take, where it is not fixed.
    """

    def __init__(self, every_steps: int | None, interval_s: float, sender_share: float) -> None:
        self._every = every_steps
        self._interval_s = interval_s
        self._share = sender_share
        self._mark: tuple[int, int, int] | None = None
        #: Steps from the last window to the next.
        self.period = every_steps or _FIRST_STEPS

    def next_due(self, n: int, now_ns: int, worked_ns: int, window_cpu_s: float) -> int:
        """The step of the next window.

        Args:
            n: The step at which one was taken.
            now_ns: Present time, nanoseconds, monotonic.
            worked_ns: Processor time of the training thread, nanoseconds.
            window_cpu_s: Processor seconds that the sender needs for one.
        """
        if self._every is not None:
            return n + self._every
        mark, self._mark = self._mark, (n, now_ns, worked_ns)
        if mark is not None and n > mark[0]:
            step_s = max(1e-9, (now_ns - mark[1]) * 1e-9 / (n - mark[0]))
            work_s = max(_LEAST_WORK * step_s, (worked_ns - mark[2]) * 1e-9 / (n - mark[0]))
            wanted = math.ceil(max(self._interval_s / step_s, window_cpu_s / self._share / work_s))
            # A pause of the user's makes steps look long, or the first windows too cheap: neither decides for long.
            self.period = max(1, min(_LONGEST, wanted, self.period * _GROWTH))
        return n + self.period
