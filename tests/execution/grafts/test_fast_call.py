"""The call of a bank in C gives what Python's way gives, and declines wherever Python must look closer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.execution.grafts import GraftSet, bank_kernel
from esper.execution.grafts.bank import Bank

from .helpers import gradients, graft_set, kernel, parameters

pytestmark = pytest.mark.usefixtures("native_calls")

D_IN, D_OUT = 10, 12


def layer(dtype: torch.dtype = torch.float64, tap: str = "input", **extra: Any) -> GraftSet:
    torch.manual_seed(0)
    d_tap = D_IN if tap == "input" else D_OUT
    kernels = {
        0: kernel("lowrank", d_tap, D_OUT, dtype=dtype, tap=tap),
        2: kernel("bottleneck", d_tap, D_OUT, seed=1, dtype=dtype, tap=tap, activation="gelu", bias=True, **extra),
    }
    return graft_set(nn.Linear(D_IN, D_OUT).to(dtype), (0.3, 0.0, 0.6), kernels)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, D_IN, dtype=dtype, requires_grad=True)
    return x, torch.randn(*shape, D_OUT, dtype=dtype, requires_grad=True)


def packed(grafts: GraftSet) -> GraftSet:
    """After a first call, which packs the bank, and one that attaches it."""
    dtype = next(grafts.parameters()).dtype
    grafts(*rows(1, dtype=dtype))
    assert isinstance(grafts._bank, Bank)
    assert grafts._fast is not None
    return grafts


def slowly(grafts: GraftSet, x: Tensor, h: Tensor) -> Tensor:
    assert isinstance(grafts._bank, Bank)
    y = grafts._bank.run(x if grafts._bank.reads_input else h, h, grafts.state_layout.alpha_blend)
    assert y is not None
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5)], ids=str)
def test_same_numbers_and_gradients_as_python(shape: tuple[int, ...], tap: str, dtype: torch.dtype) -> None:
    grafts = packed(layer(dtype, tap))
    x, h = rows(*shape, dtype=dtype)
    y = grafts._fast.run(x, h, grafts.state_layout.alpha_blend)
    expected = slowly(grafts, x, h)
    assert y is not None
    assert torch.equal(y, expected)
    tensors = [x, h, *parameters(grafts)]
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        bare = grafts._fast.run(x, h, grafts.state_layout.alpha_blend)
    assert torch.equal(bare, expected)
    assert not bare.requires_grad


def declines(grafts: GraftSet, x: Tensor, h: Tensor, alpha: Tensor | None = None) -> None:
    assert grafts._fast is not None
    assert grafts._fast.run(x, h, grafts.state_layout.alpha_blend if alpha is None else alpha) is None


class Marked(Tensor):
    pass


class Through(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, h: (x.float(), h),
        lambda x, h: (x, h.float()),
        lambda x, h: (x.bfloat16(), h.bfloat16()),
        lambda x, h: (torch.cat([x, x], 1)[:, :D_IN], h),
        lambda x, h: (x, h.t().contiguous().t()),
        lambda x, h: (x[:0], h[:0]),
        lambda x, h: (x[:2], h),
        lambda x, h: (x[:, :4].contiguous(), h),
        lambda x, h: (x, h[:, :4].contiguous()),
        lambda x, h: (x.to("meta"), h.to("meta")),
        lambda x, h: (x.detach().as_subclass(Marked), h),
        lambda x, h: (x.to_sparse(), h),
        lambda x, h: (x[0, 0], h[0, 0]),
        lambda x, h: (x.to(torch.complex128), h),
        lambda x, h: (None, h),
        lambda x, h: (x, 3.0),
    ],
    ids=[
        "x float32", "h float32", "halves", "x strided", "h strided", "empty", "other rows", "x narrow", "h narrow",
        "meta", "subclass", "sparse", "scalars", "complex", "None", "number",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_python(change: Any) -> None:
    grafts = packed(layer())
    x, h = rows(5)
    declines(grafts, *change(x.detach(), h.detach()))
    assert grafts._fast.run(x, h, grafts.state_layout.alpha_blend) is not None


def test_alphas_of_another_kind_are_left_to_python() -> None:
    grafts = packed(layer())
    declines(grafts, *rows(5), torch.ones(3, dtype=torch.float64))
    declines(grafts, *rows(5), torch.ones(6)[::2])


def test_transformations_are_left_to_python() -> None:
    grafts = packed(layer())
    x, h = (t.detach() for t in rows(5))
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(grafts._fast.run(x, h, grafts.state_layout.alpha_blend) is None)
        return x.sum()

    torch.func.grad(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    with Through():
        look(x)
    assert seen == [True] * 4
    assert grafts._fast.run(x, h, grafts.state_layout.alpha_blend) is not None


def test_other_parameters_are_noticed() -> None:
    grafts = packed(layer())
    x, h = rows(5)
    seed = grafts.get_submodule("seed0.down")
    mine = seed.weight
    seed.weight = nn.Parameter(mine.detach().clone())
    declines(grafts, x, h)
    seed.weight = mine
    assert grafts._fast.run(x, h, grafts.state_layout.alpha_blend) is not None
    mine.data = mine.data.clone()
    declines(grafts, x, h)
    del seed._parameters["weight"]
    declines(grafts, x, h)


def test_a_fault_is_left_to_python_and_contained() -> None:
    grafts = packed(layer())
    x, h = rows(5)
    with torch.no_grad():
        grafts.seed_parameters(0)["up.weight"][3, 1] = torch.nan
    declines(grafts, x, h)
    assert torch.equal(grafts(x, h), h)
    assert grafts.state_layout.fault_flags.tolist() == [1, 0, 0]


def test_large_products_are_left_to_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_kernel, "NATIVE_LIMIT", 4 * 5 * (D_IN + D_OUT))
    grafts = packed(layer())
    assert grafts._fast.run(*rows(5), grafts.state_layout.alpha_blend) is not None
    declines(grafts, *rows(6))


def test_frozen_seeds_are_attached_when_they_thaw() -> None:
    grafts = layer()
    for parameter in grafts.parameters():
        parameter.requires_grad_(False)
    packed(grafts)
    x, h = rows(5)
    y = grafts._fast.run(x, h, grafts.state_layout.alpha_blend)
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert torch.count_nonzero(gx)
    thawed = grafts.seed_parameters(2)["up.weight"]
    thawed.requires_grad_(True)
    declines(grafts, x, h)  # Python attaches
    grafts(x, h).sum().backward()
    assert torch.count_nonzero(thawed.grad)
    assert grafts._fast.run(x, h, grafts.state_layout.alpha_blend) is not None
    assert grafts.seed_parameters(0)["up.weight"].grad is None


def test_parameters_moved_on_before_the_backward_are_reported() -> None:
    grafts = packed(layer())
    y = grafts._fast.run(*rows(5), grafts.state_layout.alpha_blend)
    with torch.no_grad():
        parameters(grafts)[0].add_(1)
    with pytest.raises(RuntimeError, match="call the optimizer after backward"):
        y.sum().backward()


def test_nothing_is_kept_alive() -> None:
    grafts = packed(layer())
    bank = weakref.ref(grafts._bank)
    gc.disable()
    try:
        grafts._forget_bank()
        # No cycle: a bank's memory must not wait for the collector.
        assert bank() is None
    finally:
        gc.enable()


def test_references_are_counted() -> None:
    import sys

    grafts = packed(layer())
    x, h = rows(5)
    alpha = grafts.state_layout.alpha_blend
    objects = [x, h, alpha, grafts._bank, *parameters(grafts), None, True, False]
    for _ in range(3):
        grafts._fast.run(x, h, alpha)
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        grafts._fast.run(x, h, alpha)
        with torch.no_grad():
            grafts._fast.run(x, h, alpha)
        grafts._fast.run(x[:2], h, alpha)
    after = [sys.getrefcount(o) for o in objects]
    assert all(abs(a - b) < 20 for a, b in zip(after, before, strict=True)), (before, after)


def test_wrong_calls_are_refused() -> None:
    grafts = packed(layer())
    with pytest.raises(TypeError, match="x, h and alpha"):
        grafts._fast.run(*rows(5))
    with pytest.raises(TypeError):
        type(grafts._fast.run.__self__)(1, 2)
