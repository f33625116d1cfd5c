"""``esper inspect``: what is in an artifact, without loading a weight."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, TypeAlias

from esper.cli.sources import find, printable, table
from esper.contracts.ids import ArtifactId, kernel_id

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
    parser.add_argument(
        "--trusted-keys",
        metavar="KEYS",
        help="files, folders or ed25519:<base64>, separated by colons (default ESPER_TRUSTED_KEYS)",
    )
    parser.add_argument("--verify", action="store_true", help="also check every hash, the blueprint and the weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the manifest; with ``--verify`` a bad artifact ends in an error."""
    from esper.artifacts.keyring import KeyRing
    from esper.artifacts.text import dtype_of, parameter_count
    from esper.artifacts.trust import check_signatures

    source = find(args.artifact, args.registry)
    head = source.head()
    manifest, sha256 = head.manifest, source.sha256()
    keys = KeyRing.load(args.trusted_keys) if head.signatures else KeyRing()
    checks = check_signatures(head.text, head.signatures, keys)
    if args.verify:
        from esper.artifacts.artifact import Artifact

        Artifact.adopt(source.read(), trusted_keys=keys)
    identity = str(ArtifactId.of(manifest.blueprint_hash, manifest.target, manifest.pipeline, sha256))
    facts: dict[str, Any] = {
        "artifact_id": identity,
        "file": source.place,
        "bytes": head.container.size,
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
        "signatures": {check.key_id: str(check.state) for check in checks},
        "verified": bool(args.verify),
    }
    tensors = {name: {"shape": list(entry.shape), "dtype": entry.dtype} for name, entry in manifest.tensors.items()}
    if args.json:
        binaries = {name: entry.to_dict() for name, entry in manifest.binaries.items()}
        nodes = manifest.blueprint.get("nodes")
        print(json.dumps({**facts, "tensors": tensors, "binaries": binaries, "nodes": nodes}, indent=2))
    else:
        print("\n".join([*_lines(facts), *_graph(manifest), *_tensors(manifest), *_binaries(manifest)]))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    shown = {key.replace("_", " "): value for key, value in facts.items() if value not in ({}, [])}
    width = max(map(len, shown))
    return [f"{key:<{width}}  {_shown(value)}" for key, value in shown.items()]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return printable(", ".join(f"{key} {item}" for key, item in value.items()))
    if isinstance(value, list):
        return printable("; ".join(map(str, value)))
    return ("no", "yes")[value] if isinstance(value, bool) else printable(value)


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
    return ["", *table(("node", "op", "inputs", "attributes"), rows)] if rows else []


def _tensors(manifest: Manifest) -> list[str]:
    rows = [
        (name, entry.dtype, "x".join(map(str, entry.shape)) or "scalar", entry.sha256[:16])
        for name, entry in manifest.tensors.items()
    ]
    return ["", *table(("tensor", "dtype", "shape", "sha256"), rows)] if rows else []


def _binaries(manifest: Manifest) -> list[str]:
    rows = [
        (name, entry.kernel, entry.size, entry.registers, entry.spills, entry.shared, entry.num_warps)
        for name, entry in manifest.binaries.items()
    ]
    head = ("binary", "kernel", "bytes", "registers", "spills", "shared", "warps")
    return ["", *table(head, rows)] if rows else []
