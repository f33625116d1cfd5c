"""The manifest of a checkpoint: what :mod:`esper.core.checkpoint` writes into the file's metadata, read strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from esper.contracts import strict_json
from esper.contracts.errors import EsperError

__all__ = ["FORMAT_VERSION", "CheckpointError", "LayerRecord", "Record", "SeedRecord", "read_record", "write_record"]

FORMAT_VERSION = 2
KNOWN_VERSIONS = (1, 2)

#: The one key of the file's metadata: several would be written in no particular order, and equal networks give equal
#: files. Its value is the SHA-256 of the manifest's text, a line break, and the text.
_KEY = "esper.checkpoint"


class CheckpointError(EsperError, ValueError):
    """A checkpoint is bad or does not fit the host it is loaded into; the message says what does not."""


@dataclass(frozen=True)
class LayerRecord:
    """A layer with seeds: its dotted name and the class of its host."""

    name: str
    host_type: str


@dataclass(frozen=True)
class SeedRecord:
    """A seed whose kernel is bound.

    Attributes:
        layer: Name of its layer.
        seed_idx: Which of the layer's seeds.
        artifact_id: What it was woken with.
        kernel_id: The artifact's number in the lattice.
        manifest: The artifact's manifest, as JSON values: blueprint, family, mode, sizes, where it came from.
    """

    layer: str
    seed_idx: int
    artifact_id: str
    kernel_id: int
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """The whole manifest.

    Attributes:
        version: Of the format.
        seeds_per_layer: Seeds of every layer.
        monitor_budget: As given to ``esper.wrap``.
        telemetry: Whether activations were monitored.
        layers: In the lattice's order.
        seeds: Those with a kernel.
        reserve_rank: As given to ``esper.wrap``; since version 2.
        reserve_tap: As given to ``esper.wrap``; since version 2.
        aliases: Entries that share another entry's memory (tied weights), by name: stored once.
        hashes: SHA-256 of every stored tensor's bytes.
    """

    version: int
    seeds_per_layer: int
    monitor_budget: float
    telemetry: bool
    reserve_rank: int
    reserve_tap: str
    layers: tuple[LayerRecord, ...]
    seeds: tuple[SeedRecord, ...]
    aliases: Mapping[str, str]
    hashes: Mapping[str, str]


def write_record(record: Record) -> dict[str, str]:
    """The record as safetensors metadata, with a digest of itself."""
    text = strict_json.canonical(asdict(record))
    return {_KEY: f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"}


def read_record(metadata: Mapping[str, str]) -> Record:
    """Read what :func:`write_record` wrote.

    Raises:
        CheckpointError: there is no record, it was altered, or it is of a version that this Esper does not know.
    """
    value = metadata.get(_KEY)
    if value is None:
        raise CheckpointError("it is a safetensors file, but not one that esper.save wrote (it has no manifest)")
    digest, _, text = value.partition("\n")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"its manifest is no JSON: {error}") from None
    except RecursionError:
        raise CheckpointError("its manifest is nested too deeply") from None
    version = data.get("version") if isinstance(data, dict) else None
    # Before the digest: a newer format may well keep its digest elsewhere.
    if type(version) is not int or version not in KNOWN_VERSIONS:
        known = ", ".join(map(str, KNOWN_VERSIONS))
        raise CheckpointError(f"it is of checkpoint version {version!a:.40}; this Esper reads {known}")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise CheckpointError("its manifest does not match its own SHA-256: the file was altered")
    return _record(data)


def _record(data: Mapping[str, Any]) -> Record:
    if data["version"] == 1:  # before memory could be reserved
        data = {"reserve_rank": 0, "reserve_tap": "input", **data}
    values = _exactly(Record, data)
    values["layers"] = tuple(LayerRecord(**_exactly(LayerRecord, item)) for item in values["layers"])
    values["seeds"] = tuple(SeedRecord(**_exactly(SeedRecord, item)) for item in values["seeds"])
    return Record(**values)


#: How each annotated type of a field looks in JSON. Strings, because annotations are not evaluated in this module.
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "tuple[LayerRecord, ...]": lambda value: isinstance(value, list),
    "tuple[SeedRecord, ...]": lambda value: isinstance(value, list),
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
    "Mapping[str, str]": lambda value: isinstance(value, dict) and all(type(v) is str for v in value.values()),
}


def _exactly(kind: type, data: Any) -> dict[str, Any]:
    """The values for ``kind``'s fields: exactly those, each of its type."""
    what = kind.__name__
    if not isinstance(data, dict):
        raise CheckpointError(f"its manifest has a {what} that is no object")
    wanted = {field.name: str(field.type) for field in fields(kind)}
    if data.keys() != wanted.keys():
        odd = ", ".join(sorted(data.keys() ^ wanted.keys()))
        raise CheckpointError(f"its manifest has a {what} with missing or unknown keys: {odd}")
    for name, annotation in wanted.items():
        if not _CHECKS[annotation](data[name]):
            raise CheckpointError(f"its manifest has a {what} whose {name} is no {annotation}")
    return dict(data)
