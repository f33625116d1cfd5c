"""The state of all seeds of a model, and the commands that change it.

Several threads may not use one lattice at once: commands and steps belong to the thread that trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esper.execution.lattice_mirror import Array, AsyncMirror, DirectMirror, Mirror, Snapshot, take_snapshot
from esper.execution.lifecycle import AWAKE, TRANSITIONS, LifecycleError, SeedLifecycleState, is_legal
from esper.ops.lattice import (
    FIELDS,
    PERSISTENT,
    lattice_compact,
    lattice_crc,
    lattice_step,
    layout_of,
    table,
    views,
)

if TYPE_CHECKING:
    from esper.execution.state_layout import KasminaStateLayout

__all__ = ["INITIAL_HEALTH", "IS_AWAKE", "Lattice"]

_State = SeedLifecycleState
_INT32_MAX = 2**31 - 1
#: Health of a seed that no sample has reached yet: healthy until shown otherwise.
INITIAL_HEALTH = 1.0
#: Version of the checkpoint's entries.
_FORMAT = 1

#: By state; 256 entries, so that a corrupt state is looked up safely and counts as asleep.
IS_AWAKE: Array = np.array([state in AWAKE for state in _State] + [False] * (256 - len(_State)))
#: Bit s of entry t: state s may be followed by t.
_PREDECESSORS = [sum(1 << old for old in _State if is_legal(old, new)) for new in _State]

#: What a seed is reset to.
_FRESH: Mapping[str, Any] = {
    "active_kernel_id": 0,
    "alpha_blend": 0.0,
    "alpha_target": 0.0,
    "alpha_step": 0.0,
    "health_accumulator": INITIAL_HEALTH,
    "exec_latency_us": 0,
    "error_count": 0,
    "state_timer": 0,
    "lifecycle_states": int(_State.DORMANT),
    "fallback_active": False,
    "health_sample": math.nan,
    "fault_flags": 0,
}
_NO_ALPHA: Mapping[str, Any] = {"alpha_blend": 0.0, "alpha_target": 0.0, "alpha_step": 0.0}
_NO_FAULTS: Mapping[str, Any] = {"error_count": 0, "fallback_active": False}


class Lattice:
    """``num_layers x seeds_per_layer`` seeds as one structure of arrays on one device.

    Each field is an attribute: a tensor ``[num_seeds]`` over :attr:`storage`, row ``layer * seeds_per_layer + seed``.
    Programs that write to these tensors themselves call :meth:`notify` afterwards.

    Args:
        num_layers: Number of layers, at least 0.
        seeds_per_layer: Seeds of each layer, at least 1.
        device: Where the state lives. The meta device has no values to keep: there it lives on the CPU.

    Attributes:
        num_layers: As given.
        seeds_per_layer: As given.
        num_seeds: Rows, the product of the two.
        storage: uint8, all fields one after another (:mod:`esper.ops.lattice.layout`).
        epoch: What the last :meth:`step` was told; commands stamp rows with it.
        version: Grows with every change of a seed's state that the host knows of.

    Raises:
        ValueError: a size is out of range.
    """

    active_kernel_id: Tensor
    alpha_blend: Tensor
    alpha_target: Tensor
    alpha_step: Tensor
    health_accumulator: Tensor
    last_update_epoch: Tensor
    exec_latency_us: Tensor
    error_count: Tensor
    state_timer: Tensor
    lifecycle_states: Tensor
    fallback_active: Tensor
    health_sample: Tensor
    fault_flags: Tensor

    def __init__(self, num_layers: int, seeds_per_layer: int, device: torch.device | str = "cpu") -> None:
        if num_layers < 0:
            raise ValueError(f"num_layers must be at least 0, not {num_layers}")
        if seeds_per_layer < 1:
            raise ValueError(f"seeds_per_layer must be at least 1, not {seeds_per_layer}")
        rows = num_layers * seeds_per_layer
        # A tensor made in inference mode could never be written outside it.
        with torch.inference_mode(False):
            storage = torch.zeros(layout_of(rows).total_bytes, dtype=torch.uint8, device="cpu")
            fields = views(storage, rows)
            fields["health_accumulator"].fill_(INITIAL_HEALTH)
            fields["health_sample"].fill_(math.nan)
            self.__setstate__(
                {
                    "num_layers": num_layers,
                    "seeds_per_layer": seeds_per_layer,
                    "epoch": 0,
                    "version": 0,
                    "storage": storage if torch.device(device).type == "meta" else storage.to(device),
                    "pending": False,
                    "changes": [],
                }
            )

    # -- memory ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "seeds_per_layer": self.seeds_per_layer,
            "epoch": self.epoch,
            "version": self.version,
            "storage": self.storage,
            "pending": self._pending,
            "changes": list(self._changes),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_layers: int = state["num_layers"]
        self.seeds_per_layer: int = state["seeds_per_layer"]
        self.num_seeds = self.num_layers * self.seeds_per_layer
        self.epoch: int = state["epoch"]
        self.version: int = state["version"]
        self._layers: dict[int, KasminaStateLayout] = {}
        self._changes: list[tuple[int, SeedLifecycleState, SeedLifecycleState]] = state["changes"]
        self._pending: bool = state["pending"]
        self._adopt(state["storage"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Lattice:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):
            twin.__setstate__({**self.__getstate__(), "storage": self.storage.clone()})
        return twin

    def __repr__(self) -> str:
        return f"Lattice({self.num_layers} x {self.seeds_per_layer} seeds, {self._awake} awake, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.storage.device

    def to(self, device: torch.device | str) -> Lattice:
        """Move in place: the layers' views follow. Waits for the device. To the meta device it does not move."""
        if torch.device(device).type != "meta" and torch.device(device) != self.device:
            with torch.inference_mode(False):
                self._adopt(self.storage.to(device))
        return self

    def layer(self, index: int) -> KasminaStateLayout:
        """The rows of one layer, as views; the same object on every call.

        Raises:
            IndexError: there is no such layer.
        """
        # Each of the two classes makes the other; the import that closes the circle waits until both are there.
        from esper.execution.state_layout import KasminaStateLayout

        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of a lattice of {self.num_layers} layers")
        if index not in self._layers:
            self._layers[index] = KasminaStateLayout.of_lattice(self, index)
        return self._layers[index]

    def _adopt(self, storage: Tensor) -> None:
        self.storage = storage
        self._device_type = storage.device.type
        for name, field in views(storage, self.num_seeds).items():
            setattr(self, name, field)
        direct = self._device_type == "cpu"
        self._follow(DirectMirror(storage, self.num_seeds) if direct else AsyncMirror(storage, self.num_seeds))

    def _follow(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._states: Array = mirror.fields["lifecycle_states"]
        self._recount()
        for layer in self._layers.values():
            layer.rebind()

    # -- steps -------------------------------------------------------------------------------------

    def step(self, epoch: int) -> None:
        """One ``lattice_step`` for all seeds: ramps, faults, timers, health. Does not wait for the device.

        Args:
            epoch: Stamped on the rows that change state, take a fault or take a health sample; int32.
        """
        self.epoch = epoch
        changed = lattice_step.resolve(self._device_type)(self.storage, self.num_seeds, epoch)
        self._pending = False
        self._mirror.device_wrote()
        if changed and self._mirror.exact:
            self._reconcile()

    def poll(self) -> list[tuple[int, SeedLifecycleState, SeedLifecycleState]]:
        """What changed state without a command since the last call: ``(row, old state, new state)``, in order.

        It is a history: a later command to the same seed takes nothing back.

        Never waits. On a CPU the answer is exact; on a GPU it is as new as the last snapshot that has arrived, and
        asking starts the next one.
        """
        if self._mirror.refresh(self.storage, self.epoch):
            self._reconcile()
        if not self._changes:
            return []
        changes, self._changes = self._changes, []
        return changes

    def notify(self) -> None:
        """Say that fields were written directly: the counters are renewed, and the next step is wanted."""
        self._pending = True
        self._mirror.device_wrote()
        if self._mirror.exact:
            self._reconcile()
            self._recount()

    def expect_step(self, wanted: bool = True) -> None:
        """Say that flags or samples were written directly, the cheap part of :meth:`notify`; or that none are left."""
        self._pending = wanted

    @property
    def needs_step(self) -> bool:
        """Whether a step would do anything: a seed is awake, a timer runs, a fault or a sample was announced."""
        return self._pending or self._working > 0

    def has_active_seeds(self) -> bool:
        """Whether any seed is awake, as far as the host knows."""
        return self._awake > 0

    def get_active_count(self) -> int:
        """How many seeds are awake, as far as the host knows."""
        return self._awake

    def _reconcile(self) -> None:
        """Find the rows whose state differs from the last one known, count them and keep them for :meth:`poll`."""
        rows = np.flatnonzero(self._states != self._known)
        if not rows.size:
            return
        old, new = self._known[rows], self._states[rows]
        self._known[rows] = new
        self.version += rows.size
        self._changes.extend(
            (row, _State(before), _State(after))
            for row, before, after in zip(rows.tolist(), old.tolist(), new.tolist(), strict=True)
        )
        gained = int(np.count_nonzero(IS_AWAKE[new])) - int(np.count_nonzero(IS_AWAKE[old]))
        # A culled seed that left by itself had a timer, and so counted as working.
        timers = int(np.count_nonzero(old == _State.CULLED))
        self._awake += gained
        self._working += gained - timers

    def _recount(self) -> None:
        self._known: Array = self._states.copy()
        culled = np.flatnonzero(self._states == _State.CULLED)
        self._awake = int(np.count_nonzero(IS_AWAKE[self._states]))
        self._working = self._awake + int(np.count_nonzero(self._mirror.fields["state_timer"][culled] > 0))

    # -- whole-lattice operations ------------------------------------------------------------------

    def compact(self) -> tuple[Tensor, Tensor]:
        """Rows of the awake seeds, without waiting for the device.

        Returns:
            indices int32 ``[num_seeds]``: ascending, then -1; and count int32 ``[1]``.
        """
        indices = torch.empty(self.num_seeds, dtype=torch.int32, device=self.device)
        count = torch.empty(1, dtype=torch.int32, device=self.device)
        lattice_compact(self.storage, self.num_seeds, indices, count)
        return indices, count

    def snapshot(self) -> Snapshot:
        """Start one copy of all persistent fields to the host; on a CPU it is there at once."""
        return take_snapshot(self.storage, self.num_seeds, self.epoch)

    def copies(self, names: Sequence[str]) -> dict[str, Array]:
        """Copies of persistent fields as the host knows them: on a CPU exact, on a GPU of the last snapshot."""
        fields = self._mirror.fields
        return {name: fields[name].copy() for name in names}

    def crc(self) -> int:
        """CRC-32C of the persistent fields (``docs/lattice.md``); waits for the device."""
        value: int = lattice_crc(self.storage, self.num_seeds)
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the persistent fields, with ``layout`` (format, layers, seeds per layer, epoch) and ``crc``."""
        entries = {name: getattr(self, name).clone() for name in PERSISTENT}
        header = [_FORMAT, self.num_layers, self.seeds_per_layer, self.epoch]
        entries["layout"] = torch.tensor(header, device="cpu")
        entries["crc"] = torch.tensor([self.crc()], device="cpu")
        return entries

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave. Flags and samples not yet consumed are dropped.

        Raises:
            ValueError: the entries are incomplete, of another shape or type, or damaged; nothing was changed.
        """
        expected = {*PERSISTENT, "layout", "crc"}
        if set(state_dict) != expected:
            missing, extra = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
            raise ValueError(f"not a lattice state: missing {missing}, unknown {extra}")
        if tuple(state_dict["layout"].shape) != (4,):
            raise ValueError(f"'layout' must hold 4 numbers, not {tuple(state_dict['layout'].shape)}")
        version, layers, seeds, epoch = (int(value) for value in state_dict["layout"])
        if version != _FORMAT:
            raise ValueError(f"the lattice state has format {version}; this version of Esper reads format {_FORMAT}")
        if (layers, seeds) != (self.num_layers, self.seeds_per_layer):
            raise ValueError(
                f"the lattice state is of {layers} layers x {seeds} seeds, this lattice has "
                f"{self.num_layers} x {self.seeds_per_layer}"
            )
        twin = Lattice(layers, seeds)
        for name, dtype in PERSISTENT.items():
            entry = state_dict[name]
            if tuple(entry.shape) != (self.num_seeds,) or entry.dtype != dtype:
                raise ValueError(
                    f"{name!r} must be {dtype} of shape {(self.num_seeds,)}, not {entry.dtype} of {tuple(entry.shape)}"
                )
            getattr(twin, name).copy_(entry)
        crc = int(state_dict["crc"].reshape(-1)[0])
        if twin.crc() != crc:
            raise ValueError(
                f"the lattice state is damaged: its checksum is {twin.crc():#010x}, recorded was {crc:#010x}. "
                "Use another checkpoint."
            )
        if self.num_seeds and int(twin.lifecycle_states.max()) >= len(_State):
            raise ValueError(f"the lattice state holds a seed in unknown state {int(twin.lifecycle_states.max())}")
        self.storage.copy_(twin.storage)
        self.epoch = epoch
        self.version += 1
        self._pending = False
        self._changes.clear()
        self._mirror.reload(self.storage)
        self._recount()

    # -- commands on one row -----------------------------------------------------------------------

    def transition(self, row: int, state: int, kernel_id: int | None = None, timer: int = 0) -> None:
        """Move the seed in ``row`` to ``state``; see :meth:`KasminaStateLayout.transition_seed_state`."""
        new = _State(state)
        old = _State(int(self._states[row]))
        if not is_legal(old, new):
            allowed = ", ".join(option.name for option in sorted(TRANSITIONS[old]))
            layer, seed = divmod(row, self.seeds_per_layer)
            raise LifecycleError(
                f"seed {seed} of layer {layer} cannot go from {old.name} to {new.name}; "
                f"from {old.name} it may go to {allowed}"
            )
        if kernel_id is not None and not 0 <= kernel_id < 2**63:
            raise ValueError(f"kernel_id must be in [0, 2**63), not {kernel_id}")
        values: dict[str, Any] = {
            "lifecycle_states": int(new),
            "state_timer": _steps(timer),
            "last_update_epoch": self.epoch,
        }
        if new in (_State.DORMANT, _State.CULLED):
            values |= {**_NO_ALPHA, **_NO_FAULTS, "active_kernel_id": 0}
        elif new is _State.ERROR_RECOVERY:
            values |= {**_NO_ALPHA, "fallback_active": True}
        elif old not in AWAKE:
            values |= _NO_FAULTS
        if kernel_id is not None:
            values["active_kernel_id"] = kernel_id
        self._write(row, values, only_after=_PREDECESSORS[new])

    def set_alpha(self, row: int, alpha: float, ramp_steps: int = 0) -> None:
        """Set the blend factor, or the ramp towards it; see :meth:`KasminaStateLayout.set_alpha`."""
        if math.isnan(alpha):
            raise ValueError("alpha is NaN; give a number in [0, 1]")
        if ramp_steps < 0:
            raise ValueError(f"ramp_steps must be at least 0, not {ramp_steps}")
        goal = min(max(float(alpha), 0.0), 1.0)
        if ramp_steps == 0:
            self._write(row, {"alpha_blend": goal, "alpha_target": goal, "alpha_step": 0.0})
            return
        distance = np.float32(goal) - self._mirror.fields["alpha_blend"][row]
        self._write(row, {"alpha_target": goal, "alpha_step": abs(distance) / np.float32(ramp_steps)})
        if not self._mirror.exact:
            # The device may have moved alpha since the last snapshot; the stride follows from where it is now.
            # Steps as a tensor: by a plain number a GPU multiplies with its reciprocal, which may be one bit off.
            here = slice(row, row + 1)
            steps = torch.full((1,), ramp_steps, dtype=torch.float32, device=self.device)
            self.alpha_step[here].copy_((self.alpha_target[here] - self.alpha_blend[here]).abs_().div_(steps))

    def set_timer(self, row: int, steps: int) -> None:
        """Set the steps left until the timed transition; see :meth:`KasminaStateLayout.set_timer`."""
        self._write(row, {"state_timer": _steps(steps)})

    def raise_fault(self, row: int) -> None:
        """Flag a fault for the next step."""
        self._pending = True
        self._write(row, {"fault_flags": 1})

    def add_fault(self, row: int) -> bool:
        """Count a fault at once; see :meth:`KasminaStateLayout.increment_error_count`."""
        count = min(int(self._mirror.fields["error_count"][row]) + 1, _INT32_MAX)
        self._write(row, {"error_count": count, "fallback_active": True, "last_update_epoch": self.epoch})
        if count < table.MAX_FAULTS or not is_legal(_State(int(self._states[row])), _State.ERROR_RECOVERY):
            return False
        self.transition(row, _State.ERROR_RECOVERY)
        return True

    def record(self, row: int, latency_us: float, health_score: float) -> None:
        """Store a latency and mix in a health score; see :meth:`KasminaStateLayout.update_telemetry`."""
        if not latency_us >= 0:
            raise ValueError(f"latency_us must be a number of at least 0, not {latency_us}")
        values: dict[str, Any] = {
            "exec_latency_us": _INT32_MAX if latency_us >= _INT32_MAX else int(latency_us),
            "last_update_epoch": self.epoch,
        }
        if math.isnan(health_score):
            self._write(row, values)
            return
        score = np.float32(min(max(health_score, 0.0), 1.0))
        rate = np.float32(table.HEALTH_RATE)
        before = self._mirror.fields["health_accumulator"][row]
        mixed = before + (score - before) * rate
        if self._mirror.exact:
            values["health_accumulator"] = mixed
        else:
            here = self.health_accumulator[row : row + 1]
            here.add_(torch.rsub(here, float(score)).mul_(table.HEALTH_RATE))
            self._mirror.fields["health_accumulator"][row] = mixed
        self._write(row, values)

    def reset(self, row: int) -> None:
        """Make the seed dormant and forget its history, from any state."""
        self._write(row, {**_FRESH, "last_update_epoch": self.epoch})

    def copy_rows(self, first: int, source: Lattice, source_first: int, count: int) -> None:
        """Take over all fields of ``count`` rows of another lattice."""
        for name in FIELDS:
            getattr(self, name)[first : first + count].copy_(
                getattr(source, name)[source_first : source_first + count], non_blocking=True
            )
            mine, theirs = self._mirror.fields.get(name), source._mirror.fields.get(name)
            if not self._mirror.exact and mine is not None and theirs is not None:
                mine[first : first + count] = theirs[source_first : source_first + count]
        for row in range(first, first + count):
            self._mirror.host_wrote(row)
        self._pending = True
        self.version += 1
        self._recount()

    def _write(self, row: int, values: Mapping[str, Any], only_after: int | None = None) -> None:
        """Write fields of one row, on the host and on the device, without waiting.

        Args:
            row: Which row.
            values: New value of each field.
            only_after: Bit set of the states from which the device may take these values. Between the host's look at
                its mirror and the arrival of the command the device may have moved the seed elsewhere; an illegal
                command then comes to nothing, and the next snapshot tells the host so.
        """
        self._count(row, -1)
        fields = self._mirror.fields
        for name, value in values.items():
            if name in fields:
                fields[name][row] = value
        if not self._mirror.exact:
            self._send(row, values, only_after)
            self._mirror.host_wrote(row)
        if "lifecycle_states" in values:
            self._known[row] = values["lifecycle_states"]
            self.version += 1
        self._count(row, 1)

    def _send(self, row: int, values: Mapping[str, Any], only_after: int | None) -> None:
        here = slice(row, row + 1)
        if only_after is None:
            for name, value in values.items():
                getattr(self, name)[here].fill_(value)
            return
        state = self.lifecycle_states[here].to(torch.int32)
        taken = torch.bitwise_right_shift(only_after, state).bitwise_and_(1).to(torch.bool)
        for name, value in values.items():
            getattr(self, name)[here].masked_fill_(taken, value)

    def _count(self, row: int, sign: int) -> None:
        state = self._known[row]
        if IS_AWAKE[state]:
            self._awake += sign
            self._working += sign
        elif state == _State.CULLED and self._mirror.fields["state_timer"][row] > 0:
            self._working += sign


def _steps(timer: int) -> int:
    if timer < 0:
        raise ValueError(f"a timer must be at least 0 steps, not {timer}")
    return min(int(timer), _INT32_MAX)
