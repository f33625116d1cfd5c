"""A seed that breaks does not break its layer, and the right seed is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from .helpers import graft_set, kernel, leave_to_the_blas, parameters

FAMILIES = ("lowrank", "bottleneck", "gated", "dense", "elementwise")


def _broken(name, value=math.nan, culprit=1, alphas=(0.3, 0.5, 0.2), **params):
    torch.manual_seed(0)
    grafts = graft_set(
        nn.Linear(6, 6), alphas, {i: kernel(name, 6, 6, seed=i, tap="input", **params) for i in range(3)}
    )
    with torch.no_grad():
        next(iter(grafts.seed_parameters(culprit).values())).view(-1)[0] = value
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    return grafts, x, h


def _call(grafts, x, h, traced):
    if not traced:
        return grafts(x, h)
    return grafts._traced(x, h)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("traced", [False, True])
def test_one_of_three(name, value, traced):
    grafts, x, h = _broken(name, value)
    for _ in range(2):  # the bank, and its absence, from the first call on
        y = _call(grafts, x, h, traced)
        assert torch.equal(y, h)
        assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]
    gx, gh, *rest = torch.autograd.grad(y.sum(), [x, h, *parameters(grafts)], allow_unused=True)
    assert torch.equal(gh, torch.ones_like(gh))
    assert gx is None or not gx.any()
    assert all(g is None or not g.any() for g in rest)


@pytest.mark.parametrize("traced", [False, True])
def test_no_grad(traced):
    grafts, x, h = _broken("lowrank")
    with torch.no_grad():
        assert torch.equal(_call(grafts, x, h, traced), h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_a_broken_host_is_nobodys_fault(traced, tap, mode):
    torch.manual_seed(0)
    grafts = graft_set(nn.Linear(6, 6), (0.3, 0.5), {i: kernel("lowrank", 6, 6, tap=tap, mode=mode) for i in range(2)})
    x, h = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    h[1, 2] = math.nan
    y = _call(grafts, x, h, traced)
    assert not grafts.state_layout.fault_flags.any()
    assert torch.isnan(y[1, 2])
    assert torch.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("traced", [False, True])
def test_a_broken_input_is_nobodys_fault(traced):
    grafts, x, h = _broken("lowrank", value=1.0)
    with torch.no_grad():
        x[2, 0] = math.nan
    y = _call(grafts, x, h, traced)
    assert not grafts.state_layout.fault_flags.any()
    assert torch.isnan(y[2]).all()


@pytest.mark.parametrize("traced", [False, True])
def test_a_fault_is_seen_beside_a_broken_host(traced):
    grafts, x, h = _broken("dense")
    with torch.no_grad():
        h[0, 0] = math.inf
    y = _call(grafts, x, h, traced)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]
    assert torch.equal(y, h)


@pytest.mark.parametrize("traced", [False, True])
def test_an_overflow_that_only_the_sum_has(traced):
    """Two contributions of 0.9 of the largest number are finite, their sum is not; the small third is not to blame."""
    largest = torch.finfo(torch.float64).max
    kernels = {i: kernel("elementwise", 2, 2, seed=i, tap="input") for i in range(3)}
    grafts = graft_set(nn.Linear(2, 2), (1.0, 1.0, 1.0), kernels)
    with torch.no_grad():
        for i, size in enumerate((0.9 * largest, 1.0, 0.9 * largest)):
            for name, p in grafts.seed_parameters(i).items():
                p.fill_(size if name == "scale.weight" else 0.0)
    x = torch.ones(1, 2, dtype=torch.float64)
    h = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(_call(grafts, x, h, traced), h)
    assert grafts.state_layout.fault_flags.tolist() == [1, 0, 1]


@pytest.mark.parametrize("traced", [False, True])
def test_switched_off_seeds_cannot_fault(traced):
    grafts, x, h = _broken("gated", alphas=(0.3, 0.0, 0.2))
    y = _call(grafts, x, h, traced)
    assert not grafts.state_layout.fault_flags.any()
    assert torch.isfinite(y).all()
    assert not torch.equal(y, h)


@pytest.mark.parametrize("traced", [False, True])
def test_depthwise_judges_the_whole_image(traced):
    torch.manual_seed(0)
    host = nn.Conv2d(2, 2, 3, padding=1)
    grafts = graft_set(host, (0.5,), {0: kernel("conv", 2, 2)})
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    h = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 1] = math.nan  # the kernel spreads it over its neighbours, whose own pixels are sound
    y = _call(grafts, x, h, traced)
    assert not grafts.state_layout.fault_flags.any()
    assert torch.isfinite(y[1]).all()


def test_the_layer_recovers():
    grafts, x, h = _broken("lowrank")
    grafts(x, h)
    with torch.no_grad():
        for p in grafts.seed_parameters(1).values():
            p.fill_(0.1)
    grafts.state_layout.fault_flags.zero_()
    assert not torch.equal(grafts(x, h), h)
    assert not grafts.state_layout.fault_flags.any()


def test_large_results_are_scanned_too(monkeypatch):
    leave_to_the_blas(monkeypatch)
    grafts, x, h = _broken("lowrank")
    assert torch.equal(grafts(x, h), h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]


@pytest.mark.parametrize("position", range(67))
def test_the_scan_finds_one_bad_value_anywhere(position):
    """67 = four vectors of 16 and a rest: every lane and the tail."""
    from esper.ops import native

    module = native.load()
    for scan, dtype in ((module.graft_all_finite_f32, torch.float32), (module.graft_all_finite_f64, torch.float64)):
        values = torch.full((67,), torch.finfo(dtype).max, dtype=dtype)
        assert scan(values.data_ptr(), 67)
        for bad in (math.nan, math.inf, -math.inf):
            values[position] = bad
            assert not scan(values.data_ptr(), 67)
