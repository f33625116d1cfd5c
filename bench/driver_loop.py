"""What the CUDA driver itself takes for a launch, which Triton's launch and the package's both pay.

The loop is in C (``driver_loop.c``, compiled at the first use), so that nothing of Python is in the number.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.paired import Ratio

__all__ = ["launch_seconds", "without_driver"]

#: At least as many as any kernel has; the driver knows how many it reads, and finds zero in each.
_ARGUMENTS = 64
_SOURCE = Path(__file__).with_name("driver_loop.c")


def launch_seconds(
    code: bytes,
    symbol: str,
    *,
    folder: Path,
    wait: Callable[[], object],
    num_warps: int = 4,
    shared: int = 0,
    library: str = "libcuda.so.1",
    launches: int = 200,
    rounds: int = 101,
) -> float:
    """Median seconds of one launch from C, of a kernel that reads none of its arguments.

    Args:
        code: The binary, for the device whose context is current in this thread.
        symbol: The kernel in it.
        folder: Where the loop is compiled.
        wait: Waits for the device; called before every round, so that the queue is never full and the driver never
            waits for the device itself.
        num_warps: Of the launch.
        shared: Bytes of dynamic shared memory.
        library: The driver's.
        launches: In one round; fewer than the queue holds (1024).
        rounds: How many.

    Raises:
        OSError: there is no C compiler, or it or the driver fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler to measure the driver with")
    built = folder / "driver_loop.so"
    made = subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(_SOURCE)], capture_output=True, text=True
    )
    if made.returncode:
        raise OSError(f"{compiler} does not compile {_SOURCE.name}: {made.stderr.strip()[:300]}")
    driver, loop = ctypes.CDLL(library), ctypes.CDLL(str(built)).launches
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _done(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _done(driver.cuModuleGetFunction(ctypes.byref(function), module, symbol.encode()), "cuModuleGetFunction")
    zero = ctypes.c_uint64(0)
    addresses = (ctypes.c_void_p * _ARGUMENTS)(*[ctypes.addressof(zero)] * _ARGUMENTS)
    loop.restype = ctypes.c_double
    launch = ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p)
    threads = ctypes.c_uint(32 * num_warps)
    samples = []
    for _ in range(rounds):
        wait()
        taken = loop(launch, function, threads, ctypes.c_uint(shared), None, addresses, launches)
        _done(-int(taken) if taken < 0 else 0, "cuLaunchKernel")
        samples.append(taken)
    wait()
    driver.cuModuleUnload(module)
    return statistics.median(samples) * 1e-9


def _done(error: int, what: str) -> None:
    if error:
        raise OSError(f"{what}: CUDA error {error}")


def without_driver(ratio: Ratio, seconds: float) -> Ratio:
    """(candidate - driver) / (baseline - driver), where the driver takes ``seconds`` of either.

    Raises:
        ValueError: the driver takes all of the baseline's time.
    """
    whole = ratio.baseline_seconds
    if not seconds < whole:
        raise ValueError(f"the driver takes {seconds * 1e6:.2f} us of the baseline's {whole * 1e6:.2f}")
    median, low, high = (
        (value * whole - seconds) / (whole - seconds) for value in (ratio.median, ratio.low, ratio.high)
    )
    return replace(
        ratio, median=median, low=low, high=high, seconds=ratio.seconds - seconds, baseline_seconds=whole - seconds
    )
