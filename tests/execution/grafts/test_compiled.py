"""Compiled for a CPU, a layer's low-rank seeds are one operation, with the numbers of eager code."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch._inductor import lowering

import esper
from esper.core.model_wrapper import MorphableModel
from esper.execution.grafts import GraftSet, compiled
from esper.ops import registry
from esper.ops.graft import inductor

from .helpers import gradients, graft_set, kernel, parameters

D_IN, D_OUT = 10, 12


def layer(dtype: torch.dtype = torch.float64, tap: str = "input", **extra: Any) -> GraftSet:
    """Two of three seeds awake, of unlike rank, one with a bias and an activation."""
    torch.manual_seed(0)
    d_tap = D_IN if tap == "input" else D_OUT
    width = D_OUT // 3 if extra.get("scope") == "chunk" else D_OUT
    kernels = {
        0: kernel("lowrank", d_tap, D_OUT, dtype=dtype, tap=tap, rank=3),
        2: kernel("bottleneck", d_tap, width, seed=1, dtype=dtype, tap=tap, activation="gelu", bias=True, **extra),
    }
    return graft_set(nn.Linear(D_IN, D_OUT).to(dtype), (0.3, 0.0, 0.6), kernels)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, D_IN, dtype=dtype, requires_grad=True)
    return x, torch.randn(*shape, D_OUT, dtype=dtype, requires_grad=True)


class Graphs:
    """A compiler that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.operations: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.operations.append(
            [
                str(node.target)
                for module in graph.modules()
                if isinstance(module, torch.fx.GraphModule)
                for node in module.graph.nodes
                if node.op == "call_function"
            ]
        )
        return graph.forward

    @property
    def uses_the_operation(self) -> bool:
        assert self.operations, "nothing was compiled"
        return any("graft_seeds" in name for names in self.operations for name in names)


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch._dynamo.reset()
    assert compiled.compiled_here(), registry.get("graft_seeds").reason("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("extra", [{}, {"scope": "chunk"}, {"mode": "replace"}], ids=str)
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
def test_same_numbers_and_gradients(packed: bool, tap: str, extra: dict[str, Any], dtype: torch.dtype) -> None:
    grafts, (x, h) = layer(dtype, tap, **extra), rows(5, dtype=dtype)
    if packed:
        grafts(x, h)  # an eager call moves the parameters side by side
    run = torch.compile(grafts, fullgraph=True)
    y = run(x, h)
    tensors = [x, h, *parameters(grafts)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of gradients that are laid out unlike their parameters
        found = gradients(y, tensors)
        y.sum().backward()
    expected = grafts(x, h)
    # Sums of some 30 terms of size 1, each within an eps of its partial sum, in either order.
    allowed = {"rtol": 0, "atol": 128 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y, expected, **allowed)
    for got, want in zip(found, gradients(expected, tensors), strict=True):
        torch.testing.assert_close(
            got, want, rtol=0, atol=128 * torch.finfo(dtype).eps * max(1, want.abs().max().item())
        )
    with torch.no_grad():
        torch.testing.assert_close(run(x, h), expected, **allowed)


def test_it_is_one_operation_that_serves_any_alpha() -> None:
    grafts, graphs = layer(), Graphs()
    grafts(*rows(5))  # moves the parameters side by side, which a graph would notice
    run = torch.compile(grafts, fullgraph=True, backend=graphs, dynamic=True)
    run(*rows(5))
    assert graphs.uses_the_operation
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (0.9, 0.0, 0.3):
            grafts.state_layout.alpha_blend[0] = alpha
            x, h = rows(4)
            torch.testing.assert_close(run(x, h), grafts(x, h), rtol=0, atol=1e-13)


def test_a_fault_is_contained_and_raised() -> None:
    grafts, (x, h) = layer(), rows(5)
    run = torch.compile(grafts, fullgraph=True)
    run(x, h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 0, 0]
    with torch.no_grad():
        grafts.seed_parameters(2)["up.weight"][3, 1] = torch.nan
    y = run(x, h)
    assert torch.equal(y, h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 0, 1]
    gx, gh, *rest = torch.autograd.grad(y.sum(), [x, h, *parameters(grafts)], allow_unused=True)
    assert torch.equal(gh, torch.ones_like(h))
    assert all(g is None or torch.count_nonzero(g) == 0 for g in (gx, *rest))


def test_alpha_may_move_between_forward_and_backward() -> None:
    grafts, (x, h) = layer(), rows(5)
    run = torch.compile(grafts, fullgraph=True)
    expected = torch.autograd.grad(grafts(x, h).sum(), [x, *parameters(grafts)])
    y = run(x, h)
    grafts.state_layout.alpha_blend.zero_()
    for got, want in zip(torch.autograd.grad(y.sum(), [x, *parameters(grafts)]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_frozen_seeds_pass_the_gradient_on() -> None:
    grafts, (x, h) = layer(), rows(5)
    for parameter in parameters(grafts):
        parameter.requires_grad_(False)
    run = torch.compile(grafts, fullgraph=True)
    (found,) = torch.autograd.grad(run(x, h).sum(), x)
    (expected,) = torch.autograd.grad(grafts(x, h).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("why", ["halves", "autocast", "strided", "the reference is asked for", "elementwise"])
def test_everything_else_takes_plain_operations(why: str) -> None:
    grafts, graphs = layer(torch.float32), Graphs()
    x, h = (t.detach() for t in rows(5, dtype=torch.float32))
    if why == "halves":
        grafts, x, h = layer(torch.bfloat16), x.bfloat16(), h.bfloat16()
    if why == "autocast":
        h = h.bfloat16()  # what a host gives under autocast, while x and the seeds stay
    if why == "strided":
        x, h = x[:1].expand(1, 5, D_IN).transpose(0, 1), h[:, None]  # this alone the operation takes
    if why == "elementwise":
        grafts = graft_set(
            nn.Linear(D_IN, D_OUT), (0.5,), {0: kernel("elementwise", D_OUT, D_OUT, dtype=torch.float32)}
        )
    if why == "the reference is asked for":
        with registry.use_backend("reference"):
            grafts = layer(torch.float32)
            torch.compile(grafts, fullgraph=True, backend=graphs)(x, h)
    else:
        torch.compile(grafts, fullgraph=True, backend=graphs)(x, h)
    assert graphs.uses_the_operation == (why == "strided")


def test_an_exported_program_does_without_esper() -> None:
    grafts, (x, h) = layer(), rows(5)
    program = torch.export.export(grafts, (x.detach(), h.detach()))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names
    assert not any("esper" in name for name in names)
    torch.testing.assert_close(program.module()(x, h), grafts(x, h), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_a_backend_without_the_operation_wakes_seeds_all_the_same(backend: str) -> None:
    """``ESPER_BACKEND=triton`` on a GPU: which way compiled CPU layers would go must not be asked with an error."""
    with registry.use_backend(backend):
        assert not compiled.compiled_here()
        grafts = layer()
    x, h = rows(5)
    assert not torch.equal(grafts(x, h), h)


@pytest.fixture
def no_cached_code() -> Iterator[None]:
    """Code that another version wrote for the same graph would be found again."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def test_compiled_code_calls_it_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch, no_cached_code: None) -> None:
    called: list[str] = []
    for packet in (torch.ops.esper.graft_seeds, torch.ops.esper.graft_seeds_backward):

        def recorded(*args: Any, name: str = packet.__name__, function: Any = packet.direct) -> None:
            called.append(name)
            function(*args)

        monkeypatch.setattr(packet, "direct", recorded)
    grafts, (x, h) = layer(), rows(5)
    y = torch.compile(grafts, fullgraph=True)(x, h)
    y.sum().backward()
    assert called == ["graft_seeds", "graft_seeds_backward"]
    torch.testing.assert_close(y, grafts(x, h), rtol=0, atol=1e-13)


def test_another_inductor_writes_the_operation(monkeypatch: pytest.MonkeyPatch, no_cached_code: None) -> None:
    """What is asked of Inductor is not public; where it is gone, graphs are as they were."""
    op = torch.ops.esper.graft_seeds.default
    known = dict(lowering.lowerings)
    inductor.call_directly.cache_clear()
    try:
        lowering.lowerings.pop(op, None)
        with monkeypatch.context() as gone:
            gone.delattr(lowering, "register_lowering")
            assert not inductor.call_directly(op)
        monkeypatch.delattr(torch.ops.esper.graft_seeds, "direct")  # nobody may call it
        grafts, (x, h) = layer(), rows(5)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(grafts, fullgraph=True)(x, h), grafts(x, h), rtol=0, atol=1e-13)
    finally:
        inductor.call_directly.cache_clear()
        lowering.lowerings.clear()
        lowering.lowerings.update(known)


def grown(count: int = 3) -> MorphableModel:
    """A network of Linear layers, the second of two seeds awake in each."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(*(nn.Linear(D_OUT, D_OUT) for _ in range(count))), seeds_per_layer=2)
    for one in model.kasmina_layers.values():
        one.grafts.bind(1, kernel("lowrank", D_OUT, D_OUT, dtype=torch.float32, rank=3))
        one._refresh()
        one.state_layout.alpha_blend[1] = 0.5
    return model


#: Of three layers: each is a sum of some 30 terms of size 1, in another order.
CLOSE = {"rtol": 0, "atol": 512 * torch.finfo(torch.float32).eps}


def test_layers_share_what_comes_into_their_graph() -> None:
    """Whatever comes in is checked before every call: so of a model's lattice, and of like layers, it comes once."""
    model, x, taken = grown(), torch.randn(4, D_OUT), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        taken.append(sum(t.dtype in (torch.int32, torch.uint8) or t.shape == (6,) for t in inputs))
        return graph.forward

    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected, **CLOSE)
    assert taken == [3]  # the plan, all alphas, all flags


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_that_run_in_different_ways_are_one_graph(backend: str) -> None:
    """The operation writes to the flags of the whole lattice, what is traced to those of its layer."""
    model, x = grown(), torch.randn(4, D_OUT)
    first, *_, last = model.kasmina_layers.values()
    last.grafts.unbind(1)
    last.grafts.bind(1, kernel("dense", D_OUT, D_OUT, dtype=torch.float32))
    run = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(x), model(x), **CLOSE)
    with torch.no_grad():
        for layer in (first, last):
            parameters(layer.grafts)[0].fill_(torch.nan)
    run(x)
    assert model.lattice.fault_flags.tolist() == [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_reads_its_own_weights_alphas_and_flags(how: Callable[[MorphableModel], MorphableModel]) -> None:
    model, x = grown(), torch.randn(4, D_OUT)
    twin = how(model)
    last = list(twin.kasmina_layers.values())[-1]
    with torch.no_grad():
        for parameter in parameters(last.grafts):
            parameter.mul_(2.0)
    last.state_layout.alpha_blend[1] = 0.9
    last.default_transform.weight = nn.Parameter(torch.randn(D_OUT, D_OUT))
    for one in (model, twin):
        torch.testing.assert_close(torch.compile(one, fullgraph=True)(x), one(x), **CLOSE)
    with torch.no_grad():
        parameters(last.grafts)[0].fill_(torch.nan)
    torch._dynamo.reset()
    torch.compile(twin, fullgraph=True)(x)
    assert twin.lattice.fault_flags.tolist() == [0, 0, 0, 0, 0, 1]
    assert not model.lattice.fault_flags.any()


def test_the_callers_weights_count_under_functional_call() -> None:
    grafts, (x, h) = layer(), rows(5)
    others = {name: torch.randn_like(p) for name, p in grafts.named_parameters()}
    run = torch.compile(lambda x, h: torch.func.functional_call(grafts, others, (x, h)), fullgraph=True)
    expected = torch.func.functional_call(grafts, others, (x, h))
    assert not torch.allclose(expected, grafts(x, h))
    torch.testing.assert_close(run(x, h), expected, rtol=0, atol=1e-12)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_host_whose_weight_is_made_is_asked_itself(when: str) -> None:
    """The graph multiplies with a plain Linear's own parameters; here they are not the weight."""
    model, x = grown(), torch.randn(4, D_OUT)
    run = torch.compile(model, fullgraph=True)
    if when == "after":
        run(x)
    host = next(iter(model.kasmina_layers.values())).default_transform
    plain = model(x)
    torch.nn.utils.parametrize.register_parametrization(host, "weight", Doubled())
    expected = model(x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(run(x), expected, **CLOSE)
