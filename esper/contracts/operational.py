"""What a running network reports about itself, as data: typed, versioned, checked on the way in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

__all__ = ["HEALTH_SIGNAL_VERSION", "SETTLED_STATES", "HealthSignal"]

HEALTH_SIGNAL_VERSION: Final = 1

#: Lifecycle states by number, as ``SeedLifecycleState`` has them.
_LIFECYCLE_STATES = range(8)
#: Those that a command may end: asleep, or awake and settled. Of the others, loading and grafting are under way, a
#: fossilized seed is done, and a culled one waits for its time.
SETTLED_STATES: Final = frozenset((0, 2, 3, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSignal:
    """The health of one seed over one window of samples.

    Attributes:
        layer_name: Dotted name of the layer in the host.
        seed_idx: Which of the layer's seeds.
        lifecycle_state: Number of the ``SeedLifecycleState``.
        alpha: Blend factor, in [0, 1].
        activation_mean: Mean over rows and features of the seed's chunk.
        activation_variance: Population variance over the same.
        dead_neuron_ratio: Share of the chunk's features that stayed at 0, in [0, 1].
        avg_correlation: Average correlation of the chunk's features, in [-1, 1].
        nonfinite_count: NaN and infinite values seen.
        health_score: In [0, 1]; None when the window held no value of this seed.
        error_count: Consecutive faults.
        exec_latency_us: Last measured execution, microseconds; 0 when none ran.
        epoch: Step or epoch of the report, as the sender counts.
        window_samples: Probes in the window.
        version: Of this record's format.

    Raises:
        ValueError: a value out of its range; the message names the field and the value.
        TypeError: a value of the wrong type.
    """

    layer_name: str
    seed_idx: int
    lifecycle_state: int
    alpha: float
    activation_mean: float
    activation_variance: float
    dead_neuron_ratio: float
    avg_correlation: float
    nonfinite_count: int
    health_score: float | None
    error_count: int
    exec_latency_us: int
    epoch: int
    window_samples: int
    version: int = HEALTH_SIGNAL_VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != HEALTH_SIGNAL_VERSION:
            raise ValueError(
                f"HealthSignal version {self.version!r} is unknown; this Esper reads version {HEALTH_SIGNAL_VERSION}"
            )
        if not isinstance(self.layer_name, str) or not self.layer_name:
            raise TypeError(f"HealthSignal.layer_name is {self.layer_name!r}; need a non-empty string")
        for name in ("seed_idx", "nonfinite_count", "error_count", "exec_latency_us", "window_samples"):
            self._integer(name, low=0)
        self._integer("epoch", low=None)
        self._integer("lifecycle_state", low=0)
        if self.lifecycle_state not in _LIFECYCLE_STATES:
            raise ValueError(f"HealthSignal.lifecycle_state is {self.lifecycle_state}; known states are 0 to 7")
        self._number("alpha", 0.0, 1.0)
        self._number("activation_mean", -math.inf, math.inf)
        self._number("activation_variance", 0.0, math.inf)
        self._number("dead_neuron_ratio", 0.0, 1.0)
        self._number("avg_correlation", -1.0, 1.0)
        if self.health_score is not None:
            self._number("health_score", 0.0, 1.0)

    def _integer(self, name: str, low: int | None) -> None:
        value = getattr(self, name)
        if type(value) is not int:
            raise TypeError(f"HealthSignal.{name} is {value!r} ({type(value).__name__}); need an int")
        if low is not None and value < low:
            raise ValueError(f"HealthSignal.{name} is {value}; need {low} or more")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"HealthSignal.{name} is {value!r} ({type(value).__name__}); need a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"HealthSignal.{name} is {value}; need a finite number in [{low}, {high}]")

    @property
    def ready(self) -> bool:
        """Whether a decision may rest on it: the window saw the seed, and no change of it is under way or past."""
        return self.lifecycle_state in SETTLED_STATES and self.health_score is not None and self.window_samples > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown version, missing or unknown fields (named), or a value out of range.
            TypeError: a value of the wrong type, or no mapping.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a HealthSignal is read from a mapping, not from {type(data).__name__}")
        version = data.get("version")
        if type(version) is not int or version != HEALTH_SIGNAL_VERSION:
            raise ValueError(
                f"HealthSignal version {version!r} is unknown; this Esper reads version {HEALTH_SIGNAL_VERSION}"
            )
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - data.keys()):
            raise ValueError(f"HealthSignal lacks {', '.join(missing)}")
        if unknown := sorted(str(key) for key in data.keys() - names):
            raise ValueError(f"HealthSignal has unknown fields: {', '.join(unknown)}")
        return cls(**data)
