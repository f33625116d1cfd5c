"""Urza's API as Tezzeret uses it: questions in JSON, answers that are checked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from esper.artifacts.http_address import API, choose_token, split_address
from esper.artifacts.http_proxy import proxy_errors, proxy_for
from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError
from esper.contracts.messages import MAX_MESSAGE_BYTES
from esper.contracts.registry import RegistryURLError, mask_credentials
from esper.contracts.text import shown
from esper.services.tezzeret.job import JobError
from esper.services.tezzeret.queue import QueueUnavailableError

__all__ = ["UrzaLink"]

_TIMEOUT_S: Final = 10.0


class UrzaLink:
    """A client of one Urza, for one event loop.

    Args:
        url: Urza's address; the token, with the role ``publish``, in it (``http://:TOKEN@host:8470``) or in
            ``ESPER_REGISTRY_TOKEN``.

    Raises:
        RegistryURLError: not an http or https URL, or a token that cannot be one. It does not show in the message.
        RegistryUnavailableError: the proxy that the environment names cannot be used.
    """

    def __init__(self, url: str) -> None:
        #: Where Urza is, without the token.
        self.url = mask_credentials(url.strip())
        try:
            base, in_url = split_address(url)
        except RegistryURLError as error:
            raise RegistryURLError(f"{self.url} is not the address of an Urza: {error}") from None
        token = choose_token(self.url, in_url)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        parts = urlsplit(base)
        assert parts.hostname is not None
        proxy = proxy_for(parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
        #: Around a request: what goes wrong with a proxy.
        self._by_proxy = contextlib.nullcontext if proxy is None else proxy_errors
        try:
            with self._by_proxy():
                # Not left to the client, which would ask a proxy for this machine itself.
                transport = httpx.AsyncHTTPTransport(proxy=proxy)
                self._http = httpx.AsyncClient(
                    base_url=base + API, headers=headers, timeout=_TIMEOUT_S, transport=transport, trust_env=False
                )
        except httpx.InvalidURL:
            raise RegistryURLError(f"{self.url} is not the address of an Urza; expected http://host:port") from None

    async def close(self) -> None:
        """Disconnect."""
        await self._http.aclose()

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, expected: tuple[int, ...] = ()
    ) -> tuple[int, dict[str, Any]]:
        """Ask for ``path`` under ``/api/v1``.

        Returns:
            The status and the object that Urza answers with; of a failure the status alone, if it is ``expected``.

        Raises:
            QueueUnavailableError: Urza does not answer, or refuses us.
            JobError: Urza refuses what was asked; the message says why.
        """
        try:
            with self._by_proxy():
                async with asyncio.timeout(2 * _TIMEOUT_S), self._http.stream(method, path, json=body) as response:
                    text = bytearray()
                    async for piece in response.aiter_bytes():
                        text += piece
                        if len(text) > 2 * MAX_MESSAGE_BYTES:
                            raise QueueUnavailableError(f"Urza {self.url} answers with more than {len(text) - 1} bytes")
                    status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if isinstance(error, QueueUnavailableError):
                raise
            # What is wrong with our own request is told by quoting it, headers and all.
            said = "" if isinstance(error, httpx.LocalProtocolError) else str(error)
            said = shown(said) or type(error).__name__
            raise QueueUnavailableError(f"Urza {self.url} does not answer: {said}") from error
        if status in expected:
            return status, {}
        answer = self._parsed(bytes(text), status)
        if status in (400, 404, 409, 413, 422):
            raise JobError(f"Urza {self.url} refuses it: {_fault(answer)}")
        if not 200 <= status < 300:
            raise QueueUnavailableError(f"Urza {self.url} answers with status {status}: {_fault(answer)}")
        return status, answer

    def _parsed(self, text: bytes, status: int) -> dict[str, Any]:
        try:
            answer = strict_json.loads(text, what="the answer", max_bytes=2 * MAX_MESSAGE_BYTES)
        except ArtifactError as error:
            if status >= 300:
                return {}
            raise QueueUnavailableError(f"Urza {self.url} answers what is no JSON: {error}") from None
        return answer if isinstance(answer, dict) else {}


def _fault(answer: Mapping[str, Any]) -> str:
    fault = answer.get("error")
    said = fault.get("message") if isinstance(fault, dict) else None
    return shown(said) if isinstance(said, str) else "no reason given"
