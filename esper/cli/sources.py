"""What ``FILE|ID`` on the command line means: a file, or an artifact that a registry keeps."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.contracts.errors import KernelNotFoundError
from esper.contracts.ids import parse_artifact_id

if TYPE_CHECKING:
    from esper.artifacts.head import Head
    from esper.contracts.registry import RegistryClient

__all__ = ["Source", "find", "printable", "table", "write_whole"]


@dataclass(frozen=True)
class Source:
    """Where an artifact's bytes are.

    Attributes:
        place: The file, or the registry they came from, for people.
        path: The file, if there is one on this machine.
        data: The bytes, if they had to be fetched.
        asked: The id asked for, if it was one.
    """

    place: str
    path: Path | None = None
    data: bytes | bytearray = b""
    asked: str = ""

    def head(self) -> Head:
        """Header, manifest and signatures; of a file nothing more is read."""
        from esper.artifacts.head import parse_head, read_head

        return parse_head(self.data, len(self.data)) if self.path is None else read_head(self.path)

    def sha256(self) -> str:
        """SHA-256 of the bytes."""
        from esper.artifacts.head import hash_file

        return hashlib.sha256(self.data).hexdigest() if self.path is None else hash_file(self.path)

    def read(self) -> bytes | bytearray:
        """The bytes."""
        from esper.artifacts.head import DEFAULT_MAX_BYTES, read_bytes

        return self.data if self.path is None else read_bytes(self.path, DEFAULT_MAX_BYTES)


def find(given: str, registry: str | None) -> Source:
    """The file of this name, else the artifact with this id: the registry's own file, or its bytes.

    Raises:
        KernelNotFoundError: ``given`` is neither, or the registry has no such artifact.
        RegistryUnavailableError: the registry does not answer.
    """
    from esper.artifacts import FileRegistry, open_registry

    path = Path(given)
    if path.exists():
        return Source(given, path)
    try:
        parse_artifact_id(given)
    except ValueError:
        raise KernelNotFoundError(f"{given}: no such file, and not an artifact id") from None
    client = open_registry(registry)
    if isinstance(client, FileRegistry):
        path = client.blob_path(given)
        return Source(str(path), path, asked=given)
    return Source(client.url, data=asyncio.run(_fetch(client, given)), asked=given)


async def _fetch(client: RegistryClient, artifact_id: str) -> bytes | bytearray:
    from esper.artifacts.head import DEFAULT_MAX_BYTES

    return await client.fetch(artifact_id, max_bytes=DEFAULT_MAX_BYTES)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def printable(value: Any) -> str:
    """Text from an artifact as it may go to a terminal: no control characters."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a table with aligned columns."""
    cells = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
