"""One blob over HTTP into one piece of memory: bounded, hashed on the way, taken up again where it broke off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from esper.artifacts.http_access import Access, Answer
from esper.contracts.backoff import Backoff
from esper.contracts.errors import ArtifactError, RegistryUnavailableError

__all__ = ["Source", "announced", "download"]

#: How often one download is taken up again.
_MAX_RESUMES: Final = 5
#: What an object store answers when a signed URL has expired.
_EXPIRED: Final = (400, 401, 403)
#: A strong entity tag that is a SHA-256, as Urza gives every blob.
_HASH_TAG: Final = re.compile(r'"([0-9a-f]{64})"')
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where an artifact's bytes are, as the registry's metadata says, or the head of its answer with the bytes.

    Attributes:
        artifact_id: Whose bytes they are.
        sha256: Their SHA-256.
        size: How many there are.
        url: Where they are.
        anonymous: Whether that is outside the registry, so that the token stays here.
    """

    artifact_id: str
    sha256: str
    size: int
    url: str
    anonymous: bool


def announced(answer: Answer, artifact_id: str, url: str) -> Source | None:
    """What the head of a good answer from the registry itself says of the bytes that follow; None if not enough."""
    headers = answer.response.headers
    tag, length = _HASH_TAG.fullmatch(headers.get("etag", "")), headers.get("content-length", "")
    if tag is None or not length.isdecimal():
        return None
    return Source(artifact_id, tag[1], int(length), url, anonymous=False)


async def download(
    access: Access,
    source: Source,
    backoff: Backoff,
    renew: Callable[[], Awaitable[Source]],
    begun: Answer | None = None,
) -> bytearray:
    """Get the bytes of ``source``, which were found not to be too many.

    Args:
        access: The registry.
        source: What to get.
        backoff: Pauses before a download that broke off is taken up again.
        renew: Asks the registry for the source anew; called once, if the URL has expired.
        begun: The first answer, of which nothing but the head was read; None asks for it. It stays the caller's.

    Returns:
        The bytes; size and SHA-256 are right.

    Raises:
        RegistryUnavailableError: they could not be had.
        KernelNotFoundError: they are gone.
        ArtifactError: they are not those that were announced.
    """
    body = _Body(access, source)
    renewed, resumes = False, 0
    while True:
        try:
            if begun is not None:
                asking: contextlib.AbstractAsyncContextManager[Answer] = contextlib.nullcontext(begun)
                begun = None
            else:
                asking = access.get(source.url, anonymous=source.anonymous, headers=body.headers())
            async with asking as answer:
                if not answer.own and answer.status in _EXPIRED and not renewed:
                    renewed = True
                else:
                    await body.receive(answer)
                    return body.finish()
            again = await renew()
            if (again.sha256, again.size) != (source.sha256, source.size):
                raise ArtifactError(f"{source.artifact_id}: the registry changed what it says of it meanwhile")
            source = again
        except RegistryUnavailableError as error:
            # What nothing was received of is for the caller to try again, who knows what else to do.
            if not error.retryable or not body.got or resumes >= _MAX_RESUMES or body.slow:
                raise
            pause = backoff.pause_s(resumes, error.retry_after_s)
            if pause is None:
                raise
            resumes += 1
            await asyncio.sleep(pause)


class _Body:
    """The bytes so far."""

    def __init__(self, access: Access, source: Source) -> None:
        self._access = access
        self._source = source
        self._etag: str | None = None
        self._data = bytearray(source.size)
        self._hash = hashlib.sha256()
        self.got = 0
        self.slow = False

    def headers(self) -> dict[str, str]:
        """Ask for what is missing, and for all of it if the blob is not the same any more."""
        if not self.got:
            return {}
        wanted = {"Range": f"bytes={self.got}-"}
        return wanted | {"If-Range": self._etag} if self._etag else wanted

    async def receive(self, answer: Answer) -> None:
        """Read an answer to its end, or fail; what was received by then stays."""
        if answer.status == 416 and self.got:
            self._start_over()
            raise RegistryUnavailableError(f"{self._source.artifact_id}: the rest is not to be had; starting over")
        if answer.status == 200:
            self._start_over()
        elif answer.status != 206 or not self.got:
            await self._access.refuse(answer, self._source.artifact_id)
        elif not self._continues(answer):
            self._start_over()
            raise RegistryUnavailableError(f"{self._source.artifact_id}: another range than asked for; starting over")
        self._check_length(answer)
        etag = answer.response.headers.get("etag", "")
        # A weak one does not vouch for bytes.
        self._etag = etag if etag.startswith('"') else None
        await self._stream(answer)
        if self.got < self._source.size:
            raise RegistryUnavailableError(
                f"{self._source.artifact_id}: the download ended after {self.got} of {self._source.size} bytes"
            )

    async def _stream(self, answer: Answer) -> None:
        size, times, begun = self._source.size, self._access.times, asyncio.get_running_loop().time()
        received = 0
        with memoryview(self._data) as view, self._access.in_our_words():
            async for part in answer.response.parts:
                end = self.got + len(part)
                if end > size:
                    raise ArtifactError(
                        f"{self._source.artifact_id}: the blob goes on after the {size} bytes it was announced with"
                    )
                view[self.got : end] = part
                self._hash.update(part)
                self.got = end
                received += len(part)
                spent = asyncio.get_running_loop().time() - begun
                if end < size and spent > times.grace_s and received < times.slowest_bytes_per_s * spent:
                    self.slow = True
                    raise RegistryUnavailableError(
                        f"{self._source.artifact_id}: given up, {received} bytes came in {spent:.1f} s, "
                        f"less than {times.slowest_bytes_per_s:g} a second"
                    )

    def finish(self) -> bytearray:
        """The bytes, given away, once their hash agrees."""
        found = self._hash.hexdigest()
        if found != self._source.sha256:
            raise ArtifactError(
                f"{self._source.artifact_id}: the blob's SHA-256 is {found}, the registry announced "
                f"{self._source.sha256}: it was altered"
            )
        return self._data

    def _start_over(self) -> None:
        if self.got:
            self.got = 0
            self._hash = hashlib.sha256()

    def _continues(self, answer: Answer) -> bool:
        found = _CONTENT_RANGE.fullmatch(answer.response.headers.get("content-range", ""))
        if found is None:
            return False
        first, last, total = found.groups()
        size = self._source.size
        return int(first) == self.got and int(last) == size - 1 and total in ("*", str(size))

    def _check_length(self, answer: Answer) -> None:
        """Before a byte is read: as many are coming as are missing."""
        if encoding := answer.response.headers.get("content-encoding"):
            raise RegistryUnavailableError(
                f"{self._source.artifact_id}: sent as {encoding[:40]!a}, though plain bytes were asked for; "
                "is there a proxy that compresses?",
                retryable=False,
            )
        length = answer.response.headers.get("content-length")
        missing = self._source.size - self.got
        if length is not None and length != str(missing):
            raise ArtifactError(
                f"{self._source.artifact_id}: {missing} bytes should come, but {length[:20]!a} are announced"
            )
