"""The plain rule that grows a network: when to wake a seed, which one, and whether to keep it.

- When: the validation loss has levelled off.
- Which: the dormant seed with the worst health, among the layers in which the fewest seeds have failed; so a failure
  sends the search elsewhere first. Seeds not sampled yet come last; ties go to the one tried least, then to the first
  by layer and index. What has been tried in a place is not tried there again.
- Keep: if the validation loss after the trial is below the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Candidate", "LevelOff", "Proposal", "WorstHealthFirst"]


@dataclass(frozen=True)
class Candidate:
    """A dormant seed; ``health`` in [0, 1], NaN if it has not been sampled."""

    layer: str
    seed_idx: int
    health: float


@dataclass(frozen=True)
class Proposal:
    """Wake this seed with this blueprint."""

    candidate: Candidate
    blueprint: str


@dataclass
class LevelOff:
    """Tells when a loss has stopped falling.

    It compares the mean of the last ``window`` values with that of the ``window`` values before them; a relative gain
    below ``min_gain`` counts as level.
    """

    window: int = 5
    min_gain: float = 0.03
    _values: list[float] = field(default_factory=list, repr=False)

    def add(self, loss: float) -> bool:
        """Take the next value; True if the series is level now. A loss that is not finite never is."""
        self._values.append(loss)
        if len(self._values) < 2 * self.window:
            return False
        before = sum(self._values[-2 * self.window : -self.window]) / self.window
        now = sum(self._values[-self.window :]) / self.window
        return math.isfinite(now) and math.isfinite(before) and now > before * (1.0 - self.min_gain)

    def restart(self) -> None:
        """Forget everything, because the network has changed."""
        self._values.clear()


@dataclass
class WorstHealthFirst:
    """The rule itself; see the module.

    Attributes:
        blueprints: What may be tried in a place, in this order.
        min_gain: Relative gain in validation loss from which a seed is kept.
    """

    blueprints: Sequence[str]
    min_gain: float = 0.01
    _tried: dict[tuple[str, int], int] = field(default_factory=dict, repr=False)
    _failures: dict[str, int] = field(default_factory=dict, repr=False)

    def choose(self, candidates: Iterable[Candidate]) -> Proposal | None:
        """The next seed to wake and with what, or None when everything has been tried. The choice counts as tried."""
        open_places = [c for c in candidates if self._attempts(c) < len(self.blueprints)]
        if not open_places:
            return None
        chosen = min(
            open_places,
            key=lambda c: (self._failures.get(c.layer, 0), _health_rank(c), self._attempts(c), c.layer, c.seed_idx),
        )
        attempt = self._attempts(chosen)
        self._tried[chosen.layer, chosen.seed_idx] = attempt + 1
        return Proposal(chosen, self.blueprints[attempt])

    def failed(self, candidate: Candidate) -> None:
        """Learn that a seed did not earn its place, or could not be woken."""
        self._failures[candidate.layer] = self._failures.get(candidate.layer, 0) + 1

    def keep(self, loss_before: float, loss_after: float) -> bool:
        """Whether a seed has earned its place. A loss that is not finite has not."""
        return loss_after < loss_before * (1.0 - self.min_gain)

    def _attempts(self, candidate: Candidate) -> int:
        return self._tried.get((candidate.layer, candidate.seed_idx), 0)


def _health_rank(candidate: Candidate) -> tuple[bool, float]:
    unknown = math.isnan(candidate.health)
    return (unknown, 0.0 if unknown else candidate.health)
