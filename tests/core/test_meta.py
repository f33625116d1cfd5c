"""A wrapped model on the meta device: weights without values, and seeds whose states are kept all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import esper
from esper.core.model_wrapper import MorphableModel
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout, Lattice
from tests.nn.cases import kernel

State = SeedLifecycleState
X = torch.linspace(-1, 1, 40).reshape(5, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(params=[0, 4], ids=["elastic", "reserved"])
def model(request: pytest.FixtureRequest) -> MorphableModel:
    return esper.wrap(network(), reserve_rank=request.param)


def wake(model: MorphableModel) -> None:
    assert model.layer("0").commit(1, kernel("lowrank", 8, 8, rank=2), alpha=0.25)
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("awake", [False, True])
def test_there_and_back(awake: bool, model: MorphableModel) -> None:
    if awake:
        wake(model)
    y, state, crc = model(X), model.state_dict(), model.lattice.crc()
    base = copy.deepcopy(model).to("meta")
    assert all(parameter.is_meta for parameter in base.parameters())
    # Nothing of the seeds is lost, and a step has its clock and its lattice.
    assert base.lattice.device.type == "cpu" and base.lattice.crc() == crc
    assert base.layer("0").state_layout.state_of(1) is (State.ACTIVE if awake else State.DORMANT)
    base.step()
    base.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(base(X), y)


@pytest.mark.parametrize("awake", [False, True])
def test_as_the_base_of_an_ensemble(awake: bool, model: MorphableModel) -> None:
    if awake:
        wake(model)
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.5)
    expected = torch.stack([each(X) for each in models])
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    # The same products in another order: some ulps of numbers of about one.
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reserve_rank", [0, 4])
def test_a_network_that_is_wrapped_there(reserve_rank: int) -> None:
    with torch.device("meta"):
        host = network()
    model = esper.wrap(host, reserve_rank=reserve_rank)
    assert model(X.to("meta")).shape == (5, 3)
    model.to_empty(device="cpu").load_state_dict(network().state_dict())
    assert torch.equal(model(X), network()(X))
    wake(model)
    again = esper.wrap(network(), reserve_rank=reserve_rank)
    wake(again)
    assert torch.equal(model(X), again(X))


def test_a_lattice_stays_where_its_values_are() -> None:
    lattice = Lattice(1, 2)
    lattice.layer(0).set_alpha(1, 0.5)
    assert lattice.to("meta") is lattice and lattice.device.type == "cpu"
    assert lattice.layer(0).alpha_blend.tolist() == [0.0, 0.5]
    assert Lattice(1, 2, "meta").crc() == Lattice(1, 2).crc()
    assert KasminaStateLayout(2, "meta").device.type == "cpu"
