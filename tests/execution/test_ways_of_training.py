"""Awake seeds inside every way people train, with memory of their own and with reserved memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))


class Blocks(nn.Module):
    """Two blocks, which may be computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.around: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.second, self.around(self.first, x))


@pytest.fixture(params=[0, 4], ids=["elastic", "reserved"])
def model(request: pytest.FixtureRequest) -> Iterator[esper.MorphableModel]:
    torch.manual_seed(0)
    grown = esper.wrap(Blocks(), reserve_rank=request.param, telemetry_enabled=False)
    for layer, seed_idx, name, options in (
        ("first.0", 0, "lowrank", {}),
        ("first.0", 2, "bottleneck", {"activation": "silu"}),
        ("second.0", 1, "bottleneck", {"activation": "sigmoid", "mode": "replace"}),
    ):
        kernel = esper.compile(name, d_in=8, d_out=8, registry=None, rank=2, **options)  # type: ignore[arg-type]
        assert asyncio.run(grown.load_kernel(layer, seed_idx, kernel, alpha=0.4)), grown.get_layer_stats(layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in grown.kasmina_layers.values():
            for seed_idx in layer.grafts.bound:
                for tensor in layer.grafts.seed_tensors(seed_idx).values():
                    tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    yield grown
    grown.close()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(y: Tensor) -> Tensor:
    return (y.float() - 1.0).square().mean()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **close: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **close, msg=lambda text, name=name: f"{name}: {text}")


def test_autocast(model: esper.MorphableModel) -> None:
    loss_of(model(X)).backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
        loss = loss_of(y)
    assert y.dtype is torch.bfloat16
    loss.backward()
    rough = gradients(model)
    assert all(g.dtype is torch.float32 for g in rough.values())
    # bfloat16 has a unit roundoff of 2^-9; four products in a row of values of order one.
    scale = max(float(g.abs().max()) for g in exact.values())
    assert_same(rough, exact, rtol=0.1, atol=0.05 * scale)


def test_grad_scaler(model: esper.MorphableModel) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(X)).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    scaler.scale(loss_of(model(X))).backward()
    scaler.step(optimizer)
    scaler.update()
    named = dict(model.named_parameters())
    # A power of two scales without rounding.
    assert_same({name: named[name].detach() for name in expected}, expected, rtol=1e-6, atol=1e-7)
    # Overflow of the scaled loss: the step is left out, and the scale falls.
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.zero_grad()
    scaler.scale(loss_of(model(X)) * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[name]) for name, p in named.items())


def test_gradient_accumulation(model: esper.MorphableModel) -> None:
    loss_of(model(X)).backward()
    whole = gradients(model)
    for part in X.split(2):
        (loss_of(model(part)) / 3).backward()
    # Means over parts of equal size, summed in another order.
    assert_same(gradients(model), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(model: esper.MorphableModel, use_reentrant: bool) -> None:
    x = X.clone().requires_grad_()
    loss_of(model(x)).backward()
    plain, plain_x = gradients(model), x.grad
    x = X.clone().requires_grad_()
    model.wrapped_model.around = lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)
    loss_of(model(x)).backward()
    # The same operations on the same numbers, twice.
    assert_same(gradients(model), plain, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, plain_x, rtol=0, atol=0)
    model.wrapped_model.around = lambda block, x: block(x)


def test_functional_transforms(model: esper.MorphableModel) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    loss_of(model(X)).backward()
    exact = gradients(model)
    found = torch.func.grad(loss)(parameters, X)
    assert_same({name: found[name] for name in exact}, exact, rtol=1e-5, atol=1e-6)
    # One gradient for each row, and their mean is the whole's.
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    assert_same({name: each[name].mean(0) for name in exact}, exact, rtol=1e-4, atol=1e-6)
    y, tangent = torch.func.jvp(lambda x: model(x), (X,), (torch.ones_like(X),))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x)))(X)
    torch.testing.assert_close(y, model(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent, jacobian.sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model: esper.MorphableModel, guard: Callable[[], Any]) -> None:
    with guard():
        y = model(X)
    assert not y.requires_grad
    torch.testing.assert_close(y, model(X).detach(), rtol=1e-6, atol=1e-6)
    loss_of(model(X)).backward()
    assert gradients(model)


def test_inference_in_several_threads(model: esper.MorphableModel) -> None:
    inputs = [X + i for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[str] = []

    def serve(i: int) -> None:
        try:
            with torch.inference_mode():
                for _ in range(50):
                    if not torch.equal(model(inputs[i]), expected[i]):
                        wrong.append(f"thread {i} got another result")
                        return
        except Exception as error:
            wrong.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_second_derivatives(model: esper.MorphableModel) -> None:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    slope.square().sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_batches_of_gradients(model: esper.MorphableModel) -> None:
    x = X.clone().requires_grad_()
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(3, *y.shape, generator=generator)
    together = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(y, inputs, direction, retain_graph=True, allow_unused=True)
        for batch, gradient in zip(together, alone, strict=True):
            assert (batch is None) == (gradient is None)
            if batch is not None:
                torch.testing.assert_close(batch[i], gradient, rtol=1e-5, atol=1e-6)
    through = torch.func.vmap(lambda d: torch.autograd.grad(y, x, d, retain_graph=True)[0])(directions)
    torch.testing.assert_close(through, together[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("find", [torch.autograd.functional.jacobian, torch.autograd.functional.hessian])
def test_vectorized_derivatives(model: esper.MorphableModel, find: Callable[..., Tensor]) -> None:
    function = model if find is torch.autograd.functional.jacobian else lambda x: loss_of(model(x))
    torch.testing.assert_close(find(function, X, vectorize=True), find(function, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_seeds_that_wake_during_an_evaluation_can_be_trained(guard: Callable[[], Any]) -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with guard():
        grown = esper.wrap(host, telemetry_enabled=False)
        for seed_idx, name in enumerate(("lowrank", "gated", "dense", "elementwise")):
            kernel = esper.compile(name, d_in=8, d_out=8, registry=None)
            done = grown.request_kernel("0", seed_idx, kernel, alpha=0.4)
            until = time.monotonic() + 60
            while not done.done() and time.monotonic() < until:
                grown.step()
                time.sleep(0.001)
            assert done.result(timeout=0), grown.get_layer_stats("0")
        grown(X)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    before = [p.detach().clone() for p in grown.parameters()]
    for _ in range(2):  # what starts at zero holds its partner's gradient at zero for a step
        optimizer.zero_grad()
        loss_of(grown(X)).backward()
        optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(grown.parameters(), before, strict=True))
    grown.close()


def _train_in_another_process(grown: nn.Module) -> None:
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    loss_of(grown(X)).backward()
    optimizer.step()


@pytest.mark.parametrize("packed", [False, True])
def test_processes_that_share_memory_train_the_same_seeds(model: esper.MorphableModel, packed: bool) -> None:
    if packed:
        model(X)
    model.share_memory()
    model(X)
    assert all(p.is_shared() for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    child = multiprocessing.get_context("fork").Process(target=_train_in_another_process, args=(model,))
    child.start()
    child.join()
    assert child.exitcode == 0
    loss_of(model(before["first.0.bias"].expand(6, 8))).backward()  # what this process computes with is what it holds
    trained = gradients(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)
