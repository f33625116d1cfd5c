"""The model's clock: the one in C and the one in Python do the same."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.core import clock as clock_module
from esper.core.clock import Clock, make_clock
from esper.ops import native


@pytest.fixture(params=["native", "python"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[esper.MorphableModel]:
    if request.param == "python":
        monkeypatch.setattr(clock_module.native, "load", lambda: None)
    wrapped = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), telemetry_enabled=False)
    assert isinstance(wrapped._clock, Clock) == (request.param == "python")
    yield wrapped
    wrapped.close()


def test_counts_calls_and_steps(model: esper.MorphableModel) -> None:
    x = torch.randn(2, 4)
    for _ in range(3):
        assert torch.equal(model(x), model.wrapped_model(x))
    model.step()
    assert (model._clock.calls, model._clock.steps, model.total_forward_calls) == (3, 1, 3)


def test_arguments_pass_and_errors_come_through(model: esper.MorphableModel) -> None:
    x = torch.randn(2, 4)
    assert torch.equal(model(input=x), model(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        model(wrong=x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))


def test_what_is_due_is_done_at_its_step_and_not_before(model: esper.MorphableModel) -> None:
    done: list[int] = []
    clock = model._clock
    clock.on_due = lambda own: (done.append(own.steps), setattr(own, "due", own.steps + 3))[0]
    clock.due = clock.steps + 2
    for _ in range(6):
        model.step()
    assert done == [2, 5]


def test_an_error_in_what_is_due_reaches_the_caller_and_the_clock_goes_on(model: esper.MorphableModel) -> None:
    def fail(_: object) -> None:
        raise ValueError("from on_due")

    model._clock.on_due = fail
    model._clock.due = 0
    with pytest.raises(ValueError, match="from on_due"):
        model.step()
    assert model._clock.steps == 1


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_host_run(model: esper.MorphableModel, kind: str) -> None:
    seen: list[str] = []
    handle = getattr(model.wrapped_model, f"register_{kind}_hook")(lambda *_: seen.append(kind))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [kind]
    handle.remove()
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [kind]


def test_hook_tables_may_be_replaced(model: esper.MorphableModel) -> None:
    seen: list[int] = []
    host: Any = model.wrapped_model
    host._forward_hooks = type(host._forward_hooks)()
    host.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 4))
    assert seen == [1]


def test_global_hooks_run(model: esper.MorphableModel) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(2, 4))
    finally:
        handle.remove()
    assert model.wrapped_model in seen


def test_tracing_goes_through_the_full_call(model: esper.MorphableModel) -> None:
    x = torch.randn(2, 4)
    model.requires_grad_(False)
    traced = torch.jit.trace(model.wrapped_model, x)
    assert torch.equal(traced(x), model(x))
    calls = model._clock.calls
    kept: list[int] = []
    model._clock.host_call = lambda *args: (kept.append(1), model.wrapped_model.forward(*args))[1]
    torch.jit.trace(lambda value: model(value), x, check_trace=False)
    assert kept
    assert model._clock.calls > calls


def test_copies_and_pickles_keep_the_count_and_have_a_clock_of_their_own(model: esper.MorphableModel) -> None:
    x = torch.randn(2, 4)
    model(x)
    model.step()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (twin._clock.calls, twin._clock.steps) == (1, 1)
        twin(x)
        twin.step()
        assert (twin._clock.calls, twin._clock.steps) == (2, 2)
        assert twin._clock.host is twin.wrapped_model
        twin.close()
    assert (model._clock.calls, model._clock.steps) == (1, 1)


def test_a_model_that_is_dropped_is_collected(model: esper.MorphableModel) -> None:
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 4))
    twin.step()
    twin.close()
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_a_subclass_may_have_a_step_of_its_own(model: esper.MorphableModel) -> None:
    class Counting(esper.MorphableModel):
        own = 0

        def step(self) -> None:
            self.__dict__["own"] = self.own + 1
            super().step()

    twin = Counting(nn.Sequential(nn.Linear(4, 4)), {})
    twin.step()
    assert (twin.own, twin._clock.steps) == (1, 1)
    twin.close()


def test_a_wrapped_model_inside_a_compiled_function(model: esper.MorphableModel) -> None:
    x = torch.randn(2, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def loss(value: Tensor) -> Tensor:
        return model(value).square().sum()

    assert torch.equal(loss(x), model.wrapped_model(x).square().sum())


def test_the_native_clock_refuses_what_it_cannot_use() -> None:
    module = native.load()
    if module is None:
        pytest.skip(f"no extension: {native.reason()}")
    with pytest.raises(RuntimeError, match="no host"):
        module.Clock()(1)
    for wrong in ([], (1,)):
        with pytest.raises(TypeError, match="tuple of dictionaries"):
            module.Clock().watched = wrong
    clock = make_clock(3, 4)
    assert (clock.calls, clock.steps, clock.due) == (3, 4, 0)


def test_a_model_without_a_clock_says_so() -> None:
    unfinished = esper.MorphableModel.__new__(esper.MorphableModel)
    with pytest.raises(AttributeError, match="no clock"):
        unfinished(torch.randn(2, 4))


def test_a_class_that_takes_calls_another_way(model: esper.MorphableModel) -> None:
    class Louder(esper.MorphableModel):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    x = torch.randn(2, 4)
    twin = Louder(nn.Sequential(nn.Linear(4, 4)), {})
    assert torch.equal(twin(x), 2 * twin.wrapped_model(x))
    assert twin._clock.calls == 1
    twin.close()


def test_only_a_slot_of_the_class_is_taken_for_a_clock() -> None:
    module = native.load()
    if module is None:
        pytest.skip(f"no extension: {native.reason()}")
    for kind, slot in [(nn.Module, 3), (int, Clock.__dict__["calls"]), (nn.Linear, Clock.__dict__["calls"])]:
        with pytest.raises(TypeError, match="slot"):
            module.call_through_clock(kind, slot)
