"""Finds the tile sizes, warps and stages with which a family's kernels are fastest on the GPU of this machine.

Every candidate is compiled, loaded and run by the operation itself: the Triton backend asks
:data:`esper.ops.binaries.TABLE` for a binary, and finds the candidate there. So what is measured is what will run, and
a candidate counts only if its results agree with those of the kernel as the package configures it.

One value is changed at a time, the best of each is kept (coordinate descent): some twenty compilations a kernel instead
of hundreds.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Final

import torch
from torch import Tensor

from esper.ops import binaries
from esper.ops.graft.variants import BANK_FAMILIES, KernelVariant
from esper.ops.registry import use_backend
from esper.ops.toolchain import Built, Request, ToolchainError, build_variant, kernels_for

__all__ = ["CANDIDATES", "WORTH", "Workload", "agree", "neighbours", "time_of", "tune"]

#: What is tried, in this order. Names that a kernel has not are passed over; BLOCK_R decides which variant is needed.
CANDIDATES: Final[Mapping[str, tuple[int, ...]]] = {
    "num_warps": (2, 4, 8),
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "BLOCK_K": (32, 64, 128),
    "num_stages": (1, 2, 3, 4),
}
_OPTIONS: Final = ("num_warps", "num_stages")
#: Rows of the activations that are measured with.
ROWS: Final = 4096
_WARM_UP, _REPEATS, _LAUNCHES = 3, 15, 10
#: Seconds that a candidate runs before it is timed: while the host compiled it, the GPU's clocks went down.
_WARM_SECONDS: Final = 0.05
#: A change must be worth this much to be kept: less is noise.
WORTH: Final = 0.98
_TORCH: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: How far results may lie apart, in units of the largest value: tiles of other sizes sum in another order.
_TOLERANCE: Final[Mapping[str, float]] = {"fp32": 1e-2, "bf16": 2e-2, "fp16": 5e-3}


@dataclass(frozen=True)
class Workload:
    """Something to run: the forward or the backward pass of one seed of the family.

    Attributes:
        run: Runs it once on the GPU; its results.
        dtype: Of the values, by Triton's name.
    """

    run: Callable[[], Sequence[Tensor]]
    dtype: str


def neighbours(variant: KernelVariant) -> Iterator[tuple[str, list[KernelVariant]]]:
    """For each name in :data:`CANDIDATES` that the variant has: the variant with each of the other values."""
    for name, values in CANDIDATES.items():
        if name in _OPTIONS:
            others = [value for value in values if value != variant.options.get(name)]
            yield name, [replace(variant, options={**variant.options, name: value}) for value in others]
        elif name in variant.constants:
            others = [value for value in values if value != variant.constants[name]]
            yield name, [replace(variant, constants={**variant.constants, name: value}) for value in others]


def tune(request: Request, d_in: int, d_out: int) -> list[Built]:
    """The fastest build of every kernel of the family for the present GPU, which ``request.architectures`` names.

    Raises:
        ToolchainError: a kernel does not compile as the package configures it, or never asks for a binary.
    """
    (arch,) = request.architectures
    built = []
    for dtype in request.dtypes:
        found = kernels_for(request, dtype)
        if request.family not in BANK_FAMILIES:
            # A blend or an elementwise seed is as fast as memory in any layout: nothing to find.
            built += [build_variant(variant, dtype, arch) for variant in found]
            continue
        loads = {each: _workload(request, dtype, d_in, d_out, each) for each in ("forward", "backward")}
        for variant in found:
            built.append(_best(variant, loads[variant.direction], arch))
    return built


def _best(variant: KernelVariant, load: Workload, arch: int) -> Built:
    best = build_variant(variant, load.dtype, arch)
    expected = _results(load)
    results, cost = _measure(load, best)
    if not agree(results, expected, load.dtype):
        raise ToolchainError(f"{best.kernel} ({load.dtype}): compiled ahead of time it computes something else")
    for name in CANDIDATES:
        # Neighbours of the best so far, which may have moved since the last name.
        for candidate in dict(neighbours(variant)).get(name, []):
            try:
                built = build_variant(candidate, load.dtype, arch)
                results, taken = _measure(load, built)
            except (ToolchainError, RuntimeError):
                # Too much shared memory, too many registers: no candidate for this GPU.
                continue
            if taken < WORTH * cost and agree(results, expected, load.dtype):
                variant, best, cost = candidate, built, taken
    return best


def _measure(load: Workload, built: Built) -> tuple[list[Tensor], float]:
    """Results and milliseconds of the workload with this build in the table."""
    entry = SimpleNamespace(
        arch=f"sm_{built.arch}",
        dtype=built.dtype,
        kernel=built.kernel,
        symbol=built.symbol,
        signature=built.signature,
        constants=built.constants,
        num_warps=built.num_warps,
        shared=built.shared,
        sha256=hashlib.sha256(built.cubin).hexdigest(),
    )
    binary = SimpleNamespace(entry=entry, data=memoryview(built.cubin))
    reasons = binaries.TABLE.add([binary], torch.cuda.current_device())
    try:
        if reasons:
            raise ToolchainError("; ".join(reasons))
        before = binaries.TABLE.handed_out
        results = _results(load)
        if binaries.TABLE.handed_out == before:
            raise ToolchainError(
                f"{built.kernel} ({built.dtype}) was not asked for with these constants at these sizes, so that it "
                f"cannot be tuned: {dict(built.constants)}"
            )
        return results, time_of(load)
    finally:
        binaries.TABLE.clear()


def _results(load: Workload) -> list[Tensor]:
    with use_backend("triton"):
        results = [tensor.detach().clone() for tensor in load.run()]
    torch.cuda.synchronize()
    return results


def time_of(load: Workload) -> float:
    """Median milliseconds of one run."""
    samples: list[float] = []
    with use_backend("triton"):
        until = time.perf_counter() + _WARM_SECONDS
        while True:
            for _ in range(_WARM_UP):
                load.run()
            torch.cuda.synchronize()
            if time.perf_counter() >= until:
                break
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_LAUNCHES):
                load.run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / _LAUNCHES)
    return statistics.median(samples)


def agree(results: Sequence[Tensor], expected: Sequence[Tensor], dtype: str) -> bool:
    """Whether results are those expected, to what the arithmetic of ``dtype`` allows."""
    for one, other in zip(results, expected, strict=True):
        if other.numel() == 0:
            continue
        largest = float(other.float().abs().max())
        if not float((one.float() - other.float()).abs().max()) <= _TOLERANCE[dtype] * max(largest, 1e-6):
            return False
    return True


def _flat(results: tuple[Tensor, Sequence[Tensor]]) -> list[Tensor]:
    first, rest = results
    return [first, *rest]


def _workload(request: Request, dtype: str, d_in: int, d_out: int, direction: str, device: str = "cuda") -> Workload:
    """One seed of the family on the whole layer, at half its alpha."""
    from esper.ops.graft import graft_blend, graft_blend_backward
    from esper.ops.graft.bank import graft_bank, graft_bank_backward

    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(_TORCH[dtype])

    x, h, gy = drawn(ROWS, d_in), drawn(ROWS, d_out), drawn(ROWS, d_out)
    alpha = torch.full((1,), 0.5, device=device)
    faults = torch.zeros(1, dtype=torch.uint8, device=device)
    if request.family not in BANK_FAMILIES:
        trusted, places = torch.ones(ROWS, 1, dtype=torch.bool, device=device), [0, 0, d_out, 0]
        if direction == "forward":
            return Workload(lambda: graft_blend(h, [gy], [trusted], alpha, places, 1), dtype)
        return Workload(lambda: _flat(graft_blend_backward(gy, alpha, faults, places, 1)), dtype)
    rank = request.rank
    down, up = drawn(rank, d_in, scale=d_in**-0.5), drawn(rank, d_out, scale=rank**-0.5)
    gated = request.family == "gated"
    value = drawn(rank, d_in, scale=d_in**-0.5) if gated else None
    bias = drawn(rank) if request.biased else None
    value_bias = drawn(rank) if request.biased and gated else None
    seats = [0, 0, d_out, int(request.replaces), 0, rank]
    weights = (down, value, up, bias, value_bias)
    if direction == "forward":
        return Workload(lambda: graft_bank(x, h, alpha, *weights, seats, request.activation), dtype)
    # As esper.ops.graft.autograd asks: without a replace seed nobody wants a gradient of h computed.
    wants = True, request.replaces, True
    return Workload(
        lambda: graft_bank_backward(gy, x, alpha, faults, *weights, seats, request.activation, *wants), dtype
    )
