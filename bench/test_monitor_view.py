"""What watching costs the watcher: 10^4 seeds at a hundred windows a second must not choke it.

Two shapes: one layer of 10^4 seeds, and a hundred layers of a hundred. A window is read from its message as it comes
from the bus (JSON, arrays, checks), applied to the state; the picture is drawn at 80x24 after all layers have changed.
Reported beside the processor time: the share of one core that a hundred windows and eight pictures a second take.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

from esper.contracts.messages import OonaMessage
from esper.watch.decode import decode
from esper.watch.state import JobState
from esper.watch.ui import Ui
from esper.watch.view import Heading, draw
from tests.watch.scenes import T0, window_message

WINDOWS_A_SECOND = 100
PICTURES_A_SECOND = 8
SEEDS = 10_000


def wires(layers: int, windows: int) -> list[bytes]:
    """Messages of ``windows`` windows, going round ``layers`` layers."""
    rng = np.random.default_rng(0)
    per_layer = SEEDS // layers
    return [
        window_message(
            f"blocks.{number % layers}.mlp",
            number // layers,
            T0 + number / WINDOWS_A_SECOND,
            lifecycle_state=rng.integers(0, 8, per_layer),
            alpha=rng.random(per_layer),
            health_score=rng.random(per_layer),
            dead_neuron_ratio=rng.random(per_layer),
            avg_correlation=rng.random(per_layer),
        ).to_bytes()
        for number in range(windows)
    ]


@pytest.mark.parametrize("layers", [1, 100])
def test_ten_thousand_seeds(benchmark: Any, layers: int) -> None:
    messages = wires(layers, 200)
    heading = Heading("redis://localhost", "live", T0)

    def watch() -> tuple[float, float]:
        state, spent = JobState(), 0.0
        for number, wire in enumerate(messages):
            begin = time.thread_time()
            state.apply(decode(OonaMessage.from_bytes(wire)), T0 + number / WINDOWS_A_SECOND)
            spent += time.thread_time() - begin
        begin = time.thread_time()
        draw(state, Ui(), heading, 80, 24)
        return spent / len(messages), time.thread_time() - begin

    watch()
    found: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: found.append(watch()), rounds=10)
    window_s, picture_s = (float(np.median(column)) for column in zip(*found, strict=True))
    share = window_s * WINDOWS_A_SECOND + picture_s * PICTURES_A_SECOND
    benchmark.extra_info.update({"window_us": window_s * 1e6, "picture_ms": picture_s * 1e3, "share_of_a_core": share})
    print(
        f"\n{layers:4} layers x {SEEDS // layers:5} seeds: window {window_s * 1e6:7.0f} us, picture "
        f"{picture_s * 1e3:6.2f} ms, together {100 * share:.1f} % of a core",
        end="",
    )
