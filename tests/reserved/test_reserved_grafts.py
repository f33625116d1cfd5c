"""Seeds in reserved memory compute what seeds in memory of their own do, on both ways; padding stays padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import Blueprint, Node
from esper.execution.grafts import GraftSet, Reservation, ReservationError, ReservedGraftSet
from esper.execution.grafts.reserved_blend import ACTIVATIONS
from esper.execution.hosts import describe_host
from esper.ops.graft.seeds import Plan
from tests.core.test_dormant_identity import bits
from tests.execution.grafts.helpers import Kernel, State, gradients, graft_set, kernel

RANK = 4
D_IN, D_OUT = 10, 12

Way = Callable[[ReservedGraftSet, Tensor, Tensor], Tensor]


def eagerly(grafts: ReservedGraftSet, x: Tensor, h: Tensor) -> Tensor:
    return grafts(x, h)


def on_device(grafts: ReservedGraftSet, x: Tensor, h: Tensor) -> Tensor:
    """What compilers trace and GPUs run; here with its operations one by one."""
    return grafts._traced(x, h)


WAYS = pytest.mark.parametrize("way", [eagerly, on_device], ids=["eager", "device"])


def reserved(
    host: nn.Module, alphas: list[float], kernels: Mapping[int, Kernel], *, rank: int = RANK, tap: Any = "input"
) -> ReservedGraftSet:
    spec = describe_host(host)
    grafts = ReservedGraftSet(spec, State(alphas), Reservation.of(spec, rank, tap, "layer"))
    for seed_idx, k in kernels.items():
        grafts.bind(seed_idx, k)
    return grafts


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(D_IN, D_OUT).to(dtype)


def rows(host: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return x, host(x).detach().requires_grad_()


def low(seed: int, *, d_in: int = D_IN, d_out: int = D_OUT, **params: Any) -> Kernel:
    return kernel("lowrank", d_in, d_out, seed=seed, **params)


def act(kind: str | None, seed: int, *, d_in: int = D_IN, d_out: int = D_OUT, **params: Any) -> Kernel:
    return kernel("bottleneck", d_in, d_out, seed=seed, activation=kind, **params)


CHUNK = D_OUT // 4
SETS: dict[str, tuple[list[float], dict[int, Kernel]]] = {
    "one": ([0.3, 0, 0, 0], {0: low(0)}),
    "last of four": ([0, 0, 0, 0.7], {3: act("gelu", 1)}),
    "full rank": ([0, 0.4, 0, 0], {1: low(2, rank=RANK)}),
    "every activation": (
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        {i: act(kind, i, rank=1 + i % RANK, bias=bool(i % 2)) for i, kind in enumerate(ACTIVATIONS)},
    ),
    "replace": ([0.3, 0.4, 0, 0], {0: act("silu", 3, mode="replace"), 1: low(4)}),
    "replace over one": ([0.8, 0.9, 0.5, 0], {i: act("tanh", i, mode="replace") for i in range(3)}),
    "chunks": ([0.5, 0.6, 0.7, 0.2], {i: low(i, d_out=CHUNK, scope="chunk") for i in range(4)}),
    "chunks that replace beside a layer": (
        [0.6, 0.7, 0, 0.5],
        {
            0: act("sigmoid", 0, mode="replace"),
            1: low(1, d_out=CHUNK, scope="chunk", mode="replace"),
            3: act("relu", 2, d_out=CHUNK, scope="chunk"),
        },
    ),
    "bound but off": ([0.0, 0.5, 0, 0], {0: low(0), 1: low(1)}),
}


def compare(elastic: GraftSet, grafts: ReservedGraftSet, way: Way, x: Tensor, h: Tensor) -> None:
    expected, y = elastic(x, h), way(grafts, x, h)
    # float64, sums of at most some hundred products of order one: 1e-12 is a thousand times their rounding.
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **close)
    theirs = gradients(expected, [x, h])
    for mine, other in zip(gradients(y, [x, h]), theirs, strict=True):
        torch.testing.assert_close(mine, other, **close)
    for seed_idx in elastic.bound:
        wanted = elastic.seed_parameters(seed_idx)
        parameters = grafts.seed_parameters(seed_idx)
        assert len(wanted) == len(parameters)
        expected_grads = dict(zip(wanted, gradients(expected, list(wanted.values())), strict=True))
        for name, gradient in zip(parameters, gradients(y, list(parameters.values())), strict=True):
            tensor = expected_grads[name]
            seed = grafts._seeds[seed_idx]
            if name == "up.weight":
                inside = gradient[seed.place.begin : seed.place.end, : tensor.shape[1]]
            else:
                inside = gradient[: tensor.shape[0]]
            torch.testing.assert_close(inside, tensor, **close)
            # What the kernel does not occupy gets no gradient at all: its part is all that there is.
            torch.testing.assert_close(gradient.abs().sum(), inside.abs().sum(), rtol=1e-12, atol=0)
            assert torch.count_nonzero(gradient) == torch.count_nonzero(inside)


@WAYS
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_same_as_elastic_on_rows(name: str, shape: tuple[int, ...], way: Way) -> None:
    alphas, kernels = SETS[name]
    host = linear()
    x, h = rows(host, *shape, D_IN)
    compare(graft_set(host, alphas, kernels), reserved(host, alphas, kernels), way, x, h)


@WAYS
@pytest.mark.parametrize(
    ("host", "tap"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), "input"),
        (nn.Conv2d(6, 8, 3, padding=1, stride=2), "input"),
        (nn.Conv2d(6, 8, 1), "output"),
        (nn.Conv2d(6, 8, 3), "output"),  # asked for the input, which has not the output's size
        (nn.BatchNorm2d(6), "input"),
    ],
    ids=["same", "strided", "output", "valid", "batchnorm"],
)
def test_same_as_elastic_on_images(host: nn.Module, tap: str, way: Way) -> None:
    host = host.double().eval()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, requires_grad=True)
    h = host(x).detach().requires_grad_()
    widths = {"d_in": 6 if tap == "input" else h.shape[1], "d_out": h.shape[1]}
    kernels = {
        0: low(0, tap=tap, **widths),
        2: act("sigmoid", 1, tap=tap, mode="replace", rank=3, **widths),
    }
    asked = "output" if isinstance(host, nn.Conv2d) and host.kernel_size == (1, 1) else "input"
    alphas = [0.4, 0.0, 0.7, 0.0]
    compare(graft_set(host, alphas, kernels), reserved(host, alphas, kernels, tap=asked), way, x, h)


@pytest.mark.parametrize("alphas", [[0.0, 0.0], [0.3, 0.6], [1.0, 1.0]], ids=str)
def test_gradcheck_on_the_device_way(alphas: list[float]) -> None:
    host = nn.Linear(5, 4).double()
    kernels = {0: act("gelu", 0, d_in=5, d_out=4), 1: act("tanh", 1, d_in=5, d_out=4, mode="replace", rank=1)}
    grafts = reserved(host, alphas, kernels, rank=2)
    x, h = rows(host, 3, 5)
    parameters = [p for i in grafts.bound for p in grafts.seed_parameters(i).values()]

    def run(x: Tensor, h: Tensor, *_: Tensor) -> Tensor:
        return on_device(grafts, x, h)

    assert torch.autograd.gradcheck(run, (x, h, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, h, *parameters))


@WAYS
def test_all_alphas_zero_is_the_host_bit_for_bit(way: Way) -> None:
    host = linear(torch.float32)
    kernels = {0: low(0), 1: act("sigmoid", 1, mode="replace")}
    grafts = reserved(host, [0.0, 0.0, 0.0], kernels)
    with torch.no_grad():
        for parameter in grafts.parameters():
            parameter.fill_(math.nan)  # what does not count is not read, in seeds that sleep and in padding
    x = torch.randn(4, D_IN)
    h = torch.randn(4, D_OUT)
    h[0] = -0.0
    h[1, 0], h[1, 1] = math.inf, math.nan
    h.requires_grad_()
    y = way(grafts, x, h)
    assert torch.equal(bits(y), bits(h))
    g = torch.randn_like(y)
    (gh,) = torch.autograd.grad(y, h, g)
    assert torch.equal(bits(gh), bits(g))
    assert not grafts.state_layout.fault_flags.any()


@WAYS
def test_alpha_one_in_replace_mode_does_not_read_the_host(way: Way) -> None:
    host = linear()
    grafts = reserved(host, [0.0, 1.0], {1: act("gelu", 0, mode="replace")})
    alone = graft_set(host, [0.0, 1.0], {1: act("gelu", 0, mode="replace")})
    x, h = rows(host, 3, D_IN)
    broken = torch.full_like(h, math.nan)
    torch.testing.assert_close(way(grafts, x, broken), alone(x, h), rtol=1e-12, atol=1e-12)


@WAYS
@pytest.mark.parametrize("kind", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_padding_stays_zero_in_training(kind: str | None, optimizer: Any, way: Way) -> None:
    # A sigmoid of padding is 1/2: it would teach the padded columns of `up` if it were not masked.
    host = linear(torch.float32)
    grafts = reserved(host, [0.0, 0.6], {1: act(kind, 0, dtype=torch.float32, rank=2, bias=False)})
    start = {name: p.detach().clone() for name, p in grafts.named_parameters()}
    steps = optimizer(list(grafts.parameters()))
    x = torch.randn(8, D_IN)
    for _ in range(4):
        steps.zero_grad()
        way(grafts, x, host(x).detach()).square().sum().backward()
        steps.step()
    weights = dict(grafts.named_parameters())
    assert not torch.equal(weights["seed1.down.weight"], start["seed1.down.weight"])
    assert not torch.equal(weights["seed1.up.weight"], start["seed1.up.weight"])
    for name, padding in {
        "down.weight": weights["seed1.down.weight"][2:],
        "up.weight": weights["seed1.up.weight"][:, 2:],
        "down.bias": weights["seed1.down.bias"],
    }.items():
        assert torch.count_nonzero(padding) == 0, name
    for name, parameter in grafts.named_parameters():
        assert name.startswith("seed1") or torch.count_nonzero(parameter) == 0, name


@WAYS
def test_nodes_may_have_any_names(way: Way) -> None:
    """The memory has names of its own."""
    nodes = (
        Node("x", "input"),
        Node("squeeze", "linear", ("x",), {"out": "rank", "bias": True}),
        Node("grow", "linear", ("squeeze",), {"out": "d_out", "bias": False}),
        Node("y", "output", ("grow",)),
    )
    host, named = linear(), kernel(Blueprint("named", nodes, parameters={"rank": 3}), D_IN, D_OUT)
    assert set(named.tensors) == {"squeeze.weight", "squeeze.bias", "grow.weight"}
    x, h = rows(host, 5, D_IN)
    kernels, alphas = {1: named}, [0.0, 0.4, 0.0, 0.0]
    elastic, grafts = graft_set(host, alphas, kernels), reserved(host, alphas, kernels)
    expected, y = elastic(x, h), way(grafts, x, h)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # as in `compare`
    torch.testing.assert_close(y, expected, **close)
    theirs, own = elastic.seed_parameters(1), grafts.seed_parameters(1)
    names = {"down.weight": "squeeze.weight", "down.bias": "squeeze.bias", "up.weight": "grow.weight"}
    for mine, other in names.items():
        (got,), (want,) = gradients(y, [own[mine]]), gradients(expected, [theirs[other]])
        torch.testing.assert_close(got[: want.shape[0]].sum(), want.sum(), **close)


def test_nothing_moves() -> None:
    host = linear(torch.float32)
    grafts = reserved(host, [0.5, 0.5], {})
    before = {name: (id(p), p.data_ptr(), p.shape) for name, p in grafts.named_parameters()}
    plan = grafts.plan.data_ptr()
    x = torch.randn(3, D_IN)
    for k in (low(0), act("gelu", 1, rank=4), low(2, rank=1)):
        grafts.bind(0, k)
        assert torch.count_nonzero(grafts.seed0.down.weight).item() == k.tensors["down.weight"].numel()
        grafts(x, host(x)).sum().backward()
        grafts.unbind(0)
        for p in grafts.seed0.parameters():
            assert torch.count_nonzero(p) == 0
            assert p.grad is None or torch.count_nonzero(p.grad) == 0
        assert torch.count_nonzero(grafts.plan[:, : Plan.ROW]) == 0
    assert {name: (id(p), p.data_ptr(), p.shape) for name, p in grafts.named_parameters()} == before
    assert grafts.plan.data_ptr() == plan
    assert torch.equal(bits(grafts(x, host(x))), bits(host(x)))


@pytest.mark.parametrize(
    ("kernel_of", "words"),
    [
        (lambda: low(0, rank=9), ["rank 9", f"reserved rank {RANK}", "reserve_rank=9"]),
        (lambda: low(0, d_in=D_OUT, tap="output"), ["output", "input", "reserve_tap='output'"]),
        (lambda: kernel("dense", D_IN, D_OUT), ["family dense", "lowrank and bottleneck", "reserve_rank=0"]),
        (lambda: kernel("gated", D_IN, D_OUT), ["family gated"]),
        (lambda: kernel("normed_bottleneck", D_IN, D_OUT), ["layernorm", "reserve_rank=0"]),
        (lambda: low(0, d_in=7), ["7", str(D_IN)]),
    ],
    ids=["rank", "tap", "dense", "gated", "norm", "width"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(kernel_of: Any, words: list[str]) -> None:
    grafts = reserved(linear(), [0.5, 0.5], {1: low(1)})
    before = {name: p.detach().clone() for name, p in grafts.named_parameters()}
    plan = grafts.plan.clone()
    with pytest.raises(ValueError) as error:
        grafts.bind(0, kernel_of())
    for word in words:
        assert word in str(error.value)
    assert grafts.bound == (1,)
    assert torch.equal(grafts.plan, plan)
    assert all(torch.equal(p, before[name]) for name, p in grafts.named_parameters())


def test_an_activation_has_nothing_to_reserve_for() -> None:
    with pytest.raises(ValueError, match=r"layer 'act'.*GELU.*reserve_rank=0"):
        Reservation.of(describe_host(nn.GELU()), 4, "input", "act")
    assert issubclass(ReservationError, ValueError)


def nan_in_up(grafts: ReservedGraftSet) -> None:
    grafts.seed1.up.weight[3, 0] = math.nan


def infinite_bias(grafts: ReservedGraftSet) -> None:
    grafts.seed1.down.bias[0] = math.inf


def overflow_of_the_product(grafts: ReservedGraftSet) -> None:
    grafts.seed1.down.weight[0] = 1e30
    grafts.seed1.up.weight[:, 0] = 1e30


def overflow_of_the_sum(grafts: ReservedGraftSet) -> None:
    # Each contribution is finite, h and both together are not.
    grafts.seed1.down.weight.zero_()
    grafts.seed1.down.bias[0] = 3.0e38
    grafts.seed1.up.weight.zero_()
    grafts.seed1.up.weight[5, 0] = 1.1


@WAYS
@pytest.mark.parametrize("breaks", [nan_in_up, infinite_bias, overflow_of_the_product, overflow_of_the_sum])
def test_a_fault_is_contained_and_blamed(breaks: Any, way: Way) -> None:
    host = linear(torch.float32)
    kernels = {0: act("gelu", 0, dtype=torch.float32), 1: act(None, 1, dtype=torch.float32)}
    grafts = reserved(host, [0.5, 1.0, 0.0], kernels)
    with torch.no_grad():
        breaks(grafts)
    x, _ = rows(host, 4, D_IN, dtype=torch.float32)
    h = host(x).detach()
    h[2, 5] = 2.0e38
    h.requires_grad_()
    y = way(grafts, x, h)
    assert torch.equal(bits(y), bits(h))
    assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(bits(h.grad), bits(g))
    assert x.grad is None or torch.count_nonzero(x.grad) == 0
    for parameter in grafts.parameters():
        assert parameter.grad is None or torch.count_nonzero(parameter.grad) == 0


@WAYS
def test_a_bad_input_is_nobodys_fault(way: Way) -> None:
    host = linear(torch.float32)
    grafts = reserved(host, [0.5, 1.0], {0: low(0), 1: act("tanh", 1)})
    x = torch.randn(4, D_IN)
    x[2, 3] = math.inf
    h = host(x).detach()
    y = way(grafts, x, h)
    assert not grafts.state_layout.fault_flags.any()
    assert torch.isfinite(y[[0, 1, 3]]).all()
    assert not torch.equal(y[0], h[0])


def test_an_empty_batch() -> None:
    host = linear(torch.float32)
    grafts = reserved(host, [0.5], {0: low(0)})
    x = torch.randn(0, D_IN)
    assert on_device(grafts, x, host(x)).shape == (0, D_OUT)


def test_more_seeds_than_the_operation_can_blame_are_contained_compiled() -> None:
    host = linear()
    grafts = reserved(host, [0.01] * 65, {i: low(i) for i in range(65)})
    x, h = rows(host, 3, D_IN)
    with torch.no_grad():
        grafts.seed_parameters(64)["up.weight"][0, 0] = math.nan
    torch._dynamo.reset()
    y = torch.compile(grafts, fullgraph=True, backend="aot_eager")(x, h)
    assert torch.equal(y, h)
    assert grafts.state_layout.fault_flags.nonzero().flatten().tolist() == [64]
