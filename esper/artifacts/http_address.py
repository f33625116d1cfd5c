"""Where a registry is, and the token it wants: what a URL and ``ESPER_REGISTRY_TOKEN`` say.

No message shows a token. Nor does any quote why a URL could not be taken apart: in one whose token is not
percent-encoded, a piece of the token passes for the port.
"""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import unquote, urlsplit

from esper.contracts.registry import RegistryURLError, mask_credentials

__all__ = ["API", "TOKEN_VARIABLE", "choose_token", "split_address"]

#: Of Urza's API, behind the address.
API: Final = "/api/v1"
TOKEN_VARIABLE: Final = "ESPER_REGISTRY_TOKEN"
_ENCODE: Final = f"a token that is percent-encoded, or in {TOKEN_VARIABLE} instead"


def split_address(url: str) -> tuple[str, str | None]:
    """The URL without credentials and without the API's path, and the token in it.

    Raises:
        RegistryURLError: it is none, or has a query.
    """
    url = url.strip()
    shown = mask_credentials(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise RegistryURLError(
            f"registry {shown} is not a URL: need http://host:port, a port that is a number, and {_ENCODE}"
        ) from None
    if parts.scheme not in ("http", "https") or not host:
        raise RegistryURLError(f"registry {shown} is not of the form http://host:port or https://host")
    if parts.query or parts.fragment:
        raise RegistryURLError(f"registry {shown}: leave out the query; a token goes into {TOKEN_VARIABLE}")
    if "@" in parts.path:
        # Or the token had a / in it, and its first piece would be asked for as the host.
        raise RegistryURLError(f"registry {shown} is ambiguous: need {_ENCODE}")
    token = parts.password or parts.username
    where = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix(API)
    return f"{parts.scheme}://{where}{f':{port}' if port is not None else ''}{path}", unquote(token) if token else None


def choose_token(shown: str, in_url: str | None, given: str | None = None) -> str | None:
    """The token to send: ``given``, else the one in the URL, else ``ESPER_REGISTRY_TOKEN``, else none.

    Args:
        shown: The registry's URL for messages.
        in_url: As :func:`split_address` found it.
        given: An argument's.

    Raises:
        RegistryURLError: it cannot be one; the message says where it is from and what is wrong with it.
    """
    candidates = (
        (given, "that was given"),
        (in_url, "in the URL"),
        (os.environ.get(TOKEN_VARIABLE) or None, f"in {TOKEN_VARIABLE}"),
    )
    for token, place in candidates:
        if token is None:
            continue
        if fault := _fault(token):
            raise RegistryURLError(f"registry {shown}: the token {place} {fault}")
        return token
    return None


def _fault(token: str) -> str:
    if not token:
        return "is empty"
    what = "has characters that no token has"
    if any(letter.isspace() for letter in token):
        # What `echo`, a secret's file or a line that ends in CR LF leaves behind it.
        where = "within it" if token == token.strip() else "at an end"
        return f"{what}: a blank or line break {where}"
    if not token.isascii():
        return f"{what}: letters outside ASCII"
    return "" if token.isprintable() else f"{what}: control characters"
