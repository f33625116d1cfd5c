"""Averages of a growing network's weights, as docs/reserved.md says to keep and to use them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.artifacts.artifact import Artifact
from esper.core.model_wrapper import MorphableModel
from esper.execution.kernel_executor import LoadedKernel
from esper.services.tezzeret.forge import build

DECAY = 0.75  # exact in float32, as are one or two products of it
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def network(reserve_rank: int) -> MorphableModel:
    torch.manual_seed(1)
    host = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
    return esper.wrap(host, seeds_per_layer=2, telemetry_enabled=False, reserve_rank=reserve_rank)


def wake(model: MorphableModel, layer: str, seed_idx: int) -> None:
    kernel = LoadedKernel.from_artifact(Artifact.open(build("bottleneck", d_in=6, d_out=6, rank=2, seed=seed_idx)))
    assert model.layer(layer).commit(seed_idx, kernel, alpha=0.5)
    with torch.no_grad():
        for parameter in model.layer(layer).grafts.seed_parameters(seed_idx).values():
            parameter.normal_()  # of full rank, so there is no padding among them


def train(model: MorphableModel, average: AveragedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            # Steps that every parameter takes, but for memory that is asleep.
            parameter.add_(0.25 * (parameter != 0))
    model(X)
    model.step()
    average.update_parameters(model)


def averaged_call(model: MorphableModel, average: AveragedModel, x: Tensor) -> Tensor:
    """As the page has it."""
    weights = {**dict(average.module.named_parameters()), **dict(average.module.named_buffers())}
    y: Tensor = functional_call(model, weights, (x,))
    return y


def averaged_network(model: MorphableModel, average: AveragedModel) -> MorphableModel:
    """As the page has it."""
    lattice = {name: entry for name, entry in model.state_dict().items() if name.startswith("esper.lattice.")}
    whole = copy.deepcopy(model)
    whole.load_state_dict({**average.module.state_dict(), **lattice})
    return whole


def test_with_reserved_memory_the_average_goes_on_and_borrows_the_lattice() -> None:
    model = network(reserve_rank=2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    train(model, average)
    wake(model, "3", 1)
    train(model, average)
    wake(model, "0", 0)
    before = {name: parameter.clone() for name, parameter in average.module.named_parameters()}
    train(model, average)
    for name, parameter in model.named_parameters():
        expected = before[name].lerp(parameter, 1 - DECAY)
        torch.testing.assert_close(dict(average.module.named_parameters())[name], expected)
    model.eval()
    # What torch gives: the averaged host, asleep.
    assert not average.module.morphogenetic_active
    whole = averaged_network(model, average)
    assert whole.lattice.get_active_count() == 2
    expected = whole(X)
    assert not torch.allclose(expected, average.module.eval()(X))
    with torch.no_grad():
        # The same numbers by another way: some ten products of size one.
        torch.testing.assert_close(averaged_call(model, average, X), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.layer("0").state_layout.alpha_blend, whole.layer("0").state_layout.alpha_blend)


@pytest.mark.parametrize("seed_asleep", [False, True])
def test_memory_that_grows_wants_a_new_average(seed_asleep: bool) -> None:
    model = network(reserve_rank=0)
    wake(model, "3", 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    train(model, average)
    train(model, average)
    if seed_asleep:
        model.cull("3", 1)
    wake(model, "0", 0)
    # As the page has it: what the host's parameters have been is kept, seeds begin with what they are.
    old, average = average, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    hosts = {name: entry for name, entry in old.module.state_dict().items() if not name.startswith("esper.")}
    average.module.load_state_dict(hosts)
    average.n_averaged.copy_(old.n_averaged)
    before = {name: parameter.clone() for name, parameter in average.module.named_parameters()}
    assert all(
        torch.equal(before[name], parameter) for name, parameter in old.module.named_parameters() if "esper" not in name
    )
    train(model, average)
    ours = dict(average.module.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], before[name].lerp(parameter, 1 - DECAY))
    model.eval(), average.eval()
    with torch.no_grad():
        expected = averaged_network(model, average)(X)
        torch.testing.assert_close(average(X), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(averaged_call(model, average, X), expected, rtol=1e-5, atol=1e-5)
