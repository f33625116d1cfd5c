"""Uploads under way: a locked file each, gone when the upload ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from esper.services.urza.errors import unavailable

__all__ = ["Incoming", "incoming", "sweep"]


class Incoming:
    """An upload that is arriving; blocking, one thread at a time."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = 0
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | bytearray) -> None:
        """Append."""
        try:
            self._file.write(data)
        except OSError as error:
            raise unavailable(f"the upload cannot be kept: {error.strerror or type(error).__name__}") from error
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def incoming(folder: Path) -> Iterator[Incoming]:
    """A new file for an upload; whatever happens, it is gone in the end, unless it was moved to its place."""
    path, file = _create(folder)
    try:
        yield Incoming(path, file)
    finally:
        path.unlink(missing_ok=True)
        file.close()


def sweep(folder: Path) -> int:
    """Remove what killed processes left behind; how many files that were.

    A file that somebody still writes is locked, and a lock ends with its process, however that ends.
    """
    removed = 0
    for path in folder.glob("upload-*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


def _create(folder: Path) -> tuple[Path, BinaryIO]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"upload-{secrets.token_hex(16)}"
            file = open(path, "xb", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return path, file
            except BlockingIOError:
                pass
            # A sweep was faster than the lock.
            file.close()
    except OSError as error:
        raise unavailable(f"no upload can be taken in: {error.strerror or type(error).__name__}") from error
