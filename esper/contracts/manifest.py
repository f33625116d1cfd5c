"""The manifest: what an artifact says about itself, as JSON in the file's metadata.

Everything in it is a claim until :mod:`esper.artifacts` has checked it against the bytes and the blueprint. Reading is
strict: exactly the keys below, each of its type. Keys that a later version defines are treated as :data:`RESERVED`
says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from esper.contracts import strict_json
from esper.contracts.container import DTYPES
from esper.contracts.errors import ArtifactError
from esper.contracts.ids import check_sha256

__all__ = ["FORMAT_VERSION", "METADATA_KEY", "Manifest", "TensorEntry"]

FORMAT_VERSION: Final = 1
KNOWN_VERSIONS: Final = (1,)
#: Key of the manifest in the file's metadata.
METADATA_KEY: Final = "esper.manifest"
MAX_BYTES: Final = 1 << 19
MAX_SIZE: Final = 1 << 20

#: Keys that this version knows by name only: either a note on record, or a refusal, never a guess.
RESERVED: Final[Mapping[str, tuple[bool, str]]] = {
    "signatures": (True, "signatures are not checked by this version; the hashes are"),
    "binaries": (False, "it carries GPU binaries, which this version cannot check; compile it with pipeline='fast'"),
}

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
        target: What it was built for; ``any`` without GPU binaries.
        pipeline: The pipeline that built it.
        seed: Seed of the initial weights.
        tensors: Every tensor in the file, by name.
        tools: Versions of what built it, by name.
        provenance: Free text by key: who, from what, why. Nothing is read from it.
        notes: What the reader passed over and why (not in the file).
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
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The manifest as canonical JSON."""
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
        notes = []
        for key, (ignorable, reason) in RESERVED.items():
            if data.pop(key, None) is None:
                continue
            if not ignorable:
                raise ArtifactError(f"the artifact cannot be used: {reason}")
            notes.append(reason)
        missing, unknown = sorted(_READERS.keys() - data.keys()), sorted(data.keys() - _READERS.keys())
        if missing:
            raise ArtifactError(f"the manifest has no key {missing[0]!r}")
        if unknown:
            raise ArtifactError(f"the manifest has an unknown key {unknown[0][:80]!a}; it may be of a newer Esper")
        return cls(**{key: read(key, data[key]) for key, read in _READERS.items()}, notes=tuple(notes))


def _object(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"manifest: {key} is {type(value).__name__}, not an object")
    return value


def _text_map(key: str, value: Any) -> dict[str, str]:
    for name, text in _object(key, value).items():
        if not isinstance(text, str):
            raise ArtifactError(f"manifest: {key}[{name[:40]!a}] is {type(text).__name__}, not text")
    return dict(value)


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def read(key: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ArtifactError(f"manifest: {key} is {value!a:.40}, not an integer from {low} to {high}")
        return value

    return read


def _word(pattern: re.Pattern[str]) -> Callable[[str, Any], str]:
    def read(key: str, value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ArtifactError(f"manifest: {key} is {value!a:.40}, which does not match {pattern.pattern}")
        return value

    return read


def _sha256(key: str, value: Any) -> str:
    try:
        return check_sha256(value)
    except ValueError as error:
        raise ArtifactError(f"manifest: {key}: {error}") from None


def _tensors(key: str, value: Any) -> dict[str, TensorEntry]:
    return {name: _entry(f"{key}[{name[:80]!a}]", entry) for name, entry in _object(key, value).items()}


def _entry(where: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"shape", "dtype", "sha256"}:
        raise ArtifactError(f"manifest: {where} must be an object with exactly shape, dtype and sha256")
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ArtifactError(f"manifest: {where}: shape must be a list of integers")
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
        raise ArtifactError(f"manifest: {where}: dtype {dtype!a:.40} is not one of {', '.join(_DTYPE_NAMES)}")
    return TensorEntry(tuple(shape), dtype, _sha256(where, value["sha256"]))


_READERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "blueprint": _object,
    "blueprint_hash": _sha256,
    "d_in": _integer(1, MAX_SIZE),
    "d_out": _integer(1, MAX_SIZE),
    "family": _word(_FAMILY),
    "target": _word(_TARGET),
    "pipeline": _word(_PIPELINE),
    "seed": _integer(-(1 << 63), (1 << 63) - 1),
    "tensors": _tensors,
    "tools": _text_map,
    "provenance": _text_map,
}
