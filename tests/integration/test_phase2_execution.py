"""The seed document's own targets for the execution layer."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import nn

import esper
from esper.ops import native


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
