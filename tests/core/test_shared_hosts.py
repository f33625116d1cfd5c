"""A layer of the network belongs to one wrapped model at a time; afterwards, or as a copy, it may be wrapped again."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import LifecycleError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))


def in_place(network: nn.Module, **options: Any) -> esper.MorphableModel:
    return esper.wrap(network, preserve_original=False, monitor_budget=1.0, **options)


def wake(model: esper.MorphableModel, layer: str = "0", seed: int = 0) -> None:
    kernel = esper.compile("lowrank", d_in=8, d_out=8, registry=None, rank=2)
    assert asyncio.run(model.load_kernel(layer, seed, kernel, alpha=0.4))
    with torch.no_grad():
        for parameter in model.layer(layer).grafts.seed_parameters(seed).values():
            parameter.normal_(std=0.4)


def networks(backbone: nn.Module | None = None) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8) if backbone is None else backbone
    return nn.Sequential(shared, nn.Linear(8, 2)), nn.Sequential(nn.Linear(8, 8), shared)


def shadowed(network: nn.Module) -> bool:
    return any("forward" in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("seeded", [False, True])
def test_a_second_model_over_a_shared_layer_is_refused(seeded: bool) -> None:
    a, b = networks(esper.nn.SeededLinear(8, 8) if seeded else None)
    first = in_place(a)
    with pytest.raises(ValueError, match=r"layer '1' \(\w*Linear\) belongs to another wrapped model .*unwrap"):
        in_place(b)
    wake(first)
    y = first(X)
    with pytest.raises(ValueError, match="belongs to another"):
        in_place(b)
    with pytest.raises(ValueError, match="belongs to another"):
        in_place(a)
    for _ in range(20):
        assert torch.equal(first(X), y)
        first.step()
    other = in_place(nn.Sequential(b[0]))  # nothing of the refused attempts is left on it
    assert list(other.kasmina_layers) == ["0"]


def test_a_layer_built_apart_counts_too() -> None:
    host = nn.Linear(8, 8)
    layer = KasminaLayer.from_host(host)
    with pytest.raises(ValueError, match="belongs to another"):
        KasminaLayer.from_host(host, layer_name="again")
    del layer
    assert KasminaLayer.from_host(host).layer_name == "kasmina_layer"


@pytest.mark.parametrize("collect", [False, True])
def test_when_the_model_is_gone_its_layers_are_free(collect: bool) -> None:
    a, b = networks()
    first = in_place(a)
    first(X)
    first.monitor.sample_now()  # an armed probe of a model that is gone keeps nothing
    assert shadowed(a)
    gc.disable()
    try:
        del first
        if collect:
            gc.collect()
        second = in_place(b)
    finally:
        gc.enable()
    assert not shadowed(a)
    wake(second, "1")
    y = second(X)
    for _ in range(20):
        assert torch.equal(second(X), y)
        second.step()


def test_unwrapping_gives_layers_up_and_leaves_what_they_compute() -> None:
    a, b = networks()
    first = in_place(a)
    wake(first)
    y = first(X)
    assert esper.unwrap(first) is a
    first.step()
    assert torch.equal(first(X), y)
    wake(first, seed=1)  # it goes on while nobody else has the layers
    y, expected = first(X), b(X)
    second = in_place(b)
    assert torch.equal(second(X), expected)
    for _ in range(20):
        assert torch.equal(second(X), expected)
        assert torch.equal(first(X), y)
        first.step(), second.step()
    wake(second, "1")
    grown = second(X)
    assert not torch.equal(grown, expected)
    for _ in range(20):
        assert torch.equal(second(X), grown)
        first.monitor.sample_now(), first(X), first.step(), second.step()
    with pytest.raises(LifecycleError, match="another wrapped model has it now"):
        wake(first, seed=2)
    with pytest.raises(LifecycleError, match="another wrapped model has it now"):
        first.request_kernel("0", 2, "any")
    second.cull("1", 0)
    assert torch.equal(second(X), expected)
    assert torch.equal(first(X), y)


def test_the_same_network_may_be_wrapped_again() -> None:
    network, _ = networks()
    for _ in range(3):
        model = in_place(network)
        model(X), model.step()
        network = esper.unwrap(model)
    assert not shadowed(in_place(network).wrapped_model)


def test_seeds_that_a_layer_brought_move_on() -> None:
    a, b = networks(esper.nn.SeededLinear(8, 8))
    first = in_place(a)
    wake(first)
    expected = b(X)
    esper.unwrap(first)
    second = in_place(b)
    assert second.layer("1").grafts.bound == (0,)
    assert torch.equal(second(X), expected)


def test_copies_are_free() -> None:
    a, b = networks()
    first = in_place(a)
    wake(first)
    y = first(X)
    twins = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for twin in twins:
        assert torch.equal(twin(X), y)
        wake(twin, seed=1)
        changed = twin(X)
        assert not torch.equal(changed, y)
        for _ in range(20):
            assert torch.equal(twin(X), changed)
            assert torch.equal(first(X), y)
            twin.step(), first.step()
        with pytest.raises(ValueError, match="belongs to another"):
            in_place(twin.wrapped_model)
    preserved = esper.wrap(b)
    assert torch.equal(preserved(X), b(X))


def test_a_copy_that_was_made_while_a_probe_was_armed() -> None:
    a, b = networks()
    first = in_place(a)
    first.monitor.sample_now()
    assert shadowed(b)
    second = esper.wrap(b)
    assert not shadowed(second.wrapped_model)
    assert all(layer._binding.untouched for layer in second.kasmina_layers.values())
    first.monitor.sample_now()
    first(X)
    assert first.monitor.stats()["samples"] == 2
