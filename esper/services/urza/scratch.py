"""Uploads under way: a locked file each, gone when the upload ends, however it ends.

Between storing a blob and recording its kernel a second file marks the blob, so that the next start can remove it when
the process is killed just there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from esper.contracts.ids import check_sha256
from esper.services.urza.errors import unavailable

__all__ = ["Incoming", "incoming", "storing", "sweep"]


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
    path, file = _create(folder, "upload-")
    try:
        yield Incoming(path, file)
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def storing(folder: Path, sha256: str) -> Iterator[Callable[[], None]]:
    """Mark a blob that is stored and not yet recorded; calling what this gives says that it was settled either way."""
    path, file = _create(folder, f"storing-{sha256}-")
    settled = False

    def settle() -> None:
        nonlocal settled
        settled = True

    try:
        yield settle
    finally:
        if settled:
            path.unlink(missing_ok=True)
        file.close()


def sweep(folder: Path, drop_unrecorded: Callable[[str], None]) -> int:
    """Remove what killed processes left behind; how many files that were.

    A file that somebody still uses is locked, and a lock ends with its process, however that ends.

    Args:
        folder: The scratch folder.
        drop_unrecorded: Called with the hash of a blob that was stored; removes it unless it was also recorded.
    """
    removed = 0
    for path in [*folder.glob("upload-*"), *folder.glob("storing-*")]:
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name.startswith("storing-"):
                drop_unrecorded(check_sha256(path.name.split("-")[1]))
            path.unlink()
            removed += 1
    return removed


def _create(folder: Path, prefix: str) -> tuple[Path, BinaryIO]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"{prefix}{secrets.token_hex(16)}"
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
