"""The lattice and a layer's state layout: commands, counters, copies, checkpoints, and the mirror of a device."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper.execution.lattice_mirror import AsyncMirror, Snapshot, take_snapshot
from esper.execution.lifecycle import LifecycleError
from esper.execution.lifecycle import SeedLifecycleState as State
from esper.execution.state_layout import KasminaStateLayout, Lattice
from esper.ops.lattice import FIELDS, PERSISTENT, views

# -- shape and views -------------------------------------------------------------------------------


def test_a_fresh_layout_is_asleep_and_healthy() -> None:
    layout = KasminaStateLayout(4)
    assert len(layout) == layout.num_seeds == 4 and layout.device == torch.device("cpu")
    for name, dtype in FIELDS.items():
        field = getattr(layout, name)
        assert field.shape == (4,) and field.dtype == dtype, name
    assert [layout.state_of(i) for i in range(4)] == [State.DORMANT] * 4
    assert layout.health_accumulator.tolist() == [1.0] * 4
    assert not layout.has_active_seeds() and not layout.lattice.needs_step and layout.lattice.poll() == []
    assert layout.get_dormant_seeds().tolist() == [0, 1, 2, 3] and layout.get_active_seeds().tolist() == []


def test_layers_are_views_of_the_lattice() -> None:
    lattice = Lattice(3, 5)
    layer = lattice.layer(1)
    assert lattice.layer(1) is layer and layer.first_row == 5
    for name in FIELDS:
        mine, all_rows = getattr(layer, name), getattr(lattice, name)
        assert mine.data_ptr() == all_rows[5:].data_ptr() and mine.numel() == 5, name
        assert mine.untyped_storage().data_ptr() == lattice.storage.untyped_storage().data_ptr(), name
    layer.transition_seed_state(2, State.ACTIVE, kernel_id=2**63 - 1)
    assert lattice.lifecycle_states.nonzero().flatten().tolist() == [7]
    assert lattice.active_kernel_id[7] == 2**63 - 1
    assert lattice.get_active_count() == 1 and not lattice.layer(0).has_active_seeds()


@pytest.mark.parametrize(("layers", "seeds"), [(-1, 4), (2, 0), (2**20, 2**11)])
def test_impossible_sizes_are_refused(layers: int, seeds: int) -> None:
    with pytest.raises(ValueError):
        Lattice(layers, seeds)


def test_a_lattice_without_layers_works() -> None:
    lattice = Lattice(0, 4)
    lattice.step(1)
    assert lattice.poll() == [] and not lattice.needs_step and lattice.crc() == 0
    assert lattice.compact()[0].numel() == 0 and lattice.snapshot().fields()["alpha_blend"].numel() == 0
    lattice.load_state_dict(Lattice(0, 4).state_dict())
    with pytest.raises(IndexError, match="layer 0"):
        lattice.layer(0)


def test_surroundings_of_the_constructor_do_not_matter() -> None:
    """A default device is for the user's model, and a lattice made in inference mode is written outside it."""
    with torch.device("meta"), torch.inference_mode():
        lattice = copy.deepcopy(Lattice(1, 2))
    assert lattice.device == torch.device("cpu")
    lattice.layer(0).submit_health(torch.tensor([0.0, math.nan]))
    assert lattice.needs_step
    lattice.step(3)
    assert lattice.health_accumulator.tolist() == [float(np.float32(0.9)), 1.0]
    assert lattice.last_update_epoch.tolist() == [3, 0]


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 3, 10**12, True, 1.0, "0", None])
def test_bad_seed_indices_are_refused_everywhere(bad: object) -> None:
    layout = KasminaStateLayout(3)
    before = layout.lattice.storage.clone()
    calls = [
        lambda: layout.state_of(bad),
        lambda: layout.alpha_of(bad),
        lambda: layout.transition_seed_state(bad, State.ACTIVE),
        lambda: layout.set_alpha(bad, 0.5),
        lambda: layout.set_timer(bad, 1),
        lambda: layout.increment_error_count(bad),
        lambda: layout.raise_fault(bad),
        lambda: layout.update_telemetry(bad, 1, 1.0),
        lambda: layout.reset_seed(bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Invalid seed index"):
            call()
    assert torch.equal(layout.lattice.storage, before)


def test_integers_of_other_libraries_are_indices() -> None:
    layout = KasminaStateLayout(3)
    layout.set_alpha(np.int64(1), 0.5)
    layout.set_alpha(torch.tensor(2), 0.25)
    assert layout.alpha_blend.tolist() == [0.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_alpha(0, math.nan), "NaN"),
        (lambda s: s.set_alpha(0, 0.5, ramp_steps=-1), "ramp_steps"),
        (lambda s: s.set_timer(0, -1), "timer"),
        (lambda s: s.update_telemetry(0, -1, 0.5), "latency_us"),
        (lambda s: s.update_telemetry(0, math.nan, 0.5), "latency_us"),
        (lambda s: s.transition_seed_state(0, 8), "8"),
        (lambda s: s.transition_seed_state(0, State.ACTIVE, kernel_id=-1), "kernel_id"),
        (lambda s: s.transition_seed_state(0, State.ACTIVE, kernel_id=2**63), "kernel_id"),
        (lambda s: s.transition_seed_state(0, State.ACTIVE, timer=-1), "timer"),
        (lambda s: s.submit_health(torch.zeros(3)), "shape"),
        (lambda s: s.copy_from(KasminaStateLayout(3)), "3 seeds"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(call, message: str) -> None:  # type: ignore[no-untyped-def]
    layout = KasminaStateLayout(2)
    before = layout.lattice.storage.clone()
    with pytest.raises(ValueError, match=message):
        call(layout)
    assert torch.equal(layout.lattice.storage, before) and layout.version == 0 and not layout.lattice.needs_step


def test_an_illegal_transition_names_the_seed_the_states_and_the_legal_ones() -> None:
    layer = Lattice(3, 2).layer(2)
    with pytest.raises(LifecycleError) as caught:
        layer.transition_seed_state(1, State.FOSSILIZED)
    assert str(caught.value) == (
        "seed 1 of layer 2 cannot go from DORMANT to FOSSILIZED; from DORMANT it may go to "
        "LOADING, ACTIVE, ERROR_RECOVERY, GRAFTING, TRAINING"
    )


def test_alpha_is_clamped_and_ramps() -> None:
    layout = KasminaStateLayout(1)
    layout.set_alpha(0, 3.0)
    assert layout.alpha_of(0) == 1.0
    layout.set_alpha(0, -math.inf)
    assert layout.alpha_of(0) == 0.0
    layout.transition_seed_state(0, State.GRAFTING)
    layout.set_alpha(0, 1.0, ramp_steps=4)
    seen = []
    for epoch in range(4):
        layout.lattice.step(epoch)
        seen.append(layout.alpha_of(0))
    assert seen == [0.25, 0.5, 0.75, 1.0]  # quarters are exact in binary
    assert layout.lattice.poll() == [(0, State.GRAFTING, State.ACTIVE)]
    assert layout.lattice.poll() == []


def test_a_timer_of_zero_is_no_timer() -> None:
    layout = KasminaStateLayout(2)
    for seed in range(2):
        layout.transition_seed_state(seed, State.ACTIVE)
        layout.transition_seed_state(seed, State.CULLED)
    assert not layout.lattice.needs_step
    layout.set_timer(1, 2)
    assert layout.lattice.needs_step
    for epoch in range(3):
        layout.lattice.step(epoch)
    assert [layout.state_of(0), layout.state_of(1)] == [State.CULLED, State.DORMANT]
    assert not layout.lattice.needs_step


def test_the_third_fault_in_a_row_ends_a_seed() -> None:
    layout = KasminaStateLayout(2)
    layout.transition_seed_state(0, State.ACTIVE)
    layout.set_alpha(0, 0.5)
    for faulty in (True, True, False, True, True):
        if faulty:
            layout.raise_fault(0)
        layout.lattice.step(1)
        assert bool(layout.fallback_active[0]) is faulty
        assert layout.state_of(0) is State.ACTIVE
    layout.raise_fault(0)
    layout.lattice.step(9)
    assert layout.state_of(0) is State.ERROR_RECOVERY
    assert layout.alpha_of(0) == 0.0 and bool(layout.fallback_active[0]) and int(layout.last_update_epoch[0]) == 9
    assert layout.lattice.poll() == [(0, State.ACTIVE, State.ERROR_RECOVERY)]


def test_version_counts_state_changes_of_host_and_device() -> None:
    layout = KasminaStateLayout(1)
    layout.transition_seed_state(0, State.GRAFTING)
    assert layout.version == 1
    layout.set_alpha(0, 0.5)
    layout.update_telemetry(0, 5, 0.5)
    assert layout.version == 1
    layout.lattice.step(1)  # arrived: ACTIVE
    assert layout.version == 2


def test_direct_writes_count_after_notify() -> None:
    lattice = Lattice(2, 2)
    lattice.lifecycle_states[3] = State.ACTIVE
    assert lattice.layer(1).has_active_seeds()
    lattice.notify()
    assert lattice.get_active_count() == 1 and lattice.needs_step
    assert lattice.poll() == [(3, State.DORMANT, State.ACTIVE)]


def test_statistics() -> None:
    layout = KasminaStateLayout(6)
    layout.transition_seed_state(0, State.ACTIVE)
    layout.transition_seed_state(1, State.LOADING)
    layout.transition_seed_state(2, State.ERROR_RECOVERY)
    layout.transition_seed_state(3, State.ACTIVE)
    layout.transition_seed_state(3, State.FOSSILIZED)
    layout.update_telemetry(0, 100, 0.0)
    layout.update_telemetry(3, 301.9, math.nan)
    layout.increment_error_count(0)
    stats = layout.get_stats()
    assert math.isclose(stats.pop("avg_health"), (5 + 0.9) / 6, rel_tol=2**-23)  # one float32 rounding of 0.9
    assert stats == {
        "num_seeds": 6, "dormant_seeds": 2, "active_seeds": 2, "loading_seeds": 1, "error_recovery_seeds": 1,
        "fossilized_seeds": 1, "grafting_seeds": 0, "training_seeds": 0, "culled_seeds": 0,
        "avg_latency_us": (100 + 301) / 2, "total_errors": 1, "fallback_active_count": 2,
    }  # fmt: skip
    assert layout.get_active_seeds().tolist() == [0, 3] and layout.get_dormant_seeds().tolist() == [4, 5]


def test_latency_saturates() -> None:
    layout = KasminaStateLayout(1)
    layout.update_telemetry(0, 2.0**40, math.nan)
    assert int(layout.exec_latency_us[0]) == 2**31 - 1
    assert layout.get_stats()["avg_latency_us"] == 2**31 - 1


def test_reset_works_from_the_state_that_has_no_way_back() -> None:
    layout = KasminaStateLayout(1)
    fresh = layout.lattice.storage.clone()
    layout.transition_seed_state(0, State.ACTIVE, kernel_id=3, timer=4)
    layout.set_alpha(0, 0.5, ramp_steps=3)
    layout.update_telemetry(0, 10, 0.1)
    layout.raise_fault(0)
    layout.transition_seed_state(0, State.FOSSILIZED)
    layout.reset_seed(0)
    assert torch.equal(layout.lattice.storage, fresh)
    assert layout.lattice.get_active_count() == 0


def test_copy_from_takes_every_field() -> None:
    source, lattice = Lattice(2, 3), Lattice(3, 3)
    source.layer(1).transition_seed_state(0, State.TRAINING, kernel_id=9, timer=5)
    source.layer(1).set_alpha(0, 0.5)
    source.layer(1).raise_fault(1)
    lattice.layer(2).copy_from(source.layer(1))
    for name in FIELDS:
        assert torch.equal(
            getattr(lattice.layer(2), name).view(torch.uint8), getattr(source.layer(1), name).view(torch.uint8)
        ), name
    assert lattice.get_active_count() == 1 and lattice.needs_step and lattice.poll() == []


# -- copies and checkpoints ------------------------------------------------------------------------


def _lived_in() -> Lattice:
    lattice = Lattice(2, 3)
    lattice.layer(0).transition_seed_state(1, State.GRAFTING, kernel_id=77, timer=3)
    lattice.layer(0).set_alpha(1, 0.3, ramp_steps=7)
    lattice.layer(1).transition_seed_state(2, State.ERROR_RECOVERY)
    lattice.step(5)
    return lattice


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_stay_together_and_apart_from_the_original(make) -> None:  # type: ignore[no-untyped-def]
    lattice = _lived_in()
    twin, layer = make((lattice, lattice.layer(0)))
    assert layer is twin.layer(0) and layer.lattice is twin
    assert layer.alpha_blend.data_ptr() == twin.alpha_blend.data_ptr()
    assert torch.equal(twin.storage, lattice.storage) and twin.storage.data_ptr() != lattice.storage.data_ptr()
    assert (twin.version, twin.epoch, twin.get_active_count()) == (lattice.version, 5, 1)
    lattice.layer(0).set_alpha(1, 0.9)
    assert layer.alpha_of(1) == pytest.approx(0.3 / 7)


def test_a_layer_alone_copies_with_its_lattice() -> None:
    layer = _lived_in().layer(0)
    twin = copy.deepcopy(layer)
    assert twin.lattice is not layer.lattice and twin.state_of(1) is State.GRAFTING
    assert pickle.loads(pickle.dumps(layer)).state_of(1) is State.GRAFTING


def test_a_checkpoint_brings_everything_back_through_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lattice = _lived_in()
    torch.save(lattice.state_dict(), tmp_path / "lattice.pt")
    twin = Lattice(2, 3)
    layer = twin.layer(0)
    twin.load_state_dict(torch.load(tmp_path / "lattice.pt", weights_only=True))
    assert torch.equal(twin.storage, lattice.storage)
    assert twin.epoch == 5 and twin.get_active_count() == 1 and twin.needs_step and twin.poll() == []
    assert layer.state_of(1) is State.GRAFTING  # the views are those from before


def test_a_checkpoint_does_not_change_with_the_lattice() -> None:
    lattice = _lived_in()
    state = lattice.state_dict()
    lattice.step(6)
    Lattice(2, 3).load_state_dict(state)


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_flipped_bit_in_any_field_is_refused(name: str) -> None:
    state = _lived_in().state_dict()
    flat = state[name].view(torch.uint8)
    flat[0] ^= 1
    target = Lattice(2, 3)
    before = target.storage.clone()
    with pytest.raises(ValueError, match="damaged"):
        target.load_state_dict(state)
    assert torch.equal(target.storage, before)


def _with(state: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return {**state, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "state_timer"}, "missing.*state_timer"),
        (lambda s: _with(s, surplus=torch.zeros(1)), "unknown.*surplus"),
        (lambda s: _with(s, alpha_blend=torch.zeros(5)), r"alpha_blend.*\(6,\).*\(5,\)"),
        (lambda s: _with(s, alpha_blend=s["alpha_blend"].half()), "alpha_blend.*float32.*float16"),
        (lambda s: _with(s, layout=torch.tensor([2, 2, 3, 0])), "format 2"),
        (lambda s: _with(s, layout=torch.tensor([1, 3, 2, 0])), "3 layers x 2 seeds.*2 x 3"),
        (lambda s: _with(s, layout=torch.tensor([1])), "layout"),
    ],
)
def test_other_states_are_refused_with_the_reason(change, message: str) -> None:  # type: ignore[no-untyped-def]
    target = Lattice(2, 3)
    before = target.storage.clone()
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(change(_lived_in().state_dict()))
    assert torch.equal(target.storage, before)


def test_an_unknown_state_is_refused_even_with_a_valid_checksum() -> None:
    lattice = Lattice(1, 2)
    lattice.lifecycle_states[1] = 8
    with pytest.raises(ValueError, match="unknown state 8"):
        Lattice(1, 2).load_state_dict(lattice.state_dict())


def test_snapshot_is_the_state_of_its_moment() -> None:
    lattice = _lived_in()
    snapshot = lattice.snapshot()
    kept = {name: getattr(lattice, name).clone() for name in PERSISTENT}
    lattice.step(6)
    assert snapshot.ready() and snapshot.wait() is snapshot and snapshot.epoch == 5
    for name, field in snapshot.fields().items():
        assert torch.equal(field, kept[name]), name


# -- the mirror of a device that answers late ------------------------------------------------------


class _Late:
    """An event that passes when the test says so."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        raise AssertionError("the host must not wait for the device")


class _Device:
    """Snapshots of a lattice that runs on the CPU, delivered late, as a GPU's are."""

    def __init__(self, seeds: int = 3) -> None:
        self.asked: list[_Late] = []
        self.lattice = Lattice(1, seeds)
        self.layer = self.lattice.layer(0)
        self.lattice._follow(AsyncMirror(self.lattice.storage, seeds, take=self._take))

    def _take(self, storage: Tensor, rows: int, epoch: int, buffer: Tensor | None) -> Snapshot:
        self.asked.append(_Late())
        return Snapshot(take_snapshot(storage, rows, epoch, buffer).buffer, rows, epoch, self.asked[-1])

    def deliver(self) -> None:
        self.asked[-1].passed = True


def test_commands_reach_the_device_and_are_seen_at_once() -> None:
    device = _Device()
    layer = device.layer
    layer.transition_seed_state(1, State.GRAFTING, kernel_id=2**62 + 1, timer=2)
    layer.set_alpha(1, 1.0, ramp_steps=4)
    layer.update_telemetry(1, 55, 0.5)
    layer.increment_error_count(1)
    assert layer.state_of(1) is State.GRAFTING and layer.get_active_count() == 1
    own, twin = device.lattice, Lattice(1, 3)
    other = twin.layer(0)
    other.transition_seed_state(1, State.GRAFTING, kernel_id=2**62 + 1, timer=2)
    other.set_alpha(1, 1.0, ramp_steps=4)
    other.update_telemetry(1, 55, 0.5)
    other.increment_error_count(1)
    assert torch.equal(own.storage, twin.storage)
    assert layer.get_stats() == other.get_stats()


def test_own_changes_of_the_device_come_with_the_next_snapshot() -> None:
    device = _Device()
    device.layer.transition_seed_state(0, State.GRAFTING)
    device.lattice.step(1)  # arrives at once
    assert device.lattice.poll() == [] and device.layer.state_of(0) is State.GRAFTING
    assert device.lattice.poll() == [] and len(device.asked) == 1  # one under way is enough
    device.deliver()
    assert device.lattice.poll() == [(0, State.GRAFTING, State.ACTIVE)]
    assert device.layer.state_of(0) is State.ACTIVE
    assert device.lattice.poll() == [] and len(device.asked) == 1  # nothing was written since


def test_a_snapshot_older_than_a_command_does_not_undo_it() -> None:
    device = _Device()
    device.layer.transition_seed_state(0, State.ACTIVE)
    device.layer.transition_seed_state(1, State.GRAFTING)
    device.lattice.step(1)
    device.lattice.poll()  # asked: ACTIVE, ACTIVE
    device.layer.transition_seed_state(0, State.FOSSILIZED)
    device.deliver()
    assert device.lattice.poll() == [(1, State.GRAFTING, State.ACTIVE)]
    assert device.layer.state_of(0) is State.FOSSILIZED
    device.deliver()
    assert device.lattice.poll() == []
    assert device.layer.state_of(0) is State.FOSSILIZED and device.lattice.get_active_count() == 2


def test_a_command_that_the_device_made_illegal_comes_to_nothing() -> None:
    device = _Device()
    device.layer.transition_seed_state(0, State.ACTIVE, kernel_id=5)
    for _ in range(3):
        device.layer.raise_fault(0)
        device.lattice.step(1)
    assert int(device.lattice.lifecycle_states[0]) == State.ERROR_RECOVERY  # the host does not know yet
    device.layer.transition_seed_state(0, State.FOSSILIZED, kernel_id=6)
    assert int(device.lattice.lifecycle_states[0]) == State.ERROR_RECOVERY
    assert int(device.lattice.active_kernel_id[0]) == 5 and bool(device.lattice.fallback_active[0])
    device.lattice.poll()
    device.deliver()
    assert device.lattice.poll() == [(0, State.FOSSILIZED, State.ERROR_RECOVERY)]
    assert device.lattice.get_active_count() == 0 and not device.layer.has_active_seeds()


def test_a_ramp_starts_where_the_device_is() -> None:
    device = _Device()
    device.layer.transition_seed_state(0, State.ACTIVE)
    device.layer.set_alpha(0, 1.0, ramp_steps=4)
    device.lattice.step(1)
    device.lattice.step(2)  # at 0.5; the host believes 0
    device.layer.set_alpha(0, 0.0, ramp_steps=2)
    device.lattice.step(3)
    assert float(device.lattice.alpha_blend[0]) == 0.25
    device.lattice.step(4)
    assert float(device.lattice.alpha_blend[0]) == 0.0


class _DividesAsCuda(TorchDispatchMode):
    """By a plain number PyTorch multiplies with the reciprocal on a GPU, and divides on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten.div_ and not isinstance(args[1], Tensor):
            return args[0].mul_(float(np.float32(1) / np.float32(args[1])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("ramp_steps", [1, 3, 7, 10, 2**24 + 1])
def test_a_ramp_has_the_same_stride_on_every_device(alpha: float, ramp_steps: int) -> None:
    device = _Device()
    device.layer.transition_seed_state(0, State.ACTIVE)
    with _DividesAsCuda():
        device.layer.set_alpha(0, alpha, ramp_steps=ramp_steps)
    assert device.lattice.alpha_step[0].item() == np.float32(alpha) / np.float32(ramp_steps)


def test_reading_a_snapshot_too_early_is_an_error() -> None:
    lattice = Lattice(1, 1)
    snapshot = Snapshot(take_snapshot(lattice.storage, 1, 0).buffer, 1, 0, _Late())
    with pytest.raises(RuntimeError, match="on its way"):
        snapshot.fields()
    assert set(views(snapshot.buffer, 1)) == set(PERSISTENT)


@pytest.mark.gpu
def test_moving_to_a_gpu_and_back_keeps_state_and_views() -> None:
    lattice = _lived_in()
    layer, crc = lattice.layer(0), lattice.crc()
    lattice.to("cuda")
    assert layer.alpha_blend.is_cuda and lattice.crc() == crc and layer.state_of(1) is State.GRAFTING
    layer.set_alpha(1, 1.0)
    lattice.step(6)
    torch.cuda.synchronize()
    lattice.poll()
    torch.cuda.synchronize()
    assert lattice.poll() == [(1, State.GRAFTING, State.TRAINING)]
    lattice.to("cpu")
    assert layer.state_of(1) is State.TRAINING and layer.alpha_of(1) == 1.0


@pytest.mark.gpu
def test_commands_and_steps_do_not_synchronise() -> None:
    lattice = Lattice(4, 4, "cuda")
    layer = lattice.layer(2)
    layer.transition_seed_state(0, State.GRAFTING)
    lattice.step(0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.set_alpha(0, 1.0, ramp_steps=4)
        layer.update_telemetry(0, 3, 0.5)
        layer.raise_fault(0)
        layer.transition_seed_state(1, State.LOADING, kernel_id=3)
        layer.increment_error_count(1)
        layer.reset_seed(1)
        lattice.step(1)
        lattice.compact()
        lattice.poll()
        lattice.poll()
    finally:
        torch.cuda.set_sync_debug_mode("default")
