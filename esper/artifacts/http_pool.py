"""Connections to a registry: kept alive, one pool an event loop, closed with the loop.

Requests go to httpx's transports and not to its client. A registry needs none of what the client adds (cookies, its own
redirects, logging every URL, signed ones included), and every request would pay for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import urllib.request
from collections.abc import AsyncGenerator
from typing import Final

import httpx

from esper.artifacts.workers import run_blocking

__all__ = ["Pools"]

_MAX_CONNECTIONS: Final = 16
_KEEP_ALIVE_S: Final = 60.0
_PROXIES_KNOWN: Final = 64


class Pools:
    """A pool of connections for every event loop that asks; a copy in a forked child finds none of its parent's loops.

    Only the thread of a loop touches the loop's entry, so there is no lock.
    """

    def __init__(self) -> None:
        self._pools: dict[asyncio.AbstractEventLoop, tuple[_Pool, AsyncGenerator[None]]] = {}

    async def transport(self, url: httpx.URL) -> httpx.AsyncHTTPTransport:
        """What sends requests to ``url`` from the running loop."""
        loop = asyncio.get_running_loop()
        known = self._pools.get(loop)
        if known is None:
            for closed in [other for other in tuple(self._pools) if other.is_closed()]:
                self._pools.pop(closed, None)
            known = _Pool(), self._live(loop)
            self._pools[loop] = known
            await anext(known[1])
        return await known[0].transport(url)

    async def aclose(self) -> None:
        """Close the running loop's connections; they are opened again when needed."""
        known = self._pools.get(asyncio.get_running_loop())
        if known is not None:
            await known[1].aclose()

    async def _live(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        """Ends with its loop: ``asyncio.run`` closes the generators that are open before it closes the loop.

        Sockets that outlive their loop cannot be closed properly any more.
        """
        try:
            yield
        finally:
            known = self._pools.pop(loop, None)
            if known is not None:
                await known[0].aclose()


class _Pool:
    def __init__(self) -> None:
        self._transports: dict[tuple[bool, str | None], httpx.AsyncHTTPTransport] = {}
        self._proxies: dict[tuple[str, str, int | None], str | None] = {}

    async def transport(self, url: httpx.URL) -> httpx.AsyncHTTPTransport:
        where = (url.scheme, url.host, url.port)
        if where not in self._proxies:
            if len(self._proxies) >= _PROXIES_KNOWN:
                self._proxies.clear()
            self._proxies[where] = _proxy_for(url)
        proxy = self._proxies[where]
        key = (url.scheme == "https", proxy)
        found = self._transports.get(key)
        if found is None:
            context = await _tls(key[0] or (proxy or "").startswith("https"))
            found = self._transports.setdefault(key, _transport(context, proxy))
        return found

    async def aclose(self) -> None:
        transports = list(self._transports.values())
        self._transports.clear()
        for transport in transports:
            await transport.aclose()


def _transport(context: ssl.SSLContext, proxy: str | None) -> httpx.AsyncHTTPTransport:
    limits = httpx.Limits(
        max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS, keepalive_expiry=_KEEP_ALIVE_S
    )
    return httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy)


async def _tls(needed: bool) -> ssl.SSLContext:
    """The certificates that httpx trusts; where no connection will be encrypted, none, since reading them is slow."""
    if needed:
        return await run_blocking(httpx.create_ssl_context)
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names for ``url``; never one for this machine itself."""
    if _is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
