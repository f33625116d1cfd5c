"""The backward of a bank in C gives what Python's gives, bit for bit, and hands over where Python must look closer."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.execution.grafts import GraftSet, bank

from .helpers import graft_set, kernel, parameters

pytestmark = pytest.mark.usefixtures("native_calls")

D_IN, D_OUT = 10, 12
DTYPE = torch.float64


def layer(alphas: tuple[float, ...] = (0.3, 0.5, 0.6), dtype: torch.dtype = DTYPE, **extra: Any) -> GraftSet:
    """Seeds of unlike ranks, two with an activation, one of them with a bias; packed and attached."""
    torch.manual_seed(0)
    width = D_OUT // len(alphas) if extra.get("scope") == "chunk" else D_OUT
    kernels = {
        0: kernel("lowrank", D_IN, width, dtype=dtype, rank=3, **extra),
        1: kernel("bottleneck", D_IN, D_OUT, seed=1, dtype=dtype, activation="gelu", bias=True),
        2: kernel("bottleneck", D_IN, D_OUT, seed=2, dtype=dtype, activation="tanh", bias=False),
    }
    grafts = graft_set(torch.nn.Linear(D_IN, D_OUT).to(dtype), alphas, kernels)
    for _ in range(2):
        grafts(*rows(1, dtype))
    assert grafts._fast is not None
    return grafts


def rows(n: int = 5, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, D_IN, dtype=dtype, requires_grad=True)
    return x, torch.randn(n, D_OUT, dtype=dtype, requires_grad=True)


class Counter:
    """How often Python's backwards ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = {"_Run": 0, "_Gather": 0}
        for name in self.calls:
            self._count(monkeypatch, name)

    def _count(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        function = getattr(bank, name)
        original = function.backward

        def counted(ctx: Any, grad: Tensor) -> Any:
            self.calls[name] += 1
            return original(ctx, grad)

        monkeypatch.setattr(function, "backward", staticmethod(counted))


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def both(grafts: GraftSet, x: Tensor, h: Tensor, wanted: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """The gradients by the native backward and by Python's."""
    weight = torch.randn(h.shape, dtype=h.dtype)
    alpha = grafts.state_layout.alpha_blend
    native = grafts._fast.run(x, h, alpha)
    slow = grafts._bank.run(x if grafts._bank.reads_input else h, h, alpha)
    assert native is not None
    found = [torch.autograd.grad(y, wanted, weight, allow_unused=True) for y in (native, slow)]
    return list(found[0]), list(found[1])


def equal(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "extra", [{}, {"scope": "chunk"}, {"mode": "replace"}, {"scope": "chunk", "mode": "replace"}], ids=str
)
@pytest.mark.parametrize("alphas", [(0.3, 0.5, 0.6), (1.0, 0.0, 0.4), (0.0, 0.0, 0.2)], ids=str)
def test_bit_for_bit_as_python(
    alphas: tuple[float, ...], extra: dict[str, Any], dtype: torch.dtype, python: Counter
) -> None:
    grafts = layer(alphas, dtype, **extra)
    x, h = rows(5, dtype)
    equal(*both(grafts, x, h, [x, h, *parameters(grafts)]))
    # The buffer's gradient is cut by the same native method for both.
    assert python.calls == {"_Run": 1, "_Gather": 0}


@pytest.mark.parametrize("which", ["x", "h", "weights", "x and h", "x and weights"])
def test_only_what_is_wanted(which: str, python: Counter) -> None:
    grafts = layer()
    x, h = rows()
    x.requires_grad_("x" in which.split())
    h.requires_grad_("h" in which.split())
    for parameter in parameters(grafts):
        parameter.requires_grad_("weights" in which)
    wanted = [t for t in (x, h, *parameters(grafts)) if t.requires_grad]
    equal(*both(grafts, x, h, wanted))
    assert python.calls["_Run"] == 1


def test_a_frozen_parameter_gets_nothing_and_its_neighbours_their_own(python: Counter) -> None:
    grafts = layer()
    everything = parameters(grafts)
    x, h = rows()
    weight = torch.randn(h.shape, dtype=DTYPE)
    grafts(x, h).backward(weight)
    expected = [p.grad for p in everything]
    for parameter in everything:
        parameter.grad = None
    everything[1].requires_grad_(False)
    grafts(x, h).backward(weight)
    assert everything[1].grad is None
    for i, parameter in enumerate(everything):
        assert i == 1 or torch.equal(parameter.grad, expected[i])
    assert python.calls == {"_Run": 0, "_Gather": 0}


def test_two_forwards_add_up_and_a_graph_may_be_kept(python: Counter) -> None:
    grafts = layer()
    x, h = rows()
    weight = torch.randn(h.shape, dtype=DTYPE)
    y = grafts(x, h)
    once = torch.autograd.grad(y, parameters(grafts), weight, retain_graph=True)
    again = torch.autograd.grad(y, parameters(grafts), weight)
    together = [grafts(x, h), grafts(x, h)]
    twice = torch.autograd.grad(together, parameters(grafts), [weight, weight])
    for a, b, c in zip(once, again, twice, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a + b, c)
    assert python.calls == {"_Run": 0, "_Gather": 0}


def test_hooks_see_what_they_see_elsewhere(python: Counter) -> None:
    grafts = layer()
    x, h = rows()
    seen: list[Tensor] = []
    down = grafts.seed_parameters(0)["down.weight"]
    down.register_hook(seen.append)
    down.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    y = grafts(x, h)
    node_calls: list[int] = []
    y.grad_fn.register_hook(lambda inputs, outputs: node_calls.append(len(inputs)))
    y.backward(torch.randn(h.shape, dtype=DTYPE))
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert node_calls == [3]
    assert python.calls == {"_Run": 0, "_Gather": 0}


def test_gradients_of_gradients_are_left_to_python(python: Counter) -> None:
    grafts = layer()
    x, h = rows()
    weight = torch.randn(h.shape, dtype=DTYPE)
    (gx,) = torch.autograd.grad(grafts(x, h), x, weight, create_graph=True)
    assert gx.requires_grad
    assert python.calls["_Run"] == 1


@pytest.mark.parametrize("kind", ["all alphas 0", "a strided gradient", "too large"])
def test_what_is_not_plain_is_left_to_python(kind: str, python: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "too large":
        monkeypatch.setattr(bank.bank_kernel, "NATIVE_LIMIT", 100_000)
    grafts = layer((0.0, 0.0, 0.0) if kind == "all alphas 0" else (0.3, 0.5, 0.6))
    x, h = rows(5)
    if kind == "too large":
        x, h = rows(1000)  # forward by the BLAS
    y = grafts(x, h)
    weight = torch.randn(h.shape, dtype=DTYPE)
    y.backward(weight.t().contiguous().t() if kind == "a strided gradient" else weight)
    assert python.calls["_Run"] == 1
    assert torch.equal(h.grad, weight)


def test_an_input_changed_in_place_is_reported() -> None:
    grafts = layer()
    x, h = rows()
    leaf = x * 1.0
    y = grafts(leaf, h)
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


def test_a_second_backward_through_a_freed_graph_is_reported() -> None:
    grafts = layer()
    y = grafts(*rows())
    y.backward(torch.randn(y.shape, dtype=DTYPE))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(torch.randn(y.shape, dtype=DTYPE))


def test_saved_tensors_go_through_their_hooks(python: Counter) -> None:
    grafts = layer()
    x, h = rows()
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i].clone()):
        y = grafts(x, h)
    equal(
        list(torch.autograd.grad(y, [x, h], torch.ones_like(y))),
        list(torch.autograd.grad(grafts(x, h), [x, h], torch.ones_like(y))),
    )
    assert len(kept) == 1
    assert python.calls["_Run"] == 0


def test_references_are_counted() -> None:
    grafts = layer()
    x, h = rows()
    weight = torch.randn(h.shape, dtype=DTYPE)
    objects = [x, h, weight, grafts._bank, grafts._bank.buffer, *parameters(grafts), None, True, False]
    for _ in range(3):
        grafts(x, h).backward(weight)
    gc.collect()  # what earlier tests left behind holds None and True too
    gc.disable()
    try:
        before = [sys.getrefcount(o) for o in objects]
        for _ in range(100):
            grafts(x, h).backward(weight)
            grafts(x, h).sum().backward()
        after = [sys.getrefcount(o) for o in objects]
    finally:
        gc.enable()
    # One too many or too few a call would be a hundred; threads of earlier tests may come and go meanwhile.
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True)), (before, after)
