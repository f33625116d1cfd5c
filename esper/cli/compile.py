"""``esper compile``: from a blueprint to an artifact, in a file or in a registry."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from esper.contracts.errors import BlueprintError

if TYPE_CHECKING:
    from esper.blueprints.ir import Blueprint

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["PIPELINES", "add_parser", "choose_pipeline", "run"]

#: As in ``esper.services.tezzeret.pipelines``, which is too much to load for a line of help.
PIPELINES = ("fast", "standard", "aggressive")

_EPILOG = """\
examples:
  esper compile lowrank --d-in 64 --d-out 64 --rank 8 --registry runs/registry
  esper compile bottleneck --d-in 64 --d-out 128 --param activation=gelu --param mode=replace -o kernel.safetensors
  esper compile my_blueprint.json --d-in 64 --d-out 64
  esper compile lowrank --d-in 64 --d-out 64 --arch sm_90 --arch sm_80 --dtype bf16 --sign-key forge.key -o k
"""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a blueprint to a kernel artifact",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("blueprint", metavar="BLUEPRINT", help="name of a ready-made blueprint, or a JSON file")
    parser.add_argument("--d-in", type=int, required=True, metavar="N", help="features the sub-network reads")
    parser.add_argument("--d-out", type=int, required=True, metavar="N", help="features it changes")
    parser.add_argument("--rank", type=int, metavar="R", help="short for --param rank=R")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the blueprint, or another option of a ready-made one (mode, tap, scope, activation, ...)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the initial weights (default 0)")
    parser.add_argument(
        "--dtype",
        action="append",
        metavar="TYPE",
        help="of the weights: fp32 (default), fp64, fp16 or bf16; given again: more types that GPU binaries compute in",
    )
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="SM",
        help="put GPU binaries for this architecture, such as sm_90, into the artifact; may be given again",
    )
    parser.add_argument(
        "--pipeline",
        choices=PIPELINES,
        help="fast: no GPU binaries; standard: binaries for every --arch, without a GPU; aggressive: tuned on the GPU "
        "of this machine (default: standard with --arch, else fast)",
    )
    parser.add_argument("--sign-key", metavar="KEY", help="sign with this key file (`esper keygen` makes one)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the artifact to this file")
    where.add_argument(
        "--registry",
        metavar="URL",
        help="publish it there: a path, a file:// or an http(s):// URL (default ESPER_REGISTRY, else the user's)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile; prints the artifact's id, alone on its line."""
    from esper.artifacts import Artifact, open_registry
    from esper.artifacts.signing import SigningKey
    from esper.services.tezzeret.forge import build, compile_blueprint

    options = _options(args.param, args.rank)
    blueprint = _blueprint(args.blueprint)
    dtypes = args.dtype or ["float32"]
    common: dict[str, Any] = {
        "d_in": args.d_in,
        "d_out": args.d_out,
        "seed": args.seed,
        "dtype": dtypes[0],
        "compute_dtypes": dtypes if len(dtypes) > 1 else (),
        "pipeline": choose_pipeline(args.pipeline, args.arch),
        "architectures": args.arch,
        "sign_with": None if args.sign_key is None else SigningKey.load(args.sign_key),
        **options,
    }
    if args.output is None:
        print(compile_blueprint(blueprint, registry=open_registry(args.registry), **common))
        return 0
    data = build(blueprint, **common)
    _write(args.output, data)
    print(Artifact.open(data, policy="standard").artifact_id)
    return 0


def choose_pipeline(given: str | None, architectures: list[str]) -> str:
    """The pipeline as given; else the one that the architectures ask for."""
    return given or ("standard" if architectures else "fast")


def _blueprint(given: str) -> Blueprint | str:
    """A file where the name looks like one or is one; else a name, which the library answers for."""
    from esper.blueprints.ir import from_json

    path = Path(given)
    if path.suffix == ".json" or os.sep in given:
        try:
            return from_json(path.read_bytes())
        except OSError as error:
            raise BlueprintError(f"cannot read the blueprint {given}: {error.strerror}") from None
    return given


def _options(pairs: list[str], rank: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rank is not None:
        options["rank"] = rank
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--param {pair!r}: expected KEY=VALUE")
        if key in options:
            raise ValueError(f"{key} is given twice")
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    """Numbers, booleans, null and lists as in JSON; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None
