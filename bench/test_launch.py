"""What a launch costs: ours from ``esper._native`` beside Triton's own Python launch. The target is a quarter of it.

On a GPU both launch the same kernel, which does nothing, with as many arguments as a graft has; the ratio is recorded.
The queue is kept short, so that the host's work is measured and not the device's.

Without a GPU a library takes the driver's place, for both, and returns at once (``tests/ops/recorder.c``): what is
compared is all that the host does, without what the driver itself takes for a launch, the same for both.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record
from esper.ops import aot, cubin, native
from tests.ops import recorder as recording

CUDA = torch.cuda.is_available()
LIMIT = 0.25

#: As the bank kernel's: 14 tensors, 11 numbers.
MANY = {f"p{i}": "*bf16" for i in range(14)} | {f"n{i}": "i32" for i in range(7)} | {f"m{i}": "i64" for i in range(4)}
FEW = {"x": "*fp32", "y": "*fp32", "n": "i32"}


@triton.jit
def few_kernel(x, y, n, block: tl.constexpr):
    pass


@triton.jit
def many_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, n0, n1, n2, n3, n4, n5, n6, m0, m1, m2, m3,
    act: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    pass


KERNELS = {
    "few": (few_kernel, FEW, {"block": 64}),
    "many": (many_kernel, MANY, {"act": 1, "block": 64}),
}


def arguments(signature: dict[str, str], device: str) -> list[Any]:
    tensors = torch.zeros(len(signature), 64, dtype=torch.bfloat16, device=device)
    # Numbers that Triton's launch compiles one variant for: neither 1 nor divisible by 16.
    return [tensors[i] if kind.startswith("*") else 3 + 2 * i for i, kind in enumerate(signature.values())]


@pytest.mark.skipif(not CUDA, reason="needs a GPU; without one the host's part is measured below")
@pytest.mark.parametrize("name", KERNELS)
def test_against_triton(benchmark: Any, name: str) -> None:
    kernel, signature, constants = KERNELS[name]
    driver = native.driver()
    major, minor = driver.capability(0)
    made = aot.compile_case(aot.Case(kernel, signature, constants, {"num_warps": 4}, ""), 10 * major + minor)
    hidden = cubin.hidden_pointers(made.cubin, made.symbol, list(signature.values()))
    launch = (
        driver.load(made.cubin, 0)
        .function(made.symbol)
        .launcher(list(signature.items()), hidden=hidden, num_warps=4, shared=made.resources.shared)
    )
    values = arguments(signature, "cuda")
    stream_of = torch._C._cuda_getCurrentRawStream
    candidates = {
        "triton": lambda: kernel[(1,)](*values, **constants, num_warps=4),
        "native": lambda: launch(1, 1, 1, stream_of(0), *values),
    }
    assert candidates["native"]() is True
    ratios = compare(candidates, "triton", inner=200)
    record(benchmark, f"launch/{name}", ratios, {"native": LIMIT})
    print(
        f"  ({ratios['native'].seconds * 1e6:.2f} us against {ratios['native'].baseline_seconds * 1e6:.2f} us)", end=""
    )
    benchmark.pedantic(candidates["native"], rounds=5, iterations=200)


@pytest.mark.parametrize("name", KERNELS)
def test_the_hosts_part(benchmark: Any, tmp_path: Path, name: str) -> None:
    stand_in = recording.build_library(tmp_path, "libcuda.so.1")
    ratios = compare_in_processes(both, str(stand_in), name, processes=5)
    record(benchmark, f"launch/{name}/host", ratios, {"native": LIMIT})
    microseconds = {given: ratio.seconds * 1e6 for given, ratio in ratios.items()}
    theirs = ratios["native"].baseline_seconds * 1e6
    print(f"  ({microseconds['native']:.2f} us against {theirs:.2f} us)", end="")
    recorder = recording.build(tmp_path)
    benchmark.pedantic(_ours(recorder, name), rounds=5, iterations=200)


def both(path: str, name: str, number: int) -> dict[str, Ratio]:
    """Triton's launch and ours on the stand-in at ``path``, in process ``number``."""
    recorder = recording.Recorder(Path(path))
    theirs = _tritons(path, name)
    calls = {"triton": theirs, "native": _ours(recorder, name), "addresses": _ours(recorder, name, addresses=True)}
    return compare(calls, "triton", rounds=51, seed=number)


def _tritons(path: str, name: str) -> Callable[[], object]:
    from triton.backends.nvidia.driver import CudaDriver

    # Its libraries are found under this name when they are loaded already; what it compiles is kept apart.
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_CACHE_DIR"] = str(Path(path).parent / "triton")
    triton.knobs.nvidia.libcuda_path = str(Path(path).parent)
    driver = CudaDriver()
    # PyTorch's answers, which a build without CUDA does not have. These cost less, in Triton's favour.
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)
    kernel, signature, constants = KERNELS[name]
    values = arguments(signature, "cpu")
    return lambda: kernel[(1,)](*values, **constants, num_warps=4)


def _ours(recorder: recording.Recorder, name: str, addresses: bool = False) -> Callable[[], object]:
    """Launches with tensors, as Triton's, or with addresses found out before."""
    recorder.sizes(quiet=True)
    signature = KERNELS[name][1]
    function = native.load().Driver(recorder.path).load(recording.tiny_cubin(), 0).function("k")
    launch = function.launcher(list(signature.items()), hidden=2, num_warps=4, shared=0)
    values = arguments(signature, "cpu")
    if addresses:
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
    return lambda: launch(1, 1, 1, 0, *values)
