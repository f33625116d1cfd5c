"""One lattice_step for all seeds of a model, and how it compares with copying the bytes it has to touch.

Promised: on the CPU, at a million seeds, at most twice the time of one memcpy of those bytes. Cases:

- ``ramping``: every seed is GRAFTING and its alpha moves. Nine fields, 27 bytes a seed, have to be read: state, fault
  flag, health sample, alpha, target, stride, error count, fallback flag, timer; 4 of them are written.
- ``dormant``: nobody is awake. Three fields, 6 bytes a seed, tell that there is nothing to do.

Run with ``make bench`` or ``pytest bench/test_lattice.py --benchmark-only``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.paired import compare
from bench.results import record
from esper.execution.state_layout import Lattice
from esper.ops import registry
from esper.ops.lattice import lattice_compact, lattice_crc, lattice_snapshot, lattice_step, layout_of, table, views

#: Fields that a step must read, per case.
TOUCHED = {
    "ramping": (
        "lifecycle_states",
        "fault_flags",
        "health_sample",
        "alpha_blend",
        "alpha_target",
        "alpha_step",
        "error_count",
        "fallback_active",
        "state_timer",
    ),
    "dormant": ("lifecycle_states", "fault_flags", "health_sample"),
}
SIZES = (1_000, 10_000, 100_000, 1_000_000)
#: So many steps does a ramp last: more than any benchmark makes.
LONG = 2**22


def storage_of(rows: int, case: str) -> Tensor:
    """A lattice's buffer in which every seed is in the case's state."""
    storage = torch.zeros(layout_of(rows).total_bytes, dtype=torch.uint8)
    fields = views(storage, rows)
    fields["health_sample"].fill_(torch.nan)
    if case == "ramping":
        fields["lifecycle_states"].fill_(table.GRAFTING)
        fields["alpha_target"].fill_(1.0)
        fields["alpha_step"].fill_(1.0 / LONG)
    return storage


def touched_bytes(storage: Tensor, rows: int, case: str) -> int:
    """Bytes of the fields that a step of this case reads."""
    fields = views(storage, rows)
    return sum(fields[name].nbytes for name in TOUCHED[case])


def memcpy_of(size: int) -> Callable[[], object]:
    """One memcpy of ``size`` bytes between two buffers whose pages are in memory."""
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    addresses = target.data_ptr(), source.data_ptr()
    memmove = ctypes.memmove  # the C library takes its memcpy path when the ranges do not overlap

    def call(_keep: tuple[Tensor, Tensor] = (source, target)) -> object:
        return memmove(*addresses, size)

    return call


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", TOUCHED)
@pytest.mark.parametrize("rows", SIZES)
def test_step_against_memcpy(rows: int, case: str, benchmark: Any) -> None:
    storage = storage_of(rows, case)
    step = lattice_step.backend("cpu")
    size = touched_bytes(storage, rows, case)
    calls = {"memcpy": memcpy_of(size), "step": lambda: step(storage, rows, 1)}
    ratios = compare(calls, baseline="memcpy", rounds=101, seconds=4.0)
    benchmark.extra_info |= {"rows": rows, "bytes": size, "seconds": ratios["step"].seconds}
    limits = {"step": 2.0} if rows == 1_000_000 else {}
    record(benchmark, f"lattice_step/{case}/{rows}/memcpy", ratios, limits)
    benchmark.pedantic(calls["step"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows", SIZES)
def test_step(rows: int, backend: str, benchmark: Any) -> None:
    storage = storage_of(rows, "ramping")
    step = lattice_step.backend(backend)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(step, args=(storage, rows, 1), rounds=11, iterations=max(1, 20_000 // rows), warmup_rounds=1)


@pytest.mark.parametrize("rows", [24, 1_000, 10_000])
@pytest.mark.parametrize("awake", [0.0, 1.0])
def test_what_a_training_step_pays(rows: int, awake: float, benchmark: Any) -> None:
    """``needs_step``, ``step`` and ``poll``, as a model calls them."""
    lattice = Lattice(rows // 4, 4)
    if awake:
        lattice.lifecycle_states.fill_(table.ACTIVE)
        lattice.notify()

    def call() -> object:
        if lattice.needs_step:
            lattice.step(1)
        return lattice.poll()

    call()
    benchmark.extra_info["rows"] = rows
    benchmark(call)


@pytest.mark.parametrize("op", ["compact", "crc", "snapshot"])
@pytest.mark.parametrize("rows", [10_000, 1_000_000])
def test_other_operations(rows: int, op: str, benchmark: Any) -> None:
    storage = storage_of(rows, "ramping")
    indices, count = torch.empty(rows, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    out = torch.empty(layout_of(rows).persistent_bytes, dtype=torch.uint8)
    calls: dict[str, Callable[[], object]] = {
        "compact": lambda: lattice_compact(storage, rows, indices, count),
        "crc": lambda: lattice_crc(storage, rows),
        "snapshot": lambda: lattice_snapshot(storage, rows, out),
    }
    benchmark.extra_info |= {"rows": rows, "backend": str(registry.get(f"lattice_{op}").select("cpu").backend)}
    benchmark.pedantic(calls[op], rounds=11, warmup_rounds=1)
