"""esper.restore: a wrapped model that is there becomes what a file holds, and whatever follows it follows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

import esper
from esper.core.checkpoint import CheckpointError, load, restore, save
from esper.core.model_wrapper import MorphableModel
from esper.execution.lifecycle import SeedLifecycleState as _State
from tests.core.test_checkpoint import grown, host, kernel


def fresh(**options: Any) -> MorphableModel:
    torch.manual_seed(7)
    return esper.wrap(host(), ["0", "2", "3"], seeds_per_layer=3, telemetry_enabled=False, **options)


def same(ours: MorphableModel, theirs: MorphableModel) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name
    x = torch.randn(4, 5)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    ours.train(), theirs.train()


def train(model: MorphableModel, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> None:
    torch.manual_seed(seed)
    for x in torch.randn(steps, 8, 5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        model.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MorphableModel, Path]:
    model = grown()
    save(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def test_a_model_that_never_grew_becomes_the_saved_one(saved: tuple[MorphableModel, Path]) -> None:
    model, path = saved
    again = fresh()
    body = again.wrapped_model
    restore(again, path)
    assert again.wrapped_model is body
    same(again, model)
    assert again.layer("0").state_layout.state_of(1) is _State.FOSSILIZED
    assert again.layer("0").grafts.kernel(1).artifact_id == model.layer("0").grafts.kernel(1).artifact_id
    for m in (model, again):  # the ramp that was under way goes on
        m.step()
    assert torch.equal(model.lattice.alpha_blend, again.lattice.alpha_blend)


def test_a_model_that_grew_otherwise_goes_back(saved: tuple[MorphableModel, Path]) -> None:
    model, path = saved
    held = dict(model.layer("0").grafts.seed_parameters(2))
    model.cull("2", 0)  # awake in the file
    assert model.layer("3").commit(2, kernel("bottleneck", 6, 3, rank=4), alpha=1.0)  # dormant in the file
    model.fossilize("3", 2)
    assert model.layer("0").state_layout.state_of(1) is _State.FOSSILIZED
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    restore(model, path)
    same(model, load(path, host()))
    assert model.layer("3").state_layout.state_of(2) is _State.DORMANT
    assert model.layer("2").state_layout.state_of(0) is _State.GRAFTING
    # The seed that has its kernel still is the same parameters, whose values are the file's.
    now = model.layer("0").grafts.seed_parameters(2)
    assert now.keys() == held.keys() and all(now[name] is held[name] for name in held)


@pytest.mark.parametrize("kernels", ["others", "the same"])
def test_training_repeats_itself_to_the_bit(tmp_path: Path, kernels: str) -> None:
    model = grown()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    esper.optim.attach(optimizer, model)
    train(model, optimizer, seed=1)
    scheduler.step()
    save(model, tmp_path / "model.safetensors")
    torch.save((optimizer.state_dict(), scheduler.state_dict()), tmp_path / "optimizer.pt")
    train(model, optimizer, seed=2)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}

    if kernels == "others":
        model.cull("2", 0)
        assert model.layer("0").commit(2, kernel("bottleneck", 5, 6, rank=3), alpha=0.2)
        assert model.layer("3").commit(1, kernel("lowrank", 6, 3, rank=1), alpha=0.2)
    train(model, optimizer, seed=3)
    scheduler.step()
    restore(model, tmp_path / "model.safetensors")
    states = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()} and len(trained) == len(once)
    train(model, optimizer, seed=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, once[name]), name
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.009)


def test_what_is_reserved_and_what_grows_take_each_other_s_files(saved: tuple[MorphableModel, Path]) -> None:
    _, path = saved
    restored = fresh()
    restore(restored, path)
    wide = esper.wrap(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), reserve_rank=4)
    narrow = esper.wrap(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), reserve_rank=1)
    assert wide.layer("0").commit(1, kernel("lowrank", 5, 6, rank=3), alpha=0.5)
    with torch.no_grad():
        for parameter in wide.layer("0").grafts.seed_parameters(1).values():
            parameter.normal_()
    elastic = path.with_name("elastic.safetensors")
    save(wide, elastic)
    plain = esper.wrap(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)))
    restore(plain, elastic)
    x = torch.randn(3, 5)
    assert torch.equal(plain(x), wide(x))
    addresses = [p.data_ptr() for p in wide.parameters()]
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    restore(wide, elastic)
    assert torch.equal(plain(x), wide(x)) and [p.data_ptr() for p in wide.parameters()] == addresses
    before = {name: t.clone() for name, t in narrow.state_dict().items()}
    with pytest.raises(CheckpointError, match="rank"):
        restore(narrow, elastic)
    assert all(torch.equal(t, before[name]) for name, t in narrow.state_dict().items())


def test_loads_under_way_come_to_nothing(saved: tuple[MorphableModel, Path], tmp_path: Path) -> None:
    model, path = saved
    loads = [model.layer("3").begin_load(0, 1.0), model.layer("0").begin_load(2, 1.0)]  # one asleep, one awake
    restore(model, path)
    assert [load.ended for load in loads] == [True, True]
    assert model.layer("3").state_layout.state_of(0) is _State.DORMANT and model.layer("3").loading == ()
    assert not model.layer("3").commit(0, kernel("lowrank", 6, 3, rank=1), alpha=1.0, load=loads[0])
    same(model, load(path, host()))
    assert "restored while it was loading" in model.get_layer_stats("0")["errors"][2]


def other_layers() -> MorphableModel:
    return esper.wrap(host(), ["0", "3"], seeds_per_layer=3)


def other_count() -> MorphableModel:
    return esper.wrap(host(), ["0", "2", "3"], seeds_per_layer=4)


def other_shapes() -> MorphableModel:
    body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    return esper.wrap(body, ["0", "2", "3"], seeds_per_layer=3)


def other_dtype() -> MorphableModel:
    return fresh().double()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (other_layers, "seeds in other layers than the file: 2"),
        (other_count, "3 seeds a layer in the file, 4 in the model"),
        (other_shapes, "has shape"),
        (other_dtype, "is torch.float32 in the file, torch.float64 in the host"),
    ],
)
def test_another_model_is_refused_and_left_alone(
    saved: tuple[MorphableModel, Path], build: Callable[[], MorphableModel], words: str
) -> None:
    other = build()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        restore(other, saved[1])
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_damaged_file_changes_nothing(saved: tuple[MorphableModel, Path]) -> None:
    model, path = saved
    whole = path.read_bytes()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.random.fork_rng():
        for cut in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                restore(model, path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="SHA-256"):
        restore(model, path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        restore(model, path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_nobody_could_foresee_is_said(saved: tuple[MorphableModel, Path]) -> None:
    _, path = saved
    again = fresh()

    def fails(event: str, layer: str, seed_idx: int, parameters: dict[str, nn.Parameter]) -> None:
        if layer == "2":
            raise MemoryError("no more")

    stop = again.on_growth(fails)
    weight = again.wrapped_model[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"layer '2', seed 0.*no more.*half restored"):
        restore(again, path)
    assert torch.equal(again.wrapped_model[0].weight, weight) and not again.morphogenetic_active
    again(torch.randn(3, 5)).sum().backward()  # and it works
    stop()
    restore(again, path)
    same(again, saved[0])


def test_what_is_not_wrapped_is_named(saved: tuple[MorphableModel, Path]) -> None:
    with pytest.raises(TypeError, match=r"restore needs a model that esper.wrap gave, got Sequential"):
        restore(host(), saved[1])  # type: ignore[arg-type]
    assert esper.restore is restore


def test_a_layer_that_was_replaced_is_refused(saved: tuple[MorphableModel, Path]) -> None:
    again = fresh()
    again.wrapped_model[0] = nn.Linear(5, 6)
    with pytest.raises(CheckpointError, match="layer '0', seed 1: Layer '0' was replaced after wrap"):
        restore(again, saved[1])
    other = fresh(preserve_original=False)
    body = esper.unwrap(other)
    owner = esper.wrap(body, ["0", "2", "3"], seeds_per_layer=3, preserve_original=False)
    with pytest.raises(CheckpointError, match="was given up"):
        restore(other, saved[1])
    assert not any(model.morphogenetic_active for model in (again, other, owner))


def test_reserved_memory_trains_on_as_it_did(tmp_path: Path) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), reserve_rank=4)
    assert model.layer("0").commit(1, kernel("lowrank", 5, 6, rank=3), alpha=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    esper.optim.attach(optimizer, model)
    train(model, optimizer, seed=1)
    save(model, tmp_path / "model.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, seed=2)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, seed=3)
    restore(model, tmp_path / "model.safetensors")
    optimizer.load_state_dict(state)
    train(model, optimizer, seed=2)
    assert [name for name, p in model.named_parameters() if not torch.equal(p, once[name])] == []
