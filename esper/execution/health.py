"""The health of a layer's seeds: what the statistics of a window say about them.

The formulas are in docs/monitoring.md; ``esper.ops.stats.seed_health`` evaluates them on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from esper.contracts.operational import HealthSignal
from esper.ops.stats import HealthField, seed_health

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DEAD_EPS", "ClosedWindow", "LayerHealth", "LayoutFields", "health_signals", "layer_health"]

#: A feature whose largest magnitude in the window is no larger than this is dead.
DEAD_EPS = 1e-6

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class LayoutFields(Protocol):
    """What :func:`health_signals` reads of a layer's state layout: one value a seed in each tensor."""

    @property
    def lifecycle_states(self) -> Tensor:
        """uint8."""

    @property
    def alpha_blend(self) -> Tensor:
        """float32."""

    @property
    def error_count(self) -> Tensor:
        """int32."""

    @property
    def exec_latency_us(self) -> Tensor:
        """int32, microseconds."""


@dataclass(frozen=True, slots=True)
class ClosedWindow:
    """What was derived from a full window of one layer.

    Attributes:
        samples: Probes in it.
        table: float64 ``[7, seeds]`` as ``seed_health`` gives it, never written again; on the layer's device.
    """

    samples: int
    table: Tensor


@dataclass(frozen=True, slots=True)
class LayerHealth:
    """One window of one layer; every array has one element a seed.

    Attributes:
        layer_name: Dotted name of the layer.
        window_samples: Probes in the window; 0 before the first.
        samples: int64, finite values seen.
        activation_mean: float64, over rows and features of the chunk.
        activation_variance: float64, population variance over the same.
        dead_neuron_ratio: float64, share of features with max ``|y|`` <= eps.
        avg_correlation: float64, in [-1/(width-1), 1]; 0 where undefined.
        nonfinite_count: int64.
        health_score: float64 in [0, 1]; NaN where nothing was seen.
    """

    layer_name: str
    window_samples: int
    samples: IntArray
    activation_mean: FloatArray
    activation_variance: FloatArray
    dead_neuron_ratio: FloatArray
    avg_correlation: FloatArray
    nonfinite_count: IntArray
    health_score: FloatArray

    @classmethod
    def from_table(cls, layer_name: str, window_samples: int, table: FloatArray) -> LayerHealth:
        """From what ``seed_health`` returned, ``[7, seeds]``."""
        return cls(
            layer_name=layer_name,
            window_samples=window_samples,
            samples=table[HealthField.SAMPLES].astype(np.int64),
            activation_mean=table[HealthField.MEAN],
            activation_variance=table[HealthField.VARIANCE],
            dead_neuron_ratio=table[HealthField.DEAD_RATIO],
            avg_correlation=table[HealthField.CORRELATION],
            nonfinite_count=table[HealthField.NON_FINITE].astype(np.int64),
            health_score=table[HealthField.SCORE],
        )

    @classmethod
    def nothing(cls, layer_name: str, seeds: int) -> LayerHealth:
        """Before the first probe: zeros, and NaN for the score."""
        table = np.zeros((len(HealthField), seeds))
        table[HealthField.SCORE] = np.nan
        return cls.from_table(layer_name, 0, table)


def layer_health(
    layer_name: str, window_samples: int, features: Tensor, chunks: Tensor, eps: float = DEAD_EPS
) -> LayerHealth:
    """Read a window's health; waits for the device the statistics are on.

    Args:
        layer_name: Dotted name of the layer.
        window_samples: Probes in the window.
        features: float64 ``[5, C]``, see :mod:`esper.ops.stats.schema`.
        chunks: float64 ``[4, S]``.
        eps: Largest magnitude of a dead feature.
    """
    table: FloatArray = seed_health(features, chunks, eps).cpu().numpy()
    return LayerHealth.from_table(layer_name, window_samples, table)


def health_signals(health: LayerHealth, layout: LayoutFields, epoch: int) -> list[HealthSignal]:
    """One message a seed; reads the layout's tensors, so it waits for their device.

    A variance or mean beyond float64's range would be no JSON number: both are clamped to the largest finite ones.
    """
    states, alphas = layout.lifecycle_states.tolist(), layout.alpha_blend.tolist()
    errors, latencies = layout.error_count.tolist(), layout.exec_latency_us.tolist()
    limit = float(np.finfo(np.float64).max)
    mean = np.clip(np.nan_to_num(health.activation_mean), -limit, limit).tolist()
    variance = np.clip(np.nan_to_num(health.activation_variance), 0.0, limit).tolist()
    scores: Sequence[Any] = health.health_score.tolist()
    return [
        HealthSignal(
            layer_name=health.layer_name,
            seed_idx=seed,
            lifecycle_state=states[seed],
            alpha=alphas[seed],
            activation_mean=mean[seed],
            activation_variance=variance[seed],
            dead_neuron_ratio=float(health.dead_neuron_ratio[seed]),
            avg_correlation=float(health.avg_correlation[seed]),
            nonfinite_count=int(health.nonfinite_count[seed]),
            health_score=scores[seed] if scores[seed] == scores[seed] else None,
            error_count=errors[seed],
            exec_latency_us=latencies[seed],
            epoch=epoch,
            window_samples=health.window_samples,
        )
        for seed in range(len(scores))
    ]
