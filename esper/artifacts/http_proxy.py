"""The proxy that the environment names: for whom it is asked, and what is said of one that cannot be used.

Proxies carry passwords, so no message quotes one, nor what httpx says of it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import urllib.request
from collections.abc import Iterator

import httpx

from esper.contracts.errors import RegistryUnavailableError

__all__ = ["proxy_errors", "proxy_for"]


def proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names; never one for this machine itself."""
    if _is_loopback(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


@contextlib.contextmanager
def proxy_errors() -> Iterator[None]:
    """Say of a proxy's URL that is none, and of a kind of proxy that is not supported, whose it is and what to do.

    Raises:
        RegistryUnavailableError: instead of what httpx raises then, which quotes the URL or names nothing.
    """
    try:
        yield
    except ImportError:
        why = "a SOCKS proxy needs the Python package socksio: pip install 'httpx[socks]'"
    except (httpx.InvalidURL, ValueError, OverflowError, ExceptionGroup):
        # Of ports that are too large anyio makes a group.
        why = "need http://host:port, https:// or socks5://, a port below 65536, and a password that is percent-encoded"
    else:
        return
    raise RegistryUnavailableError(
        f"the proxy that the environment names cannot be used (http_proxy, https_proxy, all_proxy): {why}",
        retryable=False,
    ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
