"""The seed document's own targets for the execution layer."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.messages import TopicNames
from esper.contracts.telemetry import HealthWindow, read_payload
from esper.execution.telemetry.options import TelemetryOptions
from esper.oona import OonaClient
from esper.ops import native
from tests.servers import redis_server


def python_calls(run: Any) -> Counter[str]:
    """Python functions entered while ``run`` runs, by file and name."""
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


class TestPhase2ExecutionPipeline:
    def test_performance_overhead_measurement(self) -> None:
        """Dormant means: nothing of Esper on the path of a layer, and no Python of Esper's on that of the model.

        The ratio itself is measured by bench/test_dormant_overhead.py; here the mechanism is checked by counting
        calls, which no load of the machine changes.
        """
        host = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())))
        model = esper.wrap(host, [nn.Linear, nn.GELU])
        # Past the samples of the start: the next one is far away, because one sample costs more than a forward's share.
        x = torch.randn(8, 64)
        for _ in range(3):
            model(x)
            model.step()
        model._clock.due = 1 << 62

        bare = python_calls(lambda: host(x))
        wrapped = python_calls(lambda: model(x))
        # The clock is in C (in Python where the extension is missing: tests/core/test_clock.py), so neither a call nor
        # a step with nothing due enters a Python function of ours; nn.Module's two frames for the root are saved.
        assert native.load() is not None
        assert wrapped == bare - Counter(
            {name: 1 for name in bare if name.endswith(("Module._wrapped_call_impl", "Module._call_impl"))}
        )
        assert python_calls(model.step) == Counter()

        # Nothing recorded, launched or allocated by Esper either: the operators are the host's.
        def operators(net: Any) -> list[str]:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                net(x)
            return [event.name for event in profile.events() or [] if event.name.startswith(("aten::", "esper::"))]

        assert operators(model) == operators(host)

    def test_waking_is_seen_and_sleeping_costs_nothing_again(self) -> None:
        host = nn.Sequential(nn.Linear(8, 8))
        model = esper.wrap(host)
        assert model.wrapped_model[0].forward.__func__ is nn.Linear.forward
        model.layer("0").arm_probe(lambda y: None)
        assert model.wrapped_model[0].forward.__func__ is not nn.Linear.forward
        model(torch.randn(2, 8))
        assert model.wrapped_model[0].forward.__func__ is nn.Linear.forward

    def test_telemetry_configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Telemetry is on unless it is switched off, and with Redis there its health signals are there to be read."""

        def train(**options: Any) -> tuple[esper.MorphableModel, dict[str, Any]]:
            model = esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), **options)
            for _ in range(3):
                model(torch.randn(4, 8)).sum().backward()
                model.step()
            model.close()
            return model, model.telemetry_stats()

        model, stats = train()
        assert all(layer.telemetry_enabled for layer in model.kasmina_layers.values())
        assert (stats["enabled"], stats["produced"]) == (False, 0), "no REDIS_URL, nothing to publish to"

        with redis_server(tmp_path / "redis") as server:
            monkeypatch.setenv("REDIS_URL", server.url)
            options = TelemetryOptions(run_id="configured", every_steps=1, spool_dir=tmp_path / "spool")
            model, stats = train(telemetry=options)
            assert stats["delivered"] == stats["produced"] == 3 * 2 + 2
            with OonaClient() as client:
                streams = client.consume([TopicNames.TELEMETRY_SEED_HEALTH], "watchers", "one", count=100)
            windows = [read_payload(delivery.message) for delivery in streams]
            assert len(windows) == 6
            signals = [signal for window in windows if isinstance(window, HealthWindow) for signal in window.signals()]
            assert {(signal.layer_name, signal.seed_idx) for signal in signals} == {
                (name, seed) for name in ("0", "2") for seed in range(4)
            }
            assert {signal.lifecycle_state for signal in signals} == {0}

            model, stats = train(telemetry_enabled=False)
            assert not any(layer.telemetry_enabled for layer in model.kasmina_layers.values())
            assert stats["produced"] == 0
            with server.client() as redis:
                assert redis.xlen(TopicNames.TELEMETRY_SEED_HEALTH.value) == 6
