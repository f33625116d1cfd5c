"""What was measured to be fastest, by operation and shape, kept on disk for the next process.

Nothing here measures. Without a measurement there is no choice, and the caller takes its safe default. A file belongs
to one kind of device and one set of versions, since a choice says nothing about another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

__all__ = ["CHOICES", "Choices", "bucket"]


def bucket(rows: int) -> int:
    """Rows as choices know them: the next power of two, because a batch need not be the same at every call."""
    return 1 << max(rows - 1, 0).bit_length()


def _folder() -> Path:
    # As esper.contracts.paths has it, which operations do not import.
    if chosen := os.environ.get("ESPER_CACHE_DIR"):
        return Path(chosen).expanduser() / "choices"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "esper" / "choices"


@lru_cache(maxsize=64)
def _file_name(device: torch.device) -> str:
    try:
        import triton

        compiler = str(triton.__version__)
    except ImportError:
        compiler = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{name}-torch-{torch.__version__}-triton-{compiler}") + ".json"


class Choices:
    """Choices of this process, read from disk once a kind of device and written as they are made.

    Args:
        folder: Where the files are; by default ``choices`` in Esper's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        #: By the file's name: where the folder is need not be asked at every call.
        self._known: dict[str, dict[str, str]] = {}

    def path(self, device: torch.device) -> Path:
        """The file of this kind of device."""
        return (self._folder or _folder()) / _file_name(device)

    def get(self, key: str, device: torch.device) -> str | None:
        """What was chosen, or None."""
        return self._of(device).get(key)

    def put(self, key: str, choice: str, device: torch.device) -> None:
        """Keep a choice. A folder that cannot be written to costs nothing but the next process's knowledge."""
        name, path = _file_name(device), self.path(device)
        with self._lock:
            # Other processes may have chosen meanwhile.
            known = self._known[name] = _read(path) | self._known.get(name, {}) | {key: choice}
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
                partial.replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink()

    def forget(self) -> None:
        """Read the files again at the next question."""
        with self._lock:
            self._known.clear()

    def _of(self, device: torch.device) -> dict[str, str]:
        name = _file_name(device)
        found = self._known.get(name)
        if found is None:
            with self._lock:
                found = self._known.setdefault(name, _read(self.path(device)))
        return found


def _read(path: Path) -> dict[str, str]:
    """What a file holds; nothing if it is not there or not ours."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, str)}


#: The process's own.
CHOICES: Final = Choices()
