"""The lattice in Triton. On a CPU this runs only in Triton's interpreter, which the tests use."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from esper.ops import registry
from esper.ops.lattice import crc32c, reference, table
from esper.ops.lattice.layout import layout_of

__all__: list[str] = []

_STEP, _COMPACT, _CRC = "lattice_step", "lattice_compact", "lattice_crc"
_STEP_BLOCK, _COMPACT_BLOCK, _CRC_BLOCK = 512, 2048, 1024
_STEP_CONSTANTS = {
    "AWAKE": table.AWAKE,
    "TIMED": table.TIMED,
    "MAX_FAULTS": table.MAX_FAULTS,
    "HEALTH_RATE": table.HEALTH_RATE,
    "DORMANT": table.DORMANT,
    "ACTIVE": table.ACTIVE,
    "ERROR_RECOVERY": table.ERROR_RECOVERY,
    "GRAFTING": table.GRAFTING,
    "TRAINING": table.TRAINING,
    "BLOCK": _STEP_BLOCK,
}


def _signed(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(torch.int32).to(device)


@lru_cache(maxsize=8)
def _crc_tables(programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Powers of x by lane of a block, and by block of a message of ``programs`` blocks (int32 bit patterns)."""
    powers = [crc32c.power(32 * (_CRC_BLOCK - lane)) for lane in range(_CRC_BLOCK)]
    block = crc32c.power(32 * _CRC_BLOCK)
    places = [crc32c.power(0)]
    while len(places) < programs:
        places.append(crc32c.multiply(places[-1], block))
    return _signed(powers, device), _signed(places[::-1], device)


def _register(kernels: ModuleType) -> None:
    @registry.implements(_STEP, "triton")
    def step(storage: Tensor, rows: int, epoch: int) -> int:
        if rows:
            grid = (-(-rows // _STEP_BLOCK),)
            with torch.cuda.device_of(storage):
                kernels.lattice_step_kernel[grid](storage, rows, epoch, **_STEP_CONSTANTS, **kernels.STEP_OPTIONS)
        return -1

    @registry.implements(_COMPACT, "triton")
    def compact(storage: Tensor, rows: int, indices: Tensor, count: Tensor) -> None:
        programs = max(1, -(-rows // _COMPACT_BLOCK))
        constants = {"AWAKE": table.AWAKE, "BLOCK": _COMPACT_BLOCK, **kernels.OPTIONS}
        with torch.cuda.device_of(storage):
            counts = count  # one program reads none
            if programs > 1:
                # Of the current stream's, or of the pool of the graph that is being captured.
                counts = torch.empty(programs, dtype=torch.int32, device=storage.device)
                kernels.lattice_count_kernel[(programs,)](storage, rows, counts, **constants)
            kernels.lattice_compact_kernel[(programs,)](storage, rows, counts, indices, count, **constants)

    @registry.implements(_CRC, "triton")
    def crc(storage: Tensor, rows: int) -> int:
        size = layout_of(rows).persistent_bytes
        words = storage[:size].view(torch.int32)
        programs = -(-words.numel() // _CRC_BLOCK)
        if not programs:
            return crc32c.finish(0, 0)
        powers, places = _crc_tables(programs, storage.device)
        partials = torch.empty(programs, dtype=torch.int32, device=storage.device)
        constants = {"POLYNOMIAL": crc32c.POLYNOMIAL, "BLOCK": _CRC_BLOCK}
        with torch.cuda.device_of(storage):
            kernels.lattice_crc_kernel[(programs,)](
                words, words.numel(), powers, places, partials, **constants, **kernels.OPTIONS
            )
        return crc32c.finish(crc32c.xor_all(partials), size)


registry.implements("lattice_snapshot", "triton")(reference.snapshot)

try:
    _kernels = importlib.import_module("esper.kernels.lattice")
except ImportError as error:
    for _name in (_STEP, _COMPACT, _CRC):
        registry.unavailable(_name, "triton", f"the Triton kernels cannot be imported: {error}")
else:
    _register(_kernels)
