"""Whom an artifact's signatures make it trusted by, and what follows.

Policy ``standard``: weights and blueprint stand on their hashes, and need no signature; GPU binaries are code, and are
handed out only under a trusted signature. Policy ``strict``: nothing is opened without one. Under both, a signature
that claims a trusted key and does not verify is an error: that is no stranger's file, but an altered one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from esper.artifacts.keyring import KeyRing
from esper.artifacts.keys import SigningUnavailableError, TrustError
from esper.contracts.errors import ArtifactError
from esper.contracts.signatures import Signature, signed_message

__all__ = [
    "POLICIES",
    "SignatureCheck",
    "SignatureState",
    "check_signatures",
    "decide",
    "resolve_policy",
    "why_untrusted",
]

POLICIES: Final = ("standard", "strict")
VARIABLE: Final = "ESPER_TRUST_POLICY"


class SignatureState(StrEnum):
    """What became of a signature."""

    TRUSTED = "trusted"  #: It verifies, and its key is trusted.
    UNKNOWN_KEY = "unknown key"  #: Its key is not among the trusted ones, so there is nothing to check it with.
    BAD = "bad"  #: Its key is trusted and did not sign this.
    UNCHECKED = "unchecked"  #: Its key is trusted, but this Python cannot check signatures.


@dataclass(frozen=True, slots=True)
class SignatureCheck:
    """One signature and what became of it.

    Attributes:
        key_id: The key it names.
        state: What became of it.
        reason: Why it is not trusted, or "".
    """

    key_id: str
    state: SignatureState
    reason: str = ""

    @property
    def trusted(self) -> bool:
        """Whether a trusted key made it."""
        return self.state is SignatureState.TRUSTED


def resolve_policy(policy: str | None) -> str:
    """The policy given, else ``ESPER_TRUST_POLICY``, else ``standard``.

    Raises:
        TrustError: if it is none.
    """
    where = "policy"
    if policy is None:
        policy, where = os.environ.get(VARIABLE) or POLICIES[0], VARIABLE
    if policy not in POLICIES:
        raise TrustError(f"{where} is {policy!a:.40}; possible: {', '.join(POLICIES)}")
    return policy


def check_signatures(manifest: str, signatures: Sequence[Signature], keys: KeyRing) -> tuple[SignatureCheck, ...]:
    """Every signature of a manifest's text against the trusted keys; raises nothing."""
    message = signed_message(manifest)
    return tuple(_check(message, signature, keys) for signature in signatures)


def decide(checks: Sequence[SignatureCheck], policy: str) -> bool:
    """Whether a trusted key vouches for the artifact.

    Raises:
        ArtifactError: for a bad signature; under ``strict`` also when nobody trusted vouches.
    """
    for check in checks:
        if check.state is SignatureState.BAD:
            raise ArtifactError(check.reason)
    trusted = any(check.trusted for check in checks)
    if policy == "strict" and not trusted:
        raise ArtifactError(f"refused by policy strict: {why_untrusted(checks)}")
    return trusted


def why_untrusted(checks: Sequence[SignatureCheck]) -> str:
    """Why no signature counts, in one line."""
    return "; ".join(check.reason for check in checks) or "it is not signed"


def _check(message: bytes, signature: Signature, keys: KeyRing) -> SignatureCheck:
    key = keys.get(signature.key_id)
    if key is None:
        return SignatureCheck(
            signature.key_id,
            SignatureState.UNKNOWN_KEY,
            f"it is signed by {signature.key_id}, which is not trusted here",
        )
    try:
        if key.verify(message, signature.value):
            return SignatureCheck(signature.key_id, SignatureState.TRUSTED)
    except SigningUnavailableError as error:
        return SignatureCheck(
            signature.key_id, SignatureState.UNCHECKED, f"its signature by {signature.key_id} is not checked: {error}"
        )
    return SignatureCheck(
        signature.key_id,
        SignatureState.BAD,
        f"the signature by the trusted key {signature.key_id} does not verify: the manifest was altered",
    )
