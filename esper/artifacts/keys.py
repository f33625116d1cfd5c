"""Ed25519 keys: files, texts, ids, and rings of trusted ones.

Public keys are plain bytes here and need no library; making and checking signatures needs the package ``cryptography``,
imported when it is first needed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from esper.contracts.errors import EsperError

__all__ = ["PublicKey", "SigningKey", "SigningUnavailableError", "TrustError"]

#: What an inline public key begins with.
TEXT_PREFIX: Final = "ed25519:"
PUBLIC_MARK: Final = "-----BEGIN PUBLIC KEY-----"
PUBLIC_END: Final = "-----END PUBLIC KEY-----"
_KEY_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 1 << 16
# DER of a SubjectPublicKeyInfo (RFC 8410) up to the key itself: for Ed25519 it never varies.
_PUBLIC_DER: Final = bytes.fromhex("302a300506032b6570032100")


class TrustError(EsperError, ValueError):
    """What says whom to trust, or how, is wrong: a key file, ``ESPER_TRUSTED_KEYS``, ``ESPER_TRUST_POLICY``."""


class SigningUnavailableError(EsperError, RuntimeError):
    """Signatures cannot be made or checked here, because the package ``cryptography`` is missing or lacks Ed25519."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key.

    Attributes:
        raw: Its 32 bytes.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.raw, bytes) or len(self.raw) != _KEY_BYTES:
            raise TrustError(f"an Ed25519 public key has {_KEY_BYTES} bytes")

    @property
    def key_id(self) -> str:
        """What signatures call it: 16 hex digits, the first 64 bits of its SHA-256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether this key signed ``message``.

        Raises:
            SigningUnavailableError: without the package ``cryptography``.
        """
        ed25519, exceptions = _library("ed25519"), _library("exceptions")
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except exceptions.InvalidSignature:
            return False
        except exceptions.UnsupportedAlgorithm as error:
            raise SigningUnavailableError(f"this build of cryptography has no Ed25519: {error}") from None
        return True

    def to_text(self) -> str:
        """``ed25519:<base64>``: the key in one line, as ``ESPER_TRUSTED_KEYS`` takes it."""
        return TEXT_PREFIX + base64.b64encode(self.raw).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> PublicKey:
        """Read ``ed25519:<base64>``.

        Raises:
            TrustError: for anything else.
        """
        encoded = text.removeprefix(TEXT_PREFIX)
        raw = _decode(encoded) if text.startswith(TEXT_PREFIX) else b""
        if len(raw) != _KEY_BYTES:
            raise TrustError(f"{text[:80]!a} is not a public key; expected {TEXT_PREFIX}<base64 of {_KEY_BYTES} bytes>")
        return cls(raw)

    def to_pem(self) -> str:
        """The key as PEM (SubjectPublicKeyInfo), which other tools read too."""
        encoded = base64.b64encode(_PUBLIC_DER + self.raw).decode("ascii")
        return f"{PUBLIC_MARK}\n{encoded}\n{PUBLIC_END}\n"

    @classmethod
    def from_pem_body(cls, body: str) -> PublicKey:
        """Read what stands between the two marks of a PEM block.

        Raises:
            TrustError: if it is not an Ed25519 public key.
        """
        der = _decode("".join(body.split()))
        if len(der) != len(_PUBLIC_DER) + _KEY_BYTES or not der.startswith(_PUBLIC_DER):
            raise TrustError("a PEM block that is not an Ed25519 public key")
        return cls(der[len(_PUBLIC_DER) :])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key as PEM; refuses to overwrite.

        Raises:
            OSError: if the file exists or cannot be written.
        """
        write_new(Path(path), self.to_pem().encode("ascii"), 0o644)

    def __repr__(self) -> str:
        return f"PublicKey({self.to_text()!r})"


class SigningKey:
    """A private key. Make one with :meth:`generate` or :meth:`load`; nothing here prints or pickles it."""

    def __init__(self, private: Any) -> None:
        self._private = private
        serialization = _library("serialization")
        self.public = PublicKey(
            private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        )

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the system's random numbers.

        Raises:
            SigningUnavailableError: without the package ``cryptography``.
        """
        return cls(_private_class().generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> SigningKey:
        """The key with these 32 secret bytes.

        Raises:
            TrustError: if they are not 32.
            SigningUnavailableError: without the package ``cryptography``.
        """
        if len(raw) != _KEY_BYTES:
            raise TrustError(f"an Ed25519 private key has {_KEY_BYTES} bytes, not {len(raw)}")
        return cls(_private_class().from_private_bytes(bytes(raw)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SigningKey:
        """Read a private key from a PEM file (PKCS#8, without a password).

        A file that others than its owner may read is warned about.

        Raises:
            TrustError: if it cannot be read or is not such a key.
            SigningUnavailableError: without the package ``cryptography``.
        """
        data, mode = read_key_file(Path(path))
        if b"PRIVATE KEY" not in data:
            raise TrustError(f"{path}: not a private key; signing needs the file that `esper keygen` wrote with it")
        try:
            private = _library("serialization").load_pem_private_key(data, password=None)
        except TypeError:
            raise TrustError(f"{path}: the key is under a password; Esper reads keys without one") from None
        except Exception as error:
            # The library's errors for malformed keys are many, and none of them tells the user more.
            if isinstance(error, EsperError):
                raise
            raise TrustError(f"{path}: not a readable private key in PEM") from None
        if not isinstance(private, _private_class()):
            raise TrustError(f"{path}: not an Ed25519 key; make one with `esper keygen`")
        if mode & 0o077:
            warnings.warn(
                f"{path}: others may read this private key (mode {mode:03o}); chmod 600 it",
                RuntimeWarning,
                stacklevel=2,
            )
        return cls(private)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key as PEM (PKCS#8), readable by its owner only; refuses to overwrite.

        Raises:
            OSError: if the file exists or cannot be written.
        """
        serialization = _library("serialization")
        data = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_new(Path(path), data, 0o600)

    @property
    def key_id(self) -> str:
        """The public key's id."""
        return self.public.key_id

    def sign(self, message: bytes) -> bytes:
        """The signature of ``message``: 64 bytes, always the same for the same key and message."""
        signature: bytes = self._private.sign(message)
        return signature

    def __reduce__(self) -> str:
        raise TypeError("a SigningKey is not pickled; save it to a file")

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"


def read_key_file(path: Path) -> tuple[bytes, int]:
    """A key file's bytes and permission bits.

    Raises:
        TrustError: if it is missing, not a regular file, or far too large for keys.
    """
    try:
        # Non-blocking: a pipe in the place of a file must not hang the reader.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise TrustError(f"{path}: not a regular file")
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, TrustError):
            raise
        raise TrustError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise TrustError(f"{path}: more than {_MAX_FILE_BYTES} bytes; not a file of keys")
    return data, stat.S_IMODE(found.st_mode)


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that does not exist yet, with these permissions from its first moment on.

    Raises:
        OSError: if it exists or cannot be written; nothing is left behind then.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; a key is never overwritten") from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def _decode(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _private_class() -> Any:
    return _library("ed25519").Ed25519PrivateKey


def _library(part: str) -> ModuleType:
    """A module of ``cryptography``; loaded late, because most processes never check a signature."""
    try:
        if part == "ed25519":
            from cryptography.hazmat.primitives.asymmetric import ed25519

            return ed25519
        if part == "serialization":
            from cryptography.hazmat.primitives import serialization

            return serialization
        from cryptography import exceptions

        return exceptions
    except ImportError as error:
        raise SigningUnavailableError(
            f"signatures need the package cryptography, which cannot be imported here ({error}); "
            "pip install cryptography"
        ) from None
