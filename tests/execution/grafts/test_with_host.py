"""A Linear host and its seeds as one operation, as on a GPU: the same numbers as one after the other.

As in ``test_fused.py`` the layer is made to believe that its device has the operations, and the reference runs them in
float64; Triton's kernel for it is compared with that reference in ``tests/ops/test_linear.py``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.execution import fused_host
from esper.execution.grafts import GraftSet, fused
from esper.execution.grafts.device_bank import DeviceBank
from esper.ops.choices import Choices
from esper.ops.linear import fused_linear, measure
from esper.ops.linear.triton import choice_key

from .helpers import gradients, graft_set, kernel, parameters

D_IN, D_OUT, ROWS = 5, 7, 6


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "serves", lambda device: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the operation had."""
    made: list[int] = []
    real = fused_linear.resolve("cpu")

    def count(x: Tensor, *args: Any) -> Any:
        made.append(x.numel() // x.shape[-1])
        return real(x, *args)

    monkeypatch.setitem(fused_linear._chosen, "cpu", count)
    return made


def layer(name: str = "bottleneck", host: nn.Linear | None = None, **options: Any) -> tuple[nn.Linear, GraftSet]:
    torch.manual_seed(0)
    host = nn.Linear(D_IN, D_OUT).double() if host is None else host
    d_tap = D_OUT if options.get("tap") == "output" else D_IN
    kernels = {i: kernel(name, d_tap, D_OUT, seed=i, rank=i + 2, **options) for i in range(2)}
    grafts = graft_set(host, (0.3, 0.6), kernels)
    with torch.no_grad():
        grafts(torch.randn(1, D_IN, dtype=torch.float64), torch.randn(1, D_OUT, dtype=torch.float64))
    assert isinstance(grafts._bank, DeviceBank), "packed at the first call"
    return host, grafts


@pytest.mark.parametrize("name", ["lowrank", "bottleneck"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (2, 3), ()])
def test_the_same_numbers_and_gradients(name: str, mode: str, bias: bool, shape: tuple[int, ...]) -> None:
    host, grafts = layer(name, nn.Linear(D_IN, D_OUT, bias=bias).double(), mode=mode)
    x = torch.randn(*shape, D_IN, dtype=torch.float64, requires_grad=True)
    one = grafts.with_host(x, host.weight, host.bias)
    assert one is not None
    other = grafts(x, host(x))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    tensors = [x, *host.parameters(), *parameters(grafts)]
    for got, want in zip(gradients(one, tensors), gradients(other, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    with torch.no_grad():
        still = grafts.with_host(x, host.weight, host.bias)
    assert still is not None and torch.equal(still, one)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gated", {}), ("normed_bottleneck", {}), ("bottleneck", {"tap": "output"})],
    ids=["gated", "normed", "of the output"],
)
def test_what_has_no_such_operation(name: str, options: dict[str, Any]) -> None:
    host, grafts = layer(name, **options)
    assert grafts.bank_of_seeds is None
    assert grafts.with_host(torch.randn(ROWS, D_IN, dtype=torch.float64), host.weight, host.bias) is None


def test_other_dtypes_and_parameters_that_moved() -> None:
    host, grafts = layer()
    x = torch.randn(ROWS, D_IN, dtype=torch.float64)
    assert grafts.with_host(x.float(), host.weight, host.bias) is None
    assert grafts.with_host(x, host.weight.float(), host.bias) is None
    assert grafts.with_host(x, host.weight, host.bias) is not None
    moved = parameters(grafts)[0]
    moved.data = moved.data.clone()
    assert grafts.with_host(x, host.weight, host.bias) is None


def test_a_fault_gives_the_host_and_its_gradients() -> None:
    host, grafts = layer()
    with torch.no_grad():
        parameters(grafts)[0].fill_(float("nan"))
    x = torch.randn(ROWS, D_IN, dtype=torch.float64, requires_grad=True)
    y, bare = grafts.with_host(x, host.weight, host.bias), host(x)
    assert y is not None
    torch.testing.assert_close(y, bare, rtol=0, atol=1e-12)
    assert grafts.state_layout.fault_flags.tolist() == [1, 0]
    tensors = [x, *host.parameters()]
    for got, want in zip(gradients(y, tensors), gradients(bare, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_writing_to_a_parameter_before_the_backward_is_refused() -> None:
    host, grafts = layer()
    x = torch.randn(ROWS, D_IN, dtype=torch.float64)
    y = grafts.with_host(x, host.weight, host.bias)
    assert y is not None
    with torch.no_grad():
        parameters(grafts)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        y.sum().backward()


# -- in a model


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choices:
    own = Choices(tmp_path / "choices")
    monkeypatch.setattr(measure, "CHOICES", own)
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    return own


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, choices: Choices) -> list[tuple[int, ...]]:
    """Which cases were measured. Measuring needs a GPU; here one kernel is always found to be fastest."""
    cases: list[tuple[int, ...]] = []

    def stand_in(rows: int, d_in: int, d_out: int, **about: Any) -> dict[str, float]:
        cases.append((rows, d_in, d_out, about["ranks"]))
        x, weight = torch.empty(rows, d_in, dtype=about["dtype"]), torch.empty(d_out, d_in, dtype=about["dtype"])
        bias = torch.empty(d_out) if about["bias"] else None
        key = choice_key(x, weight, bias, None, about["ranks"], about["graft_activation"], False, False)
        choices.put(key, "inline", torch.device("cpu"))
        return {}

    monkeypatch.setattr(fused_host, "tune_linear", stand_in)
    return cases


def grown() -> esper.MorphableModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.ReLU(), nn.Linear(D_OUT, D_IN))
    model = esper.wrap(host, telemetry_enabled=False)
    for seed_idx in range(2):
        artifact_id = esper.compile("lowrank", d_in=D_IN, d_out=D_OUT, rank=2, registry=None, seed=seed_idx)
        assert asyncio.run(model.load_kernel("0", seed_idx, artifact_id, alpha=0.5))
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_model_takes_what_was_measured(calls: list[int], measured: list[tuple[int, ...]]) -> None:
    model = grown()
    x = torch.randn(ROWS, D_IN)
    before = model(x)
    assert calls == [], "nothing was measured, so the host's product comes first"
    assert model.tune(ROWS) == {"0": {4: "inline"}}, "of two layers one is awake"
    assert measured == [(ROWS, D_IN, D_OUT, 4)]
    # float32: the same sums in another order.
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert calls == [ROWS]
    model(torch.randn(ROWS + 2, D_IN))
    assert calls == [ROWS, ROWS + 2], "up to the next power of two"
    model(torch.randn(ROWS + 3, D_IN))
    assert calls == [ROWS, ROWS + 2], "other sizes were not measured"
    assert model.tune(ROWS) == {"0": {4: "inline"}} and len(measured) == 1, "what is known is not measured again"
    assert grown().tune(ROWS, ranks=[2, 4]) == {"0": {2: "inline", 4: "inline"}, "2": {2: "inline", 4: "inline"}}
    assert [case[3] for case in measured] == [4, 2, 2, 4]
    executions = model.get_layer_stats("0")["total_kernel_executions"]
    model(x)
    assert model.get_layer_stats("0")["total_kernel_executions"] == executions + 1


def test_autocast_and_other_forwards_go_the_other_way(calls: list[int], measured: list[tuple[int, ...]]) -> None:
    model = grown()
    x = torch.randn(ROWS, D_IN)
    model(x)
    model.tune(ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls == []
    host = nn.Linear(D_IN, D_OUT)
    host.forward = lambda x: nn.Linear.forward(host, x)  # type: ignore[method-assign]
    assert esper.wrap(nn.Sequential(host), telemetry_enabled=False, preserve_original=False).tune(ROWS, [2]) == {}
    assert esper.wrap(nn.Sequential(nn.Linear(D_IN, D_OUT)), reserve_rank=2).tune(ROWS, [2]) == {}
    assert len(measured) == 1


def test_without_a_gpu_there_is_nothing_to_measure(choices: Choices) -> None:
    with pytest.raises(RuntimeError, match="measured on a GPU, and cpu is none"):
        grown().tune(ROWS)
