"""From what users write after ``registry=`` to a client."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from esper.artifacts.file_registry import FileRegistry
from esper.contracts.paths import default_registry_dir
from esper.contracts.registry import RegistryClient, RegistryURLError, mask_credentials

__all__ = ["open_registry"]


def open_registry(where: str | os.PathLike[str] | RegistryClient | None = None) -> RegistryClient:
    """The registry that ``where`` means; opening touches no file and no network.

    Args:
        where: A client, which is returned as it is; an ``http(s)://`` URL, where Urza answers; a ``file://`` URL or a
            path; or None for ``ESPER_REGISTRY``, and where that is not set, ``$XDG_DATA_HOME/esper/registry``
            (``~/.local/share/esper/registry``).

    Raises:
        RegistryURLError: for a URL of a kind that this version does not read; credentials are masked in the message.
        TypeError: for anything else.
    """
    if where is None:
        where = os.environ.get("ESPER_REGISTRY") or default_registry_dir()
    if isinstance(where, os.PathLike):
        where = Path(where)
        return FileRegistry(where)
    if not isinstance(where, str):
        if isinstance(where, RegistryClient):
            return where
        raise TypeError(
            f"registry must be a URL, a path, a client with fetch, publish, list, describe and url, or None; "
            f"not {type(where).__name__}"
        )
    if "://" not in where:
        if not where.strip():
            raise RegistryURLError("the registry's URL is empty; give a path, a file:// or an http:// URL")
        return FileRegistry(where)
    where = where.strip()  # of a URL: a folder's name may end in a blank
    if where.partition("://")[0].lower() in ("http", "https"):
        # Imported when it is needed: httpx takes a tenth of a second.
        from esper.artifacts.http_registry import HttpRegistry

        return HttpRegistry(where)
    return FileRegistry(_file_url(where))


def _file_url(url: str) -> Path:
    shown = mask_credentials(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise RegistryURLError(
            f"registry {shown} is not a URL; expected http://, https://, file:// or a path"
        ) from None
    if parts.scheme != "file":
        raise RegistryURLError(
            f"registry {shown}: unknown scheme {parts.scheme!r}; expected http://, https://, file:// or a path"
        )
    if parts.netloc not in ("", "localhost"):
        raise RegistryURLError(f"registry {shown} names a host; write file:///absolute/path with three slashes")
    if not parts.path.strip("/"):
        raise RegistryURLError(f"registry {shown} names no folder; write file:///absolute/path")
    return Path(url2pathname(parts.path))
