"""Seeds that a layer hosts itself: woken, trained, copied, saved and put to sleep without a wrapped model."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import nn as enn
from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import SeedLifecycleState
from tests.nn.cases import CASES, Case, bits, kernel, registry_url, wake

#: Cases with rows to change, and the features of their output.
FEATURES = {
    "linear": 5,
    "linear-no-bias": 5,
    "conv": 6,
    "conv-options": 6,
    "relu": 5,
    "relu-in-place": 4,
    "gelu": 5,
    "tanh": 5,
    "sigmoid": 4,
    "layernorm": 6,
    "layernorm-options": 6,
}
AWAKE = [case for case in CASES if case.name in FEATURES]


def awake(case: Case, alpha: float = 0.5) -> tuple[enn.Seeded, nn.Module, Tensor]:
    """The layer with seed 1 awake on its output, torch's layer, and an input."""
    ours, theirs = case.pair()
    width = FEATURES[case.name]
    wake(ours, 1, kernel("bottleneck", width, width, rank=3, tap="output", activation="tanh"), alpha)
    return ours, theirs, case.input()


def expected(theirs: nn.Module, ours: enn.Seeded, x: Tensor, alpha: float = 0.5) -> Tensor:
    """``h + alpha * up tanh(down h + b)``, written out."""
    h = theirs(x * 1)
    dim = ours.seeds.channel_dim
    p = ours.seeds.grafts.seed_parameters(1)
    rows = h.movedim(dim, -1)
    k = torch.tanh(rows @ p["down.weight"].t() + p["down.bias"]) @ p["up.weight"].t()
    return h + alpha * k.movedim(-1, dim)


@pytest.mark.parametrize("case", AWAKE, ids=str)
def test_the_seed_is_on_the_path_and_learns(case: Case) -> None:
    ours, theirs, x = awake(case)
    y = ours(x * 1)
    # Sums of at most 6 products of size one, in another order: a few units in the last place of float32.
    torch.testing.assert_close(y, expected(theirs, ours, x), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    grafts = {name: p for name, p in ours.named_parameters() if name.startswith("grafts.seed1.")}
    assert len(grafts) == 3 and all(p.grad is not None and p.grad.any() for p in grafts.values())
    ours.set_seed_alpha(1, 0.0)
    assert torch.equal(bits(ours(x * 1)), bits(theirs(x * 1)))
    assert asyncio.run(ours.unload_kernel(1)) and not asyncio.run(ours.unload_kernel(1))
    assert not list(ours.children()) and "forward" not in ours.__dict__
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_seed_of_an_activation_in_place_reads_what_the_activation_read() -> None:
    layer = enn.SeededReLU(inplace=True)
    layer(torch.randn(2, 4))
    wake(layer, 0, kernel("lowrank", 4, 4, rank=2), 1.0)
    x = torch.randn(3, 4)
    p = layer.seeds.grafts.seed_parameters(0)
    k = x @ p["down.weight"].t() @ p["up.weight"].t()
    torch.testing.assert_close(layer(x.clone()), torch.relu(x) + k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height", [6, 4])
@pytest.mark.parametrize(("blueprint", "options"), [
    ("lowrank", {"rank": 2}), ("lowrank", {"rank": 2, "tap": "output", "mode": "replace"}), ("conv", {"stride": 2}),
])  # fmt: skip
def test_a_single_image(blueprint: str, options: dict[str, Any], height: int) -> None:
    # As many channels as rows of pixels in one of the two, so that taking one for the other would go unnoticed.
    layer = enn.SeededConv2d(4, 4, 3, stride=2, padding=1)
    wake(layer, 0, kernel(blueprint, 4, 4, **options), 0.5)
    x = torch.randn(2, 4, height, 5)
    # One image is multiplied in another order than two: a few products of size one.
    torch.testing.assert_close(layer(x[1]), layer(x)[1], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(Network(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[1]), layer(x)[1], rtol=1e-5, atol=1e-5)
    seen: list[torch.Size] = []
    layer.seeds.arm_probe(lambda y: seen.append(y.shape))
    layer(x[1])
    assert seen == [torch.Size([1, 4, height // 2, 3])]


@pytest.mark.parametrize("case", AWAKE, ids=str)
def test_copies_are_their_own(case: Case) -> None:
    ours, _, x = awake(case)
    before = ours(x * 1)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x * 1), before)
        twin.set_seed_alpha(1, 0.0)
        with torch.no_grad():
            twin.seeds.grafts.seed_parameters(1)["up.weight"].zero_()
        assert torch.equal(ours(x * 1), before)
        assert asyncio.run(twin.unload_kernel(1)) and ours.seeds.grafts.bound == (1,)


class Network(nn.Module):
    """Something around a layer, as there always is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("case", AWAKE, ids=str)
def test_compiled_it_follows_alpha_without_recompiling(case: Case) -> None:
    ours, _, x = awake(case)
    ours(x * 1)
    torch._dynamo.reset()
    compiled = torch.compile(Network(ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x * 1), ours(x * 1), rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours.set_seed_alpha(1, 0.9)
        torch.testing.assert_close(compiled(x * 1), ours(x * 1), rtol=1e-5, atol=1e-5)
    assert asyncio.run(ours.unload_kernel(1))
    assert torch.equal(compiled(x * 1), ours(x * 1))


def test_a_layer_compiled_by_itself_wakes_and_sleeps() -> None:
    layer, x = enn.SeededLinear(7, 5), torch.randn(3, 7)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), layer(x))
        wake(layer, 0, kernel("lowrank", 7, 5, rank=2))
        layer(x)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        assert asyncio.run(layer.unload_kernel(0))


def test_conversion_takes_the_seeds_along() -> None:
    ours, _, x = awake(AWAKE[0])
    before = ours(x)
    after = ours.double()(x.double())
    torch.testing.assert_close(before.double(), after, rtol=1e-5, atol=1e-5)
    wake(ours, 2, kernel("lowrank", 7, 5, rank=2))
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert ours.state_layout.alpha_blend.dtype is torch.float32
    sleeping = enn.SeededLinear(7, 5).double()
    wake(sleeping, 0, kernel("lowrank", 7, 5, rank=2))
    assert {p.dtype for p in sleeping.parameters()} == {torch.float64}


def test_functional_call_takes_the_callers_weights() -> None:
    ours, _, x = awake(AWAKE[0])
    ours(x)
    values = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    got = torch.func.functional_call(ours, values, (x,))
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(values[name])
    torch.testing.assert_close(got, twin(x), rtol=1e-5, atol=1e-5)


def test_a_training_run_through_the_registry(tmp_path: Path) -> None:
    registry = registry_url(tmp_path)
    artifact = esper.compile("bottleneck", d_in=6, d_out=6, rank=4, registry=registry)
    cache = KernelCache(16, registry=registry, disk_dir=tmp_path / "cache")
    network = nn.Sequential(nn.Linear(3, 6), enn.SeededTanh(kernel_cache=cache), nn.Linear(6, 1))
    x = torch.randn(64, 3)
    target = x.prod(1, keepdim=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    layer = network[1]
    assert isinstance(layer, enn.Seeded)
    losses = []
    for epoch in range(60):
        loss = nn.functional.mse_loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        enn.step(network)
        losses.append(loss.item())
        if epoch == 5:
            assert asyncio.run(layer.load_kernel(2, artifact, alpha=1.0, ramp_steps=10))
            assert layer.state_layout.state_of(2) is SeedLifecycleState.GRAFTING
            optimizer.add_param_group({"params": list(layer.seeds.grafts.seed_parameters(2).values())})
    assert layer.state_layout.state_of(2) is SeedLifecycleState.ACTIVE and layer.state_layout.alpha_of(2) == 1.0
    assert losses[-1] < losses[5]
    assert all(p.grad.any() for p in layer.parameters())
    stats = layer.get_layer_stats()
    assert stats["layer_name"] == "SeededTanh" and stats["total_kernel_executions"] == 54
    assert stats["artifacts"] == {2: artifact} and stats["cache_stats"]["fetches"] == 1
    assert not asyncio.run(layer.load_kernel(0, "missing-cpu-fast-0000", alpha=1.0))
    assert "missing" in layer.get_layer_stats()["errors"][0]


def test_faults_are_contained_and_the_third_takes_the_seed_out() -> None:
    layer = enn.SeededLinear(4, 4)
    wake(layer, 0, kernel("lowrank", 4, 4, rank=2), 1.0)
    with torch.no_grad():
        layer.seeds.grafts.seed_parameters(0)["up.weight"].fill_(float("nan"))
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.step()
    assert layer.state_layout.state_of(0) is SeedLifecycleState.ERROR_RECOVERY
    assert not list(layer.children())
    assert "non-finite" in layer.get_layer_stats()["errors"][0]


def test_state_dict_with_an_awake_seed() -> None:
    ours, theirs, x = awake(AWAKE[0])
    state = ours.state_dict()
    assert [key for key in state if not key.startswith("grafts.")] == list(theirs.state_dict())
    assert {"grafts.seed1.down.weight", "grafts.lattice.alpha_blend"} <= set(state)
    # A layer with the same seed awake takes weights and alpha; the first call lays weights side by side.
    twin, _, _ = awake(AWAKE[0], alpha=0.1)
    twin(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict({key: value.clone() for key, value in state.items()})
    assert torch.equal(twin(x), ours(x)) and twin.state_layout.alpha_of(1) == 0.5
    # Torch's own entries change the host and leave the seed as it is.
    twin.load_state_dict({key: 2 * value for key, value in theirs.state_dict().items()})
    assert torch.equal(twin.weight, 2 * ours.weight) and twin.seeds.grafts.bound == (1,)
    # Inside a network too.
    network = nn.Sequential(twin)
    network.load_state_dict(nn.Sequential(ours).state_dict())
    assert torch.equal(network(x), ours(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_other_seeds_is_refused(strict: bool) -> None:
    ours, _, _ = awake(AWAKE[0])
    state = ours.state_dict()
    sleeping = enn.SeededLinear(7, 5)
    with pytest.raises(RuntimeError, match="other awake seeds"):
        sleeping.load_state_dict(dict(state), strict)
    other = enn.SeededLinear(7, 5)
    wake(other, 1, kernel("bottleneck", 7, 5, rank=3, activation="tanh", seed=9))
    before = other.seeds.grafts.seed_parameters(1)["down.weight"].clone()
    with pytest.raises(RuntimeError, match="other awake seeds"):
        other.load_state_dict(dict(state), strict)
    assert torch.equal(other.seeds.grafts.seed_parameters(1)["down.weight"], before)
    damaged = dict(state)
    damaged["grafts.lattice.alpha_blend"] = torch.full((4,), 0.9)
    damaged["grafts.seed1.down.weight"] = damaged["grafts.seed1.down.weight"] + 1
    before = ours.seeds.grafts.seed_parameters(1)["down.weight"].clone()
    with pytest.raises(RuntimeError, match="damaged"):
        ours.load_state_dict(damaged, strict)
    assert ours.state_layout.alpha_of(1) == 0.5
    assert torch.equal(ours.seeds.grafts.seed_parameters(1)["down.weight"], before)


def test_torchs_encoder_does_not_pass_the_seed_by() -> None:
    encoder: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plain = copy.deepcopy(encoder)
    encoder.linear1 = enn.SeededLinear(8, 16)
    encoder.linear1.load_state_dict(plain.linear1.state_dict())
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(encoder(x), plain(x))
        wake(encoder.linear1, 0, kernel("lowrank", 8, 16, rank=2), 1.0)
        assert not torch.allclose(encoder(x), plain(x))
        assert asyncio.run(encoder.linear1.unload_kernel(0))
        assert torch.equal(encoder(x), plain(x))


def test_errors() -> None:
    layer = enn.SeededLinear(3, 2, num_seeds=2, layer_name="head")
    with pytest.raises(ValueError, match="Invalid seed index 2: layer 'head' has seeds 0 to 1"):
        layer.set_seed_alpha(2, 0.5)
    with pytest.raises(ValueError, match="Invalid seed index"):
        asyncio.run(layer.load_kernel(-1, "x"))
    assert not layer.seeds.commit(0, kernel("lowrank", 4, 2), alpha=0.5)
    assert "maps 4 features to 2" in layer.get_layer_stats()["errors"][0]
    assert layer.state_layout.state_of(0) is SeedLifecycleState.ERROR_RECOVERY
