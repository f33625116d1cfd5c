"""Compiles every Triton kernel ahead of time, for GPUs that need not be present: ``python -m esper.ops.aot``.

The kernels say themselves how (``AOT`` in each module of ``esper.kernels``, see docs/architecture.md). The result is a
table of registers, spills and shared memory, one row for each kernel, variant and architecture. A kernel that does not
compile, that has no entry, or that spills without a reason on record (``AOT_SPILLS``) is a problem, and the exit status
is 1.

``AOT`` holds one of each kind. ``--shipped`` takes instead every variant of a graft's kernels that the forge can put
into an artifact (:func:`esper.ops.graft.variants.shipped`), some 1600 for each architecture: hours of a processor's
time, for when a kernel's blocks or Triton change.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "Case",
    "Compiled",
    "Resources",
    "cases",
    "check",
    "compile_case",
    "differences",
    "main",
    "missing",
    "record",
    "shipped_cases",
    "spill_reason",
]

ARCHITECTURES = (80, 90, 100)
#: In the words about a kernel that does.
SPILLS = " spills "


@dataclass(frozen=True)
class Case:
    """One way to compile one kernel.

    Attributes:
        kernel: The ``@triton.jit`` function.
        signature: Run-time argument -> Triton type, such as ``"*fp32"`` or ``"i64"``.
        constexprs: Compile-time argument -> value.
        options: Launch options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``.
        spills: Why spilling is acceptable, or "".
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    spills: str

    @property
    def name(self) -> str:
        """``module.kernel``, without the package."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def variant(self) -> str:
        """What tells this case from the kernel's others: types of the pointers, and the constants."""
        return " ".join([_pointers(self.signature), *(f"{name}={value}" for name, value in self.constexprs.items())])


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of the machine.

    Attributes:
        kernel: Its name.
        variant: Types and constants.
        arch: Compute capability times ten.
        registers: Per thread.
        spill_stores: Bytes per thread written to local memory because registers ran out.
        spill_loads: Bytes per thread read back.
        shared: Bytes of shared memory per block.
        warps: Warps per block.
        cubin_bytes: Size of the machine code.
    """

    kernel: str
    variant: str
    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    cubin_bytes: int


@dataclass(frozen=True)
class Compiled:
    """One case for one architecture.

    Attributes:
        resources: What it takes.
        symbol: Name of its entry point in the machine code.
        cubin: The machine code.
        metadata: What Triton says about it (``triton.compiler``'s ``KernelMetadata``).
    """

    resources: Resources
    symbol: str
    cubin: bytes
    metadata: Any


def modules() -> Iterator[ModuleType]:
    """Every module under ``esper.kernels``, imported."""
    package = importlib.import_module("esper.kernels")
    for info in pkgutil.walk_packages(package.__path__, "esper.kernels."):
        yield importlib.import_module(info.name)


def cases(module: ModuleType) -> list[Case]:
    """What the module's ``AOT`` lists.

    Raises:
        ValueError: if an entry does not fit its kernel; the message names the module, the kernel and the argument.
    """
    found = []
    for kernel, signature, constexprs, *rest in getattr(module, "AOT", []):
        function = _unwrapped(kernel)
        name = function.__name__
        case = Case(function, signature, constexprs, rest[0] if rest else {}, _reason(module, name, signature))
        wanted = set(function.arg_names)
        given = [*signature, *constexprs]
        odd = [argument for argument in given if argument not in wanted or given.count(argument) > 1]
        lacking = sorted(wanted - set(given))
        if odd or lacking:
            raise ValueError(
                f"AOT of {module.__name__}: {name} takes {', '.join(function.arg_names)}; "
                f"the entry lacks {lacking or 'nothing'}, and names {odd or 'nothing'} wrongly or twice"
            )
        found.append(case)
    return found


def spill_reason(kernel: Any, signature: Mapping[str, str]) -> str:
    """Why ``AOT_SPILLS`` of the kernel's module says that it may spill with these types; "" if it may not."""
    # The interpreter's functions are of its own module.
    return _reason(importlib.import_module(kernel.fn.__module__), kernel.__name__, signature)


def _reason(module: ModuleType, name: str, signature: Mapping[str, str]) -> str:
    allowed: Mapping[str, str] = getattr(module, "AOT_SPILLS", {})
    return allowed.get(name, "") or allowed.get(f"{name} {_pointers(signature)}", "")


@lru_cache(maxsize=1)
def shipped_cases() -> tuple[Case, ...]:
    """Every variant that the forge can put into an artifact."""
    from esper.ops.graft.variants import shipped

    return tuple(
        Case(one.kernel, one.signature, one.constants, one.options, spill_reason(one.kernel, one.signature))
        for one in shipped()
    )


def missing(module: ModuleType) -> list[str]:
    """Names of kernels that the module launches (``*_kernel``) and its ``AOT`` does not list."""
    from triton.runtime.jit import JITFunction

    listed = {case.kernel.__name__ for case in cases(module)}
    launched = [
        name
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(_unwrapped(value), JITFunction)
    ]
    return [name for name in launched if name not in listed]


def compile_case(case: Case, arch: int, *, line_info: bool = True) -> Compiled:
    """Compile one case for one architecture, without a GPU.

    Args:
        case: What to compile.
        arch: Compute capability times ten.
        line_info: Whether the machine code says which source lines it came from. Without, the same case and tools give
            the same bytes wherever the sources lie.

    Raises:
        Exception: whatever Triton raises when the kernel does not compile.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=aligned)
    log = io.StringIO()
    # ptxas itself says what it spilled; a kernel taken from Triton's cache would not ask it.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = not line_info
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    cubin = bytes(compiled.asm["cubin"])
    resources = Resources(
        kernel=case.name,
        variant=case.variant,
        arch=arch,
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spill_stores=_number(r"(\d+) bytes spill stores", log.getvalue()),
        spill_loads=_number(r"(\d+) bytes spill loads", log.getvalue()),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        cubin_bytes=len(cubin),
    )
    return Compiled(resources, compiled.metadata.name, cubin, compiled.metadata)


def check(
    architectures: Sequence[int] = ARCHITECTURES, jobs: int = 1, *, shipped: bool = False, only: Sequence[str] = ()
) -> tuple[list[Resources], list[str]]:
    """Compile everything.

    Args:
        architectures: For which GPUs.
        jobs: Processes that share the work.
        shipped: Whether to take what the forge ships, rather than what the modules list.
        only: Words that must all occur in the name and variant of what is compiled.

    Returns:
        The table, and the problems in words (empty when all is well).
    """
    problems: list[str] = []
    lists: list[tuple[str, Sequence[Case]]] = []
    if shipped:
        lists.append((_SHIPPED, shipped_cases()))
    else:
        for module in modules():
            problems += [f"{module.__name__}.{name} is launched, but AOT does not list it" for name in missing(module)]
            lists.append((module.__name__, cases(module)))
    work = [
        (name, index, arch)
        for name, found in lists
        for index, case in enumerate(found)
        if all(word in f"{case.name} {case.variant}" for word in only)
        for arch in architectures
    ]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(_attempt, work))
    else:
        done = list(map(_attempt, work))
    table = [row for row, _ in done if row is not None]
    return table, problems + [problem for _, problem in done if problem is not None]


#: In a module's place: what the forge ships.
_SHIPPED = ""


def _attempt(which: tuple[str, int, int]) -> tuple[Resources | None, str | None]:
    """Compile one case of a module for one architecture: what it takes, and what is wrong."""
    name, index, arch = which
    case = shipped_cases()[index] if name == _SHIPPED else cases(importlib.import_module(name))[index]
    try:
        row = compile_case(case, arch).resources
    except Exception as error:
        # The compiler raises many things; all of them mean that this kernel does not compile.
        return None, f"{case.name} ({case.variant}) does not compile for sm_{arch}: {error!r}"
    if row.spill_stores + row.spill_loads and not case.spills:
        return row, (
            f"{case.name} ({case.variant}){SPILLS}{row.spill_stores} bytes on sm_{arch}; "
            f"use fewer registers, or give the reason in AOT_SPILLS of {case.kernel.__module__}"
        )
    return row, None


#: What the record keeps of a kernel. The size of the machine code says where its lines came from, too.
_KEPT = ("registers", "spill_stores", "spill_loads", "shared", "warps")


def record(table: Sequence[Resources]) -> dict[str, Any]:
    """The table as it is kept: by kernel, variant and architecture, with the version of the compiler."""
    import triton

    rows: dict[str, dict[str, dict[str, int]]] = {}
    for row in sorted(table, key=lambda row: (row.kernel, row.variant, row.arch)):
        numbers = {name: getattr(row, name) for name in _KEPT}
        rows.setdefault(f"{row.kernel} {row.variant}", {})[f"sm_{row.arch}"] = numbers
    return {"triton": str(triton.__version__), "kernels": rows}


def differences(now: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What of :func:`record` is not as it was kept, in words; empty when nothing has changed."""
    found = []
    for name in sorted({*now["kernels"], *kept["kernels"]}):
        here, there = now["kernels"].get(name), kept["kernels"].get(name)
        if here is None or there is None:
            found.append(f"{name} is {'not compiled any more' if here is None else 'not in the record'}")
        elif now["triton"] == kept["triton"]:
            found += [
                f"{name} on {arch}: {here[arch]} where the record has {there.get(arch)}"
                for arch in here
                if here[arch] != there.get(arch)
            ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if there are problems."""
    parser = argparse.ArgumentParser(prog="python -m esper.ops.aot", description="Compile the Triton kernels for GPUs.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="SM", help="such as 80 90 100")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the work")
    parser.add_argument("--shipped", action="store_true", help="take every variant that the forge can ship, not AOT's")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="words of the name and variant, all met")
    parser.add_argument("--json", action="store_true", help="print the table and the problems as JSON")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the table in this file")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="say what is not as this file has it; its compiler's spills count"
    )
    args = parser.parse_args(argv)
    from esper.ops.registry import triton_interprets

    if triton_interprets():
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    table, problems = check(args.arch, args.jobs, shipped=args.shipped, only=args.only)
    if args.record is not None:
        args.record.write_text(json.dumps(record(table), indent=1) + "\n")
    if args.against is not None:
        kept = json.loads(args.against.read_text())
        now = record(table)
        if now["triton"] != kept["triton"]:
            # Blocks and stages were chosen for the compiler on record; another divides registers in another way.
            spilling = [problem for problem in problems if SPILLS in problem]
            problems = [problem for problem in problems if problem not in spilling]
            for problem in spilling:
                print(f"Triton {now['triton']}, and the record is of {kept['triton']}: {problem}", file=sys.stderr)
        changed = differences(now, kept)
        if changed:
            changed.append(f"If that is meant: python -m esper.ops.aot --record {args.against}")
        problems += changed
    if args.json:
        print(json.dumps({"table": [dataclasses.asdict(row) for row in table], "problems": problems}, indent=1))
    else:
        print(_text(table))
        print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def _pointers(signature: Mapping[str, str]) -> str:
    """The types of the pointer arguments, each once: ``"fp32,bf16"``."""
    return ",".join(dict.fromkeys(kind[1:] for kind in signature.values() if kind.startswith("*")))


def _unwrapped(kernel: Any) -> Any:
    """The jitted function inside ``@triton.autotune`` and ``@triton.heuristics``."""
    from triton.runtime import Autotuner, Heuristics

    while isinstance(kernel, (Autotuner, Heuristics)):
        kernel = kernel.fn
    return kernel


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas did not report {pattern!r}:\n{text}")
    return int(found[1])


def _text(table: Sequence[Resources]) -> str:
    head = ("kernel", "sm", "registers", "spilled", "shared", "warps", "code", "variant")
    rows = [
        (row.kernel, row.arch, row.registers, row.spill_stores, row.shared, row.warps, row.cubin_bytes, row.variant)
        for row in table
    ]
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
