"""The manifest: what an artifact says about itself, as JSON in the file's metadata.

Everything in it is a claim until :mod:`esper.artifacts` has checked it against the bytes and the blueprint. Reading is
strict: exactly the keys below, each of its type. ``binaries`` alone may be missing, and is where there are none: an
artifact without GPU binaries is the same file whether or not its writer knows of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from esper.contracts import strict_json
from esper.contracts.binary_entry import BinaryEntry, read_binaries, target_of
from esper.contracts.container import DTYPES
from esper.contracts.errors import ArtifactError
from esper.contracts.fields import integer, mapping, sha256, text_map, word

__all__ = ["FORMAT_VERSION", "METADATA_KEY", "BinaryEntry", "Manifest", "TensorEntry"]

FORMAT_VERSION: Final = 1
KNOWN_VERSIONS: Final = (1,)
#: Key of the manifest in the file's metadata.
METADATA_KEY: Final = "esper.manifest"
MAX_BYTES: Final = 1 << 19
MAX_SIZE: Final = 1 << 20

_DTYPE_NAMES: Final = tuple(name for name, _ in DTYPES.values())
_TARGET: Final = re.compile(r"[a-z0-9_]{1,32}")
_PIPELINE: Final = re.compile(r"[a-z]{1,16}")
_FAMILY: Final = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as declared: shape, dtype by torch's name, SHA-256 of its little-endian row-major bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact says about itself.

    Attributes:
        blueprint: The blueprint as JSON values; its parameters (rank, ...) stand in it with the values it was compiled
            for.
        blueprint_hash: SHA-256 of the canonical blueprint, 64 hex digits.
        d_in: Features the sub-network reads.
        d_out: Features it changes.
        family: Name of the fused family that runs it, or ``graph``.
        target: What it was built for: ``any`` without GPU binaries, else their architectures, such as ``sm_80_sm_90``.
        pipeline: The pipeline that built it.
        seed: Seed of the initial weights.
        tensors: Every weight in the file, by name.
        tools: Versions of what built it, by name.
        provenance: Free text by key: who, from what, why. Nothing is read from it.
        binaries: Every GPU binary in the file, by the name of its tensor.
        notes: What the reader passed over and why (not in the file), such as GPU binaries that nobody trusted signed.
    """

    blueprint: Mapping[str, Any]
    blueprint_hash: str
    d_in: int
    d_out: int
    family: str
    target: str
    pipeline: str
    seed: int
    tensors: Mapping[str, TensorEntry]
    tools: Mapping[str, str]
    provenance: Mapping[str, str] = field(default_factory=dict)
    binaries: Mapping[str, BinaryEntry] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The manifest as canonical JSON."""
        binaries = {name: entry.to_dict() for name, entry in self.binaries.items()}
        return strict_json.canonical(
            {
                "format": FORMAT_VERSION,
                "blueprint": dict(self.blueprint),
                "blueprint_hash": self.blueprint_hash,
                "d_in": self.d_in,
                "d_out": self.d_out,
                "family": self.family,
                "target": self.target,
                "pipeline": self.pipeline,
                "seed": self.seed,
                "tensors": {
                    name: {"shape": list(entry.shape), "dtype": entry.dtype, "sha256": entry.sha256}
                    for name, entry in self.tensors.items()
                },
                "tools": dict(self.tools),
                "provenance": dict(self.provenance),
                **({"binaries": binaries} if binaries else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest.

        Raises:
            ArtifactError: naming the key at fault, for anything else than a manifest of a known version.
        """
        data = strict_json.loads(text, what="the manifest", max_bytes=MAX_BYTES)
        if not isinstance(data, dict):
            raise ArtifactError("the manifest is not a JSON object")
        version = data.pop("format", None)
        if type(version) is not int or version not in KNOWN_VERSIONS:
            known = ", ".join(map(str, KNOWN_VERSIONS))
            raise ArtifactError(f"unknown artifact format version {version!a:.40}; this Esper knows: {known}")
        binaries = read_binaries("binaries", data.pop("binaries")) if "binaries" in data else {}
        missing, unknown = sorted(_READERS.keys() - data.keys()), sorted(data.keys() - _READERS.keys())
        if missing:
            raise ArtifactError(f"the manifest has no key {missing[0]!r}")
        if unknown:
            raise ArtifactError(f"the manifest has an unknown key {unknown[0][:80]!a}; it may be of a newer Esper")
        manifest = cls(**{key: read(key, data[key]) for key, read in _READERS.items()}, binaries=binaries)
        built_for = target_of(entry.arch for entry in binaries.values())
        if manifest.target != built_for:
            raise ArtifactError(f"manifest: target is {manifest.target!a}, its binaries say {built_for!a}")
        return manifest


def _tensors(key: str, value: Any) -> dict[str, TensorEntry]:
    return {name: _entry(f"{key}[{name[:80]!a}]", entry) for name, entry in mapping(key, value).items()}


def _entry(where: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"shape", "dtype", "sha256"}:
        raise ArtifactError(f"manifest: {where} must be an object with exactly shape, dtype and sha256")
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ArtifactError(f"manifest: {where}: shape must be a list of integers")
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
        raise ArtifactError(f"manifest: {where}: dtype {dtype!a:.40} is not one of {', '.join(_DTYPE_NAMES)}")
    return TensorEntry(tuple(shape), dtype, sha256(where, value["sha256"]))


_READERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "blueprint": mapping,
    "blueprint_hash": sha256,
    "d_in": integer(1, MAX_SIZE),
    "d_out": integer(1, MAX_SIZE),
    "family": word(_FAMILY),
    "target": word(_TARGET),
    "pipeline": word(_PIPELINE),
    "seed": integer(-(1 << 63), (1 << 63) - 1),
    "tensors": _tensors,
    "tools": text_map,
    "provenance": text_map,
}
