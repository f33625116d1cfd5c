"""Urza's client: what ``http://`` and ``https://`` registries mean."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from esper.artifacts.artifact import DEFAULT_MAX_BYTES, Artifact
from esper.artifacts.http_access import Access, HttpTimes
from esper.artifacts.http_address import API, choose_token, split_address
from esper.artifacts.http_download import Source, announced, download
from esper.artifacts.text import summarise
from esper.artifacts.workers import run_blocking
from esper.contracts import strict_json
from esper.contracts.backoff import Backoff
from esper.contracts.errors import ArtifactError, RegistryUnavailableError
from esper.contracts.ids import artifact_id_wanted, check_sha256, parse_artifact_id
from esper.contracts.manifest import Manifest
from esper.contracts.registry import ArtifactSummary

__all__ = ["HttpRegistry", "HttpTimes"]

_DOCUMENT_BYTES: Final = 1 << 20
_PAGE: Final = 200
_MAX_LISTED: Final = 1_000_000
_PUBLISH_TRIES: Final = 4


class HttpRegistry:
    """A registry served by ``esper urza serve``, or by anything that speaks its API.

    All coroutines run on any event loop; each loop keeps its own connections alive and closes them when it ends. No
    message, log line or ``repr`` shows the token or the signature of a URL. A pickle holds the URL without the token:
    whoever unpickles it brings ``ESPER_REGISTRY_TOKEN``.

    Args:
        url: ``http://host:port``, with a path where the registry sits behind a prefix. A token may stand in the place
            of the password, ``http://:TOKEN@host``.
        token: Bearer token; None means the one in the URL, else ``ESPER_REGISTRY_TOKEN``, else none. It is sent to the
            URL's origin only, never to a blob store or along a redirect to another host.
        times: How long things may take.
        backoff_s: Bound of the first pause before a download that broke off is taken up, or an upload sent again.
        patience_s: Longest pause that the registry may ask for with ``Retry-After``.

    Raises:
        RegistryURLError: the URL is none, or has a query; or the token cannot be one. Neither shows in the message.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        times: HttpTimes | None = None,
        backoff_s: float = 0.1,
        patience_s: float = 30.0,
    ) -> None:
        self._url, in_url = split_address(url)
        held = choose_token(self._url, in_url, token)
        self._times = times or HttpTimes()
        self._backoff_s, self._patience_s = backoff_s, patience_s
        self._backoff = Backoff(backoff_s, patience_s)
        self._access = Access(self._url, held, self._times)
        #: Until it turns out that the registry's blobs are elsewhere.
        self._has_blobs = True

    @property
    def url(self) -> str:
        """Where the registry is, without credentials."""
        return self._url

    async def fetch(self, artifact_id: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> bytearray:
        """The artifact's bytes, in one request from a registry that keeps them itself.

        The head of such an answer announces size and hash. One without, or one that leads elsewhere, is let go of; then
        and from then on the metadata is asked for first, and the blob got from where it says. A download that breaks
        off is taken up where it ended, a few times.

        Raises:
            KernelNotFoundError: it is not there.
            RegistryUnavailableError: the registry did not answer, or not in time, or refuses access.
            ArtifactError: it is larger than ``max_bytes`` (found before it is read), or is not what was announced.
        """
        try:
            async with asyncio.timeout(self._times.fetch_s):
                if self._has_blobs:
                    data = await self._fetch_at_once(artifact_id, max_bytes)
                    if data is not None:
                        return data
                    self._has_blobs = False
                source = await self._locate(artifact_id)
                _check_size(source, max_bytes)
                return await download(self._access, source, self._backoff, lambda: self._locate(artifact_id))
        except TimeoutError:
            raise RegistryUnavailableError(
                f"{artifact_id} did not arrive from {self._url} within {self._times.fetch_s:g} s"
            ) from None

    async def publish(self, data: bytes, *, tags: Sequence[str] = ()) -> str:
        """Verify an artifact here and upload it; uploading it again changes nothing, but for new ``tags``.

        Returns:
            The artifact's id.

        Raises:
            ArtifactError: the bytes are no artifact, or the registry refuses them.
            RegistryUnavailableError: it could not be stored; sending it again is safe.
        """
        # Whom to trust is for those to say who load it.
        artifact = await run_blocking(Artifact.open, data, policy="standard")
        headers = {"X-Esper-SHA256": artifact.sha256, "Content-Type": "application/octet-stream"}
        for attempt in range(_PUBLISH_TRIES):
            try:
                answer = await self._upload(data, headers, artifact.artifact_id, tags)
                break
            except RegistryUnavailableError as error:
                pause = self._backoff.pause_s(attempt, error.retry_after_s)
                if not error.retryable or attempt == _PUBLISH_TRIES - 1 or pause is None:
                    raise
                await asyncio.sleep(pause)
        if not isinstance(answer, dict) or answer.get("artifact_id") != artifact.artifact_id:
            raise RegistryUnavailableError(
                f"{self._url} stored {artifact.artifact_id} under another name, so it is not of this version of Esper",
                retryable=False,
            )
        return artifact.artifact_id

    async def list(self, *, prefix: str = "") -> Sequence[ArtifactSummary]:
        """What there is, sorted by id, fetched page by page."""
        found: dict[str, ArtifactSummary] = {}
        cursor: str | None = None
        seen: set[str] = set()
        while True:
            query = (
                {"limit": str(_PAGE)} | ({"prefix": prefix} if prefix else {}) | ({"cursor": cursor} if cursor else {})
            )
            page = await self._access.get_json(self._api("/kernels?" + urlencode(query)), "the list", _DOCUMENT_BYTES)
            with _reading(self._url, "the list"):
                lines = [_summary(item) for item in page["items"]]
                cursor = page["next_cursor"]
                if cursor is not None and (not isinstance(cursor, str) or cursor in seen):
                    raise ValueError("its pages lead in a circle")
            found.update((line.artifact_id, line) for line in lines)
            if cursor is None:
                return [found[artifact_id] for artifact_id in sorted(found)]
            seen.add(cursor)
            if len(found) > _MAX_LISTED:
                raise RegistryUnavailableError(f"{self._url} lists more than {_MAX_LISTED} artifacts; give a prefix")

    async def describe(self, artifact_id: str) -> ArtifactSummary:
        """One artifact's facts from its metadata; errors as for :meth:`fetch`."""
        document = await self._metadata(artifact_id)
        with _reading(self._url, artifact_id):
            return _summary(document)

    async def aclose(self) -> None:
        """Close the running loop's connections now, rather than when the loop ends."""
        await self._access.pools.aclose()

    async def _fetch_at_once(self, artifact_id: str, max_bytes: int) -> bytearray | None:
        """The bytes, if the registry sends them itself and the head of its answer says what they are."""
        version, url = artifact_id_wanted(artifact_id).version, self._api(f"/kernels/{artifact_id}/blob")
        async with self._access.get(url, redirects=0) as answer:
            if answer.redirects:
                return None
            if answer.status != 200:
                await self._access.refuse(answer, artifact_id)
            source = announced(answer, artifact_id, url)
            if source is None:
                return None
            if source.sha256[:8] != version:
                raise ArtifactError(f"{artifact_id}: the registry {self._url} sends another artifact")
            _check_size(source, max_bytes)
            return await download(self._access, source, self._backoff, lambda: self._locate(artifact_id), answer)

    async def _metadata(self, artifact_id: str) -> dict[str, Any]:
        version = artifact_id_wanted(artifact_id).version
        document = await self._access.get_json(self._api(f"/kernels/{artifact_id}"), artifact_id, _DOCUMENT_BYTES)
        with _reading(self._url, artifact_id):
            if check_sha256(document["sha256"])[:8] != version or document["artifact_id"] != artifact_id:
                raise ArtifactError(f"{artifact_id}: the registry {self._url} describes another artifact")
        return document  # type: ignore[no-any-return]

    async def _locate(self, artifact_id: str) -> Source:
        document = await self._metadata(artifact_id)
        with _reading(self._url, artifact_id):
            size, ref = _size(document["size"]), document["kernel_binary_ref"]
            if not isinstance(ref, str) or not ref:
                raise ValueError("kernel_binary_ref is missing")
            outside = bool(urlsplit(ref).scheme or ref.startswith("//"))
        if not outside:
            # The registry does not know of a prefix that a proxy put before it.
            ref = self._url + ref if ref.startswith(API + "/") else self._api("/kernels/") + quote(ref, safe="/?=&%~")
        return Source(artifact_id, document["sha256"], size, ref, anonymous=outside)

    async def _upload(self, data: bytes, headers: dict[str, str], what: str, tags: Sequence[str]) -> Any:
        query = f"?{urlencode({'tags': ','.join(tags)})}" if tags else ""
        async with self._access.post(self._api("/kernels" + query), data, headers) as answer:
            if answer.status not in (200, 201):
                await self._access.refuse(answer, what)
            return await self._access.read_json(answer, _DOCUMENT_BYTES)

    def _api(self, path: str) -> str:
        return self._url + API + path

    def __deepcopy__(self, memo: dict[int, Any]) -> HttpRegistry:
        # It has no state but its connections, which belong to the loops.
        return self

    def __reduce__(self) -> tuple[Callable[..., HttpRegistry], tuple[str, HttpTimes, float, float]]:
        return _rebuild, (self._url, self._times, self._backoff_s, self._patience_s)

    def __repr__(self) -> str:
        return f"HttpRegistry({self._url!r})"


def _check_size(source: Source, max_bytes: int) -> None:
    if source.size > max_bytes:
        raise ArtifactError(f"{source.artifact_id} has {source.size} bytes, more than the limit of {max_bytes}")


def _rebuild(url: str, times: HttpTimes, backoff_s: float, patience_s: float) -> HttpRegistry:
    return HttpRegistry(url, times=times, backoff_s=backoff_s, patience_s=patience_s)


@contextlib.contextmanager
def _reading(url: str, what: str) -> Iterator[None]:
    """Turn the errors of taking a document apart into one that says whose document it was."""
    try:
        yield
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise RegistryUnavailableError(
            f"{url} answered for {what} what Esper cannot read: {why}", retryable=False
        ) from None


def _summary(document: dict[str, Any]) -> ArtifactSummary:
    artifact_id = str(parse_artifact_id(document["artifact_id"]))
    sha256, size = check_sha256(document["sha256"]), _size(document["size"])
    info = document.get("info")
    if info is None:
        info = summarise(Manifest.from_json(strict_json.canonical(document["manifest"])))
    if not isinstance(info, dict):
        raise ValueError("info is not an object")
    return ArtifactSummary(artifact_id, sha256, size, info)


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"size is {value!a:.40}, not a number of bytes")
    return value
