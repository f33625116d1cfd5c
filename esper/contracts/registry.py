"""What a registry of artifacts is to the rest of the package, and how it fails.

Three failures are kept apart, because the layer answers each differently: the artifact does not exist
(:class:`KernelNotFoundError`), the registry cannot be reached at present (:class:`RegistryUnavailableError`, worth
trying again), and the artifact was had and is bad (:class:`~esper.contracts.errors.ArtifactError`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from esper.contracts.errors import EsperError, KernelNotFoundError, RegistryUnavailableError

__all__ = [
    "ArtifactSummary",
    "KernelNotFoundError",
    "RegistryClient",
    "RegistryURLError",
    "RegistryUnavailableError",
    "mask_credentials",
]

#: What may stand behind a host: nothing, or a colon and digits; an IPv6 address has its colons in brackets.
_PORT: Final = re.compile(r"^(?:[^:]*|.*\])(?::[0-9]*)?$")


class RegistryURLError(EsperError, ValueError):
    """What was given as a registry's URL is none that this version can open."""


@dataclass(frozen=True, slots=True)
class ArtifactSummary:
    """One line of a registry's list.

    Attributes:
        artifact_id: The artifact's id.
        sha256: SHA-256 of its bytes, 64 hex digits.
        size: Its length in bytes.
        info: Facts copied from its manifest: ``name``, ``family``, ``d_in``, ``d_out``, ``dtype``, ``parameters``
            (count), ``seed``.
    """

    artifact_id: str
    sha256: str
    size: int
    info: Mapping[str, Any]


@runtime_checkable
class RegistryClient(Protocol):
    """What ``registry=`` accepts besides a URL. All coroutines may run on any event loop, from several threads."""

    @property
    def url(self) -> str:
        """Where the registry is, for messages; without credentials."""

    async def fetch(self, artifact_id: str, *, max_bytes: int) -> bytes | bytearray:
        """The artifact's bytes; their size is checked against ``max_bytes`` before they are read.

        A bytearray is given away: whoever returns one keeps no reference to it.

        Raises:
            KernelNotFoundError: it is not there.
            RegistryUnavailableError: the registry did not answer.
            ArtifactError: it is there and is bad, or too large.
        """

    async def publish(self, data: bytes) -> str:
        """Store an artifact and return its id; storing it again changes nothing.

        Raises:
            ArtifactError: the bytes are no artifact.
            RegistryUnavailableError: it could not be stored.
        """

    async def list(self, *, prefix: str = "") -> Sequence[ArtifactSummary]:
        """What there is, sorted by id, limited to ids that begin with ``prefix``."""

    async def describe(self, artifact_id: str) -> ArtifactSummary:
        """One artifact's line, without reading its bytes; errors as for :meth:`fetch`."""


def mask_credentials(url: str) -> str:
    """``url`` for messages and logs: user, password and query (where tokens travel) replaced by ``***``.

    Meant for URLs that may be wrong, too: of a password with an unescaped ``/`` a piece stands in the path, so all up
    to the last ``@`` is replaced; where it cannot be told what is a password, nothing is shown but the scheme.
    """
    scheme, separator, rest = url.partition("://")
    if separator and ("@" in rest.partition("?")[2] or "@" in rest.partition("#")[2]):
        # An unescaped ? or # in a password, or an @ in an option.
        return f"{scheme}://***"
    # But a file's path has no password in it.
    if "@" in (rest.partition("/")[0] if scheme in ("file", "unix") else rest):
        url = f"{scheme}://***@{rest.rpartition('@')[2]}"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    if not parts.scheme or not parts.netloc:
        # A socket's password stands in the query.
        return url.partition("?")[0] + "?***" if parts.scheme and parts.query else url
    if not _PORT.search(parts.netloc):
        # A password whose host was forgotten looks like a port.
        return f"{scheme}://***"
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "***" if parts.query else "", ""))
