"""``esper verify``: check everything about an artifact, one line a finding."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from esper.cli.sources import Source, find, printable
from esper.contracts.errors import ArtifactError

if TYPE_CHECKING:
    from esper.artifacts.keyring import KeyRing

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]

_EPILOG = """\
exit status: 0 if the artifact is sound, every signature by a trusted key verifies and, with --strict, there is one;
else 1. A signature by a key that is not trusted says nothing, for or against.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "verify", help="check an artifact's hashes, blueprint and signatures", epilog=_EPILOG
    )
    parser.add_argument("artifact", metavar="FILE|ID", help="an artifact's file, or its id in a registry")
    parser.add_argument(
        "--registry", metavar="URL", help="where to look an id up (default ESPER_REGISTRY, else the user's)"
    )
    parser.add_argument(
        "--trusted-keys",
        metavar="KEYS",
        help="files, folders or ed25519:<base64>, separated by colons (default ESPER_TRUSTED_KEYS)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="a signature by a trusted key is needed (also: ESPER_TRUST_POLICY=strict)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from esper.artifacts import KeyRing
    from esper.artifacts.trust import resolve_policy

    keys = KeyRing.load(args.trusted_keys)
    policy = "strict" if args.strict else resolve_policy(None)
    source = find(args.artifact, args.registry)
    sound = True
    for verdict, finding in _findings(source, keys, policy):
        print(f"{verdict:<4}  {printable(finding)}")
        sound = sound and verdict != "FAIL"
    return 0 if sound else 1


def _findings(source: Source, keys: KeyRing, policy: str) -> Iterator[tuple[str, str]]:
    """Each finding: ``ok``, ``note`` or ``FAIL``, and what was found."""
    from esper.artifacts.artifact import Artifact
    from esper.artifacts.signing import SignatureState, verify
    from esper.artifacts.trust import why_untrusted

    try:
        data = source.read()
        checks = verify(data, keys)
        artifact = Artifact.open(bytes(data), trusted_keys=(), policy="standard")
    except ArtifactError as error:
        yield "FAIL", str(error)
        return
    same = source.asked in ("", artifact.artifact_id)
    yield "ok" if same else "FAIL", f"id: {artifact.artifact_id}{'' if same else f', not {source.asked}'}"
    manifest = artifact.manifest
    yield "ok", f"form: {len(data)} bytes, header and manifest in agreement"
    yield "ok", f"hashes: {len(manifest.tensors)} tensors, {len(manifest.binaries)} GPU binaries"
    yield "ok", f"blueprint: {artifact.blueprint.name}, {artifact.d_in} -> {artifact.d_out}, weights finite"
    verdicts = {SignatureState.TRUSTED: "ok", SignatureState.BAD: "FAIL"}
    for check in checks:
        yield verdicts.get(check.state, "note"), f"signature: {check.reason or f'by {check.key_id}, a trusted key'}"
    if not any(check.trusted for check in checks):
        if policy == "strict":
            yield "FAIL", f"policy strict refuses it: {why_untrusted(checks)}"
        elif not checks:
            yield "note", "signature: none"
        if manifest.binaries:
            yield "note", f"its {len(manifest.binaries)} GPU binaries are not used here"
