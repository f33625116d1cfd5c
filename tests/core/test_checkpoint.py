"""One file that rebuilds a grown network, or says why it does not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

import esper
from esper.artifacts.artifact import Artifact
from esper.core.checkpoint import CheckpointError, load, save
from esper.core.model_wrapper import MorphableModel
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.lifecycle import SeedLifecycleState
from esper.services.tezzeret.forge import build

_State = SeedLifecycleState


def host() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def kernel(blueprint: str, d_in: int, d_out: int, **options: Any) -> LoadedKernel:
    return LoadedKernel.from_artifact(Artifact.open(build(blueprint, d_in=d_in, d_out=d_out, **options)))


def grown() -> MorphableModel:
    """Two layers with seeds in several states, trained for two steps so that nothing is at its start."""
    torch.manual_seed(0)
    model = esper.wrap(host(), ["0", "2", "3"], seeds_per_layer=3, preserve_original=False, telemetry_enabled=False)
    assert model.layer("0").commit(1, kernel("bottleneck", 5, 6, rank=2), alpha=0.7)
    assert model.layer("0").commit(2, kernel("lowrank", 5, 2, rank=2, scope="chunk", mode="replace"), alpha=0.4)
    assert model.layer("2").commit(0, kernel("gated", 6, 6, rank=2), alpha=1.0, ramp_steps=5)
    model.fossilize("0", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        model.step()
    return model


def test_a_missing_folder_is_named_by_the_path_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "g.safetensors"
    with pytest.raises(FileNotFoundError, match=f"its folder does not exist: '{path}'"):
        save(esper.wrap(host()), path)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (lambda: nn.Linear(2, 2), "got Linear"),
        (lambda: None, "got NoneType"),
        (lambda: nn.DataParallel(grown()), "got DataParallel; its .module is one"),
    ],
    ids=["plain", "none", "around"],
)
@pytest.mark.parametrize("function", ["save", "export", "unwrap"])
def test_what_is_not_wrapped_is_named(tmp_path: Path, model: Callable[[], Any], given: str, function: str) -> None:
    arguments = [tmp_path / "m"] if function == "save" else []
    with pytest.raises(TypeError, match=f"{function} needs a model that esper.wrap gave, {given}"):
        getattr(esper, function)(model(), *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "given"),
    [(lambda: 3, "got int"), (grown, "got a wrapped model")],
    ids=["none", "wrapped"],
)
def test_what_is_no_host_is_named(saved: tuple[MorphableModel, Path], other: Callable[[], Any], given: str) -> None:
    with pytest.raises(TypeError, match=f"load needs the plain network that was wrapped, .* {given}"):
        load(saved[1], other())


def test_a_compiled_model_is_the_model_that_was_compiled(tmp_path: Path) -> None:
    """It used to be saved under names that no host has."""
    model = grown()
    compiled: Any = torch.compile(model)
    save(compiled, tmp_path / "compiled")
    save(model, tmp_path / "plain")
    assert (tmp_path / "compiled").read_bytes() == (tmp_path / "plain").read_bytes()
    assert esper.unwrap(compiled) is esper.unwrap(model)
    x = torch.randn(3, 5)
    assert torch.equal(esper.export(compiled).eval()(x), esper.export(model).eval()(x))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MorphableModel, Path]:
    model = grown()
    path = tmp_path / "model.safetensors"
    save(model, path)
    return model, path


def test_round_trip_rebuilds_everything(saved: tuple[MorphableModel, Path]) -> None:
    model, path = saved
    torch.manual_seed(9)
    fresh = host()
    again = load(path, fresh)
    assert again.wrapped_model is fresh
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    x = torch.randn(4, 5)
    for mode in (True, False):
        model.train(mode), again.train(mode)
        assert torch.equal(model(x), again(x))
    assert again.layer("0").state_layout.state_of(1) is _State.FOSSILIZED
    assert again.layer("2").state_layout.state_of(0) is _State.GRAFTING
    assert again.layer("0").grafts.kernel(1).artifact_id == model.layer("0").grafts.kernel(1).artifact_id
    # The ramp that was under way goes on.
    for m in (model, again):
        m.step()
    assert torch.equal(model.lattice.alpha_blend, again.lattice.alpha_blend)
    assert again.get_layer_names() == model.get_layer_names()


def test_training_goes_on_as_if_nothing_had_happened(saved: tuple[MorphableModel, Path]) -> None:
    model, path = saved
    again = load(path, host())
    optimizers = []
    for m in (model, again):
        optimizer = torch.optim.AdamW(m.wrapped_model.parameters(), lr=0.01)
        esper.optim.attach(optimizer, m)
        optimizers.append(optimizer)
    torch.manual_seed(4)
    for x in torch.randn(3, 8, 5):
        for m, optimizer in zip((model, again), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
            m.step()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_public_names() -> None:
    assert esper.save is save
    assert esper.load is load


def test_a_second_generation_is_the_same_file(saved: tuple[MorphableModel, Path], tmp_path: Path) -> None:
    _, path = saved
    second = tmp_path / "second.safetensors"
    save(load(path, host()), second)
    assert second.read_bytes() == path.read_bytes()


def test_preserve_original_leaves_the_host_alone(saved: tuple[MorphableModel, Path]) -> None:
    _, path = saved
    fresh = host()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    again = load(path, fresh, preserve_original=True)
    assert esper.unwrap(again) is fresh
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_a_load_under_way_is_forgotten(tmp_path: Path) -> None:
    model = grown()
    model.layer("3").begin_load(0)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", host())
    assert again.layer("3").state_layout.state_of(0) is _State.DORMANT


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        net[1].weight = net[0].weight
        return net

    model = esper.wrap(tied(), preserve_original=False, telemetry_enabled=False)
    path = tmp_path / "m"
    save(model, path)
    assert path.stat().st_size < 2 * 64 * 64 * 4
    again = load(path, tied())
    assert again.wrapped_model[0].weight is again.wrapped_model[1].weight
    assert torch.equal(again(torch.eye(64)), model(torch.eye(64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_odd_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    def odd() -> nn.Module:
        net = nn.Linear(4, 4).to(dtype)
        net.register_buffer("flag", torch.tensor(True))
        net.register_buffer("none", torch.zeros(0, 3))
        net.register_buffer("turned", torch.arange(6).reshape(2, 3).t())
        return net

    model = esper.wrap(nn.Sequential(odd()), telemetry_enabled=False)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", nn.Sequential(odd()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_writing_is_all_or_nothing(saved: tuple[MorphableModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def refuses(path: Path, fresh: nn.Module, *words: str) -> None:
    """Loading fails with all ``words`` in the message, and leaves the host as it was."""
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(path, fresh)
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())
    assert not [name for name, module in fresh.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("fresh", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), ["Layer '2' not found"]),
        (
            lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)),
            ["0.weight", "(6, 5)", "(7, 5)"],
        ),
        (
            lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)),
            ["ReLU", "GELU", "'2'"],
        ),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.ReLU(), nn.Linear(6, 3)), ["the host lacks 1.bias"]),
        (lambda: nn.Sequential(*host(), nn.Linear(3, 3)), ["the file lacks 4.bias"]),
        (lambda: host().double(), ["torch.float32", "torch.float64"]),
    ],
)
def test_another_host_is_refused(
    saved: tuple[MorphableModel, Path], fresh: Callable[[], nn.Module], words: list[str]
) -> None:
    refuses(saved[1], fresh(), *words)


def test_missing_truncated_and_foreign_files(saved: tuple[MorphableModel, Path], tmp_path: Path) -> None:
    _, path = saved
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "nothing", host())
    data = path.read_bytes()
    cut = tmp_path / "cut"
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        refuses(cut, host())
    save_file({"x": torch.zeros(2)}, tmp_path / "plain")
    refuses(tmp_path / "plain", host(), "no manifest")


def test_a_flipped_bit_anywhere_is_found(saved: tuple[MorphableModel, Path], tmp_path: Path) -> None:
    _, path = saved
    data = path.read_bytes()
    for position in range(8, len(data), max(1, len(data) // 60)):
        altered = tmp_path / f"altered{position}"
        altered.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        refuses(altered, host())


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """The file with its manifest changed and every hash made to fit: what only the deeper checks can find."""
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["esper.checkpoint"].partition("\n")[2])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(record, tensors)
    record["hashes"] = {
        name: hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]
        for name, tensor in tensors.items()
    }
    text = json.dumps(record)
    digest = hashlib.sha256(text.encode()).hexdigest()
    changed = path.with_name("changed")
    save_file(tensors, changed, metadata={"esper.checkpoint": f"{digest}\n{text}"})
    return changed


def _version(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["version"] = 99


def _negative_rank(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["reserve_rank"] = -1


def _huge_rank(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["reserve_rank"] = 1 << 40


def _extra_key(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["surprise"] = 1


def _wrong_type(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["seeds_per_layer"] = "3"


def _lost_kernel(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["seeds"].pop()


def _state(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["esper.lattice.lifecycle_states"][0] = int(_State.ACTIVE)


def _blueprint(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["seeds"][0]["manifest"]["blueprint"]["nodes"][1]["op"] = "import_os"


def _graft_shape(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["esper.0.seed1.down.weight"] = torch.zeros(3, 5)


def _no_such_seed(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["seeds"][0]["seed_idx"] = 9


def _alias(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    record["aliases"]["4.weight"] = "5.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_version, ["version 99", "reads 1"]),
        (_negative_rank, ["reserve_rank is -1"]),
        (_huge_rank, ["reserve_rank is 1099511627776"]),
        (_extra_key, ["surprise"]),
        (_wrong_type, ["seeds_per_layer"]),
        (_lost_kernel, ["GRAFTING", "no kernel"]),
        (_state, ["checksum"]),
        (_blueprint, ["import_os"]),
        (_graft_shape, ["(3, 5)", "(2, 5)"]),
        (_no_such_seed, ["seed"]),
        (_alias, ["5.weight"]),
    ],
)
def test_a_consistent_but_wrong_manifest_is_refused(
    saved: tuple[MorphableModel, Path], change: Callable[..., None], words: list[str]
) -> None:
    refuses(rewritten(saved[1], change), host(), *words)


def test_state_that_needs_pickling_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": object()}

        def set_extra_state(self, state: object) -> None:
            raise AssertionError("never called")

    model = esper.wrap(nn.Sequential(Odd(2, 2)), telemetry_enabled=False)
    with pytest.raises(CheckpointError, match="_extra_state"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layer", "seed", "state"), [("3", 0, _State.ACTIVE), ("0", 2, _State.DORMANT)])
def test_states_and_kernels_that_disagree_are_not_saved(tmp_path: Path, layer: str, seed: int, state: _State) -> None:
    """Nobody could load such a file."""
    model = grown()
    model.layer(layer).state_layout.lifecycle_states[seed] = int(state)
    model.lattice.notify()
    has = "no kernel" if state is _State.ACTIVE else "a kernel"
    with pytest.raises(CheckpointError, match=f"layer '{layer}', seed {seed} is {state.name} but has {has}"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_the_device_has_just_taken_out_is_saved_without_its_kernel(tmp_path: Path) -> None:
    model = grown()
    model.layer("0").state_layout.transition_seed_state(2, _State.ERROR_RECOVERY)
    assert model.layer("0").grafts.bound == (1, 2)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", host())
    assert again.layer("0").grafts.bound == (1,)
    assert again.layer("0").state_layout.state_of(2) is _State.ERROR_RECOVERY
    x = torch.randn(4, 5)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["lattice", "wrapped_model", "layer", "grafts"])
def test_layers_may_have_the_names_of_esper_s_parts(tmp_path: Path, name: str) -> None:
    def other() -> nn.Sequential:
        network = nn.Sequential()
        network.add_module(name, nn.Linear(5, 6))
        return network

    model = esper.wrap(other(), telemetry_enabled=False)
    assert model.layer(name).commit(1, kernel("bottleneck", 5, 6, rank=2), alpha=0.7)
    with torch.no_grad():
        for parameter in model.graft_parameters().values():
            parameter.normal_()
    x = torch.randn(4, 5)
    before = model(x)
    model.load_state_dict(model.state_dict())
    save(model, tmp_path / "m")
    for again in (model, load(tmp_path / "m", other())):
        assert torch.equal(again(x), before)
