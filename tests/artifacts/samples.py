"""Small artifacts, and files that pretend to be some."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import torch

from esper.artifacts import SigningKey, pack
from esper.blueprints import get, initialise
from esper.contracts.manifest import METADATA_KEY, BinaryEntry


def sample(seed: int = 0, *, d_in: int = 6, d_out: int = 4, rank: int = 2, dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes of a bottleneck, less than 2 KiB."""
    blueprint = get("bottleneck", rank=rank)
    weights = initialise(blueprint, d_in, d_out, seed, dtype)
    return pack(blueprint, weights, d_in=d_in, d_out=d_out, seed=seed)


#: The same keys on every run, so that signed samples have the same bytes. Their secrets are no secrets.
ALICE: SigningKey
MALLORY: SigningKey

_SECRETS = {"ALICE": bytes(range(32)), "MALLORY": bytes(range(1, 33))}


@functools.cache
def __getattr__(name: str) -> SigningKey:
    """The keys, made when asked for: where ``cryptography`` is missing, what is not signed can still be had."""
    if name not in _SECRETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return SigningKey.from_bytes(_SECRETS[name])


def binary(code: bytes, **changes: Any) -> tuple[BinaryEntry, bytes]:
    """An entry that fits these bytes, and the bytes."""
    facts: dict[str, Any] = {
        "arch": "sm_90",
        "dtype": "bf16",
        "direction": "forward",
        "kernel": "bank_kernel",
        "symbol": "bank_kernel",
        "signature": (("x", "*bf16"), ("n", "i32")),
        "constants": {"BLOCK": 64},
        "num_warps": 4,
        "shared": 4096,
        "registers": 96,
        "spills": 0,
        "tools": {"triton": "3.9.0", "ptxas": "13.0.88"},
        "sha256": hashlib.sha256(code).hexdigest(),
        "size": len(code),
    }
    return BinaryEntry(**{**facts, **changes}), code


def sample_binaries() -> dict[str, tuple[BinaryEntry, bytes]]:
    """Three binaries for two architectures; their code is none."""
    return {
        "gpu/sm_80/bf16/forward": binary(b"\x7fELF" + b"80 forward", arch="sm_80"),
        "gpu/sm_90/bf16/forward": binary(b"\x7fELF" + b"90 forward"),
        "gpu/sm_90/bf16/backward/bank_kernel": binary(b"\x7fELF" + b"90 back", direction="backward"),
    }


def sample_with_binaries(sign_with: SigningKey | None = None) -> bytes:
    """:func:`sample` with :func:`sample_binaries`, signed or not."""
    blueprint = get("bottleneck", rank=2)
    weights = initialise(blueprint, 6, 4, 0)
    return pack(
        blueprint,
        weights,
        d_in=6,
        d_out=4,
        seed=0,
        pipeline="standard",
        binaries=sample_binaries(),
        sign_with=sign_with,
    )


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    """A file of these, its data aligned."""
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + body


def with_manifest(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its manifest changed in place by ``change``."""
    header, body = split(data)
    manifest = json.loads(header["__metadata__"][METADATA_KEY])
    change(manifest)
    header["__metadata__"][METADATA_KEY] = json.dumps(manifest)
    return join(header, body)


def forged(data: bytes, name: str, tensor: torch.Tensor) -> bytes:
    """The file with another tensor under ``name``, header, hashes and manifest all made to agree with it."""
    header, body = split(data)
    metadata = header.pop("__metadata__")
    manifest = json.loads(metadata[METADATA_KEY])
    raw = {key: body[slice(*entry["data_offsets"])] for key, entry in header.items()}
    raw[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    codes = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    shapes = {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}
    shapes[name] = (codes[str(tensor.dtype)], list(tensor.shape))
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    made: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for key in sorted(raw, key=lambda key: -widths[shapes[key][0]]):
        code, shape = shapes[key]
        made[key] = {"dtype": code, "shape": shape, "data_offsets": [len(body), len(body) + len(raw[key])]}
        body += raw[key]
    manifest["tensors"][name] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(raw[name]).hexdigest(),
    }
    metadata[METADATA_KEY] = json.dumps(manifest)
    return join(made, body)
