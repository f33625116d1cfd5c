"""Stop asking a registry that does not answer, and ask again once in a while."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Opens after ``threshold`` failures in a row; after ``cooldown_s`` seconds it lets one trial through at a time.

    Used from one event loop at a time; its properties may be read from any thread.

    Args:
        threshold: Failures in a row that open it, at least 1.
        cooldown_s: Seconds before the first trial.
        clock: Monotonic seconds.
    """

    def __init__(self, threshold: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._failures = 0
        self._retry_at = 0.0

    @property
    def open(self) -> bool:
        """Whether requests are being refused, trials aside."""
        return self._failures >= self._threshold

    def allow(self) -> bool:
        """Whether to ask now. While open, each trial that is let through postpones the next by the cooldown."""
        if not self.open:
            return True
        now = self._clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._cooldown_s
        return True

    @property
    def wait_s(self) -> float:
        """Seconds until the next trial; 0 when closed."""
        return max(0.0, self._retry_at - self._clock()) if self.open else 0.0

    def success(self) -> None:
        """The registry answered, whatever it said."""
        self._failures = 0

    def failure(self) -> None:
        """The registry did not answer."""
        self._failures += 1
        if self.open:
            self._retry_at = self._clock() + self._cooldown_s
