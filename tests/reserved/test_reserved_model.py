"""A whole network with reserved memory: waking, saving, exporting, copying, converting, and what it says of itself."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

import esper
from esper.core.checkpoint import CheckpointError
from tests.core.test_dormant_identity import bits
from tests.reserved.models import cnn, compiled_kernel, mlp, wake, wrap

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_asleep_it_is_the_host_bit_for_bit() -> None:
    host = mlp()
    model = wrap(host)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert torch.equal(bits(model(x)), bits(host(y)))
    model(x).square().sum().backward()
    host(y).square().sum().backward()
    assert torch.equal(bits(x.grad), bits(y.grad))
    parameters = dict(model.named_parameters())
    for name, parameter in host.named_parameters():
        assert torch.equal(bits(parameters[name].grad), bits(parameter.grad)), name
    # Nothing of Esper is on the path: the hosts' own forwards run.
    assert all("forward" not in layer.default_transform.__dict__ for layer in model.kasmina_layers.values())
    assert all(parameter.grad is None for parameter in model.esper.parameters())


def test_names_shapes_and_memory() -> None:
    model = wrap(rank=4, seeds_per_layer=3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("esper.")}
    assert shapes == {
        f"esper.{layer}.seed{seed}.{name}": shape
        for layer in ("0", "2")
        for seed in range(3)
        for name, shape in {"down.weight": (4, 8), "down.bias": (4,), "up.weight": (8, 4)}.items()
    }
    numbers = 2 * 3 * 4 * (8 + 8 + 1)
    assert model.get_model_stats()["reserved"] == {"rank": 4, "parameters": numbers, "bytes": 4 * numbers}
    assert model.graft_parameters() == {}
    assert esper.wrap(mlp()).get_model_stats()["reserved"] == {"rank": 0, "parameters": 0, "bytes": 0}


def test_waking_and_sleeping_keep_every_address() -> None:
    model = wrap()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    wake(model, "0", 1)
    assert set(model.graft_parameters()) == {
        f"esper.0.seed1.{name}" for name in ("down.weight", "down.bias", "up.weight")
    }
    host = model.original_model
    assert host is not None
    assert not torch.equal(model(X), host(X))
    model.step()
    model.cull("0", 1)
    assert torch.equal(bits(model(X)), bits(host(X)))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all("forward" not in layer.default_transform.__dict__ for layer in model.kasmina_layers.values())


def test_it_learns_what_an_elastic_network_learns() -> None:
    models = [wrap(), esper.wrap(mlp(), telemetry_enabled=False)]
    losses: list[list[float]] = []
    for model in models:
        # The kernels' own start: equal in both.
        for layer, seed_idx, name in (("0", 0, "lowrank"), ("2", 3, "bottleneck")):
            kernel = compiled_kernel(models[0], layer, name)
            assert asyncio.run(model.load_kernel(layer, seed_idx, kernel, alpha=0.5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(X) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            model.step()
            losses[-1].append(loss.item())
    # float32, ten steps: sums in another order, 2^-24 each, some thousand of them.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
    assert losses[0][-1] < losses[0][0]


def test_what_an_optimizer_counted_while_a_seed_slept_is_forgotten() -> None:
    model = wrap()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    esper.optim.attach(optimizer, model)
    memory: Any = model.layer("0").grafts
    for _ in range(3):
        model(X).sum().backward()
        for parameter in memory.parameters():
            parameter.grad = torch.zeros_like(parameter)  # as DDP gives them
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[memory.seed1.down.weight]["step"] == 3
    wake(model, "0", 1)
    model(X).sum().backward()
    optimizer.step()
    assert optimizer.state[memory.seed1.down.weight]["step"] == 1
    assert optimizer.state[model.get_parameter("0.weight")]["step"] == 4


def test_optimizers_follow_by_the_same_parameters() -> None:
    model = wrap()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    everything = len(list(model.parameters()))
    esper.optim.attach(optimizer, model, lr=0.05)
    wake(model, "2", 0, "lowrank")
    assert [len(group["params"]) for group in optimizer.param_groups] == [everything - 2, 2]
    assert optimizer.param_groups[1]["esper_seed"] == "2#0"
    assert optimizer.param_groups[1]["params"][0] is model.layer("2").grafts.seed0.down.weight
    model(X).sum().backward()
    optimizer.step()
    model.cull("2", 0)  # the memory stays, and goes back to where an optimizer made anew has it
    assert [len(group["params"]) for group in optimizer.param_groups] == [everything]


@pytest.mark.parametrize(
    ("saved", "loaded"), [(4, None), (4, 6), (4, 0), (0, 4)], ids=["same", "more", "elastic", "from elastic"]
)
def test_save_and_load_across_kinds_of_memory(saved: int, loaded: int | None, tmp_path: Path) -> None:
    reserved = wrap()
    model = reserved if saved else esper.wrap(mlp(), telemetry_enabled=False)
    for layer, seed_idx, rank in (("0", 1, 3), ("2", 2, 4)):
        kernel = compiled_kernel(reserved, layer, rank=rank, activation="sigmoid")
        assert asyncio.run(model.load_kernel(layer, seed_idx, kernel, alpha=0.5))
    with torch.no_grad():
        for layer in model.kasmina_layers.values():
            for seed_idx in layer.grafts.bound:
                for tensor in layer.grafts.seed_tensors(seed_idx).values():
                    tensor.normal_(std=0.3)
    esper.save(model, tmp_path / "grown")
    twin = esper.load(tmp_path / "grown", mlp(), reserve_rank=loaded)
    expected = saved if loaded is None else loaded
    assert twin.reserve_rank == expected
    # One kind of memory sums in another order than the other.
    torch.testing.assert_close(twin(X), model(X), rtol=1e-5, atol=1e-6)
    if (saved > 0) == (expected > 0):
        assert torch.equal(bits(twin(X)), bits(model(X)))
    assert twin.lattice.crc() == model.lattice.crc()
    assert all(layer.grafts.bound == twin.layer(name).grafts.bound for name, layer in model.kasmina_layers.items())
    # What is stored does not depend on how much was reserved.
    esper.save(twin, tmp_path / "again")
    names = [set(_stored(tmp_path / name)) for name in ("grown", "again")]
    assert names[0] == names[1]


def _stored(path: Path) -> list[str]:
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_load_refuses_a_rank_that_is_too_small_and_leaves_the_host_alone(tmp_path: Path) -> None:
    model = wrap()
    wake(model, "0", 1, rank=3)
    esper.save(model, tmp_path / "grown")
    host = mlp()
    before = host(X)
    with pytest.raises(CheckpointError, match=r"rank 3.*reserved rank 2"):
        esper.load(tmp_path / "grown", host, reserve_rank=2)
    assert torch.equal(host(X), before)
    assert all("forward" not in module.__dict__ for module in host.modules())


def test_a_state_dict_of_other_awake_seeds_is_refused() -> None:
    model = wrap()
    fresh = wrap()
    fresh.load_state_dict(model.state_dict())
    wake(model, "0", 1)
    with pytest.raises(RuntimeError, match=r"other awake seeds \(seed 1 of '0'\)"):
        fresh.load_state_dict(model.state_dict())
    assert not fresh.morphogenetic_active
    assert not any(parameter.any() for parameter in fresh.esper.parameters())  # sleeping memory is zero
    twin = copy.deepcopy(model)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(bits(model(X)), bits(twin(X)))


@pytest.mark.parametrize("network", [mlp, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("name", ["lowrank", "bottleneck"])
def test_export(network: Any, name: str) -> None:
    host = network()
    x = X if network is mlp else torch.randn(2, 3, 6, 6)
    host(x)
    model = wrap(host)
    for layer in model.get_layer_names():
        wake(model, layer, 1, name, rank=3)
        wake(model, layer, 2, name, rank=2, mode="replace", alpha=0.3)
    plain = esper.export(model)
    assert not any(type(module).__module__.startswith("esper") for module in plain.modules())
    # float32: three layers of sums of at most some dozen products, folded in float64.
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_copies_are_independent() -> None:
    model = wrap()
    wake(model, "0", 1)
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(bits(twin(X)), bits(expected))
        with torch.no_grad():
            twin.layer("0").grafts.seed1.up.weight.zero_()
        assert torch.equal(bits(model(X)), bits(expected))
        twin.cull("0", 1)
        assert model.layer("0").grafts.bound == (1,)
        assert torch.equal(bits(twin(X)), bits(model.original_model(X)))
        wake(twin, "2", 0)
        assert not torch.equal(twin(X), model.original_model(X))


def test_conversion() -> None:
    model = wrap()
    wake(model, "0", 1)
    expected = copy.deepcopy(model).double()(X.double())
    torch.testing.assert_close(model(X).double(), expected, rtol=1e-5, atol=1e-5)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layer("0").grafts.plan.dtype is torch.int32
    # bfloat16: unit roundoff 2^-9, three layers of values of order 1.
    torch.testing.assert_close(model(X.bfloat16()).double(), expected, rtol=0.05, atol=0.05)
    wake(model, "2", 0)
    assert torch.isfinite(model(X.bfloat16())).all()


def test_a_kernel_that_does_not_fit_is_refused_with_the_reason() -> None:
    model = wrap(rank=2)
    kernel = compiled_kernel(model, "0", rank=3)
    assert not asyncio.run(model.load_kernel("0", 0, kernel))
    assert "rank 3" in model.get_layer_stats("0")["errors"][0]
    assert model.layer("0").state_layout.state_of(0) is esper.SeedLifecycleState.ERROR_RECOVERY
    assert torch.equal(bits(model(X)), bits(model.original_model(X)))


def test_a_layer_without_a_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer '1'.*GELU"):
        wrap(target_layers=[nn.Linear, nn.GELU])
    for bad in (-1, 2.5, True):
        with pytest.raises(ValueError, match="reserve_rank"):
            wrap(rank=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reserve_tap"):
        wrap(reserve_tap="both")


def test_a_broken_seed_goes_to_error_recovery() -> None:
    model = wrap()
    wake(model, "0", 1)
    with torch.no_grad():
        model.layer("0").grafts.seed1.up.weight[0, 0] = float("nan")
    for _ in range(3):
        assert torch.equal(bits(model(X)), bits(model.original_model(X)))
        model.step()
    assert model.layer("0").state_layout.state_of(1) is esper.SeedLifecycleState.ERROR_RECOVERY
    assert "non-finite" in model.get_layer_stats("0")["errors"][1]
    assert all(torch.count_nonzero(p) == 0 for p in model.esper.parameters())


def test_layers_go_together() -> None:
    model = wrap()
    wake(model, "0", 1)
    assert all("forward" in layer.default_transform.__dict__ for layer in model.kasmina_layers.values())
    # A layer that is on the path and asleep runs nothing.
    model(X)
    assert model.layer("2").total_kernel_executions == 0
    assert model.layer("0").total_kernel_executions == 1


def test_the_awake_path_gives_the_hosts_numbers() -> None:
    model = wrap()
    with model.awake_path():
        assert all("forward" in layer.default_transform.__dict__ for layer in model.kasmina_layers.values())
        assert torch.equal(bits(model(X)), bits(model.original_model(X)))
        twin = copy.deepcopy(model)
    for each in (model, twin):
        assert all("forward" not in layer.default_transform.__dict__ for layer in each.kasmina_layers.values())
    with pytest.raises(ValueError, match="reserve_rank"), esper.wrap(mlp()).awake_path():
        pass


def test_prepare_leaves_everything_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    model = wrap(network)
    model(X).sum().backward()
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.random.get_rng_state()
    calls: list[bool] = []

    def step() -> None:
        calls.append("forward" in model.layer("0").default_transform.__dict__)
        # Recorded backwards cannot add to what the one before has left.
        assert all(parameter.grad is None for parameter in model.parameters())
        model(X).sum().backward()

    model.prepare(step, repeats=2)
    assert calls == [False, False, True, True]
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    wake(model, "0", 1)
    with pytest.raises(RuntimeError, match="asleep"):
        model.prepare(step)
    with pytest.raises(ValueError, match="reserve_rank"):
        esper.wrap(mlp()).prepare(step)
