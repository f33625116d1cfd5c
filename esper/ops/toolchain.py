"""Compiles the Triton kernels of a family of blueprints for GPUs that need not be present, in a process of its own.

The process is there for three reasons. Where this one runs kernels in Triton's interpreter, nothing can be compiled in
it. What the environment tells Triton (other compilers, replaced intermediate code, other caches) must not reach the
result: the child is started with the few variables it needs and an empty cache. And the compiler's memory, its threads
and, should it come to that, its crash stay there.

    python -m esper.ops.toolchain      reads a request as JSON from its input, writes the answer to its output
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from esper.ops import native

if TYPE_CHECKING:
    from esper.ops.graft.variants import KernelVariant

__all__ = [
    "DEFAULT_ARCHITECTURES",
    "DTYPES",
    "Built",
    "OtherGpuError",
    "Request",
    "ToolchainError",
    "build_variant",
    "compile_request",
    "kernels_for",
    "tune_request",
]

#: What is compiled for where nothing else is asked for.
DEFAULT_ARCHITECTURES: Final = (80, 90, 100)
#: Types of values there are kernels for, by Triton's name.
DTYPES: Final = ("bf16", "fp16", "fp32")
#: Seconds that a request may take.
TIMEOUT_S: Final = 900.0
_PR_SET_PDEATHSIG: Final = 1
#: All that the child sees of the environment.
_ENVIRONMENT: Final = (
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "SYSTEMROOT",
    "TMPDIR",
    "TZ",
)
_GPU_ENVIRONMENT: Final = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


class ToolchainError(RuntimeError):
    """The kernels did not compile; the message says which, and why."""


class OtherGpuError(ToolchainError):
    """The GPU to tune on is not in this machine; another may have it."""


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        family: The blueprint's family.
        activation: Its activation, or None.
        norm: Its norm, or None.
        rank: Rows of one seed's way down.
        biased: Whether that way has a bias.
        aligned: Whether all widths are multiples of 16.
        dtypes: Some of :data:`DTYPES`.
        architectures: Compute capabilities times ten.
        replaces: Whether the seed is for mode replace, in which the host has a gradient of its own.
    """

    family: str
    activation: str | None
    norm: str | None
    rank: int
    biased: bool
    aligned: bool
    dtypes: tuple[str, ...]
    architectures: tuple[int, ...]
    replaces: bool = False


@dataclass(frozen=True)
class Built:
    """One kernel for one architecture.

    Attributes:
        kernel: The kernel's name in Python.
        direction: ``forward`` or ``backward``.
        arch: Compute capability times ten.
        dtype: One of :data:`DTYPES`.
        symbol: Its entry point.
        signature: Run-time arguments in order, with Triton's types.
        constants: Compile-time arguments.
        num_warps: Warps a block.
        shared: Bytes of shared memory a block.
        registers: Registers a thread.
        spills: Bytes a thread writes to local memory for want of registers.
        tools: Versions of the compilers.
        cubin: The machine code.
    """

    kernel: str
    direction: str
    arch: int
    dtype: str
    symbol: str
    signature: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]
    num_warps: int
    shared: int
    registers: int
    spills: int
    tools: Mapping[str, str]
    cubin: bytes


def compile_request(request: Request, *, timeout_s: float = TIMEOUT_S) -> list[Built]:
    """Compile every kernel of a family, forward and backward, for every architecture and dtype; no GPU is needed.

    The same request and tools give the same bytes. A kernel that spills without a reason in ``AOT_SPILLS`` is warned
    of: it computes what it should, slower than it could, and other versions of the compiler may do better or worse.

    Returns:
        The binaries in a fixed order; none for a family that has no kernels of its own.

    Raises:
        ToolchainError: a kernel does not compile, or the compiler crashed or took longer than ``timeout_s``.
    """
    answer = _in_child(asdict(request), _ENVIRONMENT, timeout_s)
    for note in answer.get("notes", ()):
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return [_read(item) for item in answer["built"]]


def tune_request(
    request: Request, *, present: tuple[int, ...], d_in: int, d_out: int, timeout_s: float = TIMEOUT_S
) -> list[Built]:
    """Compile every kernel of a family for the GPU of this machine, with the settings that are fastest on it.

    Args:
        request: What to compile; its architectures are not looked at.
        present: Architectures that the caller believes this machine has; empty if it does not care.
        d_in: Features that are read, for the measurements.
        d_out: Features that are changed.
        timeout_s: Seconds that it may take.

    Raises:
        OtherGpuError: there is no GPU, or another one.
        ToolchainError: no machine has a GPU of several architectures; or as :func:`compile_request`.
    """
    refusal = ToolchainError if len(present) > 1 else OtherGpuError
    driver = native.driver()
    if driver is None:
        raise refusal(
            f"needs a GPU to tune on, and there is none here ({native.driver_reason()}); "
            "pipeline 'standard' compiles for named architectures without one"
        )
    major, minor = driver.capability(0)
    arch = 10 * major + minor
    if present and present != (arch,):
        named = ", ".join(f"sm_{number}" for number in present)
        raise refusal(f"tunes for the GPU of this machine, which is sm_{arch}, and not for {named}")
    given = {**asdict(replace(request, architectures=(arch,))), "tune": [d_in, d_out]}
    answer = _in_child(given, (*_ENVIRONMENT, *_GPU_ENVIRONMENT), timeout_s)
    return [_read(item) for item in answer["built"]]


def _in_child(request: Mapping[str, Any], variables: Sequence[str], timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="esper-triton-") as folder:
        environment = {name: os.environ[name] for name in variables if name in os.environ}
        # The package must be found as this process found it, also where it is not installed.
        paths = [str(Path(__file__).resolve().parents[2]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
        environment |= {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": folder,
            "TRITON_HOME": folder,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "esper.ops.toolchain"],
                input=json.dumps(request),
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ToolchainError(f"the compiler took longer than {timeout_s:g} seconds and was stopped") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        last = " ".join(done.stderr.strip().splitlines()[-2:])
        raise ToolchainError(f"the compiler {how}: {last[-500:] or 'it said nothing'}") from None
    if "error" in answer:
        raise ToolchainError(answer["error"])
    return answer


def _read(item: Mapping[str, Any]) -> Built:
    return Built(
        **{
            **item,
            "signature": tuple((name, kind) for name, kind in item["signature"]),
            "cubin": base64.b64decode(item["cubin"]),
        }
    )


def _written(built: Built) -> dict[str, Any]:
    values = {field.name: getattr(built, field.name) for field in fields(built)}
    return {**values, "cubin": base64.b64encode(built.cubin).decode("ascii")}


def _build(request: Request) -> tuple[list[Built], list[str]]:
    """In the child: every kernel in order of dtype, architecture and launch, and what is to be said of them."""
    from esper.ops.aot import spill_reason

    built, notes = [], []
    for dtype in request.dtypes:
        found = kernels_for(request, dtype)
        for arch in request.architectures:
            for variant in found:
                made = build_variant(variant, dtype, arch)
                built.append(made)
                if made.spills and not spill_reason(variant.kernel, variant.signature):
                    notes.append(
                        f"GPU binary {made.kernel} ({dtype}, sm_{arch}) spills {made.spills} bytes a thread, and no "
                        "reason for that is on record: it computes what it should, slower than it could"
                    )
    return built, notes


def kernels_for(request: Request, dtype: str) -> list[KernelVariant]:
    """The kernels that the request is about, for one type of values."""
    from esper.ops.graft.variants import variants

    return variants(
        request.family,
        request.activation,
        request.norm,
        dtype,
        rank=request.rank,
        biased=request.biased,
        aligned=request.aligned,
        replaces=request.replaces,
    )


def build_variant(variant: KernelVariant, dtype: str, arch: int) -> Built:
    """Compile one kernel for one architecture, in this process.

    Raises:
        ToolchainError: it does not compile, or a native launch cannot give it what it needs.
    """
    from esper.ops import aot, cubin

    name = variant.kernel.__name__
    where = f"{name} ({dtype}, sm_{arch})"
    case = aot.Case(variant.kernel, variant.signature, variant.constants, variant.options, "")
    try:
        made = aot.compile_case(case, arch, line_info=False)
        signature = tuple(
            (argument, variant.signature[argument])
            for argument in variant.kernel.arg_names
            if argument in variant.signature
        )
        cubin.hidden_pointers(made.cubin, made.symbol, [kind for _, kind in signature])
    except Exception as error:
        # The compiler raises many things; all of them mean that this kernel does not compile.
        raise ToolchainError(f"{where} does not compile: {_brief(error)}") from error
    wants = made.metadata
    if wants.num_ctas != 1 or wants.launch_cooperative_grid or wants.global_scratch_size or wants.profile_scratch_size:
        raise ToolchainError(f"{where} needs clusters or scratch memory, which a native launch does not give")
    return Built(
        kernel=name,
        direction=variant.direction,
        arch=arch,
        dtype=dtype,
        symbol=made.symbol,
        signature=signature,
        constants=dict(variant.constants),
        num_warps=made.resources.warps,
        shared=made.resources.shared,
        registers=made.resources.registers,
        spills=made.resources.spill_stores,
        tools=_tools(arch),
        cubin=made.cubin,
    )


def _tools(arch: int) -> dict[str, str]:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return {"triton": str(triton.__version__), "ptxas": str(get_ptxas(arch).version)}


def _brief(error: BaseException) -> str:
    """The first lines of what the compiler says; it likes to append all of its input."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def _die_with_parent() -> None:
    """Be killed with the process that asked: nobody else waits for the answer (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Answer one request."""
    _die_with_parent()
    # Whatever the compiler prints stays out of the answer.
    out, sys.stdout = sys.stdout, sys.stderr
    given = json.load(sys.stdin)
    sizes = given.pop("tune", None)
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in given.items()}
    request = Request(**values)
    try:
        notes: list[str] = []
        if sizes is None:
            built, notes = _build(request)
        else:
            from esper.ops.tuning import tune

            # What spills there was measured, and is the fastest.
            built = tune(request, *sizes)
        answer: dict[str, Any] = {"built": [_written(item) for item in built], "notes": notes}
    except (ToolchainError, ValueError) as error:
        answer = {"error": str(error)}
    out.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
