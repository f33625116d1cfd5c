"""The calls around a copy to or from a GPU, on a machine without one."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Unpinned", "stand_for_cuda"]


class Unpinned(TorchFunctionMode):
    """Asked for pinned memory, allocate ordinary memory: where it lies is left to the call, or to the default device.

    Attributes:
        pinned: The memory that was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if pinned:
            self.pinned.append(result)
        return result


def stand_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events that do nothing, and copies that are done at once."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", mock.MagicMock)
