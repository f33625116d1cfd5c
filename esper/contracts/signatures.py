"""Signatures in an artifact's metadata: their form. Whether one verifies is :mod:`esper.artifacts.trust`'s question.

Under ``esper.signatures`` stands a JSON list of ``{"key_id", "algorithm", "signature"}``. What is signed is a fixed
prefix and the manifest's text exactly as it stands in the file; the manifest holds the SHA-256 of every tensor and
binary, so a signature vouches for all of them. The prefix keeps a signature made for another purpose from passing here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError

__all__ = ["ALGORITHM", "SIGNATURES_KEY", "Signature", "format_signatures", "parse_signatures", "signed_message"]

#: Key of the signatures in the file's metadata.
SIGNATURES_KEY: Final = "esper.signatures"
ALGORITHM: Final = "ed25519"
MAX_SIGNATURES: Final = 16
_MAX_BYTES: Final = 1 << 13
_SIGNATURE_BYTES: Final = 64
_DOMAIN: Final = b"esper-artifact-v1\0"
_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Signature:
    """One Ed25519 signature.

    Attributes:
        key_id: Of the key that is said to have made it: 16 hex digits, the first 64 bits of the SHA-256 of the public
            key. It only says which key to try.
        value: 64 bytes.
    """

    key_id: str
    value: bytes


def signed_message(manifest: str) -> bytes:
    """The bytes that a signature of this manifest covers."""
    return _DOMAIN + manifest.encode("utf-8")


def format_signatures(signatures: Sequence[Signature]) -> str:
    """Signatures as canonical JSON, sorted by key, so that the order of signing does not count."""
    return strict_json.canonical(
        [
            {
                "key_id": signature.key_id,
                "algorithm": ALGORITHM,
                "signature": base64.b64encode(signature.value).decode("ascii"),
            }
            for signature in sorted(signatures, key=lambda signature: signature.key_id)
        ]
    )


def parse_signatures(text: str) -> tuple[Signature, ...]:
    """Read the metadata's signatures.

    Raises:
        ArtifactError: for anything else than a list of 1 to 16 well-formed signatures by different keys.
    """
    data = strict_json.loads(text, what="the list of signatures", max_bytes=_MAX_BYTES)
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_SIGNATURES:
        raise ArtifactError(f"{SIGNATURES_KEY} must be a list of 1 to {MAX_SIGNATURES} signatures")
    signatures = tuple(map(_signature, data))
    if len({signature.key_id for signature in signatures}) != len(signatures):
        raise ArtifactError(f"{SIGNATURES_KEY} has two signatures by one key")
    return signatures


def _signature(entry: object) -> Signature:
    if not isinstance(entry, dict) or entry.keys() != {"key_id", "algorithm", "signature"}:
        raise ArtifactError("a signature must be an object with exactly key_id, algorithm and signature")
    key_id, algorithm, encoded = entry["key_id"], entry["algorithm"], entry["signature"]
    if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise ArtifactError(f"a signature's key_id is {key_id!a:.40}, not 16 hex digits")
    if algorithm != ALGORITHM:
        raise ArtifactError(f"signature by {key_id}: algorithm {algorithm!a:.40} is not known; known: {ALGORITHM}")
    try:
        value = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except (binascii.Error, ValueError):
        value = b""
    # One encoding only: base64 leaves bits over that a decoder passes over.
    if len(value) != _SIGNATURE_BYTES or base64.b64encode(value).decode("ascii") != encoded:
        raise ArtifactError(f"signature by {key_id}: not {_SIGNATURE_BYTES} bytes in base64")
    return Signature(key_id, value)
