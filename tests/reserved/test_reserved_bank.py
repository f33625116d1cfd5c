"""Awake seeds of reserved memory as one bank on the CPU: who takes it, its gradients, and whose memory is whose."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.execution.grafts import ReservedGraftSet, fused
from esper.execution.grafts.reserved_bank import ReservedBank
from esper.ops.graft import graft_bank
from tests.execution.grafts.helpers import gradients, graft_set, kernel, leave_to_the_blas
from tests.reserved.test_reserved_grafts import (
    CHUNK,
    D_IN,
    D_OUT,
    SETS,
    act,
    compare,
    eagerly,
    linear,
    low,
    reserved,
    rows,
)


def banked(grafts: ReservedGraftSet, x: Tensor, h: Tensor) -> Tensor:
    y = grafts(x, h)
    assert isinstance(grafts._bank, ReservedBank)
    return y


@pytest.mark.parametrize("large", [False, True], ids=["native", "blas"])
@pytest.mark.parametrize("name", SETS)
def test_rows_run_as_a_bank(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        leave_to_the_blas(monkeypatch)
    alphas, kernels = SETS[name]
    host = linear()
    x, h = rows(host, 5, D_IN)
    compare(graft_set(host, alphas, kernels), reserved(host, alphas, kernels), banked, x, h)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_and_their_gradients(bias: bool) -> None:
    host = nn.Linear(5, 6).double()
    kernels = {
        0: act("gelu", 0, d_in=5, d_out=6, bias=bias),
        1: act("tanh", 1, d_in=5, d_out=6, mode="replace", rank=1),
        3: low(2, d_in=5, d_out=6 - 6 * 3 // 4, scope="chunk"),
    }
    grafts = reserved(host, [0.3, 0.6, 0.0, 0.9], kernels, rank=3)
    x, h = rows(host, 3, 5)
    parameters = [p for i in grafts.bound for p in grafts.seed_parameters(i).values()]
    assert torch.autograd.gradcheck(lambda x, h, *_: banked(grafts, x, h), (x, h, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, h, *_: banked(grafts, x, h), (x, h, *parameters))


def test_what_is_awake_changes_and_the_bank_follows() -> None:
    host = linear()
    grafts = reserved(host, [0.5, 0.4, 0.3, 0.2], {0: low(0)})
    x, h = rows(host, 5, D_IN)
    kernels: dict[int, Any] = {0: low(0)}
    for seed_idx, change in [(2, act("relu", 1)), (0, None), (3, low(3, d_out=CHUNK, scope="chunk")), (2, low(4))]:
        if change is None:
            grafts.unbind(seed_idx)
            del kernels[seed_idx]
        else:
            grafts.bind(seed_idx, change)
            kernels[seed_idx] = change
        compare(graft_set(host, [0.5, 0.4, 0.3, 0.2], kernels), grafts, banked, x, h)


def test_a_backward_uses_the_weights_of_its_forward() -> None:
    host = linear()
    kernels = {0: low(0), 1: act("gelu", 1)}
    grafts = reserved(host, [0.5, 0.4], kernels)
    x, h = rows(host, 5, D_IN)
    parameters = [p for i in grafts.bound for p in grafts.seed_parameters(i).values()]
    tensors = [x, h, *parameters]
    expected = gradients(banked(grafts, x, h), tensors)
    y = banked(grafts, x, h)
    # A loss of its own: `gradients` reads y, which must not change with the weights either.
    loss = (y * y * 0.5 + y).sum()
    with torch.no_grad():
        for p in parameters:
            p.add_(1.0)
    for got, want in zip(torch.autograd.grad(loss, tensors, retain_graph=True), expected, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="call the optimizer after backward"):
        torch.autograd.grad(loss, tensors, create_graph=True)


def test_the_host_of_a_seed_that_is_off_stays_off_in_the_gradient() -> None:
    host = linear()
    grafts = reserved(host, [0.0, 0.5], {0: low(0), 1: low(1)})
    with torch.no_grad():
        grafts.seed0.up.weight.fill_(torch.nan)
    x, h = rows(host, 5, D_IN)
    banked(grafts, x, h).sum().backward()
    for p in grafts.seed0.parameters():
        assert p.grad is None or torch.count_nonzero(p.grad) == 0
    assert torch.isfinite(grafts.seed1.up.weight.grad).all()


def test_frozen_parameters_get_nothing_and_thaw() -> None:
    host = linear()
    grafts = reserved(host, [0.5], {0: act("gelu", 0, bias=True)})
    x, h = rows(host, 5, D_IN)
    grafts.seed0.down.weight.requires_grad_(False)
    banked(grafts, x, h).sum().backward()
    assert grafts.seed0.down.weight.grad is None
    assert grafts.seed0.up.weight.grad is not None
    grafts.seed0.down.weight.requires_grad_(True)
    banked(grafts, x, h).sum().backward()
    assert grafts.seed0.down.weight.grad is not None


def test_functional_call_reads_the_tensors_it_is_given() -> None:
    host = linear()
    grafts = reserved(host, [0.5, 0.7], {0: low(0), 1: act("gelu", 1)})
    x, h = rows(host, 5, D_IN)
    banked(grafts, x, h)
    doubled = {name: 2 * p.detach() for name, p in grafts.named_parameters()}
    y = torch.func.functional_call(grafts, doubled, (x, h))
    other = copy.deepcopy(grafts)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    torch.testing.assert_close(y, eagerly(other, x, h), rtol=0, atol=1e-12)
    assert not torch.equal(y, banked(grafts, x, h))


def test_a_tensor_put_in_a_parameters_place_is_seen() -> None:
    # As FSDP2 does: other memory behind the same parameter, or another parameter.
    host = linear()
    grafts = reserved(host, [0.5], {0: low(0)})
    x, h = rows(host, 5, D_IN)
    before = banked(grafts, x, h)
    grafts.seed0.up.weight.data = 3 * grafts.seed0.up.weight.data
    torch.testing.assert_close(banked(grafts, x, h) - h, 3 * (before - h), rtol=0, atol=1e-12)
    grafts.seed0.up.weight = nn.Parameter(grafts.seed0.up.weight.detach() / 3)
    torch.testing.assert_close(grafts(x, h), before, rtol=0, atol=1e-12)


def test_copies_have_memory_of_their_own() -> None:
    host = linear()
    grafts = reserved(host, [0.5], {0: low(0)})
    x, h = rows(host, 5, D_IN)
    before = banked(grafts, x, h).detach()
    for twin in (copy.deepcopy(grafts), pickle.loads(pickle.dumps(grafts))):
        with torch.no_grad():
            twin.seed0.up.weight.mul_(2)
        torch.testing.assert_close(banked(twin, x, h) - h, 2 * (before - h), rtol=0, atol=1e-12)
        assert torch.equal(banked(grafts, x, h), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_go_another_way_and_come_back(dtype: torch.dtype) -> None:
    host = linear(torch.float32)
    grafts = reserved(host, [0.5], {0: low(0)})
    x = torch.randn(5, D_IN)
    h = host(x).detach()
    y = banked(grafts, x, h)
    grafts.to(dtype)
    halved = grafts(x.to(dtype), h.to(dtype))
    assert grafts._bank is None
    # Weights and inputs are rounded once each, and d_in + rank products of them are summed in wider numbers.
    assert (halved.float() - y).abs().max() < 8 * torch.finfo(dtype).eps * y.abs().max()
    grafts.float()
    banked(grafts, x, h)


def test_a_gpu_runs_what_is_awake_as_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without one: the layer is told that its device has the operations, and the reference runs them."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    calls: list[str] = []
    real = graft_bank.backend("reference")

    def count(*args: Any) -> Any:
        calls.append("graft_bank")
        return real(*args)

    monkeypatch.setitem(graft_bank._kernels, "reference", count)
    graft_bank._chosen.clear()
    try:
        host = linear()
        kernels = {0: act("gelu", 0, rank=3), 2: act("gelu", 1, mode="replace")}
        x, h = rows(host, 5, D_IN)
        expected = graft_set(host, [0.5, 0.0, 0.3], kernels)
        monkeypatch.setattr(fused, "serves", lambda device: False)
        expected(x, h)
        monkeypatch.setattr(fused, "serves", lambda device: True)
        grafts = reserved(host, [0.5, 0.0, 0.3], kernels)
        before = {name: p.data_ptr() for name, p in grafts.named_parameters()}
        compare(expected, grafts, lambda grafts, x, h: grafts._traced(x, h), x, h)
        assert calls
        assert {name: p.data_ptr() for name, p in grafts.named_parameters()} == before
    finally:
        graft_bank._chosen.clear()


def test_images_and_other_families_have_no_bank() -> None:
    host = nn.Conv2d(6, 8, 3, padding=1).double()
    grafts = reserved(host, [0.5], {0: low(0, d_in=6, d_out=8)})
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    grafts(x, host(x).detach())
    assert grafts._bank is None


def test_native_code_refuses_what_does_not_belong_together() -> None:
    grafts = reserved(linear(), [0.5], {0: low(0)})
    x = torch.randn(2, D_IN, dtype=torch.float64)
    banked(grafts, x, torch.randn(2, D_OUT, dtype=torch.float64))
    bank: Any = grafts._bank
    with pytest.raises(ValueError, match="this bank has 1 seeds, not 2"):
        bank._native.reserve(4, [(0, 0, 0), (0, 0, 0)])
    with pytest.raises(ValueError, match="more rows than are reserved"):
        bank._native.reserve(1, [(0, 0, 0)])
    with pytest.raises(ValueError, match="this bank has 1 seeds, not 0"):
        bank._native.scatter(0, [])


def test_kernels_of_another_rank_share_the_bank() -> None:
    host = linear()
    kernels = {i: kernel("lowrank", D_IN, D_OUT, seed=i, rank=rank) for i, rank in enumerate((1, 4, 2, 3))}
    x, h = rows(host, 7, D_IN)
    alphas = [0.1, 0.2, 0.3, 0.4]
    compare(graft_set(host, alphas, kernels), reserved(host, alphas, kernels), banked, x, h)
