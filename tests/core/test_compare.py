"""compare_with_original runs both networks by the way: neither may show that it ran."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.core.model_wrapper import MorphableModel
from tests.nn.cases import kernel


class Counts(nn.Module):
    """Keeps what it saw, in place and by a new buffer."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = x.mean()
        return x


@pytest.fixture
def model() -> MorphableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Counts(), nn.Linear(8, 3))
    return esper.wrap(net)


def everything(model: MorphableModel) -> dict[str, Any]:
    original = model.original_model
    assert original is not None
    return {
        "state": copy.deepcopy((model.state_dict(), original.state_dict())),
        "modes": [module.training for net in (model, original) for module in net.modules()],
        "random": torch.get_rng_state(),
        "forwards": model.total_forward_calls,
        "executions": [layer.total_kernel_executions for layer in model.kasmina_layers.values()],
        "faults": model.lattice.fault_flags.clone(),
        "probes": [layer.probe_armed for layer in model.kasmina_layers.values()],
        "samples": model.monitor.stats()["samples"],
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("awake", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_both_are_left_as_they_were(training: bool, awake: bool, model: MorphableModel) -> None:
    model.train(training)
    if awake:
        assert model.layer("0").commit(0, kernel("lowrank", 8, 8, rank=2), alpha=0.5)
        with torch.no_grad():
            for parameter in model.graft_parameters().values():
                parameter.fill_(0.1)
    model.monitor.sample_now()
    buffers = dict(model.named_buffers())
    before = everything(model)
    # So often that one execution would be timed and stored.
    for _ in range(65):
        found = model.compare_with_original(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    assert_same(everything(model), before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert (found["max_absolute_difference"] > 0) is awake
    assert int(model.layer("0").state_layout.exec_latency_us.sum()) == 0


@pytest.mark.parametrize("training", [True, False])
def test_asleep_there_is_no_difference_whatever_mode_the_original_is_in(training: bool, model: MorphableModel) -> None:
    model.train(training)
    assert model.original_model is not None
    model.original_model.train(not training)
    model.wrapped_model[2].train(not training)  # type: ignore[index]  # modes need not be the same everywhere
    assert model.compare_with_original(torch.randn(4, 8))["max_absolute_difference"] == 0.0


def test_a_fault_of_the_comparison_is_not_the_seeds(model: MorphableModel) -> None:
    assert model.layer("0").commit(0, kernel("lowrank", 8, 8, rank=2), alpha=0.5)
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.fill_(1e30)
    model.compare_with_original(torch.randn(4, 8))
    assert int(model.lattice.fault_flags.sum()) == 0


@pytest.mark.parametrize("training", [True, False])
def test_between_a_forward_and_its_backward(training: bool, model: MorphableModel) -> None:
    """What autograd has saved must not count as modified."""
    model.train(training)
    x = torch.randn(4, 8)
    grads = []
    for compared in (False, True):
        net = copy.deepcopy(model)
        torch.manual_seed(1)
        loss = net(x).square().sum()
        if compared:
            net.compare_with_original(x)
        loss.backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert_same(grads[1], grads[0])
