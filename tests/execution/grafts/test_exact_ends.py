"""alpha = 0 is the host and alpha = 1 in replace mode is the seed, bit for bit, whatever stands on the other side."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import interpret

from .helpers import graft_set, kernel, leave_to_the_blas, parameters

SPECIAL = (0.0, -0.0, 1e-310, -3.5, math.inf, -math.inf, math.nan, 1e300)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.int64 if t.dtype is torch.float64 else torch.int32)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _poison(grafts):
    with torch.no_grad():
        for p in parameters(grafts):
            p.fill_(math.nan)


def _host_output():
    return torch.tensor(SPECIAL, dtype=torch.float64).repeat(3, 1).requires_grad_()


@pytest.mark.parametrize("name", ["lowrank", "bottleneck", "gated", "dense", "elementwise", "residual_block"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_alpha_zero_is_the_host(name, mode, poisoned, traced):
    grafts = graft_set(
        nn.Linear(8, 8), (0.0, 0.0), {i: kernel(name, 8, 8, seed=i, mode=mode, tap="input") for i in range(2)}
    )
    if poisoned:
        _poison(grafts)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    h = _host_output()
    grafts(x, h)  # packs and settles the layout
    y = grafts._traced(x, h) if traced else grafts(x, h)
    assert _same(y, h)
    gy = torch.tensor([-0.0, 0.0, 1.0, -1.0, 2.0, 3.0, -0.0, 4.0], dtype=torch.float64).expand(3, 8)
    gx, gh, *rest = torch.autograd.grad(y, [x, h, *parameters(grafts)], gy, allow_unused=True)
    assert _same(gh, gy)
    # The host's own path gives x its gradient; the seeds add nothing to it.
    assert gx is None or not gx.any()
    # Present, so that a run that trains only seeds can start from alpha 0; and zero.
    assert all(g is not None and not g.any() for g in rest)
    assert not grafts.state_layout.fault_flags.any()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("switched_off", [0, 1, 2])
def test_a_seed_that_is_off_is_not_read(switched_off, large, monkeypatch):
    if large:
        leave_to_the_blas(monkeypatch)
    torch.manual_seed(0)
    alphas = [0.25, 0.5, 0.75]
    alphas[switched_off] = 0.0
    kernels = {i: kernel("bottleneck", 8, 8, seed=i) for i in range(3)}
    grafts = graft_set(nn.Linear(8, 8), alphas, kernels)
    without = graft_set(nn.Linear(8, 8), alphas, {i: k for i, k in kernels.items() if i != switched_off})
    with torch.no_grad():
        for p in grafts.seed_parameters(switched_off).values():
            p.fill_(math.nan)
    x, h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64)
    y, expected = grafts(x, h), without(x, h)
    # Without this seed the products have other columns, so the sums may be taken in another order.
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    (gx,), (want,) = torch.autograd.grad(y.sum(), [x]), torch.autograd.grad(expected.sum(), [x])
    torch.testing.assert_close(gx, want, rtol=1e-14, atol=1e-14)
    for s in range(3):
        grads = torch.autograd.grad(
            grafts(x, h).sum(), list(grafts.seed_parameters(s).values()), allow_unused=s == switched_off
        )
        assert all(g is None or (torch.isfinite(g).all() and bool(g.any()) is (s != switched_off)) for g in grads)


@pytest.mark.parametrize("name", ["lowrank", "gated", "dense", "elementwise"])
@pytest.mark.parametrize("traced", [False, True])
def test_alpha_one_is_the_seed_alone(name, traced):
    torch.manual_seed(0)
    grafts = graft_set(nn.Linear(8, 8), (1.0, 0.0), {0: kernel(name, 8, 8, mode="replace", tap="input")})
    x, h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), _host_output()
    grafts(x, h)
    y = grafts._traced(x, h) if traced else grafts(x, h)
    k = interpret.run(grafts.kernel(0).blueprint, grafts.seed_parameters(0), x)
    torch.testing.assert_close(y, k, rtol=1e-14, atol=1e-14)  # the same terms in another order
    gx, gh = torch.autograd.grad(y.sum(), [x, h], retain_graph=True)
    assert not gh.any()
    torch.testing.assert_close(gx, torch.autograd.grad(k.sum(), [x])[0], rtol=1e-14, atol=1e-14)
    assert not grafts.state_layout.fault_flags.any()


@pytest.mark.parametrize("traced", [False, True])
def test_alpha_one_keeps_the_sign_of_zero(traced):
    grafts = graft_set(
        nn.Linear(20, 20), (1.0,), {0: kernel("elementwise", 20, 20, tap="input", mode="replace", shift=False)}
    )
    with torch.no_grad():
        grafts.seed_parameters(0)["scale.weight"].fill_(1.0)
    x = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=torch.float64).repeat(2, 5)
    h = torch.full_like(x, math.nan)
    grafts(x, h)
    assert _same(grafts._traced(x, h) if traced else grafts(x, h), x)


@pytest.mark.parametrize("traced", [False, True])
def test_a_chunk_leaves_the_other_features_alone(traced):
    grafts = graft_set(nn.Linear(8, 8), (1.0, 0.7), {1: kernel("lowrank", 8, 4, mode="replace", scope="chunk")})
    x, h = torch.randn(3, 8, dtype=torch.float64), torch.full((3, 8), -0.0, dtype=torch.float64)
    grafts(x, h)
    y = grafts._traced(x, h) if traced else grafts(x, h)
    assert _same(y[:, :4], h[:, :4])
    assert bool(y[:, 4:].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves(dtype):
    """Half results agree with float64 on the same rounded inputs to a few roundings.

    k is rounded to the dtype after each of its two products, whose terms are O(1): 8 eps covers three roundings
    of values up to 2.5. The blend itself sums in float32 and rounds once.
    """
    torch.manual_seed(0)
    kernels = {i: kernel("bottleneck", 8, 8, seed=i, dtype=dtype) for i in range(3)}
    host = nn.Linear(8, 8).to(dtype)
    grafts = graft_set(host, (0.3, 0.0, 0.5), kernels)
    x, h = torch.randn(5, 8).to(dtype), torch.randn(5, 8).to(dtype)
    y = grafts(x, h)
    assert y.dtype is dtype
    wide = {i: kernel("bottleneck", 8, 8, seed=i) for i in range(3)}
    exact = graft_set(nn.Linear(8, 8).double(), (0.3, 0.0, 0.5), wide)
    exact.load_state_dict({k: v.double() for k, v in grafts.state_dict().items()})
    expected = exact(x.double(), h.double())
    assert (y.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1.0)
    grafts.state_layout.alpha_blend.zero_()
    assert torch.equal(grafts(x, h), h)


def test_autocast():
    torch.manual_seed(0)
    host = nn.Linear(8, 8)
    grafts = graft_set(host, (0.5,), {0: kernel("lowrank", 8, 8, dtype=torch.float32)})
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grafts(x, host(x))
    assert y.dtype is torch.bfloat16
    expected = grafts(x, host(x))
    # Two products of 8 and 2 terms of size ~1 in bfloat16 (eps 2**-8).
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in parameters(grafts))
