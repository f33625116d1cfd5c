"""One layer's seeds: its rows of the lattice, and the commands on them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from esper.execution.lattice import INITIAL_HEALTH, IS_AWAKE, Lattice
from esper.execution.lattice_mirror import Array, Snapshot
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.ops.lattice import FIELDS

__all__ = ["INITIAL_HEALTH", "KasminaStateLayout", "Lattice", "LifecycleError", "SeedLifecycleState", "Snapshot"]

_State = SeedLifecycleState


class KasminaStateLayout:
    """The state of one layer's seeds.

    Each field of the lattice is an attribute: a tensor ``[num_seeds]`` over the lattice's memory, always the live one.
    Reads of the host (:meth:`state_of`, :meth:`get_stats`, counters) never ask the device. On a CPU they are exact, on
    a GPU they include every command of the host, and the device's own changes up to the last snapshot that arrived
    (:meth:`Lattice.poll` fetches the next).

    Args:
        num_seeds: Number of seeds, at least 1. A layout made this way has a lattice of its own.
        device: Where the state lives.

    Attributes:
        lattice: The lattice these rows are part of.
        layer_index: Which layer of it.
        num_seeds: Number of rows.
        first_row: The lattice's row of seed 0.
        alphas: The lattice's ``alpha_blend``, of which this layer's is a part. A graph that reads several layers' seeds
            takes this one tensor in, and not one for each.
        faults: Its ``fault_flags``.

    Raises:
        ValueError: ``num_seeds`` is less than 1.
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
    alphas: Tensor
    faults: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str = "cpu") -> None:
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, not {num_seeds}")
        lattice = Lattice(1, num_seeds, device)
        self._attach(lattice, 0)
        lattice._layers[0] = self

    @classmethod
    def of_lattice(cls, lattice: Lattice, layer_index: int) -> KasminaStateLayout:
        """The rows of one layer of ``lattice``; programs call :meth:`Lattice.layer`, which makes each only once."""
        layout = cls.__new__(cls)
        layout._attach(lattice, layer_index)
        return layout

    def _attach(self, lattice: Lattice, layer_index: int) -> None:
        self.lattice = lattice
        self.layer_index = layer_index
        self.num_seeds = lattice.seeds_per_layer
        self.first_row = layer_index * lattice.seeds_per_layer
        self.rebind()

    def rebind(self) -> None:
        """Take the views anew; the lattice calls this when its memory has moved."""
        rows = slice(self.first_row, self.first_row + self.num_seeds)
        for name in FIELDS:
            setattr(self, name, getattr(self.lattice, name)[rows])
        self.alphas, self.faults = self.lattice.alpha_blend, self.lattice.fault_flags
        self._host: Mapping[str, Array] = MappingProxyType(
            {name: array[rows] for name, array in self.lattice._mirror.fields.items()}
        )
        self._states = self._host["lifecycle_states"]

    def __deepcopy__(self, memo: dict[int, Any]) -> KasminaStateLayout:
        return copy.deepcopy(self.lattice, memo).layer(self.layer_index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_layer_of, (self.lattice, self.layer_index))

    def __len__(self) -> int:
        return self.num_seeds

    def __repr__(self) -> str:
        states = ", ".join(_State(state).name for state in self._states.tolist())
        return f"KasminaStateLayout(layer {self.layer_index}: {states})"

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.lattice.device

    @property
    def version(self) -> int:
        """The lattice's version: equal numbers mean that no state has changed in between."""
        return self.lattice.version

    # -- reading -----------------------------------------------------------------------------------

    def get_active_seeds(self) -> Tensor:
        """Indices of awake seeds, ascending: int64 ``[number of them]`` on :attr:`device`."""
        return self._where(IS_AWAKE[self._states])

    def get_dormant_seeds(self) -> Tensor:
        """Indices of dormant seeds, ascending: int64 ``[number of them]`` on :attr:`device`."""
        return self._where(self._states == _State.DORMANT)

    def has_active_seeds(self) -> bool:
        """Whether any seed of the layer is awake."""
        return bool(IS_AWAKE[self._states].any())

    def get_active_count(self) -> int:
        """How many seeds of the layer are awake."""
        return int(np.count_nonzero(IS_AWAKE[self._states]))

    def state_of(self, seed_idx: SupportsIndex) -> SeedLifecycleState:
        """The seed's state.

        Raises:
            ValueError: bad seed index.
        """
        return _State(int(self._states[self._seed(seed_idx)]))

    def alpha_of(self, seed_idx: SupportsIndex) -> float:
        """The seed's blend factor now.

        Raises:
            ValueError: bad seed index.
        """
        return float(self._host["alpha_blend"][self._seed(seed_idx)])

    def get_stats(self) -> dict[str, int | float]:
        """Counts and means over the layer's seeds.

        Returns:
            ``num_seeds``; ``active_seeds``, all that are awake; the number in each single state: ``dormant_seeds``,
            ``loading_seeds``, ``error_recovery_seeds``, ``fossilized_seeds``, ``grafting_seeds``, ``training_seeds``,
            ``culled_seeds``; ``avg_health``, over all seeds; ``avg_latency_us``, over seeds with a measurement (0.0
            without any); ``total_errors``; ``fallback_active_count``.
        """
        counts = np.bincount(self._states, minlength=len(_State))
        latency = self._host["exec_latency_us"]
        measured = latency[latency > 0]
        return {
            "num_seeds": self.num_seeds,
            "dormant_seeds": int(counts[_State.DORMANT]),
            "active_seeds": self.get_active_count(),
            "loading_seeds": int(counts[_State.LOADING]),
            "error_recovery_seeds": int(counts[_State.ERROR_RECOVERY]),
            "fossilized_seeds": int(counts[_State.FOSSILIZED]),
            "grafting_seeds": int(counts[_State.GRAFTING]),
            "training_seeds": int(counts[_State.TRAINING]),
            "culled_seeds": int(counts[_State.CULLED]),
            "avg_health": float(self._host["health_accumulator"].mean(dtype=np.float64)),
            "avg_latency_us": float(measured.mean(dtype=np.float64)) if measured.size else 0.0,
            "total_errors": int(self._host["error_count"].sum(dtype=np.int64)),
            "fallback_active_count": int(np.count_nonzero(self._host["fallback_active"])),
        }

    # -- commands ----------------------------------------------------------------------------------

    def transition_seed_state(
        self, seed_idx: SupportsIndex, state: int, kernel_id: int | None = None, *, timer: int = 0
    ) -> None:
        """Move a seed to another state.

        Every transition sets ``state_timer`` to ``timer``. Going to DORMANT or CULLED also clears alpha and its ramp,
        the kernel id, the error count and the fallback flag; going to ERROR_RECOVERY clears alpha and its ramp and sets
        the fallback flag; waking or loading a seed clears the error count and the fallback flag.

        Args:
            seed_idx: Which seed.
            state: The new state.
            kernel_id: First 63 bits of the artifact's SHA-256; None keeps the one there is.
            timer: Steps until the timed transition of TRAINING and CULLED, and what GRAFTING hands on to TRAINING; 0 is
                no timer.

        Raises:
            ValueError: bad seed index, unknown state, ``kernel_id`` outside [0, 2**63), negative ``timer``.
            LifecycleError: the transition is not legal. In every case nothing was changed.
        """
        self.lattice.transition(self._row(seed_idx), state, kernel_id, timer)

    def set_alpha(self, seed_idx: SupportsIndex, alpha: float, ramp_steps: int = 0) -> None:
        """Set the blend factor, at once or over the next steps.

        Args:
            seed_idx: Which seed.
            alpha: New factor, clamped to [0, 1].
            ramp_steps: 0 sets it now; n > 0 lets the device move it there in n equal strides, one per step, as long as
                the seed is awake.

        Raises:
            ValueError: bad seed index, ``alpha`` is NaN, or ``ramp_steps`` is negative.
        """
        self.lattice.set_alpha(self._row(seed_idx), alpha, ramp_steps)

    def set_timer(self, seed_idx: SupportsIndex, steps: int) -> None:
        """Set the steps left until TRAINING or CULLED ends by itself; 0 stops the timer, and the seed stays.

        Raises:
            ValueError: bad seed index, or ``steps`` is negative.
        """
        self.lattice.set_timer(self._row(seed_idx), steps)

    def increment_error_count(self, seed_idx: SupportsIndex) -> bool:
        """Count a fault at once, and let the host path stand in.

        Returns:
            Whether it was the third in a row and sent the seed to ERROR_RECOVERY (from CULLED none does).

        Raises:
            ValueError: bad seed index.
        """
        return self.lattice.add_fault(self._row(seed_idx))

    def raise_fault(self, seed_idx: SupportsIndex) -> None:
        """Flag a fault, to be counted by the next step. Grafts do the same on the device, in ``fault_flags``.

        Raises:
            ValueError: bad seed index.
        """
        self.lattice.raise_fault(self._row(seed_idx))

    def update_telemetry(self, seed_idx: SupportsIndex, latency_us: float, health_score: float) -> None:
        """Store a measured latency and mix a health score into the exponential mean.

        Args:
            seed_idx: Which seed.
            latency_us: Microseconds, at least 0; saturates at 2**31 - 1.
            health_score: Clamped to [0, 1]; NaN means that there is none.

        Raises:
            ValueError: bad seed index, or ``latency_us`` is negative or NaN.
        """
        self.lattice.record(self._row(seed_idx), latency_us, health_score)

    def submit_health(self, samples: Tensor) -> None:
        """Hand one health sample per seed to the next step, on the device.

        Args:
            samples: ``[num_seeds]``, clamped to [0, 1] when they are taken in; NaN means none for that seed.

        Raises:
            ValueError: another shape.
        """
        if samples.shape != self.health_sample.shape:
            raise ValueError(f"samples must have shape ({self.num_seeds},), not {tuple(samples.shape)}")
        self.health_sample.copy_(samples, non_blocking=True)
        self.lattice.expect_step()

    def reset_seed(self, seed_idx: SupportsIndex) -> None:
        """Make a seed dormant and forget all about it, from any state.

        Raises:
            ValueError: bad seed index.
        """
        self.lattice.reset(self._row(seed_idx))

    def copy_from(self, other: KasminaStateLayout) -> None:
        """Take over every field of another layer's seeds.

        Raises:
            ValueError: the other layer has another number of seeds.
        """
        if other.num_seeds != self.num_seeds:
            raise ValueError(f"cannot copy the state of {other.num_seeds} seeds to {self.num_seeds}")
        self.lattice.copy_rows(self.first_row, other.lattice, other.first_row, self.num_seeds)

    # -- helpers -----------------------------------------------------------------------------------

    def _seed(self, seed_idx: SupportsIndex) -> int:
        try:
            index = -1 if isinstance(seed_idx, bool) else operator.index(seed_idx)
        except TypeError:
            index = -1
        if not 0 <= index < self.num_seeds:
            raise ValueError(f"Invalid seed index {seed_idx!r}: the layer has seeds 0 to {self.num_seeds - 1}")
        return index

    def _row(self, seed_idx: SupportsIndex) -> int:
        return self.first_row + self._seed(seed_idx)

    def _where(self, condition: Array) -> Tensor:
        return torch.from_numpy(np.flatnonzero(condition)).to(self.device, non_blocking=True)


def _layer_of(lattice: Lattice, index: int) -> KasminaStateLayout:
    return lattice.layer(index)
