"""Calls whose tensors a seed cannot run on: the layer goes on as its host, the third step in a row ends the seed."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper import SeedLifecycleState
from esper.contracts.errors import ShapeMismatchError

from .helpers import graft_set, kernel

#: Kernels by the way that they run: as a bank, joined products, vectors, and node by node.
NAMES = ("lowrank", "bottleneck", "gated", "dense", "elementwise", "normed_bottleneck")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    torch._dynamo.reset()


class Shared(nn.Module):
    """One activation for features of two widths, as ResNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.wide = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        return self.act(self.b(y)) if self.wide else y


def woken(host: nn.Module, layer: str, name: str, x: Tensor | None, width: int = 8, **params: Any) -> Any:
    """A model with a seed of this kernel awake, after it has seen ``x``."""
    torch.manual_seed(0)
    model = esper.wrap(host, [layer], telemetry_enabled=False)
    if x is not None:
        model(x)
    if "rank" in esper.blueprints.get(name).parameters:
        params.setdefault("rank", 2)
    made = esper.compile(name, d_in=width, d_out=width, registry=None, **params)
    assert asyncio.run(model.load_kernel(layer, 0, made, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_(std=0.3)
    return model


def state(model: Any, layer: str) -> SeedLifecycleState:
    found: SeedLifecycleState = model.layer(layer).state_layout.state_of(0)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_of_two_widths_loses_its_seed_and_nothing_else(name: str) -> None:
    x = torch.randn(5, 8)
    model = woken(Shared(), "act", name, x)
    host = model.original_model
    narrow = model.wrapped_model.act(x)
    assert not torch.equal(narrow, x.relu())
    for _ in range(2):
        assert torch.equal(model.wrapped_model.act(torch.ones(5, 16)), torch.ones(5, 16))
        model(x).sum().backward()
        model.step()
        assert state(model, "act") is SeedLifecycleState.ACTIVE
    model(x)
    model.step()
    assert state(model, "act") is SeedLifecycleState.ERROR_RECOVERY
    reason = model.get_layer_stats("act")["errors"][0]
    assert "ReLU" in reason and "8" in reason and "(5, 16)" in reason
    assert torch.equal(model(x), host(x))


def test_a_stray_call_is_not_held_against_a_seed_for_good() -> None:
    x = torch.randn(5, 8)
    model = woken(Shared(), "act", "lowrank", x)
    for turn in range(9):
        model.wrapped_model.wide = turn % 3 != 0
        model(x)
        model.step()
    assert state(model, "act") is SeedLifecycleState.ACTIVE
    assert model.layer("act").grafts.reason_of(0) is not None
    model.wrapped_model.wide = False
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.fill_(torch.nan)
    for _ in range(3):
        model(x)
        model.step()
    # The reason is that of the faults that were counted.
    assert "non-finite" in model.get_layer_stats("act")["errors"][0]


@pytest.mark.parametrize("shapes", [((2, 4, 5, 5), (2, 4)), ((2, 4, 5, 5), (2, 4, 5)), ((2, 4, 5, 5), (2, 3, 5, 5))])
def test_images_first_and_something_else_then(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    first, then = (torch.randn(shape) for shape in shapes)
    model = woken(nn.Sequential(nn.ReLU()), "0", "conv", first, width=4)
    assert not torch.equal(model(first), first.relu())
    for _ in range(3):
        assert torch.equal(model(then), then.relu())
        model.step()
    assert state(model, "0") is SeedLifecycleState.ERROR_RECOVERY
    assert str(shapes[1]) in model.get_layer_stats("0")["errors"][0]


def test_seeds_that_fit_are_not_blamed_for_one_that_does_not() -> None:
    grafts = graft_set(nn.ReLU(), (0.5, 0.5), {0: kernel("lowrank", 4, 4), 1: kernel("conv", 4, 4)})
    image, row = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    grafts(image, image)
    assert torch.equal(grafts(row, row), row)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1]


def test_more_dimensions_than_a_convolution_has() -> None:
    grafts = graft_set(nn.ReLU(), (0.5,), {0: kernel("lowrank", 4, 4)})
    image, volume = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    grafts(image, image)
    y = grafts(volume, volume)
    assert grafts.state_layout.fault_flags.tolist() == [0]
    torch.testing.assert_close(y[:, :, 1], grafts(volume[:, :, 1], volume[:, :, 1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_a_batch_norm_over_rows_takes_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match=r"images .* BatchNorm1d lie in \[N, C\]"):
        graft_set(nn.BatchNorm1d(4), (0.5,), {0: kernel("conv", 4, 4)})
    x = torch.randn(shape, dtype=torch.float64)
    grafts = graft_set(nn.BatchNorm1d(4).double(), (0.5,), {0: kernel("lowrank", 4, 4)})
    assert not torch.equal(grafts(x, x), x)


def test_a_run_that_trains_seeds_alone_goes_on() -> None:
    x = torch.randn(5, 8)
    model = woken(Shared().requires_grad_(False), "act", "lowrank", x)
    model(x)  # which decides the width
    wide = torch.randn(5, 16)
    model.wrapped_model.act(wide).sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.graft_parameters().values())
    with torch.no_grad():
        assert torch.equal(model.wrapped_model.act(wide), wide.relu())


@pytest.mark.parametrize("name", ["lowrank", "elementwise", "normed_bottleneck"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_breaks_and_once(name: str, dynamic: bool, backend: str) -> None:
    x = torch.randn(5, 8)
    model = woken(Shared(), "act", name, x)
    expected = model(x)
    model.layer("act").state_layout.fault_flags.zero_()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    counters.clear()
    for rows in (5, 6, 7) if dynamic else (5, 5, 5):
        y = compiled(torch.randn(rows, 8) if rows != 5 else x)
        if rows == 5:
            torch.testing.assert_close(y, expected)
        y.sum().backward()
        model.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert state(model, "act") is SeedLifecycleState.ERROR_RECOVERY
    assert "another shape" in model.get_layer_stats("act")["errors"][0]


@pytest.mark.parametrize("trace", [
    lambda model, x: torch.jit.trace(model, (x,), check_trace=False)(x),
    lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    lambda model, x: torch.func.vmap(model)(x[None])[0],
], ids=["jit", "functional_call", "vmap"])  # fmt: skip
def test_whoever_looks_on(trace: Callable[[Any, Tensor], Tensor]) -> None:
    x = torch.randn(5, 8)
    model = woken(Shared(), "act", "dense", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traces in general, and of shapes that are compared
        y = trace(model, x)
    torch.testing.assert_close(y, model(x))


def nested(layout: torch.layout) -> Tensor:
    pieces = [torch.ones(2, 8), torch.ones(3, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the strided layout is in prototype stage
        return torch.nested.nested_tensor(pieces, layout=layout)


#: Inputs that a host takes and seeds do not: the host, what it is called with, and a word of the reason.
ODD: list[tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = [
    (lambda: nn.Linear(8, 8), lambda: nested(torch.strided), "nested"),
    (lambda: nn.Linear(8, 8), lambda: nested(torch.jagged), "nested"),
    (nn.ReLU, lambda: nested(torch.strided), "nested"),
    (lambda: nn.LayerNorm(8), lambda: nested(torch.jagged), "nested"),
    (lambda: nn.Linear(8, 8), lambda: torch.eye(8).to_sparse_csr(), "sparse_csr"),
    (lambda: nn.Linear(8, 8), lambda: torch.eye(8).to_mkldnn(), "mkldnn"),
    (nn.ReLU, lambda: torch.arange(16).view(2, 8), "int64"),
    (nn.ReLU, lambda: torch.tensor(3.0), "single number"),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("seen", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", ["lowrank", "dense"])
@pytest.mark.parametrize(("host", "x", "reason"), ODD)
def test_tensors_of_other_kinds(
    host: Callable[[], nn.Module], x: Callable[[], Tensor], reason: str, name: str, seen: bool
) -> None:
    model = woken(nn.Sequential(host()), "0", name, None)
    if seen:
        model(torch.randn(3, 8))  # packs the seeds
        assert model.layer("0").grafts._bank is None or name == "lowrank"
    odd = x()
    expected = model.original_model(odd)
    for _ in range(3):
        y = model(odd)
        assert type(y) is type(expected) and y.layout is expected.layout
        torch.testing.assert_close(_dense(y), _dense(expected), rtol=0, atol=0)
        model.step()
    assert state(model, "0") is SeedLifecycleState.ERROR_RECOVERY
    assert reason in model.get_layer_stats("0")["errors"][0]


def _dense(t: Tensor) -> Tensor:
    if t.is_nested:
        return torch.cat(list(t.unbind()))
    return t if t.layout is torch.strided else t.to_dense()


@pytest.mark.parametrize(("host", "x", "reason"), ODD[:4] + ODD[-1:])
def test_a_probe_leaves_them_alone(host: Callable[[], nn.Module], x: Callable[[], Tensor], reason: str) -> None:
    model = esper.wrap(nn.Sequential(host()), ["0"])
    model.monitor.sample_now()
    odd = x()
    torch.testing.assert_close(_dense(model(odd)), _dense(model.original_model(odd)), rtol=0, atol=0)
    model.step()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "params", "runs"), [
    ("lowrank", {}, True), ("elementwise", {}, True), ("bottleneck", {"activation": "tanh"}, True),
    ("bottleneck", {"activation": "silu"}, False), ("gated", {}, False), ("normed_bottleneck", {}, False),
])  # fmt: skip
def test_complex_numbers(name: str, params: dict[str, Any], runs: bool, compiled: bool) -> None:
    x = torch.randn(5, 8, dtype=torch.complex64)
    model = woken(nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), "0", name, None, **params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers warn of complex numbers
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for _ in range(3):
            y = call(x)
            y.abs().sum().backward()
            model.step()
    assert torch.equal(y, model.original_model(x)) != runs
    assert state(model, "0") is (SeedLifecycleState.ACTIVE if runs else SeedLifecycleState.ERROR_RECOVERY)
    if not runs:
        assert "complex" in model.get_layer_stats("0")["errors"][0]
