"""What a launch costs: the package's way beside Triton's own Python launch. The target is a quarter of it.

The package's way is that of every graft: ``choose`` finds the binary that an artifact brought, and what it returns asks
for the current stream and launches. Beside it stands the launch alone.

On a GPU both launch the same kernel, which does nothing, with as many arguments and constants as a graft has; the ratio
is recorded. The queue is kept short, so that the host's work is measured and not the device's. What the driver itself
takes is in both; it is measured too, from C, and the ratio of what remains without it is recorded beside the other. The
promise is about the whole launch, and judged there.

Without a GPU a library takes the driver's place, for both, and returns at once (``tests/ops/recorder.c``): what is
compared is all that the host does, without what the driver itself takes for a launch, the same for both.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bench import driver_loop
from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record
from esper.kernels import graft_bank
from esper.ops import aot, binaries, cubin, native
from esper.ops.graft import triton as launcher
from tests.ops import recorder as recording

CUDA = torch.cuda.is_available()
LIMIT = 0.25


@triton.jit
def few_kernel(x, y, n, block: tl.constexpr):
    pass


@triton.jit(do_not_specialize=graft_bank.SIZES)
def many_kernel(
    x, h, y, down, value, up, bias, value_bias, alpha, owner, seats, spans, z, suspect,
    rows, d_in, d_out, ranks, seeds, groups, parts, x_row, h_row, y_row, z_row,
    act: tl.constexpr, gated: tl.constexpr, biased: tl.constexpr, wide: tl.constexpr, aligned: tl.constexpr,
    emulate: tl.constexpr, lanes: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    pass


@dataclass(frozen=True)
class Kernel:
    """A kernel that does nothing, and how it is compiled."""

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    options: Mapping[str, int]


_BLOCKS, _OPTIONS = graft_bank.bank_blocks("bf16", 64, 8192, True, True)
_KIND = {"act": 6, "gated": True, "biased": True, "aligned": True, "emulate": False, "lanes": 64}
KERNELS = {
    "few": Kernel(few_kernel, {"x": "*bf16", "y": "*bf16", "n": "i32"}, {"block": 64}, {"num_warps": 4}),
    # In all that the host sees the kernel of a bank: 14 tensors, 11 numbers, 11 constants.
    "many": Kernel(
        many_kernel,
        graft_bank.bank_signature("bf16"),
        _KIND | {name.lower(): value for name, value in _BLOCKS.items()},
        _OPTIONS,
    ),
}


def arguments(kernel: Kernel, device: str) -> list[Any]:
    types = {"bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "u8": torch.uint8}
    # Numbers that Triton's launch compiles one variant for: neither 1 nor divisible by 16.
    return [
        torch.zeros(64, dtype=types[kind[1:]], device=device) if kind.startswith("*") else 3 + 2 * i
        for i, kind in enumerate(kernel.signature.values())
    ]


@pytest.mark.skipif(not CUDA, reason="needs a GPU; without one the host's part is measured below")
@pytest.mark.parametrize("name", KERNELS)
def test_against_triton(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    kernel = KERNELS[name]
    driver = native.driver()
    major, minor = driver.capability(0)
    case = aot.Case(kernel.function, kernel.signature, kernel.constants, kernel.options, "")
    made = aot.compile_case(case, 10 * major + minor)
    table = table_with(driver, kernel, made.cubin, made.symbol, 10 * major + minor, made.resources.shared)
    monkeypatch.setattr(binaries, "TABLE", table)
    values = arguments(kernel, "cuda")
    candidates = {"triton": tritons(kernel, values), **ours(table, kernel, values)}
    assert launched_by_ours(table, candidates["chosen"])
    ratios = compare(candidates, "triton", inner=200)
    _beside_the_driver(benchmark, name, ratios, made, tmp_path)
    record(benchmark, f"launch/{name}", ratios, {"chosen": LIMIT})
    print(_times(ratios), end="")
    benchmark.pedantic(candidates["chosen"], rounds=5, iterations=200)


def _beside_the_driver(
    benchmark: Any, name: str, ratios: Mapping[str, Ratio], made: aot.Compiled, folder: Path
) -> None:
    """Record the ratios of what is not the driver's own; they are told, not judged."""
    kernel = KERNELS[name]
    try:
        seconds = driver_loop.launch_seconds(
            made.cubin,
            made.symbol,
            folder=folder,
            wait=torch.cuda.synchronize,
            num_warps=kernel.options["num_warps"],
            shared=made.resources.shared,
        )
        remaining = {way: driver_loop.without_driver(ratio, seconds) for way, ratio in ratios.items()}
    except (OSError, ValueError) as error:
        print(f"\nlaunch/{name}: without a measurement of the driver itself: {error}", end="")
        return
    record(benchmark, f"launch/{name}/without the driver", remaining)
    benchmark.extra_info["driver_microseconds"] = seconds * 1e6
    print(f"  (the driver {seconds * 1e6:.2f} us)", end="")


# Where there is a driver PyTorch has loaded it, and Triton's launches would go there with the stand-in's handles.
@pytest.mark.skipif(CUDA, reason="a GPU's driver is loaded already; with one the whole launch is measured above")
@pytest.mark.parametrize("name", KERNELS)
def test_the_hosts_part(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    stand_in = recording.build_library(tmp_path, "libcuda.so.1")
    ratios = compare_in_processes(both, str(stand_in), name, processes=5)
    record(benchmark, f"launch/{name}/host", ratios, {"chosen": LIMIT})
    print(_times(ratios), end="")
    table = stand_in_table(recording.build(tmp_path), KERNELS[name])
    monkeypatch.setattr(binaries, "TABLE", table)
    monkeypatch.setattr(launcher, "_raw_stream", _no_stream)
    calls = ours(table, KERNELS[name], arguments(KERNELS[name], "cpu"))
    benchmark.pedantic(calls["chosen"], rounds=5, iterations=200)


def both(path: str, name: str, number: int) -> dict[str, Ratio]:
    """Triton's launch and ours on the stand-in at ``path``, in process ``number``."""
    kernel = KERNELS[name]
    _triton_on(path)
    table = stand_in_table(recording.Recorder(Path(path)), kernel)
    # Of this process alone.
    binaries.TABLE, launcher._raw_stream = table, _no_stream
    values = arguments(kernel, "cpu")
    calls = {"triton": tritons(kernel, values), **ours(table, kernel, values)}
    assert launched_by_ours(table, calls["chosen"])
    return compare(calls, "triton", rounds=51, seed=number)


def launched_by_ours(table: binaries.BinaryTable, chosen: Callable[[], object]) -> bool:
    """Whether the package's way finds the binary: otherwise Triton would be compared with itself."""
    before = table.handed_out
    chosen()
    return table.handed_out > before


def stand_in_table(recorder: recording.Recorder, kernel: Kernel) -> binaries.BinaryTable:
    """A table whose driver is the stand-in, with a binary of the kernel that holds no code."""
    recorder.sizes(quiet=True)
    sizes = (*(cubin.parameter_size(kind) for kind in kernel.signature.values()), 8, 8)
    driver = native.load().Driver(recorder.path)
    return table_with(driver, kernel, recording.tiny_cubin("k", sizes), "k", 90, 0)


def table_with(driver: Any, kernel: Kernel, code: bytes, symbol: str, arch: int, shared: int) -> binaries.BinaryTable:
    """A table with this binary of the kernel, as if an artifact had brought it."""
    name, signature = kernel.function.__name__, tuple(kernel.signature.items())
    known = {name: binaries.Kernel(tuple(kernel.function.arg_names), frozenset({signature}))}
    entry = SimpleNamespace(
        arch=f"sm_{arch}", dtype="bf16", kernel=name, symbol=symbol, signature=signature, constants=kernel.constants,
        num_warps=kernel.options["num_warps"], shared=shared, sha256="",
    )  # fmt: skip
    table = binaries.BinaryTable(lambda: driver, lambda: known)
    assert table.add([SimpleNamespace(entry=entry, data=memoryview(code))], 0) == ()
    return table


def tritons(kernel: Kernel, values: list[Any]) -> Callable[[], object]:
    function, constants, options = kernel.function, kernel.constants, kernel.options
    return lambda: function[(1,)](*values, **constants, **options)


def ours(table: binaries.BinaryTable, kernel: Kernel, values: list[Any]) -> dict[str, Callable[[], object]]:
    """The package's way, the launch alone, and the launch alone with addresses found out before."""
    function, constants, options = kernel.function, kernel.constants, kernel.options
    device, stream = torch.device("cuda", 0), launcher._raw_stream
    found = table.find(function.__name__, "bf16", constants, 0)
    assert found is not None
    native_launch = found.launch
    addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
    assert native_launch(1, 1, 1, stream(0), *values) is True

    def chosen() -> None:
        _, launch = launcher.choose(function, "bf16", device, constants, options)
        launch(1, *values)

    return {
        "chosen": chosen,
        "native": lambda: native_launch(1, 1, 1, stream(0), *values),
        "addresses": lambda: native_launch(1, 1, 1, stream(0), *addresses),
    }


def _triton_on(path: str) -> None:
    from triton.backends.nvidia.driver import CudaDriver

    # Its libraries are found under this name when they are loaded already; what it compiles is kept apart.
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_CACHE_DIR"] = str(Path(path).parent / "triton")
    triton.knobs.nvidia.libcuda_path = str(Path(path).parent)
    driver = CudaDriver()
    # PyTorch's answers, which a build without CUDA does not have. These cost less, in Triton's favour.
    driver.get_current_device = lambda: 0
    driver.get_current_stream = _no_stream
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)


def _no_stream(device: int) -> int:
    return 0


def _times(ratios: Mapping[str, Ratio]) -> str:
    ours = ", ".join(f"{name} {ratio.seconds * 1e6:.2f}" for name, ratio in ratios.items())
    return f"  ({ours}; Triton {next(iter(ratios.values())).baseline_seconds * 1e6:.2f} us)"
