"""An artifact opened: every claim checked against the bytes, then the tensors handed out without a copy.

Order of the checks: size, outer form, manifest, hashes, blueprint, tensors against what the blueprint needs, finite
values. No tensor is handed out, and nothing is computed from one, before its hash agreed.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from esper.artifacts.text import describe_manifest
from esper.blueprints.canonical import blueprint_hash
from esper.blueprints.families import Family, match
from esper.blueprints.ir import Blueprint, from_json
from esper.blueprints.validation import Resolved, validate
from esper.contracts import container
from esper.contracts.container import Container
from esper.contracts.errors import ArtifactError, BlueprintError
from esper.contracts.ids import ArtifactId, kernel_id
from esper.contracts.manifest import METADATA_KEY, Manifest

__all__ = ["DEFAULT_MAX_BYTES", "Artifact", "hash_file", "read_bytes", "read_manifest"]

#: Largest file opened unless told otherwise: 1 GiB.
DEFAULT_MAX_BYTES: Final = 1 << 30
#: Elements looked at in one call: too few for torch to spread over the cores, which belong to the training.
_PIECE: Final = 1 << 15


class Artifact:
    """One artifact, verified. Make one with :meth:`open`.

    Attributes:
        manifest: What the artifact says about itself; all that can be checked was checked.
        blueprint: Its blueprint, parameters baked in.
        resolved: The blueprint at the artifact's ``d_in`` and ``d_out``: widths and tensor shapes.
        sha256: SHA-256 of the file, 64 hex digits.
        nbytes: Length of the file in bytes.
    """

    def __init__(self, data: bytes | bytearray, held: Container, manifest: Manifest, sha256: str) -> None:
        self._data = data
        self._container = held
        self.manifest = manifest
        self.sha256 = sha256
        self.nbytes = held.size
        self.blueprint, self.resolved = _check_blueprint(manifest)
        _check_needed(self.resolved, manifest)

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        trusted_keys: Collection[str] | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> Artifact:
        """Read and verify an artifact; nothing in it is ever executed, imported or unpickled.

        Args:
            source: A path, or the file's bytes.
            trusted_keys: Keys whose GPU binaries may be used. This version reads no artifact that carries binaries, so
                there is nothing for a key to allow; weights and blueprint never need one, their hashes vouch for them.
            max_bytes: Largest file accepted; checked before anything is read.

        Returns:
            The artifact. Peak memory is at most twice the file's size (once, when opened from a path).

        Raises:
            ArtifactError: whatever the bytes, if they are not a sound artifact; the message says what was found.
        """
        del trusted_keys
        if isinstance(source, bytes):
            return cls._verify(source, "the artifact", max_bytes)
        if isinstance(source, (bytearray, memoryview)):
            # The caller could still change these after the check.
            return cls._verify(bytes(source), "the artifact", max_bytes)
        return cls._verify(read_bytes(Path(source), max_bytes), str(source), max_bytes)

    @classmethod
    def adopt(
        cls, data: bytes | bytearray, *, sha256: str | None = None, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> Artifact:
        """As :meth:`open`, for bytes that the caller gives away: of a bytearray the tensors are views, without a copy.

        Args:
            data: The file's bytes; nobody else may write to them.
            sha256: Their SHA-256 where the caller has just computed it.
            max_bytes: Largest file accepted.
        """
        return cls._verify(data, "the artifact", max_bytes, sha256)

    @classmethod
    def _verify(cls, data: bytes | bytearray, what: str, max_bytes: int, sha256: str | None = None) -> Artifact:
        try:
            if len(data) > max_bytes:
                raise ArtifactError(f"{len(data)} bytes are more than the limit of {max_bytes}")
            held = container.parse(memoryview(data), len(data))
            manifest = _manifest(held)
            _check_declared(held, manifest)
            view = memoryview(data)
            for name, span in held.tensors.items():
                found = hashlib.sha256(view[span.begin : span.end]).hexdigest()
                declared = manifest.tensors[name].sha256
                if found != declared:
                    raise ArtifactError(
                        f"tensor {name!a}: SHA-256 is {found}, the manifest says {declared}: the file was altered"
                    )
            artifact = cls(data, held, manifest, sha256 or hashlib.sha256(view).hexdigest())
            artifact._check_finite()
        except ArtifactError as error:
            raise ArtifactError(f"{what}: {error}") from None
        return artifact

    @cached_property
    def artifact_id(self) -> str:
        """``<blueprint hash>-<target>-<pipeline>-<version hash>``; any change of a byte changes it."""
        m = self.manifest
        return str(ArtifactId.of(m.blueprint_hash, m.target, m.pipeline, self.sha256))

    @property
    def kernel_id(self) -> int:
        """First 63 bits of the file's SHA-256: what the lattice stores."""
        return kernel_id(self.sha256)

    @cached_property
    def family(self) -> Family:
        """The fused family that runs the blueprint, matched by this version of the package."""
        return match(self.blueprint)

    @property
    def d_in(self) -> int:
        """Features the sub-network reads."""
        return self.manifest.d_in

    @property
    def d_out(self) -> int:
        """Features the sub-network changes."""
        return self.manifest.d_out

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name (``<node>.weight``, ``<node>.bias``), on the CPU, as views of the file's bytes.

        All calls give views of the same memory: copy before writing.
        """
        data = self._writable
        return {
            name: torch.frombuffer(
                data,
                dtype=getattr(torch, span.dtype),
                count=(span.end - span.begin) // container.ITEMSIZES[span.dtype],
                offset=span.begin,
            ).view(span.shape)
            for name, span in self._container.tensors.items()
        }

    @cached_property
    def _writable(self) -> bytearray:
        # torch warns about memory it could write to but must not; one copy, made once, buys safe tensors from bytes.
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        return self._data

    def _check_finite(self) -> None:
        for name, tensor in self.tensors().items():
            for piece in torch.split(tensor.view(-1), _PIECE):
                # aminmax passes NaN on and allocates nothing, where isfinite would make a mask of every tensor.
                low, high = torch.aminmax(piece)
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise ArtifactError(f"tensor {name!a} has values that are NaN or infinite")

    def __repr__(self) -> str:
        return f"Artifact({self.artifact_id}, {describe_manifest(self.manifest)})"


def read_bytes(path: Path, max_bytes: int) -> bytearray:
    """A regular file's bytes, its size checked first.

    Raises:
        ArtifactError: if it is missing, not a regular file, larger than ``max_bytes``, or changing under the reader.
    """
    try:
        # Non-blocking, so that a pipe in the place of a file cannot hang the reader before it is recognised.
        with open(
            path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        ) as file:
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


def read_manifest(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> tuple[Manifest, int]:
    """The manifest of a file and the file's size, without reading a weight; only the header is checked.

    Raises:
        ArtifactError: if the header or the manifest is not sound.
    """
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            size = _regular_size(file.fileno(), path, max_bytes)
            prefix = file.read(8)
            head = prefix + file.read(container.header_size(prefix, size))
        held = container.parse(head, size)
        manifest = _manifest(held)
        _check_declared(held, manifest)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return manifest, size


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


def _regular_size(descriptor: int, path: Path, max_bytes: int) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path}: not a regular file")
    if found.st_size > max_bytes:
        raise ArtifactError(f"{path}: {found.st_size} bytes are more than the limit of {max_bytes}")
    return found.st_size


def _manifest(held: Container) -> Manifest:
    text = held.metadata.get(METADATA_KEY)
    if text is None:
        raise ArtifactError(f"a safetensors file, but no artifact: its metadata has no {METADATA_KEY!r}")
    return Manifest.from_json(text)


def _check_declared(held: Container, manifest: Manifest) -> None:
    """The manifest and the header describe the same tensors."""
    _same_names(held.tensors, manifest.tensors, "in the file", "in the manifest")
    for name, entry in manifest.tensors.items():
        span = held.tensors[name]
        if entry.shape != span.shape or entry.dtype != span.dtype:
            raise ArtifactError(
                f"tensor {name!a}: the header says {span.dtype} {list(span.shape)}, "
                f"the manifest {entry.dtype} {list(entry.shape)}"
            )


def _check_blueprint(manifest: Manifest) -> tuple[Blueprint, Resolved]:
    try:
        blueprint = from_json(manifest.blueprint)
        found = blueprint_hash(blueprint)
        if found != manifest.blueprint_hash:
            raise ArtifactError(f"the blueprint's hash is {found}, the manifest says {manifest.blueprint_hash}")
        return blueprint, validate(blueprint, manifest.d_in, manifest.d_out)
    except BlueprintError as error:
        raise ArtifactError(f"the blueprint does not hold: {error}") from error


def _check_needed(resolved: Resolved, manifest: Manifest) -> None:
    """The tensors are those the blueprint needs at these sizes, no more and no fewer."""
    _same_names(manifest.tensors, resolved.tensors, "in the file", "in the blueprint")
    for name, shape in resolved.tensors.items():
        found = manifest.tensors[name].shape
        if found != shape:
            raise ArtifactError(
                f"tensor {name!a} has shape {list(found)}; the blueprint needs {list(shape)} "
                f"with d_in={manifest.d_in}, d_out={manifest.d_out}"
            )


def _same_names(a: Mapping[str, object], b: Mapping[str, object], in_a: str, in_b: str) -> None:
    for extra, here, there in ((a.keys() - b.keys(), in_a, in_b), (b.keys() - a.keys(), in_b, in_a)):
        if extra:
            raise ArtifactError(f"tensor {min(extra)!a} is {here} but not {there}")
