"""The keys somebody trusts: from a file, a folder, a text, or ``ESPER_TRUSTED_KEYS``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

from esper.artifacts.keys import PUBLIC_END, PUBLIC_MARK, TEXT_PREFIX, PublicKey, TrustError, read_key_file

__all__ = ["KeyRing", "TrustedKeys"]

VARIABLE: Final = "ESPER_TRUSTED_KEYS"
#: What in a folder of keys is read.
SUFFIXES: Final = (".pub", ".pem")

#: What ``trusted_keys=`` takes; None means :data:`VARIABLE`.
TrustedKeys: TypeAlias = "KeyRing | Iterable[PublicKey | str] | str | os.PathLike[str] | None"


class KeyRing:
    """Trusted public keys, found by id.

    Args:
        keys: The keys; the same one twice is one.

    Raises:
        TrustError: if two different keys have one id.
    """

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        self._keys: dict[str, PublicKey] = {}
        for key in keys:
            if self._keys.setdefault(key.key_id, key) != key:
                raise TrustError(f"two different keys have the id {key.key_id}; trust only one of them")

    @classmethod
    def load(cls, spec: str | os.PathLike[str] | None = None) -> KeyRing:
        """Read keys.

        Args:
            spec: Files, folders and inline keys (``ed25519:<base64>``), separated as in ``PATH`` (by a colon). A file
                holds any number of public keys, as PEM blocks or inline keys, one a line; ``#`` begins a comment. Of a
                folder the files ending in ``.pub`` and ``.pem`` are read. None means ``ESPER_TRUSTED_KEYS``; where that
                is not set or empty, nobody is trusted.

        Raises:
            TrustError: naming the file, if one is missing or holds anything else.
        """
        if isinstance(spec, os.PathLike):
            return cls(_read_path(Path(spec)))
        if spec is None:
            spec = os.environ.get(VARIABLE, "")
        return cls(key for part in _split(spec) for key in _read_part(part))

    @classmethod
    def of(cls, trusted_keys: TrustedKeys) -> KeyRing:
        """What ``trusted_keys=`` means: a ring as it is, keys or texts collected, None as :meth:`load` takes it."""
        if isinstance(trusted_keys, KeyRing):
            return trusted_keys
        if trusted_keys is None or isinstance(trusted_keys, (str, os.PathLike)):
            return cls.load(trusted_keys)
        keys: list[PublicKey] = []
        for item in trusted_keys:
            if isinstance(item, PublicKey):
                keys.append(item)
            elif isinstance(item, (str, os.PathLike)):
                keys.extend(cls.load(item))
            else:
                raise TrustError(f"a trusted key must be a PublicKey, a path or a text, not {type(item).__name__}")
        return cls(keys)

    def get(self, key_id: str) -> PublicKey | None:
        """The key with this id, or None."""
        return self._keys.get(key_id)

    def __iter__(self) -> Iterator[PublicKey]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, PublicKey) and self._keys.get(key.key_id) == key

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self._keys) or 'nobody'})"


def _split(spec: str) -> Iterator[str]:
    """The parts of a list; the colon inside ``ed25519:...`` is not one between parts."""
    prefix = TEXT_PREFIX.rstrip(":")
    parts = iter(spec.split(os.pathsep))
    for part in parts:
        if part.strip() == prefix:
            yield TEXT_PREFIX + next(parts, "").strip()
        elif part.strip():
            yield part.strip()


def _read_part(part: str) -> list[PublicKey]:
    if part.startswith(TEXT_PREFIX):
        return [PublicKey.from_text(part)]
    return _read_path(Path(part).expanduser())


def _read_path(path: Path) -> list[PublicKey]:
    if not path.is_dir():
        return _read_file(path)
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    except OSError as error:
        raise TrustError(f"{path}: cannot be listed: {error.strerror}") from None
    return [key for file in files for key in _read_file(file)]


def _read_file(path: Path) -> list[PublicKey]:
    data, _ = read_key_file(path)
    try:
        keys = list(_parse(data.decode("utf-8")))
    except UnicodeDecodeError:
        raise TrustError(f"{path}: not a text file, so not one of public keys") from None
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from None
    if not keys:
        raise TrustError(f"{path}: no public key in it")
    return keys


def _parse(text: str) -> Iterator[PublicKey]:
    lines = iter(text.splitlines())
    for line in map(str.strip, lines):
        if "PRIVATE KEY" in line:
            raise TrustError("holds a private key; trusted keys are public ones, and private keys stay with the signer")
        if line == PUBLIC_MARK:
            body = []
            for inner in map(str.strip, lines):
                if inner == PUBLIC_END:
                    break
                body.append(inner)
            else:
                raise TrustError(f"a PEM block without its {PUBLIC_END}")
            yield PublicKey.from_pem_body("".join(body))
        elif line.startswith(TEXT_PREFIX):
            yield PublicKey.from_text(line.partition("#")[0].strip())
        elif line and not line.startswith("#"):
            raise TrustError(f"a line that is no public key: {line[:60]!a}")
