"""Compiled and captured graphs: two for a model, whatever its seeds do."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from tests.core.hosts import BY_NAME
from tests.reserved.models import mlp, wake, wrap

#: float32 in another order: sums of at most some dozen products of order one, 2^-24 each.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def life_of_seeds(model: esper.MorphableModel, first: str, last: str) -> Any:
    """Everything that may happen to seeds, one thing at a time."""
    wake(model, first, 1, "lowrank", rank=2)
    yield "woken"
    wake(model, last, 0, "bottleneck", rank=4, activation="sigmoid", mode="replace")
    yield "another layer, activation and mode"
    for alpha in (0.1, 1.0):
        model.set_seed_alpha(last, 0, alpha)
        model.step()
        yield f"alpha {alpha}"
    with torch.no_grad():
        memory: Any = model.layer(last).grafts
        memory.seed0.up.weight[0, 0] = float("nan")
    yield "broken"
    model.step()
    yield "broken again"
    model.step()
    yield "broken for the third time"
    model.step()
    layout = model.layer(last).state_layout
    if layout.device.type == "cuda":
        # The host learns of it from a snapshot, which the step after its arrival reads.
        for _ in range(2):
            torch.cuda.synchronize()
            model.step()
    assert layout.state_of(0) is esper.SeedLifecycleState.ERROR_RECOVERY
    yield "taken out"
    model.cull(first, 1)
    yield "asleep"
    wake(model, last, 3, "bottleneck", rank=1, activation="tanh")
    yield "awake again"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["mlp", "conv-same", "attention-batch-first", "encoder"])
def test_whatever_seeds_do_recompiles_nothing(name: str, backend: str) -> None:
    case = BY_NAME[name]
    torch.manual_seed(0)
    targets = [kind for kind in case.targets if kind not in (nn.ReLU, nn.GELU)]
    model = wrap(case.build(), target_layers=targets).eval()
    x = case.inputs()[0].requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.prepare(lambda: compiled(x, **case.kwargs).square().sum().backward(), repeats=1)
    made = graphs()
    assert made == 2
    layers = model.get_layer_names()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for event in life_of_seeds(model, layers[0], layers[-1]):
            y = compiled(x, **case.kwargs)
            torch.testing.assert_close(
                y, model(x, **case.kwargs), **CLOSE, msg=lambda text, event=event: f"{event}: {text}"
            )
            y.square().sum().backward()
    assert graphs() == made


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_convolutions_beside_linear_layers(backend: str) -> None:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)))
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    wake(model, "0", 0, "lowrank", rank=2)
    wake(model, "3", 1, "lowrank", rank=2)
    torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    compiled(x).square().sum().backward()
    for layer, seed in (("0", 0), ("3", 1)):
        with torch.no_grad():
            next(iter(model.layer(layer).grafts.seed_parameters(seed).values())).fill_(torch.nan)
    compiled(x)
    assert model.layer("0").state_layout.fault_flags.tolist() == [1, 0, 0, 0]
    assert model.layer("3").state_layout.fault_flags.tolist() == [0, 1, 0, 0]


def test_batches_of_any_size_are_one_graph() -> None:
    model = wrap(mlp())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def batch(rows: int) -> Tensor:
        x = torch.randn(rows, 8)
        torch._dynamo.mark_dynamic(x, 0)
        return x

    model.prepare(lambda: compiled(batch(4)).sum().backward(), repeats=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, event in enumerate(life_of_seeds(model, "0", "2"), start=2):
            x = batch(rows)
            torch.testing.assert_close(compiled(x), model(x), **CLOSE, msg=lambda text, event=event: f"{event}: {text}")
    assert graphs() == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_inductor_trains_as_eager_does() -> None:
    model = wrap(mlp(), telemetry_enabled=True)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 8)
    model.prepare(lambda: compiled(x).square().sum().backward(), repeats=1)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, twin)]
    for each in (model, twin):
        wake(each, "0", 1)
        wake(each, "2", 2, activation="silu", rank=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            losses = []
            for call, each, optimizer in zip((compiled, twin), (model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                loss = (call(x) - 1.0).square().mean()
                loss.backward()
                optimizer.step()
                each.monitor.close()
                each.step()
                losses.append(loss.detach())
            torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        # Five steps of AdamW at 0.01: a gradient near 0 may turn the sign of one of them.
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=2e-2, msg=name)


def test_the_gradient_is_that_of_the_alpha_in_the_forward() -> None:
    model = wrap(mlp())
    wake(model, "0", 1)
    wake(model, "2", 0, mode="replace")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    found = []
    for call in (compiled, model):
        y = call(x).square().sum()
        model.set_seed_alpha("0", 1, 0.9)
        compiled(x)  # another forward before the backward, as when gradients of several batches are gathered
        y.backward()
        model.set_seed_alpha("0", 1, 0.5)
        found.append({name: p.grad.clone() for name, p in model.graft_parameters().items()})
        model.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], **CLOSE, msg=name)


def test_without_prepare_the_first_waking_compiles_once() -> None:
    model = wrap(mlp())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(4, 8)
    compiled(x)
    wake(model, "0", 1)
    compiled(x)
    assert graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        wake(model, "2", 0)
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


# -- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_captured_graph_serves_whatever_seeds_do() -> None:
    model = wrap(mlp(64).cuda())
    x = torch.randn(16, 64, device="cuda")
    stream = torch.cuda.Stream()
    with model.awake_path():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = model(x)
    assert model.original_model is not None
    graph.replay()
    torch.testing.assert_close(y, model.original_model(x), rtol=0, atol=0)
    for event in life_of_seeds(model, "0", "2"):
        graph.replay()
        with torch.no_grad():
            expected = model(x)
        # TF32 is off by default; sums of 64 products in another order.
        torch.testing.assert_close(y, expected, **CLOSE, msg=lambda text, event=event: f"{event}: {text}")


@pytest.mark.gpu
def test_recorded_graphs_are_not_recorded_again() -> None:
    model = wrap(mlp(64).cuda())
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(16, 64, device="cuda")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).square().sum().backward()

    model.prepare(step)
    assert counters["inductor"]["cudagraph_skips"] == 0
    recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for event in life_of_seeds(model, "0", "2"):
            model.zero_grad(set_to_none=True)  # the last step's are in memory that the next one's overwrite
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x)
            torch.testing.assert_close(y, model(x), **CLOSE, msg=lambda text, event=event: f"{event}: {text}")
            y.square().sum().backward()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] == recorded
