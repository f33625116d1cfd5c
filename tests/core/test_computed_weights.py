"""Hosts whose weight is computed from other parameters: parametrized, pruned, normed by a hook."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import esper
from esper.artifacts.artifact import Artifact
from esper.core.export import ExportError
from esper.core.model_wrapper import MorphableModel
from esper.execution.kernel_executor import LoadedKernel
from esper.nn import SeededLinear
from esper.services.tezzeret.forge import build

#: float64, in another order at most.
TOLERANCE = 1e-12

Change = Callable[[nn.Module], object]


def _by_hook(change: Callable[..., object]) -> Change:
    def apply(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            change(layer)

    return apply


PARAMETRIZED: dict[str, Change] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
HOOKED: dict[str, Change] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
    "weight_norm by hook": _by_hook(nn.utils.weight_norm),
    "spectral_norm by hook": _by_hook(nn.utils.spectral_norm),
}
ALL = {**PARAMETRIZED, **HOOKED}


def kernel(blueprint: str, d_in: int = 6, d_out: int = 6, **options: Any) -> LoadedKernel:
    return LoadedKernel.from_artifact(
        Artifact.open(build(blueprint, d_in=d_in, d_out=d_out, dtype="float64", **options))
    )


def wake(model: MorphableModel, blueprint: str, **options: Any) -> None:
    assert model.layer("0").commit(0, kernel(blueprint, rank=2, **options), alpha=0.6)
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(std=0.5)


def model_of(layer: nn.Module, change: Change, *, after: bool = False) -> MorphableModel:
    network = nn.Sequential(layer, nn.Tanh()).double()
    if not after:
        change(network[0])
    model = esper.wrap(network, ["0"], telemetry_enabled=False, preserve_original=False)
    if after:
        change(network[0])
    return model


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    # A weight that a hook computed under grad mode cannot be copied: torch copies only leaves of the graph.
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [nn.Linear, SeededLinear])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("awake", [False, True])
@pytest.mark.parametrize("change", ALL.values(), ids=ALL)
def test_copies_of_the_model(change: Change, awake: bool, after: bool, kind: type[nn.Linear]) -> None:
    model = model_of(kind(6, 6), change, after=after)
    if awake:
        wake(model, "bottleneck")
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x), model.eval()  # a power iteration moves with every call in training
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin.layer("0").default_transform is twin.wrapped_model[0] is not model.wrapped_model[0]
    assert twin.layer("0") is not twin.wrapped_model[0]
    if awake:
        before = model(x)
        assert asyncio.run(twin.unload_kernel("0", 0))
        assert not torch.equal(twin(x), before) and torch.equal(model(x), before)


@pytest.mark.parametrize("change", ALL.values(), ids=ALL)
def test_copies_of_a_layer_with_its_own_seeds(change: Change) -> None:
    layer = SeededLinear(6, 6).double()
    change(layer)
    assert layer.seeds.commit(0, kernel("bottleneck", rank=2), alpha=0.6)
    for parameter in layer.seeds.grafts.parameters():
        parameter.normal_()
    x = torch.randn(3, 6, dtype=torch.float64)
    layer(x), layer.eval()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.seeds.default_transform is twin
    twin.set_seed_alpha(0, 0.0)
    assert not torch.equal(twin(x), layer(x))


def test_python_asks_a_layer_and_not_its_host() -> None:
    layer = esper.KasminaLayer(4, 4)
    assert layer.in_features == 4
    for name in ("__deepcopy__", "__len__"):
        with pytest.raises(AttributeError, match=f"'KasminaLayer' object has no attribute '{name}'"):
            getattr(layer, name)


@pytest.mark.parametrize("blueprint", ["lowrank", "bottleneck"])
@pytest.mark.parametrize("kind", [nn.Linear, SeededLinear])
@pytest.mark.parametrize("change", ALL.values(), ids=ALL)
def test_an_exported_host_goes_on_computing_its_weight(change: Change, kind: type[nn.Linear], blueprint: str) -> None:
    model = model_of(kind(6, 6), change)
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x), model.eval()
    wake(model, blueprint)
    model.wrapped_model[0].register_forward_hook(lambda module, args, output: output * 2)
    plain = esper.export(model)
    torch.testing.assert_close(plain(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))
    # What the weight is computed from still counts, and is under the host's names.
    names = {name.removeprefix("0.0.host.") for name, _ in plain.named_parameters() if name.startswith("0.0.host.")}
    own = {name.removeprefix("0.") for name, _ in model.named_parameters() if name.startswith("0.")}
    assert names == own
    before = plain(x)
    for parameter in plain.get_submodule("0.0.host").parameters():
        parameter.normal_()
    assert not torch.equal(plain(x), before)


@pytest.mark.parametrize(
    ("host", "seed"),
    [
        (lambda: nn.Conv2d(6, 6, 1), {"rank": 2}),
        (lambda: nn.LayerNorm(6), {"tap": "output"}),
    ],
    ids=["conv", "norm"],
)
def test_nothing_is_folded_into_other_pruned_hosts(host: Callable[[], nn.Module], seed: dict[str, Any]) -> None:
    network = nn.Sequential(host()).double()
    network[0].weight.normal_()
    prune.l1_unstructured(network[0], "weight", amount=0.5)
    model = esper.wrap(network, ["0"], telemetry_enabled=False)
    blueprint = "lowrank" if "rank" in seed else "elementwise"
    assert model.layer("0").commit(0, kernel(blueprint, **seed), alpha=0.6)
    for parameter in model.graft_parameters().values():
        parameter.normal_()
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(esper.export(model)(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_parametrized_attention_is_refused_with_what_to_do() -> None:
    network = nn.ModuleDict({"inner": nn.MultiheadAttention(6, 2)}).double()
    parametrizations.weight_norm(network["inner"], "in_proj_weight")
    model = esper.wrap(network, ["inner"], telemetry_enabled=False)
    assert model.layer("inner").commit(0, kernel("bottleneck", rank=2), alpha=0.6)
    with pytest.raises(ExportError, match=r"'inner' \(Parametrized.*remove_parametrizations makes it a plain one"):
        esper.export(model)
