"""Timing an execution on a GPU, with events that only say where they were recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esper.execution.host_forwards import HostForwards


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.stream: Any = None

    def record(self, stream: Any = "of the current device") -> None:
        self.stream = stream


class OnSecondGpu(torch.Tensor):
    """Says that it is on the second GPU, while the first is the current one."""

    is_cuda = True
    device = torch.device("cuda:1")


def test_an_execution_is_timed_on_the_hosts_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    grafts = SimpleNamespace(forward=lambda x, h: h)
    layer: Any = SimpleNamespace(_grafts=grafts, _cuda_timing=None)
    h = torch.zeros(2).as_subclass(OnSecondGpu)
    assert HostForwards._timed_blend(layer, h, h) is h
    assert [event.stream for event in layer._cuda_timing] == ["of cuda:1", "of cuda:1"]
