"""Where Esper keeps files when nobody said where (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "default_registry_dir"]


def cache_dir() -> Path:
    """``ESPER_CACHE_DIR``, else ``$XDG_CACHE_HOME/esper``, else ``~/.cache/esper``. It can be deleted at any time."""
    if chosen := os.environ.get("ESPER_CACHE_DIR"):
        return Path(chosen).expanduser()
    return _xdg("XDG_CACHE_HOME", ".cache") / "esper"


def default_registry_dir() -> Path:
    """``$XDG_DATA_HOME/esper/registry``, else ``~/.local/share/esper/registry``."""
    return _xdg("XDG_DATA_HOME", ".local/share") / "esper" / "registry"


def _xdg(variable: str, default: str) -> Path:
    # The specification: "All paths must be absolute. If relative, the path should be considered invalid and ignored."
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default
