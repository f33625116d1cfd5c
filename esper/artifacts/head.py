"""The beginning of an artifact's file: header, manifest and signatures, read without touching a weight."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from esper.contracts import container
from esper.contracts.container import Container
from esper.contracts.errors import ArtifactError
from esper.contracts.manifest import METADATA_KEY, Manifest
from esper.contracts.signatures import SIGNATURES_KEY, Signature, parse_signatures

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Head",
    "check_declared",
    "hash_file",
    "manifest_text",
    "parse_head",
    "read_bytes",
    "read_head",
    "read_manifest",
    "same_names",
    "signatures_of",
]

#: Largest file opened unless told otherwise: 1 GiB.
DEFAULT_MAX_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the tensors. Sound in form and in agreement with itself; no hash has been compared.

    Attributes:
        container: Where everything lies.
        text: The manifest's text, which signatures cover.
        manifest: The manifest.
        signatures: The signatures, not checked.
    """

    container: Container
    text: str
    manifest: Manifest
    signatures: tuple[Signature, ...]


def manifest_text(held: Container) -> str:
    """The manifest's text in a file's metadata.

    Raises:
        ArtifactError: if there is none.
    """
    text = held.metadata.get(METADATA_KEY)
    if text is None:
        raise ArtifactError(f"a safetensors file, but no artifact: its metadata has no {METADATA_KEY!r}")
    return text


def signatures_of(held: Container) -> tuple[Signature, ...]:
    """The signatures in a file's metadata; none if it is not signed.

    Raises:
        ArtifactError: if they are malformed.
    """
    text = held.metadata.get(SIGNATURES_KEY)
    return () if text is None else parse_signatures(text)


def parse_head(head: bytes | bytearray | memoryview, size: int) -> Head:
    """Read the head from a file's beginning.

    Args:
        head: At least the whole header.
        size: Size of the whole file.

    Raises:
        ArtifactError: if header, manifest or signatures are not sound.
    """
    held = container.parse(head, size)
    text = manifest_text(held)
    signatures = signatures_of(held)
    manifest = Manifest.from_json(text)
    check_declared(held, manifest)
    return Head(held, text, manifest, signatures)


def read_head(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> Head:
    """Read the head of a file, and nothing behind it.

    Raises:
        ArtifactError: if the file cannot be read, or as :func:`parse_head`.
    """
    try:
        with open(path, "rb", opener=_non_blocking) as file:
            size = _regular_size(file.fileno(), path, max_bytes)
            prefix = file.read(8)
            head = prefix + file.read(container.header_size(prefix, size))
        return parse_head(head, size)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_manifest(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> tuple[Manifest, int]:
    """The manifest of a file and the file's size, without reading a weight; only the header is checked.

    Raises:
        ArtifactError: if the header or the manifest is not sound.
    """
    head = read_head(path, max_bytes)
    return head.manifest, head.container.size


def read_bytes(path: Path, max_bytes: int) -> bytearray:
    """A regular file's bytes, its size checked first.

    Raises:
        ArtifactError: if it is missing, not a regular file, larger than ``max_bytes``, or changing under the reader.
    """
    try:
        with open(path, "rb", buffering=0, opener=_non_blocking) as file:
            size = _regular_size(file.fileno(), path, max_bytes)
            data = bytearray(size)
            view, got = memoryview(data), 0
            while got < size and (step := file.readinto(view[got:])):
                got += step
            if got < size or file.read(1):
                raise ArtifactError(f"{path}: its size changed while it was read")
            return data
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits, read piece by piece.

    Raises:
        ArtifactError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_declared(held: Container, manifest: Manifest) -> None:
    """The manifest and the header describe the same tensors and binaries."""
    same_names(held.tensors, {**manifest.tensors, **manifest.binaries}, "in the file", "in the manifest")
    for name, entry in manifest.tensors.items():
        span = held.tensors[name]
        if entry.shape != span.shape or entry.dtype != span.dtype:
            raise ArtifactError(
                f"tensor {name!a}: the header says {span.dtype} {list(span.shape)}, "
                f"the manifest {entry.dtype} {list(entry.shape)}"
            )
    for name, binary in manifest.binaries.items():
        span = held.tensors[name]
        if span.dtype != container.BINARY_DTYPE or span.shape != (binary.size,):
            raise ArtifactError(
                f"binary {name!a}: the header says {span.dtype} {list(span.shape)}, the manifest {binary.size} bytes"
            )


def same_names(a: Mapping[str, object], b: Mapping[str, object], in_a: str, in_b: str) -> None:
    """Both have the same keys; the message names the first that one of them lacks."""
    for extra, here, there in ((a.keys() - b.keys(), in_a, in_b), (b.keys() - a.keys(), in_b, in_a)):
        if extra:
            raise ArtifactError(f"tensor {min(extra)!a} is {here} but not {there}")


def _non_blocking(path: str, flags: int) -> int:
    # So that a pipe in the place of a file cannot hang the reader before it is recognised.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _regular_size(descriptor: int, path: Path, max_bytes: int) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path}: not a regular file")
    if found.st_size > max_bytes:
        raise ArtifactError(f"{path}: {found.st_size} bytes are more than the limit of {max_bytes}")
    return found.st_size
