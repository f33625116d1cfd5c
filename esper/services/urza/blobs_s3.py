"""Blobs in S3, or in anything that speaks its protocol; credentials are the usual ``AWS_*`` variables."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from esper.services.urza.blobs import blob_key
from esper.services.urza.errors import unavailable

__all__ = ["S3Blobs"]

#: How long a request that S3 fails is tried again.
RETRY_S = 20
#: The same failure is logged again after this time.
_SAY_AGAIN_S: Final = 300.0
_BUCKET: Final = re.compile(r"[a-z0-9.-]{3,63}")
#: Ends up in addresses and headers, where the library panics about what does not belong there.
_CHECKED: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
#: In place of ``--s3-endpoint``, the first that is set.
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_log = logging.getLogger("esper.urza")


class S3Blobs:
    """Blobs in a bucket, which must exist.

    Args:
        url: ``s3://bucket/prefix``.
        endpoint: Address of a service other than Amazon's, ``http://`` or ``https://``; else what ``AWS_ENDPOINT_URL``
            says.
        presign: Whether :meth:`sign` gives addresses.

    Raises:
        ValueError: bucket, endpoint or a variable cannot be one. Whether they are right, :meth:`check` says.
    """

    def __init__(self, url: str, *, endpoint: str | None = None, presign: bool = True) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.username is not None or parts.query or parts.fragment:
            raise ValueError("blobs in S3 must be given as s3://bucket/prefix; credentials come from AWS_* variables")
        if not _BUCKET.fullmatch(parts.netloc) or not parts.path.isprintable():
            raise ValueError(
                f"{url!r:.200} is no place in S3: a bucket's name has 3 to 63 of a-z, 0-9, '.' and '-', and a prefix "
                "no control characters"
            )
        for name in _CHECKED:
            if not re.fullmatch("[!-~]*", os.environ.get(name, "")):
                raise ValueError(f"{name} has a blank, a line's end or another character that no such value has")
        options: dict[str, Any] = {"prefix": parts.path.strip("/") or None}
        client: Any = {"timeout": datetime.timedelta(seconds=30)}
        source = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
        if endpoint is not None or source is not None:
            endpoint = _checked_endpoint("--s3-endpoint" if endpoint is not None else source, endpoint)
            options["endpoint"] = endpoint
            client["allow_http"] = endpoint.startswith("http://")
        self._presign = presign
        self._said: dict[str, float] = {}
        self._said_lock = threading.Lock()
        self._shown = f"s3://{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        retry: Any = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=RETRY_S)}
        try:
            self._store = S3Store(parts.netloc, client_options=client, retry_config=retry, **options)
        except BaseError as error:
            raise ValueError(f"{self._shown} cannot be used: {_first_of(error)}") from error

    @property
    def shown(self) -> str:
        """Bucket and prefix."""
        return self._shown

    def check(self) -> None:
        """Ask the bucket for what is in it: one that is not there cannot say."""
        with self._failing("list the bucket"):
            next(iter(obstore.list(self._store, chunk_size=1)), None)

    def put(self, sha256: str, source: Path, size: int) -> None:
        """Upload a file; S3 shows an object only when it is complete."""
        with self._failing("store the blob"):
            obstore.put(self._store, blob_key(sha256), source)
        if (found := self.size(sha256)) != size:
            raise unavailable(f"S3 kept {found} bytes of {size}")

    def size(self, sha256: str) -> int | None:
        """The object's length."""
        with self._failing("look up the blob"):
            try:
                return int(obstore.head(self._store, blob_key(sha256))["size"])
            except FileNotFoundError:
                return None

    def read(self, sha256: str, start: int, length: int) -> bytes:
        """Part of the object."""
        if length == 0:
            return b""
        with self._failing("read the blob"):
            return bytes(obstore.get_range(self._store, blob_key(sha256), start=start, length=length))

    def sign(self, sha256: str, seconds: int) -> str | None:
        """A presigned address, where that is switched on."""
        if not self._presign:
            return None
        with self._failing("sign the blob's address"):
            return str(obstore.sign(self._store, "GET", blob_key(sha256), datetime.timedelta(seconds=seconds)))

    def delete(self, sha256: str) -> None:
        """Remove the object."""
        with self._failing("delete the blob"), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, blob_key(sha256))

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            # Only reading asks for what must be there; looking up and deleting have dealt with this themselves. Storing
            # something in a bucket that is missing gives the same.
            self._say(what, error)
            where = "it is not in the bucket" if what == "read the blob" else "there is no such bucket"
            raise unavailable(f"cannot {what}: {where}") from error
        except (BaseError, OSError, ValueError) as error:
            self._say(what, error)
            # The library's message repeats the request, and with it what was signed.
            raise unavailable(f"cannot {what}: S3 did not answer as it should ({type(error).__name__})") from error
        except BaseException as error:
            # A fault in the library is no reason to end a request, or the process, without an answer.
            if type(error).__name__ != "PanicException":
                raise
            self._say(what, error)
            raise unavailable(f"cannot {what}: the S3 client failed ({type(error).__name__})") from error

    def _say(self, what: str, error: BaseException) -> None:
        """One line for the operator, not one for every request."""
        kind = f"{what} {type(error).__name__}"
        now = time.monotonic()
        with self._said_lock:
            if now - self._said.get(kind, float("-inf")) < _SAY_AGAIN_S:
                return
            self._said[kind] = now
        _log.warning("%s: cannot %s: %s: %s", self._shown, what, type(error).__name__, _first_of(error))


def _checked_endpoint(source: str | None, given: str | None) -> str:
    """The address, without a slash at its end."""
    endpoint = os.environ[str(source)] if given is None else given
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        right = False
    if not right or parts.username is not None or not re.fullmatch("[!-~]+", endpoint) or parts.query:
        # Not shown: where somebody wrote credentials into it, they would be, too.
        raise ValueError(f"{source} is no address of a service: give http://HOST:PORT or https://HOST")
    return endpoint.rstrip("/")


def _first_of(error: BaseException) -> str:
    """What the library says before it repeats requests and answers, in which there may be signatures."""
    text = re.sub(r"\?\S*", "", str(error).partition("\n")[0].partition("<")[0])
    return re.sub("[^ -~]", "?", text).strip()[:300]
