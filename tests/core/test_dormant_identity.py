"""A dormant model is its host: outputs and gradients bit for bit, whatever the host, the mode and the dtype."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.core.hosts import BY_NAME, CASES, Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern: unlike ``==`` it tells -0.0 from 0.0 and lets NaN equal itself."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(views[tensor.element_size()])


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [leaf for value in values if value is not None for leaf in leaves(value)]


def run(
    model: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any], parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One forward and backward: every output, every gradient, every buffer."""
    torch.manual_seed(7)
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    outputs = leaves(model(*inputs, **kwargs))
    gradients = torch.autograd.grad(
        sum(output.float().square().sum() for output in outputs), [*inputs, *parameters.values()], allow_unused=True
    )
    found = {f"output {index}": tensor for index, tensor in enumerate(outputs)}
    found |= {f"grad input {index}": tensor for index, tensor in enumerate(gradients[: len(inputs)])}
    found |= {f"grad {name}": tensor for name, tensor in zip(parameters, gradients[len(inputs) :], strict=True)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(host: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    host_parameters, model_parameters = dict(host.named_parameters()), dict(model.named_parameters())
    assert list(host_parameters) == list(model_parameters)
    expected, got = run(host, inputs, kwargs, host_parameters), run(model, inputs, kwargs, model_parameters)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(bits(expected[name]), bits(got[name])), name
    for name, buffer in host.named_buffers():
        assert torch.equal(bits(buffer), bits(dict(model.named_buffers())[name])), name


def wrapped(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, esper.MorphableModel]:
    torch.manual_seed(0)
    host = case.build().to(dtype)
    return host, esper.wrap(host, case.targets)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_the_hosts(case: Case, dtype: torch.dtype, train: bool) -> None:
    host, model = wrapped(case, dtype)
    assert model.kasmina_layers
    host.train(train)
    model.train(train)
    for _ in range(3):
        # step() arms a probe now and then: an observed forward is the host's too.
        assert_same(host, model, case.inputs(dtype), case.kwargs)
        model.monitor.sample_now()
        assert_same(host, model, case.inputs(dtype), case.kwargs)
        model.step()


@pytest.mark.parametrize(
    "name", ["mlp", "conv-plain", "batchnorm2d", "attention-masked", "nested", "encoder", "shared"]
)
def test_under_torch_compile_fullgraph(name: str) -> None:
    case = BY_NAME[name]
    host, model = wrapped(case)
    torch._dynamo.reset()
    assert_same(torch.compile(host, fullgraph=True), torch.compile(model, fullgraph=True), case.inputs(), case.kwargs)


def test_compiled_model_is_not_recompiled_by_steps_and_calls() -> None:
    case = BY_NAME["mlp"]
    _, model = wrapped(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(*case.inputs())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(50):
            compiled(*case.inputs())
            model.step()
    assert model.total_forward_calls == 50


def test_module_compile_in_place() -> None:
    # A network of user code: torch skips the frames of a bare nn.Sequential here, wrapped or not.
    case = BY_NAME["nested"]
    host, model = wrapped(case)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    assert_same(host, model, case.inputs(), case.kwargs)


@pytest.mark.parametrize("name", ["mlp", "conv-plain", "encoder"])
def test_autocast(name: str) -> None:
    case = BY_NAME[name]
    host, model = wrapped(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(host, model, case.inputs(), case.kwargs)


def test_channels_last() -> None:
    case = BY_NAME["batchnorm2d"]
    host, model = wrapped(case)
    host, model = host.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    inputs = tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in case.inputs())
    assert_same(host, model, inputs, case.kwargs)
    assert model(*inputs).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["linear", "mlp", "nested"])
def test_functional_call_under_host_names(name: str) -> None:
    case = BY_NAME[name]
    host, model = wrapped(case)
    doubled = {key: value * 2 for key, value in host.named_parameters()}
    expected = leaves(torch.func.functional_call(host, doubled, case.inputs(), case.kwargs))
    got = leaves(torch.func.functional_call(model, doubled, case.inputs(), case.kwargs))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert_same(host, model, case.inputs(), case.kwargs)


def test_vmap_over_per_sample_gradients() -> None:
    case = BY_NAME["mlp"]
    host, model = wrapped(case)

    def per_sample(net: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), *case.inputs())

    expected, got = per_sample(host), per_sample(model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deepcopy(case: Case) -> None:
    host, model = wrapped(case)
    model.step()
    twin = copy.deepcopy(model)
    assert_same(host, twin, case.inputs(), case.kwargs)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    for name, layer in twin.kasmina_layers.items():
        assert layer.default_transform is not model.kasmina_layers[name].default_transform
        assert any(module is layer.default_transform for module in twin.wrapped_model.modules())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pickle(case: Case) -> None:
    host, model = wrapped(case)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(host, twin, case.inputs(), case.kwargs)
    twin.step()


def test_pickle_to_another_process(tmp_path: Any) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    model = esper.wrap(host)
    x = torch.randn(3, 4)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, x)))
    script = (
        "import pickle, sys, torch\n"
        "model, x = pickle.load(open(sys.argv[1], 'rb'))\n"
        "model.step()\n"
        "torch.save(model(x).detach(), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pkl", tmp_path / "y.pt"], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), host(x))


@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")]
)
def test_conversion_after_wrapping(convert: Any) -> None:
    case = BY_NAME["batchnorm2d"]
    host, model = wrapped(case)
    host, model = convert(host), convert(model)
    dtype = next(host.parameters()).dtype
    assert_same(host, model, case.inputs(dtype), case.kwargs)
    assert model.lattice.alpha_blend.dtype is torch.float32


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_inference_fast_path_of_the_encoder(padded: bool) -> None:
    case = BY_NAME["encoder"]
    host, model = wrapped(case)
    host.eval()
    model.eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    kwargs = {"src_key_padding_mask": mask} if padded else {}
    model.monitor.sample_now()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(bits(host(*case.inputs(), **kwargs)), bits(model(*case.inputs(), **kwargs)))


def test_hooks_of_host_and_wrapper_run_once() -> None:
    case = BY_NAME["mlp"]
    _, model = wrapped(case)
    seen: list[str] = []
    model.wrapped_model.register_forward_hook(lambda *_: seen.append("root"))
    model.wrapped_model[0].register_forward_hook(lambda *_: seen.append("layer"))
    model(*case.inputs())
    assert seen == ["layer", "root"]


def test_no_hook_no_shadow_no_extra_module_while_dormant() -> None:
    for case in CASES:
        host, model = wrapped(case)
        assert [type(module) for module in host.modules()] == [type(module) for module in model.wrapped_model.modules()]
        for module in model.wrapped_model.modules():
            assert "forward" not in module.__dict__
            assert not module._forward_hooks and not module._forward_pre_hooks
