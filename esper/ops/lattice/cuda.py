"""The lattice in CUDA C++, through the extension module, on PyTorch's current stream."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from esper.ops import native, registry
from esper.ops.lattice import crc32c, reference
from esper.ops.lattice.cpu import stale
from esper.ops.lattice.layout import layout_of

__all__: list[str] = []

_STEP, _COMPACT, _CRC = "lattice_step", "lattice_compact", "lattice_crc"


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _register(module: ModuleType) -> None:
    step_cuda, compact_cuda, crc_cuda = module.lattice_step_cuda, module.lattice_compact_cuda, module.lattice_crc_cuda

    @registry.implements(_STEP, "cuda")
    def step(storage: Tensor, rows: int, epoch: int) -> int:
        with torch.cuda.device(storage.device):
            step_cuda(storage.data_ptr(), rows, epoch, _stream(storage))
        return -1

    @registry.implements(_COMPACT, "cuda")
    def compact(storage: Tensor, rows: int, indices: Tensor, count: Tensor) -> None:
        # Of the current stream's, or of the pool of the graph that is being captured.
        counts = torch.empty(module.lattice_compact_blocks(rows), dtype=torch.int32, device=storage.device)
        with torch.cuda.device(storage.device):
            compact_cuda(
                storage.data_ptr(), rows, counts.data_ptr(), indices.data_ptr(), count.data_ptr(), _stream(storage)
            )

    @registry.implements(_CRC, "cuda")
    def crc(storage: Tensor, rows: int) -> int:
        size = layout_of(rows).persistent_bytes
        words = size // 4
        partials = torch.empty(module.lattice_crc_partials(words), dtype=torch.int32, device=storage.device)
        with torch.cuda.device(storage.device):
            crc_cuda(storage.data_ptr(), words, partials.data_ptr(), _stream(storage))
        return crc32c.finish(crc32c.xor_all(partials), size)


if torch.cuda.is_available():
    registry.implements("lattice_snapshot", "cuda")(reference.snapshot)
else:
    registry.unavailable("lattice_snapshot", "cuda", "no CUDA device is visible")

_module = native.load()
_reason = native.cuda_reason() or ("" if _module is None else stale(_module))
if _module is not None and not _reason:
    _register(_module)
else:
    for _name in (_STEP, _COMPACT, _CRC):
        registry.unavailable(_name, "cuda", _reason)
