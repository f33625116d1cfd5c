"""How many a second, from counts and times; every method is told the time, so that a replay has a clock of its own."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["Pace", "Rate"]

_SPAN_S: Final = 10


class Rate:
    """Events a second over the last ten seconds, kept in one bucket a second."""

    def __init__(self) -> None:
        self.total = 0
        self._counts = [0] * (_SPAN_S + 1)
        self._seconds = [-1] * (_SPAN_S + 1)
        self._first: float | None = None

    def add(self, number: int, now: float) -> None:
        """Count ``number`` events at ``now``, seconds of any clock."""
        self.total += number
        if self._first is None or now < self._first:
            self._first = now
        second = int(now)
        place = second % len(self._counts)
        if self._seconds[place] != second:
            self._seconds[place] = second
            self._counts[place] = 0
        self._counts[place] += number

    def per_second(self, now: float) -> float:
        """The rate at ``now``; 0 when nothing came for ten seconds."""
        if self._first is None:
            return 0.0
        oldest = int(now) - _SPAN_S
        recent = sum(n for n, s in zip(self._counts, self._seconds, strict=True) if oldest <= s <= now)
        # The oldest bucket is whole, the one of `now` is not.
        return recent / max(1.0, min(now - oldest, now - self._first))


class Pace:
    """How fast a counter that others report grows, by the reporters' clock: steps a second."""

    _APART_S: Final = 0.25

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, value: int, at: float) -> None:
        """The counter stood at ``value`` at ``at``. A counter that falls begins anew."""
        points = self._points
        if points and value < points[-1][1]:
            points.clear()
        if not points or at - points[-1][0] >= self._APART_S:
            points.append((at, value))
        # Two are kept however far apart: reports may be rare.
        while len(points) > 2 and at - points[0][0] > _SPAN_S:
            points.popleft()

    def per_second(self) -> float | None:
        """The rate over the last ten seconds of reports; None before there are two."""
        if len(self._points) < 2:
            return None
        (begin, low), (end, high) = self._points[0], self._points[-1]
        return (high - low) / (end - begin)
