"""The outer form of an artifact: one safetensors file, parsed strictly and written in one way only.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length N, N bytes of JSON
``{"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the tensors' bytes.
Nothing here trusts the file: every count, length and offset is checked against the file's real size before it is used,
and no tensor byte is read. What this module accepts, the safetensors library accepts too; the reverse does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError

__all__ = [
    "BINARY_DTYPE",
    "BINARY_PREFIX",
    "DTYPES",
    "ITEMSIZES",
    "MAX_HEADER_BYTES",
    "Container",
    "TensorSpan",
    "build",
    "header_size",
    "parse",
    "with_metadata",
]

#: The format's dtype codes that weights may have: name in torch, bytes per element.
DTYPES: Final[Mapping[str, tuple[str, int]]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
#: Names of GPU binaries begin with this; they, and nothing else, are bytes without a type.
BINARY_PREFIX: Final = "gpu/"
BINARY_DTYPE: Final = "uint8"
_BINARY_CODE: Final = "U8"
#: Bytes per element by torch's name.
ITEMSIZES: Final[Mapping[str, int]] = dict(DTYPES.values())
_BINARY_DTYPES: Final[Mapping[str, tuple[str, int]]] = {_BINARY_CODE: (BINARY_DTYPE, 1)}
_CODES: Final = {name: code for code, (name, _) in {**DTYPES, **_BINARY_DTYPES}.items()}

MAX_HEADER_BYTES: Final = 1 << 20
MAX_TENSORS: Final = 512
MAX_NAME: Final = 256
MAX_DIMS: Final = 8
MAX_DIM: Final = 1 << 31
_PREFIX: Final = 8
#: Tensor data starts on a cache line, so that views into the file are aligned for vector loads.
_ALIGN: Final = 64


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where one tensor lies in the file: ``dtype`` by torch's name, offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Container:
    """A checked header: the metadata and every tensor's place."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpan]
    data_begin: int
    size: int


def header_size(prefix: bytes, total: int) -> int:
    """Length of the JSON header, from the file's first 8 bytes and its total size.

    Raises:
        ArtifactError: if the file is too short or the length makes no sense.
    """
    if total < _PREFIX or len(prefix) < _PREFIX:
        raise ArtifactError(f"not an artifact: {min(total, len(prefix))} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:_PREFIX], "little")
    if length > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}; "
            "is it a safetensors file at all?"
        )
    if length > total - _PREFIX:
        raise ArtifactError(
            f"the header claims {length} bytes, but only {total - _PREFIX} follow: the file is truncated"
        )
    if length < 2:
        raise ArtifactError(f"the header claims {length} bytes; the shortest possible header has 2")
    return length


def parse(head: bytes | bytearray | memoryview, total: int) -> Container:
    """Check the header of a file.

    Args:
        head: The file's beginning, at least the 8 length bytes and the whole header.
        total: Size of the whole file in bytes.

    Raises:
        ArtifactError: with the first thing found wrong.
    """
    length = header_size(bytes(head[:_PREFIX]), total)
    raw = memoryview(head)[_PREFIX : _PREFIX + length]
    if len(raw) < length:
        raise ArtifactError(f"the header has {len(raw)} of its {length} bytes: the file is truncated")
    if raw[0] != ord("{"):
        raise ArtifactError("the header does not begin with '{': not a safetensors file")
    header = strict_json.loads(_ascii(raw), what="the header", max_bytes=MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise ArtifactError("the header is not a JSON object")
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise ArtifactError(f"{len(header)} tensors, more than the limit of {MAX_TENSORS}")
    data_begin = _PREFIX + length
    tensors = {name: _tensor(name, entry, data_begin, total) for name, entry in header.items()}
    _check_cover(tensors, data_begin, total)
    return Container(metadata, tensors, data_begin, total)


def build(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Write a file; the same contents always give the same bytes.

    Args:
        metadata: Text by key.
        tensors: ``(dtype by torch's name, shape, little-endian row-major bytes)`` by name; GPU binaries, named
            ``gpu/...``, have dtype ``uint8``.

    Raises:
        ArtifactError: if the result would not pass :func:`parse`.
    """
    for name, (dtype, _, _) in tensors.items():
        possible = (BINARY_DTYPE,) if name.startswith(BINARY_PREFIX) else ITEMSIZES
        if dtype not in possible:
            raise ArtifactError(f"tensor {name!a}: dtype {dtype} cannot be stored; possible: {', '.join(possible)}")
    # Wide elements first: every tensor then starts at a multiple of its element size without padding between them.
    order = sorted(tensors, key=lambda name: (-ITEMSIZES.get(tensors[name][0], 1), name))
    spans, offset = {}, 0
    for name in order:
        dtype, shape, data = tensors[name]
        spans[name] = TensorSpan(dtype, shape, offset, offset + len(data))
        offset += len(data)
    return b"".join([_head(metadata, spans, offset), *(tensors[name][2] for name in order)])


def with_metadata(data: bytes | bytearray | memoryview, metadata: Mapping[str, str]) -> bytes:
    """The same tensors, byte for byte, under other metadata.

    Raises:
        ArtifactError: if ``data`` does not pass :func:`parse`, or the result would not.
    """
    held = parse(data, len(data))
    spans = {
        name: TensorSpan(span.dtype, span.shape, span.begin - held.data_begin, span.end - held.data_begin)
        for name, span in held.tensors.items()
    }
    body = memoryview(data)[held.data_begin :]
    return b"".join([_head(metadata, spans, len(body)), body])


def _head(metadata: Mapping[str, str], spans: Mapping[str, TensorSpan], data_size: int) -> bytes:
    """Length and header of a file whose data these spans, counted from its first byte, describe."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, span in spans.items():
        header[name] = {
            "dtype": _CODES[span.dtype],
            "shape": list(span.shape),
            "data_offsets": [span.begin, span.end],
        }
    text = strict_json.canonical(header).encode("ascii")
    text += b" " * (-(_PREFIX + len(text)) % _ALIGN)
    head = len(text).to_bytes(_PREFIX, "little") + text
    parse(head, len(head) + data_size)
    return head


def _ascii(raw: memoryview) -> str:
    """The header as text. :func:`build` escapes what is not ASCII, and ASCII takes one byte a character in memory."""
    try:
        return str(raw, "ascii")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the header is not ASCII: {error.reason} at byte {error.start}") from None


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ArtifactError("__metadata__ is not a JSON object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ArtifactError(f"__metadata__[{key[:80]!a}] is {type(text).__name__}, not text")
    return value


def _tensor(name: str, entry: Any, data_begin: int, total: int) -> TensorSpan:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ArtifactError(f"tensor name {name[:80]!a} is empty, unprintable or longer than {MAX_NAME}")
    where = f"tensor {name!a}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where}: expected an object with exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    possible = _BINARY_DTYPES if name.startswith(BINARY_PREFIX) else DTYPES
    if not isinstance(code, str) or code not in possible:
        raise ArtifactError(f"{where}: dtype {code!a:.40} is not one of {', '.join(possible)}")
    dtype, itemsize = possible[code]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ArtifactError(f"{where}: shape must be a list of at most {MAX_DIMS} sizes")
    if any(type(size) is not int or not 1 <= size <= MAX_DIM for size in shape):
        raise ArtifactError(f"{where}: every size of a shape must be an integer from 1 to {MAX_DIM}")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        raise ArtifactError(f"{where}: data_offsets must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= total - data_begin:
        raise ArtifactError(f"{where}: data_offsets lie outside the {total - data_begin} data bytes of the file")
    need = math.prod(shape) * itemsize
    if end - begin != need:
        raise ArtifactError(f"{where}: shape {shape} of {dtype} needs {need} bytes, data_offsets span {end - begin}")
    if (data_begin + begin) % itemsize:
        raise ArtifactError(
            f"{where}: starts at byte {data_begin + begin}, not a multiple of its {itemsize}-byte elements"
        )
    return TensorSpan(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_cover(tensors: Mapping[str, TensorSpan], data_begin: int, total: int) -> None:
    """The tensors tile the data: no overlap, no hole where something unhashed could hide, nothing after the last."""
    reached, last = data_begin, ""
    for name, span in sorted(tensors.items(), key=lambda item: item[1].begin):
        if span.begin < reached:
            raise ArtifactError(f"tensors {last!a} and {name!a} overlap")
        if span.begin > reached:
            raise ArtifactError(f"{span.begin - reached} bytes before tensor {name!a} belong to no tensor")
        reached, last = span.end, name
    if reached != total:
        raise ArtifactError(f"{total - reached} bytes at the end of the file belong to no tensor")
