"""Blobs in S3, or in anything that speaks its protocol; credentials are the usual ``AWS_*`` variables."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from esper.services.urza.blobs import blob_key
from esper.services.urza.errors import unavailable

__all__ = ["S3Blobs"]

#: How long a request that S3 fails is tried again.
RETRY_S = 20


class S3Blobs:
    """Blobs in a bucket, which must exist.

    Args:
        url: ``s3://bucket/prefix``.
        endpoint: Address of a service other than Amazon's; ``http://`` is accepted there.
        presign: Whether :meth:`sign` gives addresses.
    """

    def __init__(self, url: str, *, endpoint: str | None = None, presign: bool = True) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.hostname or parts.username or parts.query:
            raise ValueError("blobs in S3 must be given as s3://bucket/prefix; credentials come from AWS_* variables")
        options: dict[str, Any] = {"prefix": parts.path.strip("/") or None}
        client: Any = {"timeout": datetime.timedelta(seconds=30)}
        if endpoint is not None:
            options["endpoint"] = endpoint.rstrip("/")
            client["allow_http"] = endpoint.startswith("http://")
        self._presign = presign
        self._shown = f"s3://{parts.hostname}/{parts.path.strip('/')}".rstrip("/")
        retry: Any = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=RETRY_S)}
        self._store = S3Store(parts.hostname, client_options=client, retry_config=retry, **options)

    @property
    def shown(self) -> str:
        """Bucket and prefix."""
        return self._shown

    def check(self) -> None:
        """Ask the bucket for an object that is not there."""
        self.size("0" * 64)

    def put(self, sha256: str, source: Path, size: int) -> None:
        """Upload a file; S3 shows an object only when it is complete."""
        with self._failing("store"):
            obstore.put(self._store, blob_key(sha256), source)
        if (found := self.size(sha256)) != size:
            raise unavailable(f"S3 kept {found} bytes of {size}")

    def size(self, sha256: str) -> int | None:
        """The object's length."""
        with self._failing("look up"):
            try:
                return int(obstore.head(self._store, blob_key(sha256))["size"])
            except FileNotFoundError:
                return None

    def read(self, sha256: str, start: int, length: int) -> bytes:
        """Part of the object."""
        if length == 0:
            return b""
        with self._failing("read"):
            return bytes(obstore.get_range(self._store, blob_key(sha256), start=start, length=length))

    def sign(self, sha256: str, seconds: int) -> str | None:
        """A presigned address, where that is switched on."""
        if not self._presign:
            return None
        with self._failing("sign the address of"):
            return str(obstore.sign(self._store, "GET", blob_key(sha256), datetime.timedelta(seconds=seconds)))

    def delete(self, sha256: str) -> None:
        """Remove the object."""
        with self._failing("delete"), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, blob_key(sha256))

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            # Only reading asks for what must be there; looking up and deleting have dealt with this themselves.
            raise unavailable(f"cannot {what} the blob: it is not in the bucket") from error
        except (BaseError, OSError, ValueError) as error:
            # The library's message repeats the request, and with it what was signed.
            raise unavailable(
                f"cannot {what} the blob: S3 did not answer as it should ({type(error).__name__})"
            ) from error
