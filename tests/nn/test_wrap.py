"""``esper.wrap`` takes the seeds that layers bring as they are."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import nn as enn
from esper.execution.lifecycle import SeedLifecycleState
from tests.nn.cases import bits, kernel, wake


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(enn.SeededLinear(4, 6), enn.SeededTanh(), nn.Linear(6, 6), enn.SeededLayerNorm(6))


@pytest.mark.parametrize("preserve", [True, False])
def test_the_models_layers_are_the_layers_own_seeds(preserve: bool) -> None:
    host = network()
    x = torch.randn(5, 4)
    before = host(x)
    model = esper.wrap(host, preserve_original=preserve)
    # Linear by default, and whatever brings seeds.
    assert model.get_layer_names() == ["0", "1", "2", "3"]
    assert torch.equal(bits(model(x)), bits(before))
    assert list(model.state_dict())[:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name in ("0", "1", "3"):
        layer = model.wrapped_model[int(name)]
        assert model.kasmina_layers[name] is layer.seeds and layer.seeds.layer_name == name
        assert layer.state_layout.lattice is model.lattice
        assert not list(layer.children())
    assert (host[0].state_layout.lattice is model.lattice) is not preserve


def test_awake_seeds_come_along(tmp_path: Path) -> None:
    host = network()
    wake(host[0], 2, kernel("lowrank", 4, 6, rank=2), 0.7)
    x = torch.randn(5, 4)
    before = host(x)
    model = esper.wrap(host)
    assert torch.equal(model(x), before)
    assert model.layer("0").state_layout.alpha_of(2) == pytest.approx(0.7)  # the nearest float32
    names = [name for name, _ in model.named_parameters() if "seed2" in name]
    assert names == ["esper.0.seed2.down.weight", "esper.0.seed2.up.weight"]
    assert not [key for key in model.state_dict() if key.startswith("0.grafts")]
    model.set_seed_alpha("0", 2, 0.0)
    assert not torch.equal(model(x), before)
    # The network given is a copy's original: its seed goes on at its own alpha.
    assert torch.equal(host(x), before)
    model.set_seed_alpha("0", 2, 0.7)
    path = tmp_path / "grown.safetensors"
    esper.save(model, path)
    again = esper.load(path, network())
    assert torch.equal(again(x), before)
    assert again.layer("0") is again.wrapped_model[0].seeds


def test_the_models_clock_and_commands_are_the_layers() -> None:
    host = network()
    model = esper.wrap(host, preserve_original=False)
    wake(host[1], 0, kernel("dense", 6, 6, tap="output"), 1.0)
    assert model.morphogenetic_active and list(model.graft_parameters())
    assert not list(host[1].children())
    layout = host[1].state_layout
    layout.set_alpha(0, 0.0, ramp_steps=4)
    host[1].step()
    enn.step(host)
    assert layout.alpha_of(0) == 1.0, "the model's clock is the only one"
    for _ in range(4):
        model(torch.randn(2, 4))
        model.step()
    assert layout.alpha_of(0) == 0.0
    assert asyncio.run(host[1].unload_kernel(0))
    assert not model.morphogenetic_active


def test_copies_of_the_model() -> None:
    host = network()
    model = esper.wrap(host)
    wake(model.wrapped_model[0], 1, kernel("lowrank", 4, 6, rank=2))
    x = torch.randn(3, 4)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin.kasmina_layers["0"] is twin.wrapped_model[0].seeds
    assert twin.wrapped_model[0].state_layout.lattice is twin.lattice
    twin.set_seed_alpha("0", 1, 0.0)
    assert model.layer("0").state_layout.state_of(1) is SeedLifecycleState.ACTIVE
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("blueprint", ["lowrank", "bottleneck"])
def test_an_exported_network_holds_torchs_layers(blueprint: str) -> None:
    host = network().double()
    model = esper.wrap(host)
    found = kernel(blueprint, 4, 6, rank=2, dtype="float64")
    wake(model.wrapped_model[0], 1, found)
    x = torch.randn(3, 4, dtype=torch.float64)
    plain = esper.export(model)
    assert not [module for module in plain.modules() if type(module).__module__.startswith("esper")]
    # Sums of fewer than ten float64 terms of size about one, in another order.
    torch.testing.assert_close(plain(x), model(x), rtol=1e-13, atol=1e-13)
    assert type(plain[1]) is nn.Tanh and type(plain[3]) is nn.LayerNorm
    assert isinstance(model.wrapped_model[0], enn.SeededLinear)


def test_names_alone_and_other_numbers_of_seeds() -> None:
    model = esper.wrap(network(), ["2"])
    assert model.get_layer_names() == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="layer '0' is a SeededLinear with 4 seeds, but seeds_per_layer is 2"):
        esper.wrap(network(), seeds_per_layer=2)
    host = nn.Sequential(enn.SeededLinear(3, 2, num_seeds=2))
    assert esper.wrap(host, seeds_per_layer=2).lattice.num_seeds == 2


def test_a_layer_that_is_the_whole_network() -> None:
    layer = enn.SeededLinear(3, 2)
    model = esper.wrap(layer)
    x = torch.randn(4, 3)
    assert model.get_layer_names() == ["root"] and torch.equal(model(x), layer(x))


def test_a_linear_with_a_forward_of_its_own_is_not_folded() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = esper.wrap(nn.Sequential(Doubled(3, 2)).double())
    found = kernel("lowrank", 3, 2, rank=1, dtype="float64", mode="replace")
    assert model.layer("0").commit(0, found, alpha=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(esper.export(model)(x), model(x), rtol=1e-13, atol=1e-13)


def test_reserved_memory_is_for_layers_that_sleep() -> None:
    host = nn.Sequential(enn.SeededLinear(4, 6), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    before = host(x)
    model = esper.wrap(host, reserve_rank=3)
    names = [name for name, _ in model.named_parameters() if name.startswith("esper.0.seed3.")]
    assert len(names) == 3 and torch.equal(model(x), before)
    wake(model.wrapped_model[0], 3, kernel("lowrank", 4, 6, rank=2), 1.0)
    p = model.layer("0").grafts.seed_tensors(3)
    h = host[0](x) + x @ p["down.weight"].t() @ p["up.weight"].t()
    torch.testing.assert_close(model(x), host[1](h), rtol=1e-5, atol=1e-5)
    wake(host[0], 0, kernel("lowrank", 4, 6, rank=2))
    with pytest.raises(ValueError, match="layer '0' brings awake seeds"):
        esper.wrap(host, reserve_rank=3)
    with pytest.raises(ValueError, match="Tanh"):
        esper.wrap(network(), reserve_rank=3)
