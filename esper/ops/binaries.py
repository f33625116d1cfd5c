"""GPU binaries from artifacts, ready to launch in the place of what Triton would compile here.

A :class:`BinaryTable` is given the binaries of artifacts whose signature was trusted (others are never handed out),
loads those that fit the device, and answers a Triton backend's question: is there one for this kernel with these
constants? Whatever does not fit is left out, with the reason, and the package's own kernel runs instead.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Final, Protocol

from esper.ops import aot, cubin, native

__all__ = ["TABLE", "TILES", "Binary", "BinaryTable", "Entry", "NativeKernel", "package_kernels", "tile_sizes"]

_ARCH: Final = re.compile(r"sm_(\d{2,3})")
#: Compile-time arguments that tuning may change and no meaning with them. Not every size of a tile is one: where a tile
#: must hold a whole bank (BLOCK_R), a smaller one computes something else.
TILES: Final = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


class Entry(Protocol):
    """What :class:`esper.contracts.manifest.BinaryEntry` says of a binary, as far as launching it goes."""

    @property
    def arch(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def kernel(self) -> str: ...  # noqa: D102
    @property
    def symbol(self) -> str: ...  # noqa: D102
    @property
    def signature(self) -> tuple[tuple[str, str], ...]: ...  # noqa: D102
    @property
    def constants(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def num_warps(self) -> int: ...  # noqa: D102
    @property
    def shared(self) -> int: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102


class Binary(Protocol):
    """A binary that may be used: its entry and its bytes."""

    @property
    def entry(self) -> Entry: ...  # noqa: D102
    @property
    def data(self) -> memoryview: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """A binary that is loaded.

    Attributes:
        constants: Compile-time arguments it was built with; the grid follows from its tile sizes.
        device: Index of the GPU it is loaded on.
        launch: ``launch(grid_x, grid_y, grid_z, stream, *arguments) -> bool``; tensors, addresses and numbers, in the
            order of the kernel's run-time arguments. False: nothing was launched, since the binary was not made for
            these values (a pointer not aligned to 16 bytes, a number that does not fit its type); Triton's own launch
            takes them. Nothing else about the tensors is checked.
    """

    constants: Mapping[str, Any]
    device: int
    launch: Callable[..., bool]


_Key = tuple[int, str, str, frozenset[tuple[str, Any]]]


class BinaryTable:
    """The binaries loaded in this process, by device, kernel, dtype and constants.

    What is loaded stays: a captured CUDA graph may hold the address of a kernel that nothing else refers to. The same
    bytes are loaded once a device.

    Args:
        driver: Gives the driver, or None where there is none; by default this machine's.
        kernels: Gives the package's kernels as :func:`package_kernels` does.

    Attributes:
        handed_out: How many times :meth:`find` had an answer.
        choices: For callers: what they made of the answers, by keys of their own. Another dictionary takes its place
            when binaries come or go. Take it before asking :meth:`find`, and put what was made into that one: what is
            made while binaries come is then forgotten with it.
    """

    def __init__(
        self,
        driver: Callable[[], Any] = native.driver,
        kernels: Callable[[], Mapping[str, Kernel]] | None = None,
    ) -> None:
        self._driver = driver
        self._kernels = kernels or package_kernels
        self.handed_out = 0
        self.choices: dict[tuple[object, ...], Any] = {}
        self._lock = threading.Lock()
        self._found: dict[_Key, tuple[NativeKernel, ...]] = {}
        self._known: set[tuple[int, str]] = set()

    def add(self, binaries: Iterable[Binary], device: int) -> tuple[str, ...]:
        """Load what fits ``device``. It takes a while: call it in the thread that fetches, not in the one that trains.

        Returns:
            Why binaries were left out, in words; empty when the device has one of each kernel.
        """
        binaries = tuple(binaries)
        if not binaries:
            return ()
        driver = self._driver()
        if driver is None:
            return (f"GPU binaries are not used: {native.driver_reason()}",)
        try:
            major, minor = driver.capability(device)
        except RuntimeError as error:
            return (f"GPU binaries are not used: {error}",)
        chosen, reasons = _choose(binaries, 10 * major + minor)
        for binary in chosen:
            try:
                self._load(driver, binary, device)
            except (cubin.CubinError, RuntimeError, ValueError) as error:
                entry = binary.entry
                reasons.append(f"GPU binary {entry.kernel} ({entry.arch}, {entry.dtype}) is not used: {error}")
        return tuple(reasons)

    def find(
        self, kernel: str, dtype: str, constants: Mapping[str, Any], device: int, *, tuned: bool = False
    ) -> NativeKernel | None:
        """The binary to launch in place of the package's ``kernel``, or None.

        Args:
            kernel: The kernel's name in Python.
            dtype: Of the values it works on: ``bf16``, ``fp16`` or ``fp32``.
            constants: Every compile-time argument.
            device: Index of the GPU.
            tuned: Whether tile sizes (:data:`TILES`) may be others than in ``constants``; the caller then makes its
                grid from those of the answer.
        """
        found = self._found.get(_key(device, kernel, dtype, constants))
        if found is None:
            return None
        wanted = tile_sizes(constants)
        answer = found[-1] if tuned else next((one for one in found if tile_sizes(one.constants) == wanted), None)
        self.handed_out += answer is not None
        return answer

    def clear(self) -> None:
        """Forget everything; what was found before stays loaded as long as somebody holds it."""
        with self._lock:
            self._found.clear()
            self._known.clear()
            self.choices = {}

    def _load(self, driver: Any, binary: Binary, device: int) -> None:
        entry = binary.entry
        with self._lock:
            if (device, entry.sha256) in self._known:
                return
        hidden = _check(entry, binary.data, self._kernels())
        function = driver.load(binary.data, device).function(entry.symbol)
        arguments = list(entry.signature)
        launch = function.launcher(arguments, hidden=hidden, num_warps=entry.num_warps, shared=entry.shared)
        made = NativeKernel(dict(entry.constants), device, launch)
        key = _key(device, entry.kernel, entry.dtype, entry.constants)
        with self._lock:
            if (device, entry.sha256) not in self._known:
                self._known.add((device, entry.sha256))
                self._found[key] = (*self._found.get(key, ()), made)
                self.choices = {}


@dataclass(frozen=True)
class Kernel:
    """A kernel of the package: its arguments in order, and the signatures that it is compiled with."""

    arguments: tuple[str, ...]
    signatures: frozenset[tuple[tuple[str, str], ...]]


def tile_sizes(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the compile-time arguments that tuning may change."""
    return {name: value for name, value in constants.items() if name in TILES}


@lru_cache(maxsize=1)
def package_kernels() -> Mapping[str, Kernel]:
    """The package's own kernels by name, from what the modules of ``esper.kernels`` list in ``AOT``."""
    return kernels_of(aot.modules())


def kernels_of(modules: Iterable[ModuleType]) -> dict[str, Kernel]:
    """The kernels that these modules list, by name."""
    signatures: dict[str, set[tuple[tuple[str, str], ...]]] = {}
    arguments: dict[str, tuple[str, ...]] = {}
    for module in modules:
        for case in aot.cases(module):
            name = case.kernel.__name__
            arguments[name] = tuple(case.kernel.arg_names)
            ordered = tuple((each, case.signature[each]) for each in arguments[name] if each in case.signature)
            signatures.setdefault(name, set()).add(ordered)
    return {name: Kernel(arguments[name], frozenset(found)) for name, found in signatures.items()}


def _key(device: int, kernel: str, dtype: str, constants: Mapping[str, Any]) -> _Key:
    fixed = frozenset((name, value) for name, value in constants.items() if name not in TILES)
    return device, kernel, dtype, fixed


def _choose(binaries: Iterable[Binary], present: int) -> tuple[list[Binary], list[str]]:
    """Of each kernel variant the binary for the nearest architecture that runs here, and a reason where none does."""
    best: dict[Any, tuple[int, Binary]] = {}
    others: dict[Any, set[str]] = {}
    for binary in binaries:
        entry = binary.entry
        key = entry.kernel, entry.dtype, frozenset(entry.constants.items())
        found = _ARCH.fullmatch(entry.arch)
        built = int(found[1]) if found else 0
        if not cubin.runs_on(built, present):
            others.setdefault(key, set()).add(entry.arch)
        elif key not in best or built > best[key][0]:
            best[key] = built, binary
    reasons = [
        f"GPU binary {key[0]} ({key[1]}) is not used: it is for {', '.join(sorted(archs))}, not for sm_{present}"
        for key, archs in others.items()
        if key not in best
    ]
    return [binary for _, binary in best.values()], reasons


def _check(entry: Entry, data: memoryview, kernels: Mapping[str, Kernel]) -> int:
    """Compare a binary with the package's kernel and with itself; the number of pointers behind the arguments.

    Raises:
        CubinError: saying what differs.
    """
    ours = kernels.get(entry.kernel)
    if ours is None:
        raise cubin.CubinError("this version of Esper has no kernel of that name")
    names = [name for name, _ in entry.signature]
    if names != [name for name in ours.arguments if name not in entry.constants] or len(names) + len(
        entry.constants
    ) != len(ours.arguments):
        given = ", ".join([*names, *entry.constants])
        raise cubin.CubinError(f"its arguments ({given}) are not this version's ({', '.join(ours.arguments)})")
    if tuple(tuple(argument) for argument in entry.signature) not in ours.signatures:
        types = ", ".join(f"{name}: {kind}" for name, kind in entry.signature)
        raise cubin.CubinError(f"this version's kernel is never compiled with these types ({types})")
    built = cubin.architecture(data)
    if entry.arch != f"sm_{built}":
        raise cubin.CubinError(f"it is declared for {entry.arch} and was built for sm_{built}")
    return cubin.hidden_pointers(data, entry.symbol, [kind for _, kind in entry.signature])


#: The process's own table.
TABLE: Final = BinaryTable()
