"""A layer whose seeds sleep is the torch layer it stands in for."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper import nn as enn
from tests.nn.cases import CASES, DTYPES, Case, bits

OURS = ["num_seeds", "layer_name", "kernel_cache"]


def run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.detach().clone().requires_grad_()
    # An activation in place may not write to a leaf.
    y = layer(x * 1)
    wanted = {"input": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y.square().sum(), list(wanted.values()))
    return {"output": y, **dict(zip(wanted, gradients, strict=True))}


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    got, expected = run(ours, x), run(theirs, x)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(bits(got[name]), bits(expected[name])), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_constructor_is_torchs(case: Case) -> None:
    ours, theirs = inspect.signature(case.seeded), inspect.signature(case.plain)
    # Activations without arguments say *args, **kwargs there, because they have no constructor of their own.
    expected = [
        (p.name, p.default)
        for p in theirs.parameters.values()
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    shared = [(p.name, p.default) for p in ours.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert shared == expected
    assert [p.name for p in ours.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY] == OURS
    assert issubclass(case.seeded, case.plain)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_torchs_bit_for_bit(case: Case, dtype: torch.dtype, train: bool) -> None:
    ours, theirs = (layer.train(train) for layer in case.pair(dtype))
    assert_same(ours, theirs, case.input(dtype))


@pytest.mark.parametrize("case", [case for case in CASES if len(case.shape) > 1 and case.shape[0]], ids=str)
def test_strided_inputs(case: Case) -> None:
    ours, theirs = case.pair()
    x = case.input()
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    assert not wide.is_contiguous()
    layouts = [wide, x.transpose(0, 1).contiguous().transpose(0, 1)]
    if x.dim() == 4:
        layouts.append(x.to(memory_format=torch.channels_last))
    for layout in layouts:
        assert_same(ours, theirs, layout)
        assert ours(layout * 1).stride() == theirs(layout * 1).stride()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_repr_and_children_are_torchs(case: Case) -> None:
    ours, theirs = case.pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert not list(ours.children()) and not list(ours.buffers())
    inside = repr(theirs).split("(", 1)[1].removesuffix(")")
    inside = f"{inside}, num_seeds=4" if inside else "num_seeds=4"
    assert repr(ours) == f"{case.seeded.__name__}({inside})"
    theirs.load_state_dict(ours.state_dict())
    fresh = case.seeded(*case.args, **case.options)
    assert str(fresh.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(fresh(case.input()), theirs(case.input()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies(case: Case) -> None:
    ours, theirs = case.pair()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(twin) is case.seeded and "forward" not in twin.__dict__
        assert twin.seeds.default_transform is twin and twin.seeds is not ours.seeds
        assert twin.state_layout.lattice is not ours.state_layout.lattice
        assert_same(twin, theirs, case.input())
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functional_call_and_transforms(case: Case) -> None:
    ours, theirs = case.pair()
    x = case.input()
    values = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    assert torch.equal(
        torch.func.functional_call(ours, values, (x * 1,)), torch.func.functional_call(theirs, values, (x * 1,))
    )
    if x.numel() and "in-place" not in case.name:
        batch = torch.stack([x, -x])
        assert torch.equal(torch.vmap(ours)(batch), torch.vmap(theirs)(batch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_a_break(case: Case) -> None:
    ours, theirs = case.pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.input()), theirs(case.input()))


def test_in_a_network_of_any_kind() -> None:
    network = nn.Sequential(enn.SeededConv2d(3, 4, 3), enn.SeededReLU(), nn.Flatten(), enn.SeededLinear(36, 2))
    loss = network(torch.randn(2, 3, 5, 5)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert list(network.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    enn.step(network)  # nothing is due


def test_device_and_type() -> None:
    layer = enn.SeededLinear(3, 2, device="meta", dtype=torch.float16)
    assert layer.weight.is_meta and layer.state_layout.device.type == "cpu"
    layer.to_empty(device="cpu")
    assert layer.weight.dtype is torch.float16 and not layer.weight.is_meta
    with torch.device("meta"):
        made = enn.SeededLinear(3, 2)
    assert made.weight.is_meta and made.state_layout.get_stats()["dormant_seeds"] == 4
    # The seeds' own numbers keep their types, whatever the layer's become.
    assert layer.double().state_layout.alpha_blend.dtype is torch.float32


@pytest.mark.parametrize("seeds", [0, -1])
def test_a_layer_has_at_least_one_seed(seeds: int) -> None:
    with pytest.raises(ValueError, match=f"num_seeds must be at least 1, not {seeds}"):
        enn.SeededLinear(2, 2, num_seeds=seeds)


def test_torchs_own_errors_are_torchs() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        enn.SeededLinear(3, 2)(torch.randn(2, 4))
    with pytest.raises(TypeError):
        enn.SeededReLU(seeds=3)  # type: ignore[call-arg]


def test_a_subclass_of_the_users() -> None:
    class Scaled(enn.SeededLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Scaled(3, 2, num_seeds=2)
    x = torch.randn(4, 3)
    assert torch.equal(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    twin: Any = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.num_seeds == 2


def test_names() -> None:
    assert set(enn.__all__) <= set(dir(enn))
    for name in enn.__all__:
        assert getattr(enn, name).__module__.startswith("esper.nn.")
    with pytest.raises(AttributeError, match="SeededLSTM"):
        enn.SeededLSTM  # noqa: B018
