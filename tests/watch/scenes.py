"""Facts and messages for tests: small jobs whose every number is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper.contracts.messages import OonaMessage
from esper.contracts.telemetry import COLUMNS, EventKind, HealthWindow, RunEvent
from esper.watch.facts import LayerWindow

__all__ = ["T0", "event_message", "window", "window_message"]

#: Where the tests' clocks begin, seconds since 1970.
T0 = 1_700_000_000.0


def window(layer: str = "fc", states: Any = (0, 0), at: float = T0, **more: Any) -> LayerWindow:
    """One window; columns may be given by name."""
    columns = {name: np.asarray(more.pop(name), np.float32) for name in COLUMNS if name in more}
    more.setdefault("run", "job")
    return LayerWindow(layer=layer, states=np.asarray(states, np.uint8), columns=columns, at=at, **more)


def window_message(layer: str = "fc", sequence: int = 0, at: float = T0, **more: Any) -> OonaMessage:
    """A real message with a window of health; columns may be given by name, and are 0 unless."""
    seeds = len(more.get("lifecycle_state", (0, 0)))
    columns = {name: np.asarray(more.pop(name, np.zeros(seeds)), dtype) for name, dtype in COLUMNS.items()}
    values: dict[str, Any] = {
        "run_id": "job",
        "rank": 0,
        "world_size": 1,
        "step": 16 * (sequence + 1),
        "epoch": 0,
        "dropped_windows": 0,
        "num_seeds": seeds,
        "seed_offset": 0,
        "window_samples": 16,
        **more,
    }
    window = HealthWindow(layer_name=layer, sequence=sequence, captured_at=at, columns=columns, **values)
    return window.to_message("trainer", "job")


def event_message(kind: EventKind, sequence: int = 0, at: float = T0, **more: Any) -> OonaMessage:
    """A real message with an event."""
    values: dict[str, Any] = {"run_id": "job", "rank": 0, "world_size": 1, "step": 100, "epoch": 1, **more}
    event = RunEvent(kind=kind, sequence=sequence, occurred_at=at, **values)
    return OonaMessage("trainer", "job", event.topic, event.to_payload())
