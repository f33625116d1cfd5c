"""``esper sign``: put a signature into an artifact, in a file or in a registry."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from esper.cli.sources import find, write_whole

if TYPE_CHECKING:
    from esper.contracts.registry import RegistryClient

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]

_EPILOG = """\
A signature is part of the file: the signed artifact has another id than the unsigned one.

examples:
  esper sign kernel.safetensors --key esper.key -o signed.safetensors
  esper sign affabf91870ff394-any-fast-f09f1273 --key esper.key --registry runs/registry
"""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "sign", help="sign an artifact", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", metavar="FILE|ID", help="an artifact's file, or its id in a registry")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key, from `esper keygen`")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the signed artifact to this file")
    parser.add_argument(
        "--registry",
        metavar="URL",
        help="where an id is looked up, and, without -o, where the signed artifact is published",
    )


def run(args: argparse.Namespace) -> int:
    """Sign; prints the signed artifact's id, alone on its line."""
    from esper.artifacts import Artifact, SigningKey, open_registry
    from esper.artifacts.signing import sign

    if args.output is None and args.registry is None and Path(args.artifact).exists():
        raise ValueError("where to? give -o FILE, or --registry URL to publish the signed artifact")
    key = SigningKey.load(args.key)
    data = sign(find(args.artifact, args.registry).read(), key)
    if args.output is None:
        print(asyncio.run(_publish(open_registry(args.registry), data)))
        return 0
    write_whole(args.output, data)
    print(Artifact.open(data, trusted_keys=[key.public]).artifact_id)
    return 0


async def _publish(client: RegistryClient, data: bytes) -> str:
    return await client.publish(data)
