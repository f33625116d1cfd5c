"""What a GPU binary says about itself: its architecture, and the sizes of a kernel's parameters.

A cubin is an ELF file. The compiler leaves, in the section ``.nv.info.<kernel>``, one record for every parameter.
Launching a kernel with arguments of other sizes than it was compiled for reads garbage on the device, so a binary's
declared signature is compared with these before it is loaded, and without a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["CubinError", "Parameter", "architecture", "hidden_pointers", "parameter_size", "parameters", "runs_on"]

_HEADER: Final = 64
_CUDA_MACHINE: Final = 190
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_NO_BITS: Final = 8
#: Records of ``.nv.info``: a format, an attribute, and 16 bits that are the length of what follows for format 4 only.
_SIZED: Final = 4
_PARAMETER: Final = 0x17
#: From this version of the format on the architecture stands one byte higher in the flags.
_ABI_8: Final = 8
#: From this architecture on Triton compiles for the feature set of one architecture ("sm_90a").
_SPECIFIC: Final = 90

_SIZES: Final = {
    **dict.fromkeys(("i1", "u1", "i8", "u8"), 1),
    **dict.fromkeys(("i16", "u16"), 2),
    **dict.fromkeys(("i32", "u32", "fp32"), 4),
    **dict.fromkeys(("i64", "u64", "fp64"), 8),
}


class CubinError(ValueError):
    """The bytes are no GPU binary, or not the one that is described."""


@dataclass(frozen=True, order=True)
class Parameter:
    """One parameter of a kernel: its place in order, its offset in bytes, its size in bytes."""

    index: int
    offset: int
    size: int


def parameter_size(kind: str) -> int:
    """Bytes that an argument of Triton's type ``kind`` takes.

    Raises:
        CubinError: for a type that a launch does not pass.
    """
    if kind.startswith("*"):
        return 8
    if kind not in _SIZES:
        raise CubinError(f"type {kind!r} is not one that a launch passes; those are pointers and {', '.join(_SIZES)}")
    return _SIZES[kind]


def runs_on(built: int, present: int) -> bool:
    """Whether a binary of architecture ``built`` runs on a device of architecture ``present`` (both as in sm_90).

    Machine code runs on later minor versions of the same major one. From sm_90 on Triton uses instructions that one
    architecture alone has ("sm_90a"), and such a binary runs on no other.
    """
    if built >= _SPECIFIC:
        return built == present
    return built // 10 == present // 10 and built % 10 <= present % 10


def architecture(data: bytes | memoryview) -> int:
    """Compute capability times ten that the binary was built for.

    Raises:
        CubinError: if the bytes are no GPU binary.
    """
    data = memoryview(data)
    _check_header(data)
    flags = int.from_bytes(data[48:52], "little")
    return flags >> 8 & 0xFF if data[8] >= _ABI_8 else flags & 0xFF


def parameters(data: bytes | memoryview, symbol: str) -> list[Parameter]:
    """The parameters of the kernel ``symbol``, in order.

    Raises:
        CubinError: if the bytes are no GPU binary, or there is no such kernel in it.
    """
    data = memoryview(data)
    for name, content in _sections(data):
        if name == f".nv.info.{symbol}":
            found = sorted(_parameters(content))
            if [item.index for item in found] != [*range(len(found))]:
                raise CubinError(f"the GPU binary describes the parameters of {symbol} incompletely")
            return found
    raise CubinError(f"the GPU binary has no kernel {symbol!r}")


def hidden_pointers(data: bytes | memoryview, symbol: str, types: Sequence[str]) -> int:
    """How many pointers the kernel takes behind arguments of these types: Triton adds some for scratch memory.

    Raises:
        CubinError: if the kernel's parameters are not of these types.
    """
    found = parameters(data, symbol)
    wanted = [parameter_size(kind) for kind in types]
    sizes = [item.size for item in found]
    if sizes[: len(wanted)] != wanted or any(size != 8 for size in sizes[len(wanted) :]):
        raise CubinError(f"{symbol} takes parameters of {sizes} bytes, and is declared to take {wanted}")
    return len(sizes) - len(wanted)


def _check_header(data: memoryview) -> None:
    machine = int.from_bytes(data[18:20], "little")
    if len(data) < _HEADER or bytes(data[:6]) != b"\x7fELF\x02\x01" or machine != _CUDA_MACHINE:
        raise CubinError("not a GPU binary (a 64-bit ELF file for CUDA)")


def _sections(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    _check_header(data)
    start = int.from_bytes(data[40:48], "little")
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    if size != _SECTION.size or start + size * count > len(data) or names_at >= count:
        raise CubinError("the GPU binary is cut short or damaged: its table of sections points outside of it")
    headers = [_SECTION.unpack_from(data, start + index * size) for index in range(count)]

    def content(header: tuple[int, ...]) -> memoryview:
        kind, offset, length = header[1], header[4], header[5]
        if kind == _NO_BITS:
            return data[:0]
        if offset + length > len(data):
            raise CubinError("the GPU binary is cut short or damaged: a section points outside of it")
        return data[offset : offset + length]

    names = bytes(content(headers[names_at]))
    for header in headers:
        end = names.find(b"\0", header[0])
        yield names[header[0] : end].decode("ascii", "replace") if end >= 0 else "", content(header)


def _parameters(info: memoryview) -> Iterator[Parameter]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _SIZED:
            continue
        if attribute == _PARAMETER and length >= 12 and at + 12 <= len(info):
            # A hash, the place, the offset, and bits of which the highest 14 are the size.
            _, index, offset, bits = struct.unpack_from("<IHHI", info, at)
            yield Parameter(index, offset, bits >> 18)
        at += length
