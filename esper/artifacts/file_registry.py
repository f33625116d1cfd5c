"""The embedded registry: a folder, no server. What ``file://`` URLs and plain paths mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from esper.artifacts.artifact import DEFAULT_MAX_BYTES, Artifact
from esper.artifacts.folder import ArtifactFolder
from esper.artifacts.text import summarise
from esper.artifacts.workers import run_blocking
from esper.contracts.registry import ArtifactSummary

__all__ = ["FileRegistry"]


class FileRegistry:
    """A registry in a folder; see :mod:`esper.artifacts.folder` for its layout.

    All coroutines do their file work in worker threads and run on any event loop. Several processes may share the
    folder.

    Args:
        folder: Made by the first :meth:`publish`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._files = ArtifactFolder(self.folder, durable=True)

    @property
    def url(self) -> str:
        """The folder as a ``file://`` URL."""
        return self.folder.as_uri()

    async def fetch(self, artifact_id: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> bytearray:
        """The artifact's bytes, checked against the SHA-256 they are stored under.

        Raises:
            KernelNotFoundError: it is not there.
            RegistryUnavailableError: the folder is gone or cannot be read.
            ArtifactError: it is larger than ``max_bytes`` (found before it is read), or was altered.
        """
        data, _ = await run_blocking(self._files.read, artifact_id, max_bytes)
        return data

    async def publish(self, data: bytes) -> str:
        """Verify and store an artifact; storing it again changes nothing, a damaged copy is repaired.

        Returns:
            The artifact's id.

        Raises:
            ArtifactError: the bytes are no artifact, or another artifact has the same id.
            RegistryUnavailableError: the folder cannot be written.
        """
        return await run_blocking(self.publish_sync, data)

    async def list(self, *, prefix: str = "") -> Sequence[ArtifactSummary]:
        """What there is, sorted by id; damaged entries are left out with a warning."""
        return await run_blocking(self._files.entries, prefix)

    async def describe(self, artifact_id: str) -> ArtifactSummary:
        """One artifact's facts from the index; errors as for :meth:`fetch`."""
        return await run_blocking(self._files.entry, artifact_id)

    def publish_sync(self, data: bytes) -> str:
        """:meth:`publish` for callers without an event loop."""
        # A registry keeps what is sound; whom to trust is for those to say who load it.
        artifact = Artifact.open(data, policy="standard")
        summary = ArtifactSummary(artifact.artifact_id, artifact.sha256, artifact.nbytes, summarise(artifact.manifest))
        self._files.store(data, summary)
        return artifact.artifact_id

    def blob_path(self, artifact_id: str) -> Path:
        """The file that holds an artifact; errors as for :meth:`fetch`."""
        return self._files.blob_path(self._files.entry(artifact_id).sha256)

    def __repr__(self) -> str:
        return f"FileRegistry({str(self.folder)!r})"
