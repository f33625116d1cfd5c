"""Random lives of seeds: commands, faults, samples and steps, on every backend at once, against the plain model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout, Lattice
from esper.ops import registry
from esper.ops.lattice import FIELDS
from tests.ops import lattice_model as model
from tests.ops.lattice_model import F, Seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton", "cuda" if DEVICE == "cuda" else "cpu")
seeds_of_a_layer = st.integers(0, 1000)
timers = st.sampled_from([0, 0, 1, 2, 3])


class Lives(RuleBasedStateMachine):
    """One model of 3 layers; the same commands go to one lattice per backend and to the plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.lattices: dict[str, Lattice] = {}
        self.seeds: list[Seed] = []
        self.own_changes: list[tuple[int, int, int]] = []
        self.epoch = 0

    @initialize(seeds_per_layer=st.sampled_from([1, 2, 5]))
    def start(self, seeds_per_layer: int) -> None:
        self.per_layer = seeds_per_layer
        self.lattices = {backend: Lattice(3, seeds_per_layer, DEVICE) for backend in BACKENDS}
        self.seeds = [Seed() for _ in range(3 * seeds_per_layer)]
        self.own_changes = []

    def _each(self, pick: int) -> tuple[Seed, int, list[KasminaStateLayout]]:
        row = pick % len(self.seeds)
        layer, seed_idx = divmod(row, self.per_layer)
        return self.seeds[row], seed_idx, [lattice.layer(layer) for lattice in self.lattices.values()]

    @rule(
        pick=seeds_of_a_layer,
        new=st.sampled_from(SeedLifecycleState),
        kernel_id=st.none() | st.integers(0, 2**63 - 1),
        timer=timers,
    )
    def transition(self, pick: int, new: SeedLifecycleState, kernel_id: int | None, timer: int) -> None:
        seed, seed_idx, layouts = self._each(pick)
        old = seed.lifecycle_states
        if seed.transition(int(new), kernel_id, timer, self.epoch):
            for layout in layouts:
                layout.transition_seed_state(seed_idx, new, kernel_id, timer=timer)
            return
        for layout in layouts:
            before = layout.lattice.storage.clone(), layout.version
            try:
                layout.transition_seed_state(seed_idx, new, kernel_id, timer=timer)
            except LifecycleError as error:
                message = str(error)
                assert model.NAMES[old] in message and new.name in message
                assert all(model.NAMES[option] in message for option in model.LEGAL[old])
            else:
                raise AssertionError(f"{model.NAMES[old]} -> {new.name} was let through")
            assert torch.equal(layout.lattice.storage, before[0]) and layout.version == before[1]

    @rule(pick=seeds_of_a_layer, alpha=st.sampled_from([-1.0, 0.0, 0.3, 1 / 3, 1.0, 7.0]), ramp=st.integers(0, 4))
    def set_alpha(self, pick: int, alpha: float, ramp: int) -> None:
        seed, seed_idx, layouts = self._each(pick)
        seed.set_alpha(alpha, ramp)
        for layout in layouts:
            layout.set_alpha(seed_idx, alpha, ramp)

    @rule(pick=seeds_of_a_layer, steps=timers)
    def set_timer(self, pick: int, steps: int) -> None:
        seed, seed_idx, layouts = self._each(pick)
        seed.state_timer = steps
        for layout in layouts:
            layout.set_timer(seed_idx, steps)

    @rule(pick=seeds_of_a_layer, directly=st.booleans())
    def raise_fault(self, pick: int, directly: bool) -> None:
        """By command, or as a graft does it: a write to the tensor."""
        seed, seed_idx, layouts = self._each(pick)
        seed.fault_flags = 1
        for layout in layouts:
            if directly:
                layout.fault_flags[seed_idx] = 1
                layout.lattice.expect_step()
            else:
                layout.raise_fault(seed_idx)

    @rule(pick=seeds_of_a_layer)
    def increment_error_count(self, pick: int) -> None:
        seed, seed_idx, layouts = self._each(pick)
        went = seed.add_fault(self.epoch)
        assert [layout.increment_error_count(seed_idx) for layout in layouts] == [went] * len(layouts)

    @rule(
        pick=seeds_of_a_layer,
        latency=st.sampled_from([0, 1, 250.7, 2**31 - 2, 2**31 - 1, 2**31, 1e30, float("inf")]),
        health=st.sampled_from([0.0, 0.25, 1.0, 5.0, -5.0, float("nan")]),
    )
    def update_telemetry(self, pick: int, latency: float, health: float) -> None:
        seed, seed_idx, layouts = self._each(pick)
        seed.record(latency, health, self.epoch)
        for layout in layouts:
            layout.update_telemetry(seed_idx, latency, health)

    @rule(layer=st.integers(0, 2), data=st.data())
    def submit_health(self, layer: int, data: st.DataObject) -> None:
        samples = [data.draw(st.sampled_from([float("nan"), 0.0, 0.5, 0.9, 3.0])) for _ in range(self.per_layer)]
        for lattice in self.lattices.values():
            lattice.layer(layer).submit_health(torch.tensor(samples))
        for seed_idx, sample in enumerate(samples):
            self.seeds[layer * self.per_layer + seed_idx].health_sample = F(sample)

    @rule(pick=seeds_of_a_layer)
    def reset(self, pick: int) -> None:
        seed, seed_idx, layouts = self._each(pick)
        row = self.seeds.index(seed)
        self.seeds[row] = Seed(last_update_epoch=self.epoch)
        for layout in layouts:
            layout.reset_seed(seed_idx)

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        known = self._states()
        for _ in range(steps):
            self.epoch += 1
            for seed in self.seeds:
                seed.step(self.epoch)
            for backend, lattice in self.lattices.items():
                with registry.use_backend(backend):
                    lattice.step(self.epoch)
            if DEVICE == "cpu":  # a GPU tells only what lies between two snapshots, here before and after this rule
                known = self._note_changes(known)
        self._note_changes(known)

    def _states(self) -> list[int]:
        return [seed.lifecycle_states for seed in self.seeds]

    def _note_changes(self, known: list[int]) -> list[int]:
        now = self._states()
        pairs = enumerate(zip(known, now, strict=True))
        self.own_changes += [(row, old, new) for row, (old, new) in pairs if old != new]
        return now

    @rule()
    def poll(self) -> None:
        """Every change that no command made, in order, whatever commands did to the seed later."""
        for lattice in self.lattices.values():
            self._settle(lattice)
            polled = lattice.poll()
            assert polled == self.own_changes
            assert all(isinstance(state, SeedLifecycleState) for _, *states in polled for state in states)
        self.own_changes = []

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    @precondition(lambda self: all(seed.fault_flags == 0 for seed in self.seeds))
    @precondition(lambda self: all(np.isnan(seed.health_sample) for seed in self.seeds))
    def go_on_with_a_copy(self, how: str) -> None:
        """A copy lives on exactly as the original would; a state dict holds no changes that are yet to be polled."""
        if how == "state_dict":
            self.own_changes = []
        for backend, lattice in self.lattices.items():
            if how == "deepcopy":
                twin = copy.deepcopy(lattice)
            elif how == "pickle":
                twin = pickle.loads(pickle.dumps(lattice))
            else:
                twin = Lattice(3, self.per_layer, DEVICE)
                twin.load_state_dict(lattice.state_dict())
            assert twin.crc() == lattice.crc()
            self.lattices[backend] = twin

    @staticmethod
    def _settle(lattice: Lattice) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            lattice._mirror.reload(lattice.storage)
            lattice._reconcile()

    @invariant()
    def tensors_are_the_model(self) -> None:
        for backend, lattice in self.lattices.items():
            for name in FIELDS:
                got = getattr(lattice, name).cpu().numpy()
                want: Any = np.array([getattr(seed, name) for seed in self.seeds], got.dtype)
                assert np.array_equal(got, want, equal_nan=got.dtype == np.float32), (backend, name, got, want)

    @invariant()
    def counters_are_the_tensors(self) -> None:
        states = [seed.lifecycle_states for seed in self.seeds]
        awake = [state in model.AWAKE for state in states]
        working = any(awake) or any(s.lifecycle_states == model.CULLED and s.state_timer > 0 for s in self.seeds)
        for lattice in self.lattices.values():
            self._settle(lattice)
            assert lattice.get_active_count() == sum(awake)
            assert lattice.has_active_seeds() == any(awake)
            flagged = any(s.fault_flags or not np.isnan(s.health_sample) for s in self.seeds)
            assert lattice.needs_step or not (working or flagged)
            indices, count = lattice.compact()
            assert indices[: int(count)].tolist() == [row for row, is_awake in enumerate(awake) if is_awake]
            for layer in range(3):
                layout = lattice.layer(layer)
                mine = slice(layer * self.per_layer, (layer + 1) * self.per_layer)
                assert layout.get_active_count() == sum(awake[mine])
                assert [layout.state_of(i) for i in range(self.per_layer)] == states[mine]

    @invariant()
    def checksums_are_equal(self) -> None:
        assert len({lattice.crc() for lattice in self.lattices.values()}) <= 1


def test_a_command_does_not_undo_what_poll_tells() -> None:
    """What a seed did by itself is told in order, though it was reset, culled or woken again before anybody asked."""
    lattice = Lattice(1, 2, DEVICE)
    layout = lattice.layer(0)
    told = []
    for command in ("reset", "cull", "fossilize"):
        layout.transition_seed_state(1, SeedLifecycleState.GRAFTING)
        layout.set_alpha(1, 1.0)
        lattice.step(1)
        Lives._settle(lattice)
        assert layout.state_of(1) == SeedLifecycleState.ACTIVE
        told.append((1, SeedLifecycleState.GRAFTING, SeedLifecycleState.ACTIVE))
        if command == "reset":
            layout.reset_seed(1)
        elif command == "cull":
            layout.transition_seed_state(1, SeedLifecycleState.CULLED)
            layout.transition_seed_state(1, SeedLifecycleState.DORMANT)
        else:
            layout.transition_seed_state(1, SeedLifecycleState.FOSSILIZED)
    assert lattice.poll() == told
    assert lattice.poll() == []


Lives.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestLives = Lives.TestCase


class SettlingLives(Lives):
    """After a step that nothing asked for, a lattice asks for none."""

    @rule()
    def sleep(self) -> None:
        for pick in range(len(self.seeds)):
            self.reset(pick)
        self.step(1)
        assert not any(lattice.needs_step for lattice in self.lattices.values())


SettlingLives.TestCase.settings = settings(max_examples=5, stateful_step_count=15)
TestSettlingLives = SettlingLives.TestCase
