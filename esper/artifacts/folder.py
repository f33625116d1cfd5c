"""Artifacts in a folder: content-addressed blobs and one small index entry an artifact.

::

    blobs/sha256/ab/abcdef...    the bytes, under their own SHA-256
    kernels/<artifact id>.json   which blob, its size, and the facts that a list shows
    quarantine/                  what was found altered
    tmp/                         files being written

A blob or an entry appears under its name by one rename, complete, or not at all; so any number of processes may read
and write one folder at once. The registry and the disk cache are both such a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from esper.artifacts.artifact import read_bytes
from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.ids import artifact_id_wanted, check_sha256, parse_artifact_id
from esper.contracts.registry import ArtifactSummary

__all__ = ["ArtifactFolder"]

T = TypeVar("T")

_ENTRY_FORMAT: Final = 1
_ENTRY_MAX_BYTES: Final = 1 << 16


class ArtifactFolder:
    """Artifacts under ``root``; blocking, safe from several threads and processes at once.

    Args:
        root: The folder; made by the first :meth:`store`.
        durable: Force everything to the disk before it counts as stored. A cache, which verifies what it reads and can
            fetch again, does without.
    """

    def __init__(self, root: Path, *, durable: bool) -> None:
        self.root = root
        self._durable = durable

    def read(self, artifact_id: str, max_bytes: int) -> tuple[bytearray, str]:
        """An artifact's bytes and their SHA-256, which agrees with the one on record.

        The size is checked before anything is read.

        Raises:
            KernelNotFoundError: it is not here, or ``artifact_id`` is no id.
            RegistryUnavailableError: the folder is gone or cannot be read.
            ArtifactError: it is larger than ``max_bytes`` or was altered.
        """
        entry = self.entry(artifact_id)
        if entry.size > max_bytes:
            raise ArtifactError(f"{artifact_id} has {entry.size} bytes, more than the limit of {max_bytes}")
        return self.read_blob(artifact_id, entry.sha256, entry.size), entry.sha256

    def read_blob(self, artifact_id: str, sha256: str, size: int) -> bytearray:
        """The bytes that an index entry names; errors as for :meth:`read`.

        The file is opened once, so one that is deleted meanwhile is either read whole or not there.
        """
        path = self.blob_path(sha256)
        with (
            self._reading(artifact_id, "its index entry is there, its blob is missing"),
            # Non-blocking, so that a pipe in the place of a file cannot hang the reader before it is recognised.
            open(
                path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_CLOEXEC)
            ) as file,
        ):
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{artifact_id}: its blob is not a regular file: {path}")
            if status.st_size != size:
                raise ArtifactError(
                    f"{artifact_id}: its blob has {status.st_size} bytes, the index says {size}: {path}"
                )
            data = bytearray(size)
            with memoryview(data) as view:
                got = 0
                while got < size and (step := file.readinto(view[got:])):
                    got += step
            if got < size or file.read(1):
                raise ArtifactError(f"{artifact_id}: its blob's size changed while it was read: {path}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != sha256:
            raise ArtifactError(
                f"{artifact_id}: its blob's SHA-256 is {digest}, not its name: the file was altered: {path}"
            )
        return data

    def entry(self, artifact_id: str) -> ArtifactSummary:
        """The index entry of an artifact; errors as for :meth:`read`."""
        path = self.entry_path(artifact_id)
        with self._reading(artifact_id, "no such artifact"), open(path, "rb") as file:
            text = file.read(_ENTRY_MAX_BYTES + 1)
        try:
            return _parse_entry(text, artifact_id)
        except (ArtifactError, ValueError) as error:
            raise ArtifactError(f"{artifact_id}: its index entry is damaged: {error}: {path}") from None

    def entries(self, prefix: str = "") -> list[ArtifactSummary]:
        """All entries whose id begins with ``prefix``, sorted by id; a damaged one is warned about and left out."""
        with self._reading(prefix, "no index"):
            if not self.root.is_dir():
                raise FileNotFoundError(self.root)
            names = sorted(path.stem for path in self.index.glob("*.json") if path.stem.startswith(prefix))
        found = []
        for name in names:
            try:
                found.append(self.entry(name))
            except KernelNotFoundError:
                continue  # removed since the folder was listed, or a file that is no artifact's
            except ArtifactError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        return found

    def store(self, data: bytes | bytearray, summary: ArtifactSummary) -> None:
        """Write an artifact that was verified. What is there and sound is left alone; what is damaged is replaced.

        Raises:
            ArtifactError: another artifact has the same id.
            RegistryUnavailableError: the folder cannot be written.
        """
        blob = self.blob_path(summary.sha256)
        with self._writing():
            if not self._holds(blob, summary):
                self._write(blob, data)
            try:
                present = self.entry(summary.artifact_id)
            except (ArtifactError, KernelNotFoundError, RegistryUnavailableError):
                self._write(self.entry_path(summary.artifact_id), _format_entry(summary))
                return
        if present.sha256 != summary.sha256:
            raise ArtifactError(
                f"{summary.artifact_id} is taken by other bytes (SHA-256 {present.sha256}, not {summary.sha256}); "
                "compile with another seed or provenance"
            )

    def quarantine(self, artifact_id: str) -> None:
        """Take an artifact out of the index; its blob, if there is one, is kept under ``quarantine/``."""
        with contextlib.suppress(ArtifactError, KernelNotFoundError):
            blob = self.blob_path(self.entry(artifact_id).sha256)
            with self._writing(), contextlib.suppress(FileNotFoundError):
                kept = self.root / "quarantine" / f"{blob.name}.{secrets.token_hex(4)}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                blob.rename(kept)
        with self._writing():
            self.entry_path(artifact_id).unlink(missing_ok=True)

    def blob_path(self, sha256: str) -> Path:
        """Where the bytes with this SHA-256 are, or would be."""
        return Path(f"{self.root}/blobs/sha256/{sha256[:2]}/{sha256}")

    def entry_path(self, artifact_id: str) -> Path:
        """Where the index entry of an artifact is, or would be.

        Raises:
            KernelNotFoundError: ``artifact_id`` is no id.
        """
        artifact_id_wanted(artifact_id)
        return self.index / f"{artifact_id}.json"

    @property
    def index(self) -> Path:
        """The folder of index entries."""
        return self.root / "kernels"

    def _holds(self, blob: Path, summary: ArtifactSummary) -> bool:
        try:
            return hashlib.sha256(read_bytes(blob, summary.size)).hexdigest() == summary.sha256
        except ArtifactError:
            return False

    def _write(self, path: Path, data: bytes | bytearray) -> None:
        temporary = self.root / "tmp" / f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with _made(temporary.parent, lambda: open(temporary, "xb", buffering=0)) as file:
                with memoryview(data) as view:
                    done = 0
                    while done < len(view):
                        done += file.write(view[done:])
                if self._durable:
                    os.fsync(file.fileno())
            _made(path.parent, lambda: os.replace(temporary, path))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if self._durable:
            _sync_folder(path.parent)

    @contextlib.contextmanager
    def _reading(self, artifact_id: str, missing: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            # The same error comes from a missing file and from a folder that vanished; the caller treats them
            # differently.
            if not self.root.is_dir():
                raise RegistryUnavailableError(f"the folder {self.root} does not exist") from None
            raise KernelNotFoundError(f"{artifact_id}: {missing} in {self.root}") from None
        except OSError as error:
            raise RegistryUnavailableError(f"cannot read {self.root}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except RegistryUnavailableError:
            raise
        except OSError as error:
            raise RegistryUnavailableError(f"cannot write to {self.root}: {error.strerror or error}") from error


def _format_entry(summary: ArtifactSummary) -> bytes:
    return strict_json.canonical(
        {
            "format": _ENTRY_FORMAT,
            "artifact_id": summary.artifact_id,
            "sha256": summary.sha256,
            "size": summary.size,
            "blob": f"sha256/{summary.sha256[:2]}/{summary.sha256}",
            "info": dict(summary.info),
        }
    ).encode("ascii")


def _parse_entry(text: bytes, artifact_id: str) -> ArtifactSummary:
    entry: Any = strict_json.loads(text, what="the entry", max_bytes=_ENTRY_MAX_BYTES)
    if not isinstance(entry, dict) or entry.get("format") != _ENTRY_FORMAT:
        raise ArtifactError(f"it is not an index entry of format {_ENTRY_FORMAT}")
    size, info, sha256 = entry.get("size"), entry.get("info"), check_sha256(entry.get("sha256"))
    if type(size) is not int or size < 0 or not isinstance(info, dict):
        raise ArtifactError("size or info is missing or of the wrong type")
    if entry.get("artifact_id") != artifact_id or parse_artifact_id(artifact_id).version != sha256[:8]:
        raise ArtifactError("it describes another artifact")
    return ArtifactSummary(artifact_id, sha256, size, info)


def _made(folder: Path, call: Callable[[], T]) -> T:
    """``call()``, with ``folder`` made if that is what it lacks: it is there nearly always, and asking costs time."""
    try:
        return call()
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return call()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
