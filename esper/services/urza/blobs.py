"""Where the artifacts' bytes are: a folder or S3, under their own SHA-256, written once and never changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from esper.services.urza.errors import unavailable
from esper.services.urza.settings import Settings

__all__ = ["PIECE", "BlobStore", "FolderBlobs", "blob_key", "open_blobs"]

#: Blobs are read and sent in pieces of this many bytes.
PIECE: Final = 1 << 20


class BlobStore(Protocol):
    """Blocking; safe from several threads and processes.

    Failures of the store itself (the folder is gone, S3 does not answer) are :class:`ApiError` 503.
    """

    @property
    def shown(self) -> str:
        """Where it is, without secrets."""

    def check(self) -> None:
        """Raise unless the store answers."""

    def put(self, sha256: str, source: Path, size: int) -> None:
        """Store a complete file durably; ``source`` may be moved away. The same bytes may be there already."""

    def size(self, sha256: str) -> int | None:
        """The blob's length, or None where there is none."""

    def read(self, sha256: str, start: int, length: int) -> bytes:
        """A piece of a blob that exists; shorter than asked only if the blob is."""

    def sign(self, sha256: str, seconds: int) -> str | None:
        """An address that gives the bytes for so long without our token, where the store has such a thing."""

    def delete(self, sha256: str) -> None:
        """Remove a blob; nothing happens where there is none."""


def blob_key(sha256: str) -> str:
    """Path of a blob below the store's root."""
    return f"sha256/{sha256[:2]}/{sha256}"


def open_blobs(settings: Settings) -> BlobStore:
    """The store that the settings name; nothing is touched yet but the folder, which is made."""
    if not settings.blobs.startswith("s3://"):
        return FolderBlobs(Path(settings.blobs))
    from esper.services.urza.blobs_s3 import S3Blobs

    return S3Blobs(settings.blobs, endpoint=settings.s3_endpoint, presign=settings.presign)


class FolderBlobs:
    """Blobs as files in a folder, made if need be."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @property
    def shown(self) -> str:
        """The folder."""
        return str(self._root)

    def check(self) -> None:
        """Raise unless the folder is there and can be written to."""
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise unavailable(f"the blobs' folder {self._root} is missing or cannot be written to")

    def put(self, sha256: str, source: Path, size: int) -> None:
        """Move a file into its place: complete and on the disk, or not there at all."""
        target = self._path(sha256)
        with self._failing("store"):
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            made = not target.parent.exists()
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            # A rename lasts once the folder is on the disk, and so does the folder once its own is.
            for folder in [target.parent, target.parent.parent, self._root] if made else [target.parent]:
                _sync(folder)

    def size(self, sha256: str) -> int | None:
        """The file's length."""
        with self._failing("look up"):
            try:
                return self._path(sha256).stat().st_size
            except FileNotFoundError:
                return None

    def read(self, sha256: str, start: int, length: int) -> bytes:
        """Part of the file."""
        with self._failing("read"), open(self._path(sha256), "rb", buffering=0) as file:
            pieces = []
            while length > 0 and (piece := os.pread(file.fileno(), length, start)):
                pieces.append(piece)
                start += len(piece)
                length -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sign(self, sha256: str, seconds: int) -> str | None:
        """A folder has no addresses."""
        del sha256, seconds
        return None

    def delete(self, sha256: str) -> None:
        """Remove the file."""
        with self._failing("delete"):
            self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._root / blob_key(sha256)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unavailable(f"cannot {what} the blob: {error.strerror or type(error).__name__}") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
