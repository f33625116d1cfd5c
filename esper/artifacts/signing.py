"""Signing whole artifacts, and checking the signatures of one.

Keys and key rings can be had from here too: :class:`SigningKey`, :class:`PublicKey`, :class:`KeyRing`.
"""

from __future__ import annotations

from esper.artifacts.artifact import Artifact
from esper.artifacts.head import parse_head
from esper.artifacts.keyring import KeyRing, TrustedKeys
from esper.artifacts.keys import PublicKey, SigningKey, SigningUnavailableError, TrustError
from esper.artifacts.trust import SignatureCheck, SignatureState, check_signatures
from esper.contracts.container import with_metadata
from esper.contracts.signatures import SIGNATURES_KEY, Signature, format_signatures, signed_message

__all__ = [
    "KeyRing",
    "PublicKey",
    "SignatureCheck",
    "SignatureState",
    "SigningKey",
    "SigningUnavailableError",
    "TrustError",
    "sign",
    "verify",
]


def sign(data: bytes | bytearray, key: SigningKey) -> bytes:
    """An artifact's bytes with ``key``'s signature in them; signatures by other keys stay.

    The artifact is verified first: nobody signs what cannot be opened. Its bytes change, and so does its id.

    Raises:
        ArtifactError: if ``data`` is no sound artifact, or has too many signatures.
    """
    Artifact.open(bytes(data), trusted_keys=(), policy="standard")
    head = parse_head(data, len(data))
    others = [signature for signature in head.signatures if signature.key_id != key.key_id]
    signatures = [*others, Signature(key.key_id, key.sign(signed_message(head.text)))]
    signed = with_metadata(data, {**head.container.metadata, SIGNATURES_KEY: format_signatures(signatures)})
    Artifact.open(signed, trusted_keys=[key.public], policy="strict")
    return signed


def verify(data: bytes | bytearray | memoryview, trusted_keys: TrustedKeys = None) -> tuple[SignatureCheck, ...]:
    """What becomes of each signature of an artifact under these keys; nothing but header and signatures is looked at.

    Raises:
        ArtifactError: if the header, the manifest or the signatures are malformed.
        TrustError: if the keys cannot be read.
    """
    head = parse_head(data, len(data))
    return check_signatures(head.text, head.signatures, KeyRing.of(trusted_keys))
