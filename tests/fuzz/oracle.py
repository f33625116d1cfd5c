"""What must hold for any bytes: a valid artifact or an ArtifactError, in bounded time and memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import time
import tracemalloc
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from esper.artifacts import Artifact
from esper.artifacts.head import parse_head
from esper.contracts.errors import ArtifactError
from tests.artifacts.samples import ALICE

#: Memory allowed beyond twice the file's size: what the interpreter's objects for a header within its limits (1 MiB of
#: text, 20 000 JSON elements) can take. It counts for files of a few MiB at most.
SLACK_BYTES = 8 << 20
#: Nothing of the sizes here may take longer, on the slowest machine: a hang is what is looked for.
MAX_SECONDS = 20.0
_LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Outcome:
    """What became of some bytes.

    Attributes:
        artifact: The artifact, if they are one.
        message: The error, if not.
        extra_bytes: Peak of the memory allocated while they were opened.
        seconds: How long that took.
    """

    artifact: Artifact | None
    message: str
    extra_bytes: int
    seconds: float


def check(data: bytes) -> Outcome:
    """Open the bytes and hold the result against the promises.

    Raises:
        AssertionError: a promise is broken. So it is by any other exception.
    """
    outcome = _open(data)
    allowed = 2 * len(data) + SLACK_BYTES
    assert outcome.extra_bytes <= allowed, f"{outcome.extra_bytes} bytes of memory for a file of {len(data)}"
    assert outcome.seconds <= MAX_SECONDS, f"{outcome.seconds:.1f} s for a file of {len(data)} bytes"
    if outcome.artifact is None:
        assert outcome.message.isprintable(), "a message with control characters in it"
        assert len(outcome.message) <= _LONGEST_MESSAGE, "a message that repeats what it complains of"
    else:
        _check_accepted(outcome.artifact, data)
    _check_policies(outcome, data)
    return outcome


def _open(data: bytes) -> Outcome:
    artifact, message = None, ""
    tracemalloc.start()
    began = time.monotonic()
    try:
        artifact = Artifact.open(data, trusted_keys=[ALICE.public], policy="standard")
    except ArtifactError as error:
        message = str(error)
    finally:
        seconds = time.monotonic() - began
        extra = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Outcome(artifact, message, extra, seconds)


def _check_accepted(artifact: Artifact, data: bytes) -> None:
    """What was accepted can be used, and is what the bytes say."""
    head = parse_head(data, len(data))
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert artifact.artifact_id.endswith(artifact.sha256[:8])
    assert artifact.trusted == _vouched_for(data)
    hashed = sorted((span.begin, span.end) for span in head.container.tensors.values())
    assert [begin for begin, _ in hashed] + [len(data)] == [head.container.data_begin] + [end for _, end in hashed]
    for name, tensor in artifact.tensors().items():
        assert tuple(tensor.shape) == artifact.resolved.tensors[name]
        assert math.isfinite(float(tensor.double().abs().sum()))
    assert len(artifact.binaries) == (len(head.manifest.binaries) if artifact.trusted else 0)
    assert artifact.trusted or bool(artifact.notes) == bool(head.manifest.binaries)
    for binary in artifact.binaries:
        assert hashlib.sha256(binary.data).hexdigest() == binary.entry.sha256
        assert binary.name in binary.entry.names()
    assert "Artifact(" in repr(artifact)


def _vouched_for(data: bytes) -> bool:
    """Whether Alice signed this, found with nothing of the package but her public bytes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    message = b"esper-artifact-v1\0" + header["__metadata__"]["esper.manifest"].encode()
    key = Ed25519PublicKey.from_public_bytes(ALICE.public.raw)
    for signature in json.loads(header["__metadata__"].get("esper.signatures", "[]")):
        with contextlib.suppress(InvalidSignature):
            key.verify(base64.b64decode(signature["signature"]), message)
            return True
    return False


def _check_policies(outcome: Outcome, data: bytes) -> None:
    """Trusting nobody only takes binaries away; strict only refuses more."""
    try:
        stranger = Artifact.open(data, trusted_keys=(), policy="standard")
    except ArtifactError as error:
        assert outcome.artifact is None
        assert "does not verify" not in str(error)
    else:
        assert stranger.binaries == ()
        assert outcome.artifact is not None or "does not verify" in outcome.message
    try:
        strict = Artifact.open(data, trusted_keys=[ALICE.public], policy="strict")
    except ArtifactError:
        assert outcome.artifact is None or not outcome.artifact.trusted
    else:
        assert outcome.artifact is not None
        assert strict.trusted
        assert strict.artifact_id == outcome.artifact.artifact_id
