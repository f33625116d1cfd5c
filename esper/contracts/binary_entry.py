"""One GPU binary as the manifest declares it: what it is, how it is launched, and its hash.

A binary is a byte tensor named ``gpu/<arch>/<dtype>/<direction>``, with ``/<kernel>`` behind it where several kernels
make up one direction. The name repeats what the entry says, and the two must agree: a reader that picks by name and one
that picks by entry pick the same.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from esper.contracts.container import BINARY_PREFIX
from esper.contracts.errors import ArtifactError
from esper.contracts.fields import choice, integer, mapping, sha256, text_map, word
from esper.contracts.ids import TARGET_ANY

__all__ = ["MAX_BINARIES", "MAX_BINARY_BYTES", "BinaryEntry", "Constant", "read_binaries", "target_of"]

Constant: TypeAlias = "int | float | bool | str | None"

#: Binaries in one artifact. Their entries must also fit the manifest's own limits.
MAX_BINARIES: Final = 128
#: Bytes of one binary; Triton's are some ten to some hundred KiB.
MAX_BINARY_BYTES: Final = 16 << 20
_MAX_ARGUMENTS: Final = 128
_MAX_CONSTANTS: Final = 128
_MAX_TEXT: Final = 256
_INT64: Final = 1 << 63

_ARCH: Final = re.compile(r"sm_([1-9][0-9]{1,2})([a-z]?)")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SYMBOL: Final = re.compile(r"[A-Za-z_$.][A-Za-z0-9_$.]{0,255}")
_TYPE: Final = re.compile(r"\*?(i1|[iu](8|16|32|64)|bf16|fp(16|32|64))")


@dataclass(frozen=True, slots=True)
class BinaryEntry:
    """One GPU binary as declared.

    Attributes:
        arch: The architecture it runs on, such as ``sm_90``.
        dtype: Of the values it works on: ``bf16``, ``fp16`` or ``fp32``.
        direction: ``forward`` or ``backward``.
        kernel: Python name of the Triton kernel it was compiled from.
        symbol: Its entry point in the cubin.
        signature: Run-time arguments in order: name and Triton type, such as ``*bf16`` or ``i32``.
        constants: Compile-time arguments by name, for the record and for choosing among variants.
        num_warps: Warps per block.
        shared: Bytes of dynamic shared memory per block.
        registers: Registers per thread.
        spills: Bytes per thread spilled to local memory.
        tools: Versions of the compilers, by name.
        sha256: SHA-256 of the binary, 64 hex digits.
        size: Its length in bytes.
    """

    arch: str
    dtype: str
    direction: str
    kernel: str
    symbol: str
    signature: tuple[tuple[str, str], ...]
    constants: Mapping[str, Constant]
    num_warps: int
    shared: int
    registers: int
    spills: int
    tools: Mapping[str, str]
    sha256: str
    size: int

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "signature": [list(argument) for argument in self.signature],
            "constants": dict(self.constants),
            "tools": dict(self.tools),
        }

    @classmethod
    def from_dict(cls, where: str, value: Any) -> BinaryEntry:
        """Read an entry; ``where`` names it in messages.

        Raises:
            ArtifactError: naming the key at fault.
        """
        entry = mapping(where, value)
        if entry.keys() != _READERS.keys():
            odd = min(entry.keys() ^ _READERS.keys())
            problem = f"has no key {odd!a}" if odd in _READERS else f"has an unknown key {odd[:80]!a}"
            raise ArtifactError(f"manifest: {where} {problem}")
        return cls(**{key: read(f"{where}.{key}", entry[key]) for key, read in _READERS.items()})

    def names(self) -> tuple[str, str]:
        """The two names under which the binary may stand in the file: for a direction of one kernel, and of several."""
        short = f"{BINARY_PREFIX}{self.arch}/{self.dtype}/{self.direction}"
        return short, f"{short}/{self.kernel}"


def read_binaries(key: str, value: Any) -> dict[str, BinaryEntry]:
    """The manifest's table of binaries: tensor name to entry.

    Raises:
        ArtifactError: naming the binary and key at fault; also for an empty table, which is written as none.
    """
    table = mapping(key, value)
    if not 1 <= len(table) <= MAX_BINARIES:
        raise ArtifactError(f"manifest: {key} has {len(table)} entries; possible: 1 to {MAX_BINARIES}, or no such key")
    binaries = {}
    for name, given in table.items():
        where = f"{key}[{name[:80]!a}]"
        entry = BinaryEntry.from_dict(where, given)
        if name not in entry.names():
            raise ArtifactError(f"manifest: {where} describes {' or '.join(entry.names())}, not a tensor of this name")
        binaries[name] = entry
    return binaries


def target_of(architectures: Iterable[str]) -> str:
    """What an artifact with binaries for these was built for: ``any`` without one, else such as ``sm_80_sm_90``."""
    return "_".join(sorted(set(architectures), key=_rank)) or TARGET_ANY


def _rank(arch: str) -> tuple[int, str]:
    found = _ARCH.fullmatch(arch)
    return (int(found[1]), found[2]) if found else (0, arch)


def _signature(key: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or len(value) > _MAX_ARGUMENTS:
        raise ArtifactError(f"manifest: {key} must be a list of at most {_MAX_ARGUMENTS} arguments")
    read = []
    for argument in value:
        if not isinstance(argument, list) or len(argument) != 2:
            raise ArtifactError(f"manifest: {key}: every argument must be [name, type]")
        kind = word(_TYPE)(f"{key}: type", argument[1])
        read.append((_identifier(f"{key}: name", argument[0]), kind))
    if len({name for name, _ in read}) != len(read):
        raise ArtifactError(f"manifest: {key} names an argument twice")
    return tuple(read)


def _constants(key: str, value: Any) -> dict[str, Constant]:
    table = mapping(key, value)
    if len(table) > _MAX_CONSTANTS:
        raise ArtifactError(f"manifest: {key} has {len(table)} entries, more than the limit of {_MAX_CONSTANTS}")
    for name, constant in table.items():
        _identifier(key, name)
        where = f"{key}[{name!a}]"
        if isinstance(constant, (dict, list)):
            raise ArtifactError(f"manifest: {where} is {type(constant).__name__}, not a number, text, boolean or null")
        if isinstance(constant, str) and len(constant) > _MAX_TEXT:
            raise ArtifactError(f"manifest: {where} is text of {len(constant)} characters, more than {_MAX_TEXT}")
        if isinstance(constant, int) and not -_INT64 <= constant < _INT64:
            raise ArtifactError(f"manifest: {where} does not fit in 64 bits")
    return dict(table)


def _identifier(key: str, value: Any) -> str:
    name = word(_NAME)(key, value)
    if keyword.iskeyword(name):
        raise ArtifactError(f"manifest: {key} is {name!a}, which is no name in Python")
    return name


def _warps(key: str, value: Any) -> int:
    warps = integer(1, 32)(key, value)
    if warps & (warps - 1):
        raise ArtifactError(f"manifest: {key} is {warps}, not a power of two")
    return warps


_READERS: Final[Mapping[str, Any]] = {
    "arch": word(_ARCH),
    "dtype": choice("bf16", "fp16", "fp32"),
    "direction": choice("forward", "backward"),
    "kernel": _identifier,
    "symbol": word(_SYMBOL),
    "signature": _signature,
    "constants": _constants,
    "num_warps": _warps,
    "shared": integer(0, 1 << 20),
    "registers": integer(0, 255),
    "spills": integer(0, 1 << 20),
    "tools": text_map,
    "sha256": sha256,
    "size": integer(1, MAX_BINARY_BYTES),
}
