"""A layer that was replaced after wrap has seeds that nothing calls: loading into them is refused."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.core.model_wrapper import MorphableModel


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    return esper.compile("lowrank", d_in=8, d_out=8, registry=str(tmp_path), rank=2)


@pytest.fixture
def model(tmp_path: Path, kernel: str) -> MorphableModel:
    return esper.wrap(network(), [nn.Linear, nn.BatchNorm1d], registry=str(tmp_path), telemetry_enabled=False)


def assigned(model: MorphableModel) -> MorphableModel:
    model.wrapped_model[0] = nn.Linear(8, 8)
    return model


def removed(model: MorphableModel) -> MorphableModel:
    del model.wrapped_model[2]
    return model


def quantized(model: MorphableModel) -> MorphableModel:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("replace", "layer", "now"),
    [
        (assigned, "0", r"another module \(Linear\) in place of the Linear"),
        (removed, "2", "nothing in place of the Linear"),
        (quantized, "0", r"another module \(Linear\) in place of the Linear"),
        (nn.SyncBatchNorm.convert_sync_batchnorm, "1", r"another module \(SyncBatchNorm\) in place of the BatchNorm1d"),
    ],
)
def test_loading_is_refused(
    replace: Callable[[MorphableModel], MorphableModel], layer: str, now: str, model: MorphableModel, kernel: str
) -> None:
    changed = replace(model)
    for call in (
        lambda: changed.request_kernel(layer, 0, kernel),
        lambda: asyncio.run(changed.load_kernel(layer, 0, kernel)),
    ):
        with pytest.raises(ValueError, match=rf"Layer '{layer}' was replaced after wrap: the network has {now}"):
            call()
    assert changed.layer(layer).state_layout.get_stats()["dormant_seeds"] == 4


def test_what_the_error_says_to_do_helps(model: MorphableModel, kernel: str, tmp_path: Path) -> None:
    assert asyncio.run(model.load_kernel("2", 0, kernel))
    assigned(model)
    again = esper.wrap(esper.export(model), registry=str(tmp_path))
    assert asyncio.run(again.load_kernel("0", 0, kernel))


class Around(nn.Module):
    """As checkpointing, PEFT and torch.compile of a part do it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


def wrapped_in_another(model: MorphableModel) -> MorphableModel:
    model.wrapped_model[0] = Around(model.wrapped_model[0])  # type: ignore[index]
    return model


def parametrized(model: MorphableModel) -> MorphableModel:
    nn.utils.parametrizations.weight_norm(model.wrapped_model[0])  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    "change",
    [wrapped_in_another, parametrized, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["wrapped", "parametrized", "deepcopy", "pickle"],
)
def test_a_host_that_is_still_called_takes_kernels(
    change: Callable[[MorphableModel], MorphableModel], model: MorphableModel, kernel: str
) -> None:
    changed = change(model)
    assert asyncio.run(changed.load_kernel("0", 0, kernel))
    changed(torch.randn(4, 8))
    assert changed.layer("0").total_kernel_executions == 1


def test_a_layer_under_two_names_and_one_that_is_the_network(kernel: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net.append(net[0])
    shared = esper.wrap(net, registry=str(tmp_path))
    shared.wrapped_model[0] = nn.Identity()
    assert asyncio.run(shared.load_kernel("1", 0, kernel))
    root = esper.wrap(nn.Linear(8, 8), registry=str(tmp_path))
    assert asyncio.run(root.load_kernel("root", 0, kernel))
