"""Optimizers that follow growth: who joins, who leaves, what survives."""

from __future__ import annotations

import asyncio
import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import esper
import esper.optim
from esper.optim import SEED_KEY, attach

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.Adafactor, {"lr": 0.01}),
]


class Grafts:
    def __init__(self) -> None:
        self.seeds: dict[int, dict[str, nn.Parameter]] = {}

    @property
    def bound(self) -> tuple[int, ...]:
        return tuple(self.seeds)

    def parameters(self) -> list[nn.Parameter]:
        return [p for seed in self.seeds.values() for p in seed.values()]

    def seed_parameters(self, seed_idx: int) -> dict[str, nn.Parameter]:
        return dict(self.seeds[seed_idx])


class Layer:
    def __init__(self, host: nn.Module) -> None:
        self.default_transform = host
        self.grafts = Grafts()


class Growing(nn.Module):
    """A host whose seeds are residual vectors: just enough of a MorphableModel to drive the optimizer by hand."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.kasmina_layers = {
            name: Layer(m) for name, m in host.named_modules() if isinstance(m, (nn.Linear, nn.ReLU))
        }
        self.callbacks: list[Callable[..., None]] = []

    def on_growth(self, callback: Callable[..., None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback) if callback in self.callbacks else None

    def wake(self, layer: str, seed_idx: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.full((2,), 0.5))
        self.kasmina_layers[layer].grafts.seeds[seed_idx] = {"shift": parameter}
        for callback in tuple(self.callbacks):
            callback("bound", layer, seed_idx, {"shift": parameter})
        return parameter

    def cull(self, layer: str, seed_idx: int) -> None:
        parameters = self.kasmina_layers[layer].grafts.seeds.pop(seed_idx)
        for callback in tuple(self.callbacks):
            callback("unbound", layer, seed_idx, parameters)

    def loss(self) -> torch.Tensor:
        awake = [p for layer in self.kasmina_layers.values() for s in layer.grafts.seeds.values() for p in s.values()]
        return sum((p.square().sum() for p in (*self.host.parameters(), *awake)), start=torch.zeros(()))


def model() -> Growing:
    torch.manual_seed(0)
    return Growing(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def train(growing: Growing, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        growing.loss().backward()
        optimizer.step()


def groups_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[dict[str, object]]:
    return [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_seed_joins_learns_and_leaves_and_the_rest_keeps_its_state(kind: type, options: dict[str, float]) -> None:
    growing = model()
    optimizer = kind(growing.host.parameters(), **options)
    attach(optimizer, growing)
    train(growing, optimizer)
    before = copy.deepcopy({i: s for i, s in optimizer.state_dict()["state"].items()})
    seed = growing.wake("0", 1)
    after = optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, state in before.items():
        for key, value in state.items():
            same = (
                torch.equal(value, after[index][key]) if isinstance(value, torch.Tensor) else value == after[index][key]
            )
            assert same, (index, key)
    start = seed.detach().clone()
    train(growing, optimizer)
    assert not torch.equal(seed, start)
    assert seed in optimizer.state
    growing.cull("0", 1)
    assert seed not in optimizer.state
    assert groups_of(optimizer, seed) == []
    assert len(optimizer.param_groups) == 1
    train(growing, optimizer)


def test_growth_changes_nothing_for_the_other_parameters() -> None:
    """Culling after waking leaves the host on the very path it would have taken alone: states are kept, bit for bit."""
    growing, alone = model(), model()
    optimizers = [torch.optim.AdamW(m.host.parameters(), lr=0.01) for m in (growing, alone)]
    attach(optimizers[0], growing)
    for m, o in zip((growing, alone), optimizers, strict=True):
        train(m, o)
    growing.wake("2", 0)
    for m, o in zip((growing, alone), optimizers, strict=True):
        train(m, o)
    growing.cull("2", 0)
    for m, o in zip((growing, alone), optimizers, strict=True):
        train(m, o)
    for ours, theirs in zip(growing.host.parameters(), alone.host.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_new_group_inherits_options_and_takes_its_own() -> None:
    growing = model()
    optimizer = torch.optim.AdamW(growing.host.parameters(), lr=0.01, weight_decay=0.3, betas=(0.8, 0.9))
    attach(optimizer, growing, weight_decay=0.0, lr=0.5)
    (group,) = groups_of(optimizer, growing.wake("0", 3))
    assert group["betas"] == (0.8, 0.9)
    assert group["weight_decay"] == 0.0
    assert group["lr"] == pytest.approx(0.5)
    assert group[SEED_KEY] == "0#3"
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_seeds_awake_before_attaching_join_and_attaching_twice_makes_no_duplicate() -> None:
    growing = model()
    early = growing.wake("0", 0)
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    first = attach(optimizer, growing)
    assert attach(optimizer, growing) is first
    late = growing.wake("0", 1)
    for parameter in (early, late):
        assert len(groups_of(optimizer, parameter)) == 1
    growing.cull("0", 0)
    assert len(optimizer.param_groups) == 2


def test_parameters_already_in_the_optimizer_move_into_a_group_of_their_own() -> None:
    growing = model()
    seed = growing.wake("0", 0)
    optimizer = torch.optim.Adam([*growing.host.parameters(), seed], lr=0.02)
    train(growing, optimizer)
    moments = optimizer.state[seed]["exp_avg"].clone()
    attach(optimizer, growing)
    (group,) = groups_of(optimizer, seed)
    assert group[SEED_KEY] == "0#0"
    assert group["lr"] == 0.02
    assert torch.equal(optimizer.state[seed]["exp_avg"], moments)


def test_a_group_made_by_the_user_for_seeds_is_left_alone() -> None:
    growing = model()
    seed = growing.wake("0", 0)
    optimizer = torch.optim.SGD([{"params": list(growing.host.parameters())}, {"params": [seed], "lr": 7.0}], lr=0.1)
    attach(optimizer, growing)
    assert [group["lr"] for group in groups_of(optimizer, seed)] == [7.0]
    assert len(optimizer.param_groups) == 2


def _lambda(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)


def _sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 10)], milestones=[3])


SCHEDULERS: list[Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = [
    _lambda,
    _sequence,
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    lambda o: lr_scheduler.PolynomialLR(o, 20),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_schedulers_follow(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], scheduler_first: bool, named: bool
) -> None:
    """Seeds run on the first group's schedule from the moment they wake, and after others have left."""
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer) if scheduler_first else None
    schedulers = [scheduler] if named and scheduler is not None else None
    if isinstance(scheduler, lr_scheduler.SequentialLR) and schedulers is not None:
        schedulers += scheduler._schedulers
    attach(optimizer, growing, schedulers=schedulers)
    scheduler = scheduler if scheduler is not None else make(optimizer)
    for _ in range(3):
        train(growing, optimizer, 1)
        scheduler.step()
    first, second = growing.wake("0", 0), growing.wake("2", 1)
    for parameter in (first, second):
        assert groups_of(optimizer, parameter)[0]["lr"] == optimizer.param_groups[0]["lr"]
    for step in range(6):
        train(growing, optimizer, 1)
        scheduler.step()
        if step == 2:
            growing.cull("0", 0)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-12)
        assert len(scheduler.get_last_lr()) == len(rates)
    assert len(optimizer.param_groups) == 2


def test_own_rate_is_scaled_by_the_schedule() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    attach(optimizer, growing, lr=0.4)
    optimizer.step()
    scheduler.step()
    seed = growing.wake("0", 0)
    rates = []
    for _ in range(3):
        rates.append((optimizer.param_groups[0]["lr"], groups_of(optimizer, seed)[0]["lr"]))
        train(growing, optimizer, 1)
        scheduler.step()
    assert rates == [pytest.approx((0.1 * 0.5**k, 0.4 * 0.5**k)) for k in (1, 2, 3)]


def test_plateau_scheduler_goes_on() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    floors = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=[0.01])
    attach(optimizer, growing, schedulers=[plateau, floors])
    seed = growing.wake("0", 0)
    for scheduler in (plateau, floors):
        scheduler.step(1.0)
        scheduler.step(1.0)
    assert groups_of(optimizer, seed)[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert floors.min_lrs == [0.01, 0.01]


def test_named_parameters_stay_named() -> None:
    growing = model()
    optimizer = torch.optim.AdamW(growing.host.named_parameters(), lr=0.01)
    attach(optimizer, growing)
    growing.wake("0", 2)
    assert optimizer.param_groups[1]["param_names"] == ["0#2.shift"]


def test_two_optimizers_each_take_the_seeds_of_the_layers_they_train() -> None:
    growing = model()
    lower = torch.optim.SGD(growing.host[0].parameters(), lr=0.1)
    upper = torch.optim.Adam(growing.host[2].parameters(), lr=0.01)
    attach(lower, growing)
    attach(upper, growing)
    seeds = {name: growing.wake(name, 0) for name in ("0", "1", "2")}
    assert [len(groups_of(lower, seeds[name])) for name in ("0", "1", "2")] == [1, 1, 0]
    assert [len(groups_of(upper, seeds[name])) for name in ("0", "1", "2")] == [0, 0, 1]


def test_layers_can_be_named() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    attach(optimizer, growing, layers={"2"})
    assert groups_of(optimizer, growing.wake("0", 0)) == []
    assert len(groups_of(optimizer, growing.wake("2", 0))) == 1


def test_state_dict_round_trip_in_another_order_of_waking() -> None:
    growing = model()
    optimizer = torch.optim.Adam(growing.host.parameters(), lr=0.01)
    attach(optimizer, growing)
    for layer, seed_idx in (("2", 1), ("0", 0)):
        growing.wake(layer, seed_idx)
        train(growing, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = model()
    twins = {key: fresh.wake(*key) for key in (("0", 0), ("2", 1))}
    other = torch.optim.Adam(fresh.host.parameters(), lr=0.5)
    attach(other, fresh)
    other.load_state_dict(saved)
    for (layer, seed_idx), twin in twins.items():
        ours = growing.kasmina_layers[layer].grafts.seeds[seed_idx]["shift"]
        assert torch.equal(other.state[twin]["exp_avg"], optimizer.state[ours]["exp_avg"])
        assert other.state[twin]["step"] == optimizer.state[ours]["step"]
    assert {group["lr"] for group in other.param_groups} == {0.01}
    assert [group[SEED_KEY] for group in other.param_groups[1:]] == ["2#1", "0#0"]  # as saved


@pytest.mark.parametrize(("here", "there", "named"), [([("0", 0)], [], "0#0"), ([], [("2", 1)], "2#1")])
def test_a_state_of_other_seeds_is_refused_by_name(
    here: list[tuple[str, int]], there: list[tuple[str, int]], named: str
) -> None:
    models = model(), model()
    optimizers = [torch.optim.SGD(m.host.parameters(), lr=0.1) for m in models]
    for growing, optimizer, seeds in zip(models, optimizers, (here, there), strict=True):
        attach(optimizer, growing)
        for seed in seeds:
            growing.wake(*seed)
    with pytest.raises(ValueError, match=named):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


def test_detach_ends_it() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    attachment = attach(optimizer, growing)
    growing.wake("0", 0)
    attachment.detach()
    attachment.detach()
    assert groups_of(optimizer, growing.wake("0", 1)) == []
    assert len(optimizer.param_groups) == 2
    assert attach(optimizer, growing) is not attachment
    assert len(optimizer.param_groups) == 3


def test_neither_side_keeps_the_other_alive() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    attachment = weakref.ref(attach(optimizer, growing))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert attachment() is None
    assert growing.callbacks == []
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    attach(optimizer, growing)
    dead = weakref.ref(growing)
    del growing
    gc.collect()
    assert dead() is None


def test_bad_arguments_say_what_is_wrong() -> None:
    growing = model()
    optimizer = torch.optim.SGD(growing.host.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Linear"):
        attach(growing.host[0], growing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS"):
        attach(torch.optim.LBFGS(growing.host.parameters()), growing)
    with pytest.raises(ValueError, match="lr=nan"):
        attach(optimizer, growing, lr=float("nan"))
    with pytest.raises(ValueError, match="'betas'"):
        attach(optimizer, growing, betas=(0.9, 0.99))
    assert esper.optim.attachment._BY_OPTIMIZER.get(optimizer, []) == []
    with pytest.raises(TypeError, match="model is a Linear; expected what"):
        attach(optimizer, nn.Linear(2, 2))  # type: ignore[arg-type]


def test_with_a_real_model_through_waking_culling_and_loading(tmp_path: Path) -> None:
    """The same with seeds that are fetched in the background, committed by step(), saved, and rebuilt."""
    torch.manual_seed(0)
    registry = str(tmp_path / "registry")

    def host() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    kernels = [
        esper.compile("bottleneck", d_in=4, d_out=6, rank=2, registry=registry),
        esper.compile("lowrank", d_in=6, d_out=2, rank=2, registry=registry),
    ]
    grown = esper.wrap(host(), registry=registry, preserve_original=False)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=0.01)
    attach(optimizer, grown)

    def step(m: esper.MorphableModel, o: torch.optim.Optimizer, x: torch.Tensor) -> None:
        o.zero_grad()
        m(x).square().sum().backward()
        o.step()
        m.step()

    waking = [grown.request_kernel("2", 1, kernels[1]), grown.request_kernel("0", 0, kernels[0], ramp_steps=3)]
    for outcome in waking:
        while not outcome.done():
            step(grown, optimizer, torch.randn(8, 4))
    assert sorted(group[SEED_KEY] for group in optimizer.param_groups[1:]) == ["0#0", "2#1"]
    for _ in range(3):
        step(grown, optimizer, torch.randn(8, 4))
    assert all(p in optimizer.state for p in grown.graft_parameters().values())

    esper.save(grown, tmp_path / "m.safetensors")
    again = esper.load(tmp_path / "m.safetensors", host(), registry=registry)
    other = torch.optim.AdamW(again.parameters(), lr=0.5)
    attach(other, again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in torch.randn(3, 8, 4):
        step(grown, optimizer, x)
        step(again, other, x)
    for (name, ours), (_, theirs) in zip(grown.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    gone = list(grown.layer("2").grafts.seed_parameters(1).values())
    grown.cull("2", 1)
    assert [group.get(SEED_KEY) for group in optimizer.param_groups] == [None, "0#0"]
    assert not [p for p in gone if p in optimizer.state]
    step(grown, optimizer, torch.randn(8, 4))


@pytest.mark.parametrize("before", [True, False], ids=["attached before", "attached after"])
def test_an_optimizer_around_the_optimizer(before: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (peft brings it)")
    growing = model()
    inner = torch.optim.Adam(growing.host.parameters(), lr=0.1)
    attachment = attach(inner, growing) if before else None
    outer = accelerate.Accelerator(cpu=True).prepare(inner)
    assert outer is not inner
    if not before:
        attachment = attach(outer, growing)
    assert attachment is not None and attachment.optimizer is inner and attach(outer, growing) is attachment
    # The scheduler knows the outer one only, as in transformers' Trainer.
    scheduler = lr_scheduler.LambdaLR(outer, lambda epoch: 0.5**epoch)
    train(growing, outer)
    scheduler.step()
    parameter = growing.wake("0", 0)
    assert [group["lr"] for group in groups_of(inner, parameter)] == [0.05]
    train(growing, outer)
    scheduler.step()
    assert [group["lr"] for group in outer.param_groups] == [0.025, 0.025]
    assert parameter in inner.state


def test_an_optimizer_of_another_model_is_warned_of() -> None:
    growing = model()
    original = copy.deepcopy(growing.host)
    with pytest.warns(UserWarning, match=r"no parameter of this model.*model\.parameters\(\)"):
        attach(torch.optim.SGD(original.parameters(), lr=0.1), growing)
    growing.host.requires_grad_(False)  # seeds on a frozen network, beside whatever else is trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(torch.optim.SGD(original.parameters(), lr=0.1), growing)


@pytest.fixture
def reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], esper.MorphableModel]:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return lambda: esper.wrap(host, reserve_rank=2, seeds_per_layer=2, telemetry_enabled=False)


def _wake(grown: esper.MorphableModel, layer: str, seed_idx: int) -> None:
    kernel = esper.compile("lowrank", d_in=4, d_out=4, rank=2, registry=None)
    assert asyncio.run(grown.load_kernel(layer, seed_idx, kernel, alpha=0.5))


def _step(grown: esper.MorphableModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    grown(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("own_group", [False, True])
def test_reserved_memory_goes_back_to_its_place(
    reserved: Callable[[], esper.MorphableModel], named: bool, own_group: bool
) -> None:
    grown = reserved()

    def optimizer_of(grown: esper.MorphableModel) -> torch.optim.Optimizer:
        pairs = list(grown.named_parameters())
        seeds = {id(p) for layer in grown.kasmina_layers.values() for p in layer.grafts.parameters()}
        split = [[pair for pair in pairs if (id(pair[1]) in seeds) == kind] for kind in (False, True)]
        chosen = split if own_group else [pairs]
        groups = [{"params": part if named else [p for _, p in part]} for part in chosen]
        optimizer = torch.optim.Adam(groups, lr=0.01)
        attach(optimizer, grown)
        return optimizer

    optimizer = optimizer_of(grown)

    def places() -> list[list[int]]:
        return [[id(p) for p in group["params"]] for group in optimizer.param_groups]

    def names() -> list[list[str] | None]:
        return [group.get("param_names") for group in optimizer.param_groups]

    fresh, fresh_names = places(), names()
    state = copy.deepcopy(optimizer.state_dict())
    for layer, seed_idx in (("2", 1), ("0", 0), ("0", 1)):
        _wake(grown, layer, seed_idx)
    _step(grown, optimizer)
    assert len(optimizer.param_groups) == len(fresh) + 3
    for layer, seed_idx in (("0", 0), ("2", 1), ("0", 1)):  # not in the order in which they came
        grown.cull(layer, seed_idx)
    assert (places(), names()) == (fresh, fresh_names)
    _step(grown, optimizer)
    optimizer.load_state_dict(state)  # of before any seed woke
    trained = copy.deepcopy(optimizer.state_dict())
    again = optimizer_of(reserved())  # as a run that is taken up again has it
    again.load_state_dict(trained)
    grown.close()


def test_reserved_memory_that_was_not_in_the_optimizer_stays_out(
    reserved: Callable[[], esper.MorphableModel],
) -> None:
    grown = reserved()
    optimizer = torch.optim.Adam(grown.wrapped_model[0].parameters(), lr=0.01)
    attach(optimizer, grown)
    _wake(grown, "0", 0)
    assert len(optimizer.param_groups) == 2
    grown.cull("0", 0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    grown.close()


def test_what_is_loaded_lies_as_the_parameter_does() -> None:
    growing = model()
    with torch.no_grad():
        weight = growing.host[0].weight
        weight.data = weight.t().contiguous().t()
    optimizer = torch.optim.Adam(growing.host.parameters(), lr=0.01)
    attachment = attach(optimizer, growing)
    train(growing, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0]["exp_avg"].stride() == weight.stride()
    for kept in state["state"].values():
        kept.update({key: value.contiguous() for key, value in kept.items()})
    optimizer.load_state_dict(state)
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[weight][key].stride() == weight.stride()
        assert torch.equal(optimizer.state[weight][key], state["state"][0][key])
    attachment.detach()
    optimizer.load_state_dict(state)  # nobody looks after it any more
    assert optimizer.state[weight]["exp_avg"].is_contiguous()


def test_rates_of_groups_come_back_to_the_groups_they_were_of() -> None:
    """Schedulers keep them by place, so the groups take the places that they had when the state was saved."""

    def scheduled(*seeds: tuple[str, int]) -> tuple[Growing, torch.optim.Optimizer, lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = Growing(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        optimizer = torch.optim.SGD(model.host.parameters(), lr=0.1)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        attach(optimizer, model)
        for layer, seed_idx in seeds:
            model.wake(layer, seed_idx)
        return model, optimizer, scheduler

    def rates(optimizer: torch.optim.Optimizer) -> dict[str | None, float]:
        return {group.get(SEED_KEY): group["lr"] for group in optimizer.param_groups}

    _, optimizer, scheduler = scheduled(("2", 1), ("0", 3))
    for group in optimizer.param_groups[1:]:
        group["lr"] = group["initial_lr"] = {"2#1": 0.2, "0#3": 0.4}[group[SEED_KEY]]
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    _, again, schedule = scheduled(("0", 3), ("2", 1))
    again.load_state_dict(states[0])
    assert rates(again) == {None: 0.1, "2#1": 0.2, "0#3": 0.4} == rates(optimizer)
    schedule.load_state_dict(states[1])
    for one, other in ((optimizer, scheduler), (again, schedule)):
        one.step(), other.step()
    assert rates(again) == rates(optimizer) == {None: 0.05, "2#1": 0.1, "0#3": 0.2}
    assert schedule.base_lrs == [0.1, 0.2, 0.4]
