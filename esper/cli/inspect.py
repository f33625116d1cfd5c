"""``esper inspect``: what is in an artifact, without loading a weight."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from esper.contracts.errors import KernelNotFoundError
from esper.contracts.ids import ArtifactId, kernel_id, parse_artifact_id

if TYPE_CHECKING:
    from esper.contracts.manifest import Manifest

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser("inspect", help="show what is in an artifact")
    parser.add_argument("artifact", metavar="FILE|ID", help="an artifact's file, or its id in a registry")
    parser.add_argument(
        "--registry", metavar="URL", help="where to look an id up (default ESPER_REGISTRY, else the user's)"
    )
    parser.add_argument("--verify", action="store_true", help="also check every hash, the blueprint and the weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the manifest; with ``--verify`` a bad artifact ends in an error."""
    from esper.artifacts.artifact import Artifact, hash_file, read_manifest
    from esper.artifacts.text import dtype_of, parameter_count

    path = _locate(args.artifact, args.registry)
    manifest, size = read_manifest(path)
    sha256 = hash_file(path)
    if args.verify:
        Artifact.open(path)
    identity = str(ArtifactId.of(manifest.blueprint_hash, manifest.target, manifest.pipeline, sha256))
    facts: dict[str, Any] = {
        "artifact_id": identity,
        "file": str(path),
        "bytes": size,
        "sha256": sha256,
        "kernel_id": kernel_id(sha256),
        "blueprint": manifest.blueprint.get("name"),
        "blueprint_hash": manifest.blueprint_hash,
        "family": manifest.family,
        **{key: manifest.blueprint.get(key) for key in ("tap", "mode", "scope", "parameters")},
        "d_in": manifest.d_in,
        "d_out": manifest.d_out,
        "weights": parameter_count(manifest),
        "dtype": dtype_of(manifest),
        "seed": manifest.seed,
        "target": manifest.target,
        "pipeline": manifest.pipeline,
        "tools": dict(manifest.tools),
        "provenance": dict(manifest.provenance),
        "notes": list(manifest.notes),
        "verified": bool(args.verify),
    }
    tensors = {name: {"shape": list(entry.shape), "dtype": entry.dtype} for name, entry in manifest.tensors.items()}
    if args.json:
        print(json.dumps({**facts, "tensors": tensors, "nodes": manifest.blueprint.get("nodes")}, indent=2))
    else:
        print("\n".join([*_lines(facts), *_graph(manifest), *_tensors(manifest)]))
    return 0


def _locate(given: str, registry: str | None) -> Path:
    """The file: the path given, or where the registry keeps the id given."""
    from esper.artifacts import FileRegistry, open_registry

    path = Path(given)
    if path.exists():
        return path
    try:
        parse_artifact_id(given)
    except ValueError:
        raise KernelNotFoundError(f"{given}: no such file, and not an artifact id") from None
    client = open_registry(registry)
    if not isinstance(client, FileRegistry):
        raise ValueError(f"{client.url}: only file:// registries can be looked into")
    return client.blob_path(given)


def _lines(facts: dict[str, Any]) -> list[str]:
    shown = {key.replace("_", " "): value for key, value in facts.items() if value not in ({}, [])}
    width = max(map(len, shown))
    return [f"{key:<{width}}  {_shown(value)}" for key, value in shown.items()]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return _printable(", ".join(f"{key} {item}" for key, item in value.items()))
    if isinstance(value, list):
        return _printable("; ".join(map(str, value)))
    return ("no", "yes")[value] if isinstance(value, bool) else _printable(value)


def _printable(value: Any) -> str:
    """Text from an artifact as it may go to a terminal: no control characters."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def _graph(manifest: Manifest) -> list[str]:
    nodes = manifest.blueprint.get("nodes")
    rows = []
    for node in nodes if isinstance(nodes, list) else []:
        if not isinstance(node, dict):
            continue
        rest = {key: value for key, value in node.items() if key not in ("name", "op", "inputs")}
        inputs = node.get("inputs")
        rows.append(
            (
                node.get("name"),
                node.get("op"),
                ", ".join(map(str, inputs)) if isinstance(inputs, list) else "",
                " ".join(f"{key}={value}" for key, value in rest.items()),
            )
        )
    return ["", *_table(("node", "op", "inputs", "attributes"), rows)] if rows else []


def _tensors(manifest: Manifest) -> list[str]:
    rows = [
        (name, entry.dtype, "x".join(map(str, entry.shape)) or "scalar", entry.sha256[:16])
        for name, entry in manifest.tensors.items()
    ]
    return ["", *_table(("tensor", "dtype", "shape", "sha256"), rows)] if rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(head), *([_printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
