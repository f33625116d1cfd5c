"""Exported networks compute what the grown ones compute, without Esper."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.artifacts.artifact import Artifact
from esper.core.export import ExportError, export
from esper.core.model_wrapper import MorphableModel
from esper.execution.kernel_executor import LoadedKernel
from esper.nn.attention import GraftedAttention
from esper.services.tezzeret.forge import build

#: Sums of at most a few hundred float64 terms of size about one, in another order: 2**-53 * 100, with room.
TOLERANCE = 1e-12


def wake(
    model: MorphableModel,
    layer: str,
    seed_idx: int,
    blueprint: str,
    d_in: int,
    d_out: int,
    alpha: float,
    **options: Any,
) -> None:
    """Wake a seed with weights drawn at random, all of them: the library's start at zero would hide the seed."""
    data = build(blueprint, d_in=d_in, d_out=d_out, seed=seed_idx, dtype="float64", **options)
    kernel = LoadedKernel.from_artifact(Artifact.open(data))
    assert model.layer(layer).commit(seed_idx, kernel, alpha=alpha), model.get_layer_stats(layer)["errors"]
    model.double()  # a host without parameters does not tell which dtype its seeds should have
    generator = torch.Generator().manual_seed(100 + seed_idx)
    for parameter in model.layer(layer).grafts.seed_parameters(seed_idx).values():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)


def wrapped(host: nn.Module, *targets: Any) -> MorphableModel:
    return esper.wrap(host.double().eval(), list(targets) or None, telemetry_enabled=False)


def assert_same(model: MorphableModel, *inputs: torch.Tensor, esper_free: bool = True) -> nn.Module:
    """Outputs agree, the model is not changed, and no module of Esper is left."""
    before = model(*inputs)
    plain = export(model)
    after = plain(*inputs)
    assert torch.equal(before, model(*inputs))
    torch.testing.assert_close(after, before, rtol=TOLERANCE, atol=TOLERANCE)
    if esper_free:
        assert not [type(m) for m in plain.modules() if type(m).__module__.startswith("esper")]
    return plain


LINEAR_CASES = [
    ("lowrank", {"rank": 3}),
    ("lowrank", {"rank": 3, "mode": "replace"}),
    ("dense", {"activation": None}),
    ("lowrank", {"rank": 2, "tap": "output"}),
    ("dense", {"activation": None, "tap": "output", "mode": "replace"}),
]


@pytest.mark.parametrize(("blueprint", "options"), LINEAR_CASES)
@pytest.mark.parametrize("scope", ["layer", "chunk"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_linear_seeds_are_folded_into_a_linear_host(
    blueprint: str, options: dict[str, Any], scope: str, bias: bool, alpha: float
) -> None:
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh()), "0")
    d_in = 6 if options.get("tap") == "output" else 5
    # Six features, four seeds: chunk 1 is [1, 3).
    d_out = 6 if scope == "layer" else 2
    wake(model, "0", 1, blueprint, d_in, d_out, alpha, scope=scope, **options)
    plain = assert_same(model, torch.randn(7, 5, dtype=torch.float64))
    assert type(plain[0]) is nn.Linear
    assert set(plain.state_dict()) <= {"0.weight", "0.bias"}


def test_folding_gives_a_host_without_bias_one_if_a_seed_needs_it() -> None:
    model = wrapped(nn.Sequential(nn.Linear(5, 6, bias=False)), "0")
    wake(model, "0", 0, "dense", 5, 6, 0.5, activation=None, bias=True)
    plain = assert_same(model, torch.randn(3, 5, dtype=torch.float64))
    assert type(plain[0]) is nn.Linear
    assert plain[0].bias is not None


def test_several_seeds_fold_together_and_replace_seeds_share_the_blend() -> None:
    torch.manual_seed(1)
    model = wrapped(nn.Sequential(nn.Linear(5, 8)), "0")
    wake(model, "0", 0, "lowrank", 5, 8, 0.7, rank=2)
    wake(model, "0", 1, "dense", 5, 2, 0.9, activation=None, mode="replace", scope="chunk")
    wake(model, "0", 2, "dense", 8, 8, 0.8, activation=None, mode="replace", tap="output")
    plain = assert_same(model, torch.randn(2, 3, 5, dtype=torch.float64))
    assert type(plain[0]) is nn.Linear


HOSTS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    ("linear", lambda: nn.Linear(6, 8), (5, 6), 6, 8),
    ("linear 3d", lambda: nn.Linear(6, 8, bias=False), (2, 5, 6), 6, 8),
    ("relu", nn.ReLU, (5, 8), 8, 8),
    ("relu image", nn.ReLU, (2, 8, 3, 4), 8, 8),
    ("gelu", lambda: nn.GELU("tanh"), (5, 8), 8, 8),
    ("layer norm", lambda: nn.LayerNorm(8), (5, 8), 8, 8),
    ("batch norm 1d", lambda: nn.BatchNorm1d(8), (5, 8), 8, 8),
    ("batch norm 1d long", lambda: nn.BatchNorm1d(8), (5, 8, 3), 8, 8),
    ("batch norm 2d", lambda: nn.BatchNorm2d(8), (2, 8, 3, 4), 8, 8),
    ("conv", lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 4), 6, 8),
    ("conv strided", lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), (2, 6, 7, 6), 6, 8),
    ("conv grouped", lambda: nn.Conv2d(6, 8, 1, groups=2, bias=False), (2, 6, 5, 4), 6, 8),
]
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("lowrank", {"rank": 3}),
    ("normed_bottleneck", {"rank": 3}),
    ("gated", {"rank": 2}),
    ("dense", {"activation": "silu", "mode": "replace"}),
    ("normed_bottleneck", {"rank": 3, "activation": "tanh", "tap": "output", "mode": "replace", "norm": "rmsnorm"}),
]


@pytest.mark.parametrize(("name", "make", "shape", "d_in", "d_out"), HOSTS, ids=[host[0] for host in HOSTS])
@pytest.mark.parametrize(("blueprint", "options"), SEEDS)
@pytest.mark.parametrize("scope", ["layer", "chunk"])
def test_every_host_and_seed(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    d_in: int,
    d_out: int,
    blueprint: str,
    options: dict[str, Any],
    scope: str,
) -> None:
    torch.manual_seed(2)
    model = wrapped(nn.Sequential(make()), "0")
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    tap = d_out if options.get("tap") == "output" else d_in
    wake(model, "0", 2, blueprint, tap, d_out if scope == "layer" else 2, 0.6, scope=scope, **options)
    assert not torch.equal(model(x), model.original_model(x))
    assert_same(model, x)


def test_scale_and_shift_fold_into_norms() -> None:
    for host, shape in ((nn.LayerNorm(6), (3, 6)), (nn.BatchNorm2d(6), (2, 6, 4, 4))):
        model = wrapped(nn.Sequential(host), "0")
        wake(model, "0", 0, "elementwise", 6, 6, 0.4, mode="replace")
        plain = assert_same(model, torch.randn(shape, dtype=torch.float64))
        assert type(plain[0]) is type(host)


def test_pointwise_seeds_fold_into_a_convolution_of_their_stride() -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)), "0")
    wake(model, "0", 0, "lowrank", 3, 4, 0.5, rank=2)
    plain = assert_same(model, torch.randn(2, 3, 6, 7, dtype=torch.float64))
    assert type(plain[0]) is nn.Conv2d


def test_depthwise_seeds_stay_apart() -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "0")
    wake(model, "0", 0, "conv", 3, 4, 0.5)
    assert_same(model, torch.randn(2, 3, 6, 7, dtype=torch.float64))


def test_attention_and_the_encoder_around_it() -> None:
    """The fused inference path reads weights directly; it must not pass the grafts by."""
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = wrapped(nn.TransformerEncoder(layer, 2), nn.MultiheadAttention, nn.Linear, nn.LayerNorm)
    wake(model, "layers.0.self_attn", 1, "bottleneck", 8, 8, 0.5, rank=2)
    wake(model, "layers.1.linear1", 0, "bottleneck", 8, 16, 0.5, rank=2)
    wake(model, "layers.1.norm1", 0, "bottleneck", 8, 8, 0.5, rank=2)
    with torch.no_grad():
        plain = assert_same(model, torch.randn(2, 5, 8, dtype=torch.float64), esper_free=False)
    attention = plain.get_submodule("layers.0.self_attn")
    assert isinstance(attention, GraftedAttention)
    assert "layers.0.self_attn.in_proj_weight" in plain.state_dict()
    again = torch.load(_bytes(plain), weights_only=False)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))


def _bytes(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_tied_weights_are_not_folded() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    host[1].weight = host[0].weight
    model = wrapped(host, "0")
    wake(model, "0", 0, "lowrank", 4, 4, 0.5, rank=2)
    assert_same(model, torch.randn(3, 4, dtype=torch.float64))


def test_a_host_used_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(4, 4)
    model = wrapped(nn.Sequential(shared, nn.Tanh(), shared), "0")
    wake(model, "0", 0, "bottleneck", 4, 4, 0.5, rank=2)
    plain = assert_same(model, torch.randn(3, 4, dtype=torch.float64))
    assert plain[0] is plain[2]


def test_a_model_that_is_itself_the_host() -> None:
    model = wrapped(nn.Linear(4, 3))
    wake(model, "root", 0, "bottleneck", 4, 3, 0.5, rank=2)
    assert_same(model, torch.randn(3, 4, dtype=torch.float64))


def test_dormant_and_silent_seeds_leave_plain_hosts() -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    wake(model, "0", 0, "bottleneck", 4, 3, 0.0, rank=2)
    x = torch.randn(3, 4, dtype=torch.float64)
    plain = export(model)
    assert torch.equal(plain(x), model.original_model(x))
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU]
    assert "forward" not in plain[0].__dict__


def test_export_shares_no_memory_and_trains() -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 3)), "0")
    wake(model, "0", 0, "bottleneck", 4, 3, 0.5, rank=2)
    plain = export(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not [p for p in plain.parameters() if p.data_ptr() in ours]
    plain(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in plain.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning")
def test_exported_models_script_and_load_without_esper(tmp_path: Path) -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    wake(model, "0", 0, "bottleneck", 4, 3, 0.5, rank=2)
    wake(model, "2", 3, "gated", 3, 2, 0.5, rank=2)
    plain = export(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(torch.jit.script(plain)(x), plain(x))
    torch.save((plain, x, plain(x)), tmp_path / "plain.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['esper'] = None\n"
        f"plain, x, y = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False)\n"
        "assert torch.equal(plain(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_an_activation_of_unknown_shape_is_refused() -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "1")
    wake(model, "1", 0, "bottleneck", 3, 3, 0.5, rank=2)
    with pytest.raises(ExportError, match="call the model once"):
        export(model)


def _double(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _plus_input(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + args[0].sum()


def _shift(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1, *args[1:])


HOOKED_HOSTS = ["linear", "relu", "layer norm", "conv"]


@pytest.mark.parametrize("seed", [("lowrank", {"rank": 3}), ("bottleneck", {"rank": 3, "activation": "silu"})])
@pytest.mark.parametrize("hooks", ["after", "before", "both"])
@pytest.mark.parametrize("host", HOOKED_HOSTS)
def test_hooks_of_a_layer_stay_around_its_seeds(host: str, hooks: str, seed: tuple[str, dict[str, Any]]) -> None:
    """They used to be lost, or to see the host's own output."""
    torch.manual_seed(6)
    _, make, shape, d_in, d_out = next(entry for entry in HOSTS if entry[0] == host)
    network = nn.Sequential(make())
    if hooks != "before":
        network[0].register_forward_hook(_double)
        network[0].register_forward_hook(_plus_input, with_kwargs=True, always_call=True)
    if hooks != "after":
        network[0].register_forward_pre_hook(_shift)
    model = wrapped(network, "0")
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    wake(model, "0", 1, seed[0], d_in, d_out, 0.6, **seed[1])
    plain = assert_same(model, x)
    # Copies and files too: a graph module drops its hooks there.
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))
    assert torch.equal(torch.load(_bytes(plain), weights_only=False)(x), plain(x))
    assert len(network[0]._forward_hooks) == (0 if hooks == "before" else 2)


def test_hooks_of_attention_and_of_gradients() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.inner(x, x, x)[0])

    network = Attention()
    network.inner.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    network.inner.register_forward_pre_hook(_shift)
    network.linear.register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
    model = wrapped(network, "inner", "linear")
    wake(model, "inner", 0, "bottleneck", 8, 8, 0.5, rank=2)
    wake(model, "linear", 0, "bottleneck", 8, 8, 0.5, rank=2)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    plain = assert_same(model, x, esper_free=False)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (plain, model))
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_activation_in_place_leaves_its_seeds_their_input() -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)), "1")
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x)
    wake(model, "1", 0, "bottleneck", 6, 6, 0.5, rank=2)
    assert_same(model, x)


class Tripled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return output * 3, weights


@pytest.mark.parametrize("patched", [False, True])
def test_attention_with_a_forward_of_its_own_is_refused(patched: bool) -> None:
    host: nn.MultiheadAttention = nn.MultiheadAttention(8, 2) if patched else Tripled(8, 2)
    if patched:
        host.forward = functools.partial(host.forward, need_weights=False)  # type: ignore[method-assign]
    model = wrapped(nn.ModuleDict({"inner": host}), "inner")
    wake(model, "inner", 0, "bottleneck", 8, 8, 0.5, rank=2)
    with pytest.raises(ExportError, match=r"layer 'inner' \((Tripled|MultiheadAttention)\) .* another forward"):
        export(model)
