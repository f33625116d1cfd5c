"""When a layer's tables go to its GPU: as soon as its seeds are known, and not while a graph is being made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.execution.grafts import fused, graft_set
from esper.ops import registry
from esper.ops.graft import triton, triton_blend

from . import helpers
from .helpers import kernel

D = 4
Uploads = list[tuple[fused.Plan, torch.device]]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """What was asked for, on a machine whose every device is a GPU."""
    found: Uploads = []
    monkeypatch.setattr(fused, "serves", lambda device: True)
    monkeypatch.setattr(fused, "upload", lambda plan, device: found.append((plan, device)))
    return found


def bound(*names: str) -> Any:
    kernels = {i: kernel(name, D, D, seed=i) for i, name in enumerate(names)}
    return helpers.graft_set(nn.Linear(D, D), (0.5,) * len(names), kernels)


@pytest.mark.parametrize("name", ["lowrank", "gated", "elementwise"])
def test_every_set_of_seeds_is_announced(uploads: Uploads, name: str) -> None:
    grafts = bound(name, name)
    assert [len(plan.seeds) for plan, _ in uploads] == [1, 2]
    grafts.unbind(0)
    assert uploads[-1] == (grafts._plan, torch.device("cpu"))
    assert len(uploads) == 3


def test_seeds_that_are_no_operation_have_no_tables(uploads: Uploads) -> None:
    bound("dense")
    assert uploads == []


def test_seeds_that_move_are_announced_where_they_go(uploads: Uploads) -> None:
    """A network is loaded on the CPU, and moved then."""
    grafts = bound("lowrank")
    grafts.to("meta")
    assert [device.type for _, device in uploads] == ["cpu", "meta"]


def test_nothing_is_sent_to_other_devices(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(fused, "upload", lambda *_: pytest.fail("to a CPU"))
    bound("lowrank")


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph", ["compiled", "captured", "traced"])
def test_what_is_made_in_a_graph_would_be_the_graphs(
    uploads: Uploads, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grafts = bound("lowrank")
    uploads.clear()
    if graph == "traced":
        with _Looks():
            grafts._settle()
    else:
        name = "_compiling" if graph == "compiled" else "capturing"
        monkeypatch.setattr(graft_set, name, lambda *_: True)
        grafts._settle()
    assert uploads == []


@pytest.mark.parametrize("name", ["lowrank", "gated", "elementwise"])
def test_the_first_call_finds_its_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not registry.triton_interprets():
        pytest.skip("the CPU has Triton's kernels in its interpreter only: TRITON_INTERPRET=1")
    monkeypatch.setattr(fused, "serves", lambda device: True)
    for module in (triton, triton_blend):
        module._uploaded.cache_clear()
    host = nn.Linear(D, D)
    kernels = {i: kernel(name, D, D, seed=i, dtype=torch.float32) for i in range(2)}
    grafts = helpers.graft_set(host, (0.5, 0.5), kernels)
    for module in (triton, triton_blend):
        monkeypatch.setattr(module, "Table", lambda *_: pytest.fail("made in the call"))
    x = torch.randn(3, D, requires_grad=True)
    with registry.use_backend("triton"):
        grafts(x, host(x)).sum().backward()
    assert x.grad is not None
