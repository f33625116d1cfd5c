"""A bank on CUDA without Triton, against the reference.

The blend and its backward are CUDA kernels; on a machine without a GPU the reference of these stands in for them, and
the composition around them is what is tested.

Tolerances. In float32 both sides sum the same terms in another order: 64 eps of a tensor's largest value, as in
``test_graft_bank.py``. In halves the composition rounds where the reference does not: each product down, the
activation, its product with the second, what the seed gives, and on the way back the same; so a value has up to six
roundings of half an eps that the other side lacks, and sums of such values as many: 8 eps of the scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esper.ops import registry
from esper.ops.graft import bank_composed, graft_bank, graft_bank_backward, graft_blend, graft_blend_backward

from .test_graft_bank import CHUNKS, DEVICE, FAULTS, HALVES, MIXED, PLAIN, Case, bits

BACKEND = registry.Backend.CUDA


@pytest.fixture(autouse=True)
def composed() -> Iterator[None]:
    """The composition under the name of its backend, around the blend of this device."""
    ops = graft_bank, graft_bank_backward
    kernels = [dict(op._kernels) for op in ops]
    blend = BACKEND if DEVICE == "cuda" else registry.Backend.REFERENCE
    torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
    bank_composed._register(graft_blend.backend(blend), graft_blend_backward.backend(blend))
    yield
    torch.use_deterministic_algorithms(False)
    for op, known in zip(ops, kernels, strict=True):
        op._kernels.clear()
        op._kernels.update(known)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    if want.numel():
        finite = want[torch.isfinite(want)]
        scale = max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
        allowed = (64 if want.dtype is torch.float32 else 8) * torch.finfo(want.dtype).eps * scale
        torch.testing.assert_close(got, want, rtol=0, atol=allowed, equal_nan=True)


def check(case: Case) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    y, faults = case.forward(BACKEND)
    want, expected = case.forward("reference")
    assert faults.tolist() == expected.tolist()
    assert_close(y, want)
    grads = case.backward(BACKEND, faults)
    for got, exact in zip(grads, case.backward("reference", faults), strict=True):
        assert_close(got, exact)
    return y, faults, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("seeds", [PLAIN, MIXED, CHUNKS], ids=["plain", "mixed", "chunks"])
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_numbers(dtype: torch.dtype, seeds: list, gated: bool) -> None:
    check(Case(19, 13, 11, seeds, dtype, activation="silu", gated=gated, bias=True))
    check(Case(19, 13, 11, seeds, dtype, gated=gated))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid"])
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_activations(activation: str, gated: bool) -> None:
    check(Case(9, 7, 11, MIXED, activation=activation, gated=gated, bias=True))


def test_strided_rows_leading_dimensions_and_no_rows() -> None:
    case = Case(12, 10, 8, MIXED)
    wide_x, wide_h = torch.randn(12, 23, device=DEVICE), torch.randn(12, 19, device=DEVICE)
    case.x, case.h, case.gy = wide_x[:, 5:15], wide_h[:, 2:10], wide_h[:, 11:19]
    check(case)
    case.x, case.h, case.gy = (t.unflatten(0, (2, 6)) for t in (case.x, case.h, case.gy))
    check(case)
    check(Case(0, 3, 2, PLAIN, gated=True, bias=True))


def test_all_asleep_is_the_host_bit_for_bit() -> None:
    case = Case(19, 13, 11, MIXED, torch.bfloat16, alphas=[0.0, 0.0, 0.0])
    case.h[4, 1], case.h[5, 1] = -0.0, float("inf")
    case.x[2], case.down[0], case.up[1] = float("nan"), float("inf"), float("nan")
    y, faults, (gx, gh, *weights) = check(case)
    assert torch.equal(bits(y), bits(case.h)) and torch.equal(bits(gh), bits(case.gy))
    assert not faults.any() and not any(g.any() for g in (gx, *weights))


@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_a_sleeping_seed_is_not_read(gated: bool) -> None:
    case = Case(9, 7, 11, MIXED, activation="sigmoid", gated=gated, bias=True, alphas=[0.5, 0.0, 0.25])
    for t in case.weights:
        if t is not None:
            t[3:8] = float("nan")
    y, faults, grads = check(case)
    assert torch.isfinite(y).all() and not faults.any()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_faults(fault: str, gated: bool) -> None:
    case = Case(20, 7, 11, MIXED, gated=gated)
    FAULTS[fault](case)
    y, faults = case.forward(BACKEND)
    assert faults.tolist() == case.forward("reference")[1].tolist()
    assert faults.any() == (fault not in ("host", "input"))
    if faults.any():
        grads = case.backward(BACKEND, faults)
        assert torch.equal(bits(y), bits(case.h)) and torch.equal(grads[1], case.gy)
        assert not any(g.any() for g in (grads[0], *grads[2:]))


def test_only_what_is_wanted() -> None:
    case = Case(9, 7, 11, MIXED, activation="gelu", gated=True, bias=True)
    _, faults, everything = check(case)
    for wants in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = case.backward(BACKEND, faults, *wants)
        flags = [wants[0], wants[1], *[wants[2]] * 5]
        for got, whole, wanted in zip(some, everything, flags, strict=True):
            assert torch.equal(got, whole) if wanted else got.numel() == 0


def test_products_run_in_the_layers_dtype() -> None:
    """Not in float32, for which halves would be copied and the GPU's faster units left alone."""
    seen: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ("mm", "linear")):
                seen.update(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    case = Case(9, 7, 11, MIXED, torch.bfloat16, activation="gelu", gated=True, bias=True)
    with Watch():
        _, faults = case.forward(BACKEND)
        case.backward(BACKEND, faults)
    assert seen == {torch.bfloat16}
