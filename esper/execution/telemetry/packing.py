"""From a capture to messages, on the sender's thread: arrays of all seeds first, then one message a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.telemetry import COLUMNS, MAX_SEEDS_PER_MESSAGE, packed_columns, window_payload
from esper.execution.telemetry.capture import Capture
from esper.execution.telemetry.identity import Identity
from esper.ops.stats import HealthField

__all__ = ["EVENT_TAG", "PART_TAG", "Outgoing", "Packer", "parts_of"]

Array = NDArray[Any]

#: Tags of messages that are not the first of a layer's window; the first has the number of its layer.
EVENT_TAG: Final = -1
PART_TAG: Final = -2

#: Longest that the interpreter is held while somebody waits for it, about.
_SLICE_S: Final = 0.001

#: A message without its attachment, about.
_TEXT_BYTES: Final = 1024

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_INT32_MAX: Final = 2**31 - 1
#: Column -> row of the health table, and the range that its values are held in.
_FROM_HEALTH: Final = {
    "activation_mean": (HealthField.MEAN, -_FLOAT32_MAX, _FLOAT32_MAX),
    "activation_variance": (HealthField.VARIANCE, 0.0, _FLOAT32_MAX),
    "dead_neuron_ratio": (HealthField.DEAD_RATIO, 0.0, 1.0),
    "avg_correlation": (HealthField.CORRELATION, -1.0, 1.0),
    "nonfinite_count": (HealthField.NON_FINITE, 0, _INT32_MAX),
    "health_score": (HealthField.SCORE, 0.0, 1.0),
}
#: Column -> field of the lattice, and the range that its values are held in.
_FROM_LATTICE: Final = {
    "lifecycle_state": ("lifecycle_states", 0, 255),
    "alpha": ("alpha_blend", 0.0, 1.0),
    "error_count": ("error_count", 0, _INT32_MAX),
    "exec_latency_us": ("exec_latency_us", 0, _INT32_MAX),
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message on its way.

    Attributes:
        tag: The layer's number for the first message of its window, else :data:`EVENT_TAG` or :data:`PART_TAG`.
        message: What to send.
        captured_ns: When it was captured, by the monotonic clock.
        size: Its bytes, about.
    """

    tag: int
    message: OonaMessage
    captured_ns: int
    size: int = _TEXT_BYTES


def parts_of(seeds: int) -> int:
    """Messages that one window of a layer takes."""
    return -(-seeds // MAX_SEEDS_PER_MESSAGE)


class Packer:
    """Keeps the latest health of every layer, and makes messages of captures.

    Args:
        identity: Who sends.
        layer_names: In the order of the lattice.
        seeds_per_layer: Of each.
    """

    def __init__(self, identity: Identity, layer_names: Sequence[str], seeds_per_layer: int) -> None:
        self._identity = identity
        self._names = list(layer_names)
        self._seeds = seeds_per_layer
        rows = len(self._names) * seeds_per_layer
        self._samples = [0] * len(self._names)
        self._health = {name: np.zeros(rows, COLUMNS[name]) for name in _FROM_HEALTH}
        self._health["health_score"].fill(np.nan)

    def pack(self, capture: Capture, dropped_windows: Callable[[int], int]) -> Iterator[Outgoing]:
        """The messages of one window, layer by layer as they are asked for; waits for the capture to arrive.

        Args:
            capture: The window.
            dropped_windows: Windows given up so far, by number of the layer.
        """
        fields = capture.wait()
        self._take_health(capture)
        columns = self._columns(fields)
        common = {
            "run_id": self._identity.run_id,
            "rank": self._identity.rank,
            "world_size": self._identity.world_size,
            "sequence": capture.sequence,
            "step": capture.step,
            "epoch": capture.epoch,
            "captured_at": capture.captured_at,
            "num_seeds": self._seeds,
        }
        worked_since = time.perf_counter()
        for index, layer_name in enumerate(self._names):
            own = {
                "layer_name": layer_name,
                "dropped_windows": dropped_windows(index),
                "window_samples": self._samples[index],
            }
            for offset in range(0, self._seeds, MAX_SEEDS_PER_MESSAGE):
                begin = index * self._seeds + offset
                rows = slice(begin, begin + min(MAX_SEEDS_PER_MESSAGE, self._seeds - offset))
                # Arrays were held in their ranges whole; checking each message again would take as long as making it.
                message = self.message(
                    TopicNames.TELEMETRY_SEED_HEALTH,
                    window_payload({**common, **own, "seed_offset": offset}),
                    attachment=packed_columns({name: array[rows] for name, array in columns.items()}),
                )
                if (now := time.perf_counter()) - worked_since > _SLICE_S:
                    # Whoever trains may have the interpreter now, and not only when the switch interval of 5 ms ends.
                    time.sleep(0)
                    worked_since = now
                tag = index if offset == 0 else PART_TAG
                yield Outgoing(tag, message, capture.captured_ns, _TEXT_BYTES + len(message.attachment))

    def message(
        self, topic: TopicNames, payload: dict[str, Any], trace_id: str | None = None, attachment: bytes = b""
    ) -> OonaMessage:
        """``payload`` in an envelope of this process."""
        who = self._identity
        return OonaMessage(who.sender_id, trace_id or who.run_id, topic, payload, attachment=attachment)

    def _take_health(self, capture: Capture) -> None:
        for index, window in capture.closed.items():
            table = window.table.numpy()
            rows = slice(index * self._seeds, (index + 1) * self._seeds)
            self._samples[index] = window.samples
            for name, (row, low, high) in _FROM_HEALTH.items():
                values = table[row] if name == "health_score" else np.nan_to_num(table[row])
                # Rounding to float32 cannot leave the range: its ends are float32 numbers.
                self._health[name][rows] = np.clip(values, low, high)

    def _columns(self, fields: Mapping[str, Array]) -> dict[str, Array]:
        columns: dict[str, Array] = dict(self._health)
        for name, (source, low, high) in _FROM_LATTICE.items():
            array = fields[source]
            if name == "alpha":
                array = np.nan_to_num(array)
            columns[name] = np.clip(array, low, high) if name != "lifecycle_state" else array
        return columns
