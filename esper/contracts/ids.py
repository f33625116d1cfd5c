"""Names of artifacts: the readable id, and the integer that stands for it in the lattice.

``<blueprint hash, 16 hex>-<target>-<pipeline>-<version hash, 8 hex>``. The version hash is the beginning of the
SHA-256 of the artifact's bytes, so weights, sizes, seed and tool versions all count, and whoever holds the bytes can
check the id.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from esper.contracts.errors import KernelNotFoundError

__all__ = [
    "JOB_PATTERN",
    "TAG_PATTERN",
    "TARGET_ANY",
    "ArtifactId",
    "artifact_id_wanted",
    "check_sha256",
    "kernel_id",
    "parse_artifact_id",
]

#: Target of an artifact without GPU binaries: its blueprint runs wherever the package runs.
TARGET_ANY = "any"

#: A whole tag of an artifact, and the whole name of a job: what registries take, and whoever sends to them checks.
TAG_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.:/+=-]{0,63}"
JOB_PATTERN = r"[0-9a-f]{32}"

# No dot, slash or backslash can match, so an id that passed is safe as a file name.
_ID = re.compile(r"([0-9a-f]{16})-([a-z0-9_]{1,32})-([a-z]{1,16})-([0-9a-f]{8})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactId(NamedTuple):
    """The four parts of an artifact id; ``str()`` joins them."""

    blueprint: str
    target: str
    pipeline: str
    version: str

    def __str__(self) -> str:
        return "-".join(self)

    @classmethod
    def of(cls, blueprint_hash: str, target: str, pipeline: str, file_sha256: str) -> ArtifactId:
        """The id of an artifact.

        Args:
            blueprint_hash: SHA-256 of the canonical blueprint, 64 hex digits.
            target: What it was built for (:data:`TARGET_ANY` without GPU binaries).
            pipeline: The pipeline that built it.
            file_sha256: SHA-256 of the artifact's bytes, 64 hex digits.

        Raises:
            ValueError: if a part does not fit the pattern.
        """
        return parse_artifact_id(f"{blueprint_hash[:16]}-{target}-{pipeline}-{file_sha256[:8]}")


def parse_artifact_id(text: object) -> ArtifactId:
    """Split and check an artifact id.

    Raises:
        ValueError: if ``text`` is not an artifact id; nothing has touched the file system by then.
    """
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        shown = repr(text)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(
            f"{shown} is not an artifact id; expected <16 hex digits>-<target>-<pipeline>-<8 hex digits>, "
            "as esper.compile returns it"
        )
    return ArtifactId(*found.groups())


def artifact_id_wanted(text: object) -> ArtifactId:
    """As :func:`parse_artifact_id`, for those who look one up: what is no id is nowhere.

    Raises:
        KernelNotFoundError: if ``text`` is not an artifact id.
    """
    try:
        return parse_artifact_id(text)
    except ValueError as error:
        raise KernelNotFoundError(str(error)) from None


def check_sha256(text: object) -> str:
    """Return ``text`` if it is a SHA-256 in lower-case hex, else raise ``ValueError``."""
    if isinstance(text, str) and _SHA256.fullmatch(text):
        return text
    raise ValueError(f"{text!r:.80} is not a SHA-256 in lower-case hex")


def kernel_id(sha256: str) -> int:
    """First 63 bits of a SHA-256 (64 hex digits) as a non-negative int64, for the lattice's ``active_kernel_id``."""
    return int(sha256[:16], 16) >> 1
