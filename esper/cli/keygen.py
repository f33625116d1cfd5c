"""``esper keygen``: a key pair for signing artifacts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser("keygen", help="make a key pair for signing artifacts")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("esper"),
        metavar="NAME",
        help="write NAME.key (private, mode 600) and NAME.pub (public); existing files are left alone (default esper)",
    )


def run(args: argparse.Namespace) -> int:
    """Write both files; prints where they are, and the public key in one line."""
    from esper.artifacts import SigningKey

    private, public = (args.output.with_name(f"{args.output.name}{suffix}") for suffix in (".key", ".pub"))
    if public.exists():
        raise FileExistsError(f"{public} exists; a key is never overwritten")
    key = SigningKey.generate()
    key.save(private)
    try:
        key.public.save(public)
    except OSError:
        private.unlink()
        raise
    print(f"key id       {key.key_id}")
    print(f"private key  {private} (whoever has it can sign in your name)")
    print(f"public key   {public}")
    print(f"to trust it  ESPER_TRUSTED_KEYS={key.public.to_text()}")
    return 0
