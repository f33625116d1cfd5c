"""How often one token may write: a bucket that fills at a steady rate, from which every write takes one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from esper.services.urza.errors import ApiError

__all__ = ["WriteLimit"]


class WriteLimit:
    """Token buckets by caller; safe from several threads.

    Args:
        rate: Writes a second in the long run; 0 switches the limit off.
        burst: Writes at once after a pause.
        clock: Seconds; the monotonic clock, which nobody sets.

    Raises:
        ValueError: ``rate`` is negative, infinite or no number, or ``burst`` is less than 1. With NaN for a rate no
            bucket would ever be empty.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate is {rate}; need a finite number of writes a second, 0 or more")
        if not 1 <= burst < math.inf:
            raise ValueError(f"burst is {burst}; need at least one write")
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> None:
        """Count one write.

        Raises:
            ApiError: 429, with the whole seconds to wait in ``Retry-After``.
        """
        if self._rate <= 0:
            return
        with self._lock:
            now = self._clock()
            held, since = self._buckets.get(caller, (float(self._burst), now))
            held = min(float(self._burst), held + (now - since) * self._rate)
            if held < 1.0:
                wait = max(1, math.ceil((1.0 - held) / self._rate))
                raise ApiError(
                    429,
                    "too_many_writes",
                    f"{caller} has written too often; {self._rate:g} writes a second are allowed: wait {wait} s",
                    {"Retry-After": str(wait)},
                )
            self._buckets[caller] = (held - 1.0, now)
