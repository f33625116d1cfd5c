"""The lattice in C++, through the extension module: raw addresses, no copies, the interpreter lock held throughout."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from esper.ops import native, registry
from esper.ops.lattice import reference, table
from esper.ops.lattice.layout import ALIGN, layout_of

__all__ = ["stale"]

_STEP, _COMPACT, _CRC = "lattice_step", "lattice_compact", "lattice_crc"


def stale(module: ModuleType) -> str:
    """Why the extension's state machine cannot be used; "" when its numbers are those of the table."""
    theirs = {
        name: getattr(module, f"lattice_{name}", None)
        for name in ("transitions", "awake", "timed", "max_faults", "align")
    }
    ours = {
        "transitions": table.TRANSITIONS,
        "awake": table.AWAKE,
        "timed": table.TIMED,
        "max_faults": table.MAX_FAULTS,
        "align": ALIGN,
    }
    different = [name for name, value in ours.items() if theirs[name] != value]
    if not different:
        return ""
    return f"esper._native was built from other sources ({', '.join(different)} of the lattice differ): rebuild it"


def _register(module: ModuleType) -> None:
    step_cpu, compact_cpu, crc_cpu = module.lattice_step_cpu, module.lattice_compact_cpu, module.lattice_crc_cpu

    @registry.implements(_STEP, "cpu")
    def step(storage: Tensor, rows: int, epoch: int) -> int:
        changed: int = step_cpu(storage.data_ptr(), rows, epoch)
        return changed

    @registry.implements(_COMPACT, "cpu")
    def compact(storage: Tensor, rows: int, indices: Tensor, count: Tensor) -> None:
        count.fill_(compact_cpu(storage.data_ptr(), rows, indices.data_ptr()))

    @registry.implements(_CRC, "cpu")
    def crc(storage: Tensor, rows: int) -> int:
        value: int = crc_cpu(storage.data_ptr(), layout_of(rows).persistent_bytes)
        return value


registry.implements("lattice_snapshot", "cpu")(reference.snapshot)

_module = native.load()
_reason = native.reason() if _module is None else stale(_module)
if _module is not None and not _reason:
    _register(_module)
else:
    for _name in (_STEP, _COMPACT, _CRC):
        registry.unavailable(_name, "cpu", _reason)
