"""The corpus: small artifacts, sound and not, that the fuzzer starts from.

The files are committed, so that every run starts from the same bytes whatever versions are installed. To make them anew
after the format changed: ``python -m tests.fuzz.corpus``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from esper.artifacts import pack
from esper.artifacts.signing import sign
from esper.blueprints import Blueprint, Node, get, initialise
from tests.artifacts.samples import ALICE, MALLORY, join, sample, sample_with_binaries, split, with_manifest

FOLDER = Path(__file__).with_name("corpus")


def load() -> dict[str, bytes]:
    """Every file of the corpus by name."""
    return {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir())}


def make() -> dict[str, bytes]:
    """The corpus from this version's own writer."""
    bare = Blueprint(
        "bare",
        (Node("x", "input"), Node("a", "activation", ("x",), {"kind": "tanh"}), Node("y", "output", ("a",))),
    )
    made = {
        **{
            f"plain-{kind}": sample(dtype=getattr(torch, kind))
            for kind in ("float64", "float32", "float16", "bfloat16")
        },
        "bare": pack(bare, {}, d_in=4, d_out=4, seed=0),
        "conv": _ready("conv"),
        "gated": _ready("gated"),
        "provenance": with_manifest(sample(), lambda m: m.update(provenance={"by": "\u00e9\U0001f600", "": "x" * 300})),
        "binaries": sample_with_binaries(),
        "binaries-signed": sample_with_binaries(ALICE),
        "binaries-stranger": sample_with_binaries(MALLORY),
        "signed": sign(sample(), ALICE),
        "signed-twice": sign(sample_with_binaries(ALICE), MALLORY),
        "signed-altered": with_manifest(sample_with_binaries(ALICE), lambda m: m.update(seed=5)),
        "version-2": with_manifest(sample(), lambda m: m.update(format=2)),
        "no-manifest": join({"__metadata__": {}, **_tensors(sample())}, split(sample())[1]),
        "truncated": sample()[:-10],
        "deep": _header("[" * 500 + "]" * 500),
        "duplicate": _header('{"a":1,"a":2}'),
        "huge-length": (1 << 62).to_bytes(8, "little") + b"{}",
        "empty": b"",
    }
    return {f"{name}.safetensors": data for name, data in made.items()}


def _ready(name: str) -> bytes:
    blueprint = get(name)
    return pack(blueprint, initialise(blueprint, 4, 4, 0), d_in=4, d_out=4, seed=0)


def _tensors(data: bytes) -> dict[str, object]:
    return {name: entry for name, entry in split(data)[0].items() if name != "__metadata__"}


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def main() -> None:
    """Write the corpus over the committed one."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for name, data in make().items():
        (FOLDER / name).write_bytes(data)
    print(f"{len(load())} files, {sum(map(len, load().values()))} bytes")


if __name__ == "__main__":
    main()
