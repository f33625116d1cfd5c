"""Hosts with a forward of their own: subclasses that take and give other things, and forwards put in front."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import SeedLifecycleState

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
Call = Callable[[Any, Tensor], Any]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    torch._dynamo.reset()


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale + shift


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.norm()


class Clamped(nn.ReLU):
    def forward(self, x: Tensor, top: float) -> Tensor:  # type: ignore[override]
        return super().forward(x).clamp_(max=top)


class OneResult(nn.MultiheadAttention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, tokens, tokens)[0]


class Pooled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.mean(0, keepdim=True))


class Repeated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).repeat(3, 1)


class Named(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"y": super().forward(x)}


class Cropped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[..., 1:]


class Around(nn.Module):
    """A network of one layer, called as ``how`` says."""

    def __init__(self, host: nn.Module, how: Call) -> None:
        super().__init__()
        self.host, self.how = host, how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.host, x)


def by_position(host: Any, x: Tensor) -> Any:
    return host(x, 2.0)


def by_name(host: Any, x: Tensor) -> Any:
    return host(scale=2.0, shift=0.5, x=x)


def plainly(host: Any, x: Tensor) -> Any:
    return host(x)


def named(host: Any, x: Tensor) -> Any:
    return host(x=x)


def woken(host: nn.Module, how: Call = plainly, **params: Any) -> Any:
    torch.manual_seed(0)
    model = esper.wrap(Around(host, how), ["host"], telemetry_enabled=False)
    kernel = esper.compile("lowrank", d_in=8, d_out=8, registry=None, rank=2, **params)
    assert asyncio.run(model.load_kernel("host", 0, kernel, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(std=0.3)
    return model


def seed(model: Any, tap: Tensor) -> Tensor:
    """What the seed adds: half of its contribution."""
    weights = model.layer("host").grafts.seed_parameters(0)
    return 0.5 * tap @ weights["down.weight"].t() @ weights["up.weight"].t()


#: float32 sums of some ten products of order one.
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [by_position, by_name, plainly, named])
@pytest.mark.parametrize("tap", ["input", "output"])
def test_arguments_go_to_the_host_and_the_first_to_the_seeds(how: Call, tap: str) -> None:
    model = woken(Scaled(8, 8), how, tap=tap)
    h = model.original_model(X)
    expected = h + seed(model, X if tap == "input" else h)
    close(model(X), expected)
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for backend in ("aot_eager", "inductor"):
        close(torch.compile(model, fullgraph=True, backend=backend)(X), expected)
    close(torch.func.functional_call(model, dict(model.named_parameters()), (X,)), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(X), expected)
    asyncio.run(model.unload_kernel("host", 0))
    assert torch.equal(model(X), h)
    assert "forward" not in model.wrapped_model.host.__dict__


@pytest.mark.parametrize("awake", [False, True])
def test_probes_see_it_too(awake: bool) -> None:
    model = woken(Scaled(8, 8), by_name)
    if not awake:
        asyncio.run(model.unload_kernel("host", 0))
    model.enable_telemetry()
    expected = model(X)
    model.monitor.sample_now()
    close(model(X), expected)
    assert model.monitor.stats()["samples"] == 1


def test_the_first_of_a_tuple_is_the_output() -> None:
    model = woken(Pair(8, 8))
    h, norm = model.original_model(X)
    y, rest = model(X)
    close(y, h + seed(model, X))
    assert torch.equal(rest, norm)


def test_an_activation_and_an_attention() -> None:
    model = woken(Clamped(inplace=True), by_position_of(1.0))
    before = X.clone()
    close(model(before), X.relu().clamp(max=1.0) + seed(model, X))
    assert torch.equal(before, X)  # its seeds are to read it
    model = woken(OneResult(8, 2, batch_first=True))
    x = X[None]
    close(model(x), model.original_model(x) + seed(model, x))


def by_position_of(value: float) -> Call:
    return functools.partial(_with, value)


def _with(value: float, host: Any, x: Tensor) -> Any:
    return host(x, value)


@pytest.mark.parametrize(
    "host", [Pooled(8, 8), Repeated(8, 8), Named(8, 8), Cropped(8, 8, 1)], ids=lambda h: type(h).__name__
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_of_another_size_or_kind_is_the_hosts(host: nn.Module, compiled: bool) -> None:
    torch._dynamo.reset()
    model = woken(host)
    x = X[None, :, :, None].permute(0, 2, 1, 3).expand(1, 8, 5, 4) if isinstance(host, nn.Conv2d) else X
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(3):
        torch.testing.assert_close(call(x), model.original_model(x))
        model.step()
    layer = model.layer("host")
    assert layer.state_layout.state_of(0) is SeedLifecycleState.ERROR_RECOVERY
    assert type(host).__name__ in layer.get_layer_stats()["errors"][0]


def test_a_probe_passes_over_what_is_no_tensor() -> None:
    model = esper.wrap(Around(Named(8, 8), plainly), ["host"])
    model.monitor.sample_now()
    assert torch.equal(model(X)["y"], model.original_model(X)["y"])


def test_a_forward_that_was_put_in_front_takes_what_it_takes() -> None:
    host = nn.Linear(8, 8)
    host.forward = lambda data, scale: nn.Linear.forward(host, data) * scale  # type: ignore[assignment,misc]
    torch.manual_seed(0)
    model = esper.wrap(Around(host, lambda host, x: host(scale=2.0, data=x)), ["host"], preserve_original=False)
    h = model(X)
    kernel = esper.compile("lowrank", d_in=8, d_out=8, registry=None, rank=2)
    assert asyncio.run(model.load_kernel("host", 0, kernel, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(std=0.3)
    close(model(X), h + seed(model, X))


def test_the_linear_layer_of_transformers_by_name() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = woken(utils.Conv1D(8, 8), named)
    close(model(X), model.original_model(X) + seed(model, X))
