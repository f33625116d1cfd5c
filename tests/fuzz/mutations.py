"""Ways to spoil an artifact: bytes, the JSON of the header and the manifest, signatures, binaries.

Every mutation draws from the ``random.Random`` it is given, so that hypothesis can drive and shrink it and a long run
can repeat it from a seed. What is changed in the JSON is put together again with lengths, offsets, hashes and
signatures that agree, in part or in whole: a parser that stops at the first hash would otherwise never be tested behind
it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from esper.blueprints import blueprint_hash
from esper.blueprints.ir import from_json
from esper.contracts.errors import EsperError
from esper.contracts.manifest import METADATA_KEY
from esper.contracts.signatures import SIGNATURES_KEY
from tests.artifacts.samples import ALICE, MALLORY

#: Values that parsers trip over.
ODD: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63),
    2**64, 10**40, 0.0, -0.0, 1.0, 1.5, 1e308, 5e-324, "", "a", "x", "rank", "d_in", "d_out", "\0", "\n", "\u00e9",
    "\u202e", "\U0001f600", "\ud800", "../..", "any", "sm_90", "sm_80", "bf16", "forward", "backward", "float32",
    "uint8", "F32", "U8", "ed25519", "0" * 64, "f" * 16, "-1", "1e999", "NaN", [], {}, [[]], [{}], {"": None}, [0],
    [1, 2], [2**62, 2**62], "A" * 86 + "==", "x" * 5000,
)  # fmt: skip


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four things changed; ``other`` is a second file to take pieces from."""
    for _ in range(rng.randint(0, 3)):
        data = rng.choice(_STRUCTURE)(data, other, rng)
    # Last, because a file with broken bytes cannot be taken apart any more; and seldom, because it is refused early.
    if rng.random() < 0.3:
        data = rng.choice(_BYTES)(data, other, rng)
    return data


# -- bytes


def _flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(min(len(data), rng.randint(1, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(data))
    piece = rng.choice(
        [b"\0", b"\xff", b'"', b"{", b"}", b"[", b"\\", b"\\ud800", b"1e999", b"NaN", b"\xf0\x9f\x98\x80"]
    )
    return data[:at] + piece + data[at + rng.choice([0, len(piece)]) :]


def _truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _extend(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data + bytes(rng.randint(1, 64))


def _splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    begin = rng.randint(0, len(other))
    piece = other[begin : rng.randint(begin, len(other))]
    at = rng.randint(0, len(data))
    return data[:at] + piece + data[rng.randint(at, len(data)) :]


def _length(data: bytes, other: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return data
    length = int.from_bytes(data[:8], "little")
    new = rng.choice([0, 1, 2, length - 1, length + 1, length + 64, len(data) - 8, len(data), 1 << 20, (1 << 64) - 1])
    return (new % (1 << 64)).to_bytes(8, "little") + data[8:]


# -- structure


class Parts:
    """A file taken apart: header entries, metadata, manifest and signatures as JSON values, and the data."""

    def __init__(self, data: bytes, layout: dict[str, Any] | None = None) -> None:
        self.layout = layout or {}
        length = int.from_bytes(data[:8], "little")
        self.header: Any = json.loads(data[8 : 8 + length])
        self.metadata: Any = self.header.pop("__metadata__")
        self.manifest: Any = json.loads(self.metadata[METADATA_KEY])
        self.signatures: Any = json.loads(self.metadata.get(SIGNATURES_KEY, "null"))
        self.body = data[8 + length :]

    def text(self) -> str:
        """The manifest's text as it will stand in the file."""
        return json.dumps(self.manifest, **self.layout)

    def join(self) -> bytes:
        """The file again."""
        with contextlib.suppress(TypeError, AttributeError):
            self.metadata[METADATA_KEY] = self.text()
            if self.signatures is not None:
                self.metadata[SIGNATURES_KEY] = json.dumps(self.signatures)
        header = {"__metadata__": self.metadata, **self.header} if isinstance(self.header, dict) else self.header
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text + self.body


def _structural(
    change: Callable[[Parts, bytes, random.Random], None],
) -> Callable[[bytes, bytes, random.Random], bytes]:
    """A mutation of the parts; a file that is too broken to take apart stays as it is."""

    def run(data: bytes, other: bytes, rng: random.Random) -> bytes:
        try:
            parts = Parts(data, rng.choice([{}, {"separators": (",", ":")}, {"indent": 1}]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return data
        # The entries may be of any type by now, and then there is nothing to repair.
        with contextlib.suppress(KeyError, TypeError, AttributeError, IndexError, ValueError):
            change(parts, other, rng)
            _agree(parts, rng)
        return parts.join()

    return run


def _manifest(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.manifest = _edit(parts.manifest, rng)


def _blueprint(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.manifest["blueprint"] = _edit(parts.manifest["blueprint"], rng)


def _binary_entries(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.manifest["binaries"] = _edit(parts.manifest.get("binaries", {}), rng)


def _signatures(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.signatures = _edit(parts.signatures or [], rng)


def _header(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.header = _edit(parts.header, rng)


def _metadata(parts: Parts, other: bytes, rng: random.Random) -> None:
    parts.metadata = _edit(parts.metadata, rng)


def _data(parts: Parts, other: bytes, rng: random.Random) -> None:
    if rng.random() < 0.5:
        parts.body = _flip(parts.body, other, rng)
    else:  # a NaN in every format, where a number was
        at = rng.randrange(max(1, len(parts.body) // 8)) * 8
        parts.body = parts.body[:at] + (b"\xff" * 8)[: len(parts.body) - at] + parts.body[at + 8 :]


def _bloat(parts: Parts, other: bytes, rng: random.Random) -> None:
    """Much of something cheap to write: long text, many keys, many elements, deep nesting."""
    size = rng.choice([100, 3000, 30_000, 300_000])
    deep: Any = []
    for _ in range(min(size, 400)):
        deep = [deep]
    many = min(size, 6000)
    value = rng.choice(
        ["x" * size, "\U0001f600" + "x" * size, [0] * many, {str(i): i for i in range(many)}, [{}] * many, deep]
    )
    target = rng.choice([parts.manifest, parts.manifest["provenance"], parts.metadata, parts.header])
    target[rng.choice(["provenance", "tools", "blueprint", "tensors", "binaries", "by", "down.weight", "new"])] = value


def _foreign(parts: Parts, other: bytes, rng: random.Random) -> None:
    """A part of another artifact in the place of this one's."""
    theirs = Parts(other)
    name = rng.choice(["manifest", "signatures", "body", "header", "metadata"])
    setattr(parts, name, getattr(theirs, name))


def _nothing(parts: Parts, other: bytes, rng: random.Random) -> None:
    """Only what :func:`_agree` does."""


_Mutation: TypeAlias = Callable[[bytes, bytes, random.Random], bytes]
_BYTES: Sequence[_Mutation] = (_flip, _overwrite, _truncate, _extend, _splice, _length)
_EDITS = (_manifest, _blueprint, _binary_entries, _signatures, _header, _metadata, _data, _bloat, _foreign, _nothing)
_STRUCTURE: Sequence[_Mutation] = tuple(
    # The manifest has the most to get wrong.
    _structural(edit)
    for edit in (*_EDITS, _manifest, _blueprint, _blueprint, _binary_entries, _binary_entries)
)


def _edit(value: Any, rng: random.Random) -> Any:
    """A JSON value changed at one place, found by walking down at random."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        action = rng.random()
        if action < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.16:
            return {**value, _name(rng): value[key]}
        if action < 0.22:
            return {(_name(rng) if k == key else k): v for k, v in value.items()}
        return {**value, key: _edit(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:at] + value[at + 1 :]
        if action < 0.2:
            return [*value, value[at]]
        return [*value[:at], _edit(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 8])
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0aZ_/. \0\u00e9") + value[at + rng.randint(0, 1) :]
    return rng.choice(ODD)


def _name(rng: random.Random) -> str:
    names = [
        "",
        "a",
        "up.weight",
        "gpu/sm_90/bf16/forward",
        "gpu/",
        "__metadata__",
        "esper.manifest",
        "binaries",
        "\ud800",
    ]
    return rng.choice(names)


# -- agreement


def _agree(parts: Parts, rng: random.Random) -> None:
    """Make some of the hashes, offsets and signatures agree with what was changed."""
    for repair, chance in ((_hashes, 0.6), (_shapes, 0.3), (_blueprint_hash, 0.8), (_target, 0.8), (_sign, 0.6)):
        if rng.random() < chance:
            repair(parts, rng)


def _hashes(parts: Parts, rng: random.Random) -> None:
    for table in ("tensors", "binaries"):
        for name, entry in parts.manifest.get(table, {}).items():
            if name in parts.header:
                begin, end = parts.header[name]["data_offsets"]
                entry["sha256"] = hashlib.sha256(parts.body[begin:end]).hexdigest()


def _shapes(parts: Parts, rng: random.Random) -> None:
    """The manifest says of every tensor what the header says, and of every binary too."""
    for name, entry in parts.manifest["tensors"].items():
        if name in parts.header:
            entry["shape"] = parts.header[name]["shape"]
    for name, entry in parts.manifest.get("binaries", {}).items():
        if name in parts.header:
            entry["size"] = parts.header[name]["shape"][0]


def _blueprint_hash(parts: Parts, rng: random.Random) -> None:
    with contextlib.suppress(EsperError):
        parts.manifest["blueprint_hash"] = blueprint_hash(from_json(parts.manifest["blueprint"]))


def _target(parts: Parts, rng: random.Random) -> None:
    architectures = {entry["arch"] for entry in parts.manifest.get("binaries", {}).values()}
    parts.manifest["target"] = "_".join(sorted(architectures)) or "any"


def _sign(parts: Parts, rng: random.Random) -> None:
    text = parts.text()
    key = rng.choice([ALICE, ALICE, MALLORY])
    signature = base64.b64encode(key.sign(b"esper-artifact-v1\0" + text.encode("utf-8", "surrogatepass"))).decode()
    parts.signatures = [{"key_id": key.key_id, "algorithm": "ed25519", "signature": signature}]
