"""Requests to a registry over HTTP: who gets the token, where redirects lead, and what a refusal means."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from urllib.parse import quote, urljoin, urlsplit

from esper.artifacts.http_address import TOKEN_VARIABLE
from esper.artifacts.http_pool import Address, Pools, Timeouts
from esper.artifacts.http_wire import Response
from esper.contracts import strict_json
from esper.contracts.backoff import parse_retry_after
from esper.contracts.errors import ArtifactError, EsperError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.registry import mask_credentials

__all__ = ["Access", "Answer", "HttpTimes"]

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MAX_REDIRECTS: Final = 5
#: Names and addresses, in ASCII; what a URL writes otherwise is none.
_HOST: Final = re.compile(r"[0-9A-Za-z.:_%-]{1,255}")
#: What stands in a request as it is; the percent sign among it, since URLs come quoted.
_UNQUOTED: Final = "/?%:@!$&'()*+,;=~[]"
#: A refusal's text is read as far as this, and quoted as far as that.
_REASON_BYTES: Final = 1 << 14
_REASON_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class HttpTimes:
    """How long a registry may take.

    Attributes:
        connect_s: To accept a connection; also to wait for one of this client's that is free.
        silence_s: Between two pieces of an answer.
        fetch_s: For one artifact, all requests, resumed ones included.
        slowest_bytes_per_s: Average below which a download is given up,
        grace_s: once it has run this long.
    """

    connect_s: float = 5.0
    silence_s: float = 15.0
    fetch_s: float = 300.0
    slowest_bytes_per_s: float = 4096.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
                raise ValueError(f"{name} must be a number of seconds (or bytes per second) from 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose body has not been read yet.

    Attributes:
        response: Status, headers, and the stream of the body.
        own: Whether it came from the registry itself, rather than from where a redirect or a reference led.
    """

    response: Response
    own: bool

    @property
    def status(self) -> int:
        """The status code."""
        return self.response.status

    @property
    def redirects(self) -> bool:
        """Whether it says to ask elsewhere."""
        return self.response.status in _REDIRECTS and "location" in self.response.headers


class Access:
    """What may be asked of one registry.

    Args:
        base: The registry's URL, without credentials and without a slash at its end.
        token: Bearer token; sent to the registry's own origin and to nobody else.
        times: How long things may take.
    """

    def __init__(self, base: str, token: str | None, times: HttpTimes) -> None:
        self.base = base
        self.times = times
        self.pools = Pools(Timeouts(times.connect_s, times.silence_s))
        self._token = token
        self._origin = self._address(base).origin

    @contextlib.asynccontextmanager
    async def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        anonymous: bool = False,
        redirects: int = _MAX_REDIRECTS,
    ) -> AsyncIterator[Answer]:
        """The answer to a GET, redirects followed. Leaving the block lets go of the connection.

        Args:
            url: Absolute; from the registry, so it is checked.
            headers: Further headers.
            anonymous: Do not send the token, whoever is asked.
            redirects: How many to follow at most; with 0 a redirect is the answer.
        """
        answer = await self._get(url, dict(headers or {}), anonymous, redirects)
        try:
            yield answer
        finally:
            await answer.response.aclose()

    @contextlib.asynccontextmanager
    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """The answer to a POST to the registry itself; redirects are not followed."""
        response = await self._send("POST", self._address(url), headers, own=True, content=content)
        try:
            yield Answer(response, own=True)
        finally:
            await response.aclose()

    async def get_json(self, url: str, what: str, max_bytes: int) -> Any:
        """A JSON document of the registry; ``what`` names what was asked for in messages."""
        async with self.get(url, headers={"Accept": "application/json"}) as answer:
            if answer.status != 200:
                await self.refuse(answer, what)
            return await self.read_json(answer, max_bytes)

    async def read_json(self, answer: Answer, max_bytes: int) -> Any:
        """The body of a good answer, parsed.

        Raises:
            RegistryUnavailableError: it is no JSON, so whatever answers there is no registry.
        """
        text = await self._read(answer, max_bytes + 1)
        # Not the strict parser, which takes longer than the request: of what is parsed here only a few fields are
        # read, each checked. Its bound on memory is kept.
        if len(text) <= max_bytes and sum(map(text.count, (b",", b":", b"[", b"{"))) <= strict_json.MAX_TOKENS:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(text)
        raise RegistryUnavailableError(f"{self.base} is no registry of Esper's: {_quoted(text)}", retryable=False)

    async def refuse(self, answer: Answer, what: str) -> NoReturn:
        """Raise what a status other than the hoped-for one means."""
        status, after = answer.status, parse_retry_after(answer.response.headers.get("retry-after"))
        said = _reason(await self._read(answer, _REASON_BYTES))
        who = f"registry {self.base}" if answer.own else f"the blob store behind {self.base}"
        shown = f"{who} answered {status}{said}"
        error: EsperError
        if status in (404, 410):
            error = KernelNotFoundError(
                f"{what}: no such artifact in {self.base}" + ("" if answer.own else " (no blob)")
            )
        elif status in (401, 403) and answer.own:
            held = "the token is not accepted, or lacks the role" if self._token else "it wants a token"
            error = RegistryUnavailableError(
                f"{shown}: {held}; set {TOKEN_VARIABLE}, or write it into the URL as http://:TOKEN@host",
                retryable=False,
            )
        elif status in (400, 409, 413, 415, 422) and answer.own:
            error = ArtifactError(f"{what}: {shown}")
        elif status in (408, 425, 429) or status >= 500:
            error = RegistryUnavailableError(shown, retry_after_s=after)
        elif status in _REDIRECTS:
            there = mask_credentials(answer.response.headers.get("location", "nowhere"))
            error = RegistryUnavailableError(f"{shown}: use the address it leads to, {there}", retryable=False)
        else:
            error = RegistryUnavailableError(shown, retryable=False)
        raise error

    @contextlib.contextmanager
    def in_our_words(self) -> Iterator[None]:
        """Turn what goes wrong on a connection into :class:`RegistryUnavailableError`."""
        try:
            yield
        except RegistryUnavailableError:
            raise
        except OSError as error:  # TimeoutError and errors of TLS among them
            why = str(error) or type(error).__name__
            raise RegistryUnavailableError(f"cannot talk to {self.base}: {why}") from error

    async def _get(self, url: str, headers: dict[str, str], anonymous: bool, redirects: int) -> Answer:
        for _ in range(redirects + 1):
            where = self._address(url)
            # Once it has led away, a chain of redirects gets no token any more, not even if it leads back.
            anonymous = anonymous or where.origin != self._origin
            response = await self._send("GET", where, headers, own=not anonymous)
            answer = Answer(response, own=not anonymous)
            if not redirects or not answer.redirects:
                return answer
            try:
                await self._read(answer, _REASON_BYTES)
            finally:
                await response.aclose()
            url = _joined(url, response.headers["location"])
        raise RegistryUnavailableError(f"{self.base} redirects more than {redirects} times", retryable=False)

    def _address(self, url: str) -> Address:
        """The parts of a URL that the registry named."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
            shown = mask_credentials(url)
            raise RegistryUnavailableError(f"{self.base} leads to {shown[:200]!a}, no http URL", retryable=False)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_UNQUOTED)
        return Address(parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], target)

    async def _send(
        self, method: str, where: Address, headers: Mapping[str, str], *, own: bool, content: bytes = b""
    ) -> Response:
        # Plain bytes on the wire: lengths are checked against what the registry announced, and ranges count them.
        sent = {"Host": where.authority, "Accept-Encoding": "identity", "User-Agent": "esper", **headers}
        if own and self._token is not None:
            sent["Authorization"] = f"Bearer {self._token}"
        with self.in_our_words():
            return await self.pools.request(method, where, sent, content)

    async def _read(self, answer: Answer, limit: int) -> bytes:
        """The body, or its first ``limit`` bytes."""
        parts, got = [], 0
        with self.in_our_words():
            async for part in answer.response.parts:
                parts.append(part)
                got += len(part)
                if got >= limit:
                    break
        return b"".join(parts)[:limit]


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        return location  # no URL, which is found out next


def _quoted(text: bytes) -> str:
    return f"it answers {text[:60]!r}" + ("..." if len(text) > 60 else "")


def _reason(body: bytes) -> str:
    """``: message`` of an error in the registry's form, else nothing."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    shown = "".join(c if c.isprintable() else " " for c in message) if isinstance(message, str) else ""
    return f": {shown[:_REASON_SHOWN]}" if shown else ""
