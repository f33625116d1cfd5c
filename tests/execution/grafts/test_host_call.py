"""A Linear host and its seeds in one call: the host's own bits, the same gradients as in two, and a way out of every
case that is not plain."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import esper.nn as enn
from esper.execution.grafts import GraftSet, bank
from esper.execution.host_forwards import LATENCY_PERIOD
from esper.execution.kasmina_layer import KasminaLayer

from .helpers import Kernel, kernel, parameters

pytestmark = pytest.mark.usefixtures("native_calls")

D_IN, D_OUT = 10, 12
#: 2100 rows of 64 to 64 pass the limit below which torch's product is called past the dispatcher.
WIDE, MANY = 64, 2100


def kernels(d_in: int, d_out: int, dtype: torch.dtype) -> dict[int, Kernel]:
    return {
        0: kernel("lowrank", d_in, d_out, dtype=dtype, rank=3),
        1: kernel("bottleneck", d_in, d_out, seed=1, dtype=dtype, activation="gelu", bias=True),
    }


def layer_on(host: nn.Module, alphas: tuple[float, ...] = (0.3, 0.6, 0.0)) -> KasminaLayer:
    """A layer around this host, with awake seeds, whose host's forward is the awake one."""
    layer = KasminaLayer.from_host(host, num_seeds=len(alphas))
    dtype = next(host.parameters()).dtype
    d_out, d_in = next(p for p in host.parameters() if p.dim() == 2).shape
    for seed_idx, k in kernels(d_in, d_out, dtype).items():
        assert layer.commit(seed_idx, _Loaded(k), alpha=alphas[seed_idx])
    return layer


class _Loaded:
    """A kernel that is here; everything else is the helper's."""

    def __init__(self, given: Kernel) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def wait_on_current_stream(self) -> None:
        """On a CPU there is nothing to wait for."""


def linear(
    d_in: int = D_IN, d_out: int = D_OUT, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[nn.Linear, KasminaLayer]:
    torch.manual_seed(0)
    host = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    return host, layer_on(host)


class Calls:
    """How many forwards were one call, and how many backwards left C."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = self.declined = self.in_python = 0
        original, backward = bank.Bank.fast_call, bank._RunHost.backward

        def watched(this: bank.Bank) -> bank.FastCall | None:
            made = original(this)
            if made is None:
                return None

            def run_host(*arguments: Any) -> Tensor | None:
                y = made.run_host(*arguments)
                self.whole += y is not None
                self.declined += y is None
                return y

            return bank.FastCall(made.run, run_host, made.elapsed)

        def counted(ctx: Any, gy: Tensor) -> Any:
            self.in_python += 1
            return backward(ctx, gy)

        monkeypatch.setattr(bank.Bank, "fast_call", watched)
        monkeypatch.setattr(bank._RunHost, "backward", staticmethod(counted))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def in_two(layer: KasminaLayer, x: Tensor) -> Tensor:
    """The host's product and then the seeds, each with its own node."""
    host = layer.default_transform
    return layer.grafts(x, F.linear(x, host.weight, host.bias))


def differences(layer: KasminaLayer, x: Tensor, wanted: list[Tensor]) -> Iterator[tuple[Any, Any]]:
    """y and the gradients of both ways."""
    one, two = layer(x), in_two(layer, x)
    gy = torch.randn(one.shape, dtype=one.dtype)
    yield one.detach(), two.detach()
    found = [torch.autograd.grad(y, wanted, gy, allow_unused=True) for y in (one, two)]
    yield from zip(*found, strict=True)


def equal(layer: KasminaLayer, x: Tensor, wanted: list[Tensor]) -> None:
    for one, two in differences(layer, x, wanted):
        assert (one is None) == (two is None)
        assert one is None or (torch.equal(one, two) and one.stride() == two.stride())


SHAPES = [(1,), (7,), (32,), (2, 5), (2, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", [(10, 12), (16, 16), (33, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_in_two(
    shape: tuple[int, ...], widths: tuple[int, int], bias: bool, dtype: torch.dtype, calls: Calls
) -> None:
    host, layer = linear(*widths, bias=bias, dtype=dtype)
    x = torch.randn(*shape, widths[0], dtype=dtype, requires_grad=True)
    equal(layer, x, [x, *host.parameters(), *parameters(layer.grafts)])
    one = x.numel() > 1  # of a single number autograd has another product
    assert (calls.whole, calls.in_python) == (one, 0)
    with torch.no_grad():
        assert torch.equal(layer(x), in_two(layer, x))
    with torch.inference_mode():
        assert torch.equal(layer(x), in_two(layer, x))
    assert calls.whole == 3 * one


@pytest.mark.parametrize("shape", [(MANY,), (3, MANY // 3)], ids=str)
def test_same_bits_where_torch_is_called(shape: tuple[int, ...], calls: Calls) -> None:
    """A product of many rows lets other threads have the interpreter meanwhile."""
    host, layer = linear(WIDE, WIDE, dtype=torch.float32)
    x = torch.randn(*shape, WIDE, requires_grad=True)
    equal(layer, x, [x, *host.parameters(), *parameters(layer.grafts)])
    assert (calls.whole, calls.in_python) == (1, 0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("shape", [*SHAPES, (128,), (MANY,)], ids=str)
def test_the_hosts_part_is_its_own_bits(shape: tuple[int, ...], precision: str, calls: Calls) -> None:
    """Seeds that add nothing: what is left is torch's linear, whatever way it is told to multiply."""
    host, layer = linear(WIDE, WIDE, dtype=torch.float32)
    with torch.no_grad():
        for seed_idx in layer.grafts.bound:
            layer.grafts.seed_parameters(seed_idx)["up.weight"].zero_()
    x = torch.randn(*shape, WIDE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(layer(x), F.linear(x, host.weight, host.bias))
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls.whole == 1


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "seeds", "x weight", "bias seeds", "weight seeds"])
def test_only_what_is_wanted(wanted: str, calls: Calls) -> None:
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad="x" in wanted.split())
    host.weight.requires_grad_("weight" in wanted)
    host.bias.requires_grad_("bias" in wanted)
    seeds = parameters(layer.grafts)
    for parameter in seeds:
        parameter.requires_grad_("seeds" in wanted)
    equal(layer, x, [t for t in (x, host.weight, host.bias, *seeds) if t.requires_grad])
    assert (calls.whole, calls.in_python) == (1, 0)


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("wanted", ["x", "weight", "x weight", "seeds", "everything"])
def test_one_gradient_does_not_cost_the_others(wanted: str, rows: int, calls: Calls) -> None:
    """A node is told what has a gradient, not what this backward wants. Of a large product the engine is asked."""
    host, layer = linear(WIDE, WIDE, dtype=torch.float32)
    x = torch.randn(rows, WIDE, requires_grad=True)
    named = {"x": [x], "weight": [host.weight], "seeds": parameters(layer.grafts)}
    named["everything"] = [x, *host.parameters(), *named["seeds"]]
    some = [t for name in wanted.split() for t in named[name]]
    gy = torch.randn(rows, WIDE)
    for through in ("grad", "inputs"):
        y, expected = layer(x), in_two(layer, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            if through == "grad":
                got = torch.autograd.grad(y, some, gy)
            else:
                y.backward(gy, inputs=some)
                got = tuple(t.grad for t in some)
        for one, two in zip(got, torch.autograd.grad(expected, some, gy), strict=True):
            assert torch.equal(one, two)
        for t in named["everything"]:
            assert t.grad is None or any(t is other for other in some)
            t.grad = None
        products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
        assert products == (2 if rows == 5 or wanted == "everything" else len(set(wanted.split()) & {"x", "weight"}))
    assert calls.in_python == 0


@pytest.mark.parametrize("alphas", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0)], ids=str)
def test_alphas_at_their_ends(alphas: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    host = nn.Linear(D_IN, D_OUT).double()
    layer = layer_on(host, alphas)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    equal(layer, x, [x, *host.parameters(), *parameters(layer.grafts)])
    if not any(alphas):
        y, h = layer(x), F.linear(x, host.weight, host.bias)
        assert torch.equal(y, h)
        for one, two in zip(
            torch.autograd.grad(y.square().sum(), [x, *host.parameters()]),
            torch.autograd.grad(h.square().sum(), [x, *host.parameters()]),
            strict=True,
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("scope", ["chunk", "layer"])
def test_seeds_that_replace(scope: str, calls: Calls) -> None:
    torch.manual_seed(0)
    host = nn.Linear(D_IN, D_OUT).double()
    layer = KasminaLayer.from_host(host, num_seeds=2)
    width = D_OUT // 2 if scope == "chunk" else D_OUT
    given = kernel("lowrank", D_IN, width, rank=3, scope=scope, mode="replace")
    assert layer.commit(1, _Loaded(given), alpha=0.4)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    equal(layer, x, [x, *host.parameters(), *parameters(layer.grafts)])
    assert (calls.whole, calls.in_python) == (1, 0)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_parameters_that_are_not_contiguous(which: str, calls: Calls) -> None:
    """Such a bias is read as it lies; for such a weight autograd has other products, with other bits."""
    torch.manual_seed(0)
    host = nn.Linear(D_IN, D_OUT).double()
    if which == "weight":
        host.weight = nn.Parameter(torch.randn(D_IN, D_OUT, dtype=torch.float64).t())
    else:
        host.bias = nn.Parameter(torch.randn(2 * D_OUT, dtype=torch.float64)[::2])
    layer = layer_on(host)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    equal(layer, x, [x, *host.parameters(), *parameters(layer.grafts)])
    assert calls.whole == (which == "bias")


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


class Through(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around", [Watching, Through, lambda: torch.autocast("cpu", torch.bfloat16), torch.autograd.forward_ad.dual_level]
)
def test_what_watches_or_changes_operations_sees_them(around: Callable[[], Any], calls: Calls) -> None:
    host, layer = linear(dtype=torch.float32)
    x = torch.randn(5, D_IN, requires_grad=True)
    layer(x)
    with around() as mode:
        y, expected = layer(x), in_two(layer, x)
        assert torch.equal(y, expected)
        if isinstance(mode, Watching):
            assert mode.names.count("linear") == 2
        # Autocast keeps its casts of weights: one that was made without a graph would cost the host its gradient.
        wanted = [x, *host.parameters()]
        grads = [torch.autograd.grad(t.float().sum(), wanted) for t in (y, expected)]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))
    assert calls.whole == 1


def test_a_profiler_sees_the_product(calls: Calls) -> None:
    _, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64)
    expected = layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = layer(x)
    assert torch.equal(y, expected)
    assert [event.count for event in profile.key_averages() if event.key == "aten::linear"] == [1]
    assert calls.whole == 2


@pytest.mark.parametrize(
    "change",
    [lambda x: x[0], lambda x: x[:0], lambda x: torch.cat([x, x], 1)[:, :D_IN], lambda x: nn.Parameter(x)],
    ids=["one row without a dimension", "empty", "strided", "a parameter"],
)
def test_inputs_that_are_not_plain(change: Callable[[Tensor], Tensor], calls: Calls) -> None:
    _, layer = linear()
    x = change(torch.randn(5, D_IN, dtype=torch.float64))
    torch.testing.assert_close(layer(x), in_two(layer, x), rtol=1e-14, atol=1e-14)
    assert calls.whole == 0


@pytest.mark.parametrize("kind", ["too wide", "another dtype", "None"])
def test_errors_are_the_hosts(kind: str) -> None:
    host, layer = linear()
    wide = torch.randn(5, D_IN + 1, dtype=torch.float64)
    x: Any = {"too wide": wide, "another dtype": torch.randn(5, D_IN), "None": None}[kind]
    with pytest.raises((RuntimeError, TypeError)) as own:
        F.linear(x, host.weight, host.bias)
    with pytest.raises(type(own.value)) as error:
        layer(x)
    assert str(error.value) == str(own.value)
    assert torch.is_grad_enabled()


def test_hosts_that_compute_their_weight(calls: Calls) -> None:
    """Parametrized before or after it was wrapped: the parameters that are multiplied with are none of the host's."""
    torch.manual_seed(0)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    before = nn.Linear(D_IN, D_OUT).double()
    parametrizations.weight_norm(before)
    layer = KasminaLayer.from_host(before, num_seeds=3)
    assert layer.commit(0, _Loaded(kernels(D_IN, D_OUT, torch.float64)[0]), alpha=0.3)
    assert torch.equal(layer(x), in_two(layer, x))
    host, layer = linear()
    layer(x)
    parametrizations.weight_norm(host)
    y = layer(x)
    assert torch.equal(y, in_two(layer, x))
    assert torch.autograd.grad(y.sum(), host.parametrizations.weight.original0)[0].any()
    assert calls.whole == 1


def test_layers_that_bring_their_seeds_and_subclasses(calls: Calls) -> None:
    torch.manual_seed(0)

    class Mine(nn.Linear):
        """Says nothing of its own."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(5, D_IN, requires_grad=True)
    seeded = enn.SeededLinear(D_IN, D_OUT)
    assert seeded.seeds.commit(0, _Loaded(kernels(D_IN, D_OUT, torch.float32)[0]), alpha=0.3)
    assert torch.equal(seeded(x), in_two(seeded.seeds, x))
    assert calls.whole == 1
    layer = layer_on(Mine(D_IN, D_OUT))
    assert torch.equal(layer(x), in_two(layer, x))
    assert calls.whole == 2
    layer = layer_on(Doubled(D_IN, D_OUT))
    h = 2 * F.linear(x, layer.default_transform.weight, layer.default_transform.bias)
    assert torch.equal(layer(x), layer.grafts(x, h))
    assert calls.whole == 2


def test_other_weights_for_one_call(calls: Calls) -> None:
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    own = {"weight": host.weight.detach() * scale, "bias": host.bias.detach()}
    layer(x)
    y = torch.func.functional_call(layer, {f"default_transform.{name}": t for name, t in own.items()}, (x,))
    expected = layer.grafts(x, F.linear(x, own["weight"], own["bias"]))
    assert torch.equal(y, expected)
    one, two = (torch.autograd.grad(t.square().sum(), scale, retain_graph=True) for t in (y, expected))
    assert torch.equal(one[0], two[0])
    assert calls.whole == 2


class Gathering(dict):
    """As sharded training has it: whoever asks for a parameter gets it from elsewhere."""

    def __getitem__(self, name: str) -> Any:
        return 2 * super().__getitem__(name)


@pytest.mark.parametrize("how", ["beside", "instead", "another dictionary", "a dictionary of another kind"])
def test_weights_are_what_the_host_finds(how: str, calls: Calls) -> None:
    """FSDP puts what it has gathered among the host's own names, before a repeated forward there alone."""
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    layer(x)
    other = {name: 2 * p.detach() for name, p in host.named_parameters()}
    if how in ("beside", "instead"):
        host.__dict__.update(other)
        if how == "instead":
            host._parameters.clear()
    else:
        host._parameters = dict(other) if how == "another dictionary" else Gathering(host._parameters)
    expected = F.linear(x, other["weight"], other["bias"])
    assert torch.equal(host._parameters["weight"] if how.startswith("a") else host.weight, other["weight"])
    assert torch.equal(layer(x), layer.grafts(x, expected))
    assert calls.whole == (1 if how == "a dictionary of another kind" else 2)


def test_a_replaced_linear_is_called(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who counts or changes products puts a function of his own in the place of torch's, or a forward."""
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64)
    layer(x)
    original, seen = F.linear, []

    def watched(*arguments: Any) -> Tensor:
        seen.append(len(arguments))
        return 2 * original(*arguments)

    monkeypatch.setattr(F, "linear", watched)
    y = layer(x)
    assert seen == [3]
    assert torch.equal(y, layer.grafts(x, 2 * original(x, host.weight, host.bias)))
    monkeypatch.undo()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * original(input, self.weight, self.bias))
    host, layer = linear()
    assert torch.equal(layer(x), layer.grafts(x, 2 * original(x, host.weight, host.bias)))
    assert calls.whole == 1


@pytest.mark.parametrize("alphas", [(0.0, 0.0, 0.0), (0.3, 0.6, 0.0)], ids=str)
@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["", "autocast"])
def test_checkpoints_let_saved_tensors_be_asked_for_once(around: Callable[[], Any], alphas: tuple[float, ...]) -> None:
    """All alphas are 0 at the start of a ramp; a backward may be inside autocast though the forward was not."""
    torch.manual_seed(0)
    layer = layer_on(nn.Linear(D_IN, D_OUT), alphas)
    x = torch.randn(5, D_IN, requires_grad=True)
    gy = torch.randn(5, D_OUT)
    for _ in range(3):
        y = checkpoint(layer, x, use_reentrant=False)
        with around():
            (got,) = torch.autograd.grad(y, x, gy)
            (expected,) = torch.autograd.grad(layer(x) if around is nullcontext else _outside(layer, x), x, gy)
        assert torch.equal(got, expected)


def _outside(layer: KasminaLayer, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer(x)


def test_results_lie_as_the_hosts_do() -> None:
    """Rows of one element along a dimension may have any stride; the host's result has its own."""
    host, layer = linear(16, 16, dtype=torch.float32)
    last = torch.randn(1, 4, 16)[:, -1]
    image = torch.randn(2, 5, 1, 16).permute(0, 2, 1, 3)
    for x in (last, image, torch.randn(1, 16), torch.randn(2, 1, 3, 16)):
        assert layer(x).stride() == F.linear(x, host.weight, host.bias).stride()


@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, MANY // 3)], ids=str)
def test_the_result_may_be_changed_in_place(shape: tuple[int, ...], calls: Calls) -> None:
    _, layer = linear(WIDE, WIDE, dtype=torch.float32)
    x = torch.randn(*shape, WIDE, requires_grad=True)
    y = layer(x)
    assert not y._is_view()
    expected = torch.autograd.grad(F.relu(in_two(layer, x)).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(F.relu_(y).sum(), x)[0], expected)
    assert calls.whole == 1


@pytest.mark.parametrize("x_wants", [True, False])
def test_what_is_saved(x_wants: bool, calls: Calls) -> None:
    """The input, and the weight where the input has a gradient: an optimizer may step in between where it has none."""
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=x_wants)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i]):
        y = layer(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()] + [host.weight.data_ptr()] * x_wants
    with torch.no_grad():
        host.weight.add_(1)
    y = layer(x)
    with torch.no_grad():
        host.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") if x_wants else nullcontext():
        y.backward(torch.randn(y.shape, dtype=y.dtype))
    assert calls.in_python == 0


def test_seeds_changed_between_forward_and_backward_are_reported() -> None:
    _, layer = linear()
    y = layer(torch.randn(5, D_IN, dtype=torch.float64))
    with torch.no_grad():
        parameters(layer.grafts)[0].add_(1)
    with pytest.raises(RuntimeError, match="call the optimizer after backward"):
        y.sum().backward()


def test_a_second_backward_through_a_freed_graph_is_reported() -> None:
    _, layer = linear()
    y = layer(torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_gradients_of_gradients_and_many_at_once(calls: Calls) -> None:
    host, layer = linear()
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert calls.in_python > 0
    wanted = [x, *host.parameters(), *parameters(layer.grafts)]

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    torch.testing.assert_close(second(layer(x)), second(in_two(layer, x)), rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.functional.jacobian(f, x, vectorize=True) for f in (layer, lambda t: in_two(layer, t)))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["a strided gradient", "one number for all"])
def test_gradients_that_are_not_plain(kind: str, calls: Calls) -> None:
    _, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(D_OUT, 5, dtype=torch.float64).t() if kind == "a strided gradient" else torch.ones(()).double()
    one, two = (torch.autograd.grad(y, x, gy.expand(5, D_OUT))[0] for y in (layer(x), in_two(layer, x)))
    torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-14)
    assert calls.in_python == 1


def test_the_first_forward_is_whole_and_so_is_the_one_after_a_move(calls: Calls) -> None:
    """Activation checkpointing compares what the first forward saves with what its repetition does."""
    _, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    for turn in range(1, 3):
        checkpoint(layer, x, use_reentrant=False).sum().backward()  # ends the repetition once all is saved again
        assert (calls.whole, calls.declined) == (turn, turn - 1)
        for parameter in parameters(layer.grafts):
            parameter.data = parameter.data.clone()


def test_checkpoints_at_the_forward_that_is_timed(calls: Calls) -> None:
    _, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    for _ in range(LATENCY_PERIOD):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert calls.whole == LATENCY_PERIOD


def test_parameters_thawed_later_get_gradients(calls: Calls) -> None:
    _, layer = linear()
    seeds = parameters(layer.grafts)
    for parameter in seeds:
        parameter.requires_grad_(False)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    for parameter in seeds:
        parameter.requires_grad_(True)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in seeds)
    assert calls.whole == 2


def test_the_time_of_the_seeds_is_taken() -> None:
    _, layer = linear(WIDE, WIDE, dtype=torch.float32)
    seen: list[int] = []
    layer.latency_sink = seen.append
    x = torch.randn(1000, WIDE)
    for _ in range(2 * LATENCY_PERIOD):
        layer(x)
    assert len(seen) == 2
    assert all(0 < microseconds < 10_000_000 for microseconds in seen)


@pytest.mark.parametrize("graph", [True, False])
def test_a_fault_is_contained(graph: bool, calls: Calls) -> None:
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=graph)
    with torch.no_grad():
        layer.grafts.seed_parameters(1)["up.weight"][0, 0] = torch.inf
    y, h = layer(x), F.linear(x, host.weight, host.bias)
    assert torch.equal(y, h)
    assert layer.state_layout.fault_flags.tolist() == [0, 1, 0]
    if graph:
        one, two = (torch.autograd.grad(t.square().sum(), [x, *host.parameters()]) for t in (y, h))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert calls.whole == 0


def test_a_host_that_is_not_finite_is_nobodys_fault() -> None:
    host, layer = linear()
    with torch.no_grad():
        host.bias[3] = torch.nan
    y = layer(torch.randn(5, D_IN, dtype=torch.float64))
    assert y[:, 3].isnan().all()
    assert y[:, 4].isfinite().all()
    assert not layer.state_layout.fault_flags.any()


def test_nothing_is_left_behind() -> None:
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(5, D_OUT, dtype=torch.float64)
    the_bank = layer.grafts.fast_call(x) and layer.grafts._bank
    objects = [x, gy, host.weight, host.bias, the_bank, *parameters(layer.grafts), None, True, False]
    for _ in range(3):
        layer(x).backward(gy)
    gc.collect()
    gc.disable()
    try:
        before = [sys.getrefcount(o) for o in objects]
        for _ in range(100):
            layer(x).backward(gy)
            with torch.no_grad():
                layer(x)
            layer(x[0])
            with pytest.raises(RuntimeError):
                layer(x[:, :3].contiguous())
        after = [sys.getrefcount(o) for o in objects]
    finally:
        gc.enable()
    # One too many or too few a call would be a hundred; threads of earlier tests may come and go meanwhile.
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True)), (before, after)


def test_wrong_calls_are_refused() -> None:
    host, layer = linear()
    x = torch.randn(5, D_IN, dtype=torch.float64)
    fast = layer.grafts.fast_call(x)
    assert fast is not None
    alpha = layer.state_layout.alpha_blend
    with pytest.raises(TypeError, match="run_host takes x, the host, alpha"):
        fast.run_host(x, host, alpha)
    assert fast.run_host(x, host, alpha, False) is not None
    for weight, bias in [(host.weight[:, :4], None), (host.weight, 3), (None, host.bias), (host.weight.float(), None)]:
        other = nn.Module()
        other.__dict__.update(weight=weight, bias=bias)
        assert fast.run_host(x, other, alpha, False) is None
    assert fast.run_host(x, nn.Module(), alpha, False) is None


def test_a_set_of_grafts_alone_has_no_host() -> None:
    """Seeds that read the host's output need it whole, so the call says no."""
    torch.manual_seed(0)
    host = nn.Linear(D_IN, D_OUT).double()
    layer = KasminaLayer.from_host(host, num_seeds=1)
    assert layer.commit(0, _Loaded(kernel("lowrank", D_OUT, D_OUT, tap="output")), alpha=0.5)
    x = torch.randn(5, D_IN, dtype=torch.float64)
    fast = layer.grafts.fast_call(x)
    assert isinstance(layer.grafts, GraftSet)
    assert fast is not None
    assert fast.run_host(x, host, layer.state_layout.alpha_blend, False) is None
    assert torch.equal(layer(x), in_two(layer, x))
