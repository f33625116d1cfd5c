"""Connections to a registry: kept alive, one pool an event loop, closed with the loop."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from esper.artifacts.http_proxy import proxy_errors, proxy_for
from esper.artifacts.http_wire import Connection, Response, StaleConnectionError, WireError, connect_options
from esper.artifacts.workers import run_blocking

__all__ = ["Address", "Pools", "Timeouts"]

_MAX_CONNECTIONS: Final = 16
_KEEP_ALIVE_S: Final = 60.0
_PROXIES_KNOWN: Final = 64


@dataclass(frozen=True, slots=True)
class Address:
    """Where a request goes: the parts of a URL that were checked.

    Attributes:
        scheme: ``http`` or ``https``.
        host: A name or an address, without brackets.
        port: Its port.
        target: Path and query, quoted.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """What the ``Host`` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to get a connection, and of silence on one."""

    connect_s: float
    silence_s: float


class Pools:
    """A pool of connections for every event loop that asks; a copy in a forked child finds none of its parent's loops.

    Only the thread of a loop touches the loop's entry, so there is no lock.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._pools: dict[asyncio.AbstractEventLoop, tuple[_Pool, AsyncGenerator[None]]] = {}

    async def request(self, method: str, where: Address, headers: Mapping[str, str], body: bytes = b"") -> Response:
        """Send a request from the running loop.

        Raises:
            ConnectionRefusedError: among others, as the system says it.
            TimeoutError: no connection, or no answer, in time; the message says which.
            WireError: the connection broke.
            RegistryUnavailableError: the proxy that the environment names cannot be used.
        """
        return await (await self._here()).request(method, where, headers, body)

    async def aclose(self) -> None:
        """Close the running loop's connections; they are opened again when needed."""
        known = self._pools.get(asyncio.get_running_loop())
        if known is not None:
            await known[1].aclose()

    async def _here(self) -> _Pool:
        loop = asyncio.get_running_loop()
        known = self._pools.get(loop)
        if known is None:
            for closed in [other for other in tuple(self._pools) if other.is_closed()]:
                self._pools.pop(closed, None)
            known = _Pool(self._timeouts), self._live(loop)
            self._pools[loop] = known
            await anext(known[1])
        return known[0]

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
    """The connections of one loop."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}
        self._places = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._tls: ssl.SSLContext | None = None
        self._proxies: dict[tuple[str, str, int], str | None] = {}
        self._proxied: dict[str, httpx.AsyncHTTPTransport] = {}

    async def request(self, method: str, where: Address, headers: Mapping[str, str], body: bytes) -> Response:
        proxy = self._proxy(where)
        if proxy is not None:
            return await self._through_proxy(proxy, method, where, headers, body)
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                await self._places.acquire()
        except TimeoutError:
            raise TimeoutError(f"no free connection within {self._timeouts.connect_s:g} s") from None
        try:
            return await self._direct(method, where, headers, body)
        except BaseException:
            self._places.release()
            raise

    async def _direct(self, method: str, where: Address, headers: Mapping[str, str], body: bytes) -> Response:
        while True:
            connection = self._take(where) or await self._connect(where)
            try:
                return await connection.request(method, where.target, headers, body, self._giver(connection, where))
            except StaleConnectionError:
                # A server may close a kept-alive connection at the moment it is used again. That says nothing of the
                # server, and what it did not see may be sent again; so may what it saw, for all that is sent here.
                connection.close()
            except BaseException:
                connection.close()
                raise

    def _giver(self, connection: Connection, where: Address) -> Callable[[], None]:
        given = False

        def give_back() -> None:
            nonlocal given
            if given:
                return
            given = True
            self._places.release()
            if connection.idle:
                connection.idle_since = asyncio.get_running_loop().time()
                self._idle.setdefault(where.origin, []).append(connection)

        return give_back

    def _take(self, where: Address) -> Connection | None:
        """The connection that was used last, so that the others grow old and are dropped."""
        now = asyncio.get_running_loop().time()
        for origin, connections in tuple(self._idle.items()):
            for connection in tuple(connections):
                if not connection.idle or now - connection.idle_since > _KEEP_ALIVE_S:
                    connections.remove(connection)
                    connection.close()
            if not connections:
                del self._idle[origin]
        mine = self._idle.get(where.origin)
        return mine.pop() if mine else None

    async def _connect(self, where: Address) -> Connection:
        secure = where.scheme == "https"
        if secure and self._tls is None:
            self._tls = await run_blocking(httpx.create_ssl_context)  # reads some hundred certificates
        loop, silence_s = asyncio.get_running_loop(), self._timeouts.silence_s
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(silence_s),
                    where.host,
                    where.port,
                    **connect_options(where.host, secure, self._tls),
                )
        except TimeoutError:
            raise TimeoutError(f"no connection within {self._timeouts.connect_s:g} s") from None
        return connection

    async def aclose(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        for transport in self._proxied.values():
            await transport.aclose()
        self._proxied.clear()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next turn

    # -- proxies

    def _proxy(self, where: Address) -> str | None:
        if where.origin not in self._proxies:
            if len(self._proxies) >= _PROXIES_KNOWN:
                self._proxies.clear()
            self._proxies[where.origin] = proxy_for(where.scheme, where.host, where.port)
        return self._proxies[where.origin]

    async def _through_proxy(
        self, proxy: str, method: str, where: Address, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """What the wire cannot do is left to httpx."""
        transport = self._proxied.get(proxy)
        if transport is None:
            context = await run_blocking(httpx.create_ssl_context)
            limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, keepalive_expiry=_KEEP_ALIVE_S)
            with proxy_errors():
                made = httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy)
            transport = self._proxied.setdefault(proxy, made)
        silence_s, connect_s = self._timeouts.silence_s, self._timeouts.connect_s
        timeout = {"connect": connect_s, "pool": connect_s, "read": silence_s, "write": silence_s}
        url = f"{where.scheme}://{where.authority}{where.target}"
        request = httpx.Request(method, url, headers=headers, content=body, extensions={"timeout": timeout})
        with _httpx_errors(), proxy_errors():
            answer = await transport.handle_async_request(request)
        names = {name.lower(): value for name, value in reversed(answer.headers.multi_items())}
        return Response(answer.status_code, names, _parts(answer), answer.aclose)


async def _parts(answer: httpx.Response) -> AsyncGenerator[bytes]:
    with _httpx_errors():
        async for part in answer.aiter_raw():
            yield part


@contextlib.contextmanager
def _httpx_errors() -> Iterator[None]:
    """Turn what httpx raises into what the wire raises."""
    try:
        yield
    except httpx.TimeoutException:
        raise TimeoutError("silent for too long, by way of the proxy") from None
    except httpx.TransportError as error:
        raise WireError(f"by way of the proxy: {error or type(error).__name__}") from None
