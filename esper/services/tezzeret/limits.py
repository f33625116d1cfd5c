"""How much one job may take, and how a process binds itself to that."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self

__all__ = ["Limits", "die_with", "sandbox_environment"]

_MIB: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1

#: All that a sandbox learns of the worker's environment. Not in it: tokens, keys, passwords, proxies, and switches
#: that would change what is compiled.
_INHERITED: Final = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONPATH",
    "TRITON_PTXAS_PATH",
    "TZ",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one job may take.

    Attributes:
        timeout_s: Seconds by the clock on the wall, counted by the worker, and of CPU time, counted by the kernel.
        memory_bytes: Of private writable memory (``RLIMIT_DATA``): heap, stacks, tensors. Not of address space, most
            of which is libraries' and never touched.
        artifact_bytes: Largest artifact, and largest file that may be written.
    """

    timeout_s: float = 120.0
    memory_bytes: int = 4096 * _MIB
    artifact_bytes: int = 256 * _MIB

    def __post_init__(self) -> None:
        for name, low in (("timeout_s", 1), ("memory_bytes", 256 * _MIB), ("artifact_bytes", 1 << 10)):
            value = getattr(self, name)
            # `not >=` catches NaN as well.
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1 << 50:
                raise ValueError(f"{name} is {value!r}; need a number of at least {low} and less than 2^50")

    def to_payload(self) -> dict[str, float]:
        """Plain values for the sandbox."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: Mapping[str, float]) -> Self:
        """The inverse of :meth:`to_payload`."""
        return cls(
            timeout_s=payload["timeout_s"],
            memory_bytes=int(payload["memory_bytes"]),
            artifact_bytes=int(payload["artifact_bytes"]),
        )

    def bind(self) -> None:
        """Put this process, and those it starts, under the limits. There is no way back."""
        # A compiler's own scratch files must fit, however small the artifact may be.
        file = max(self.artifact_bytes, 16 * _MIB)
        _limit(resource.RLIMIT_DATA, self.memory_bytes)
        # The soft limit ends the process with a signal that says why, the hard one just ends it.
        _limit(resource.RLIMIT_CPU, int(self.timeout_s) + 1, slack=2)
        _limit(resource.RLIMIT_FSIZE, file)
        _limit(resource.RLIMIT_CORE, 0)


def _limit(what: int, value: int, slack: int = 0) -> None:
    """Set a limit, or leave the one that is there if it is lower."""
    present = resource.getrlimit(what)[1]
    hard = value + slack if present == resource.RLIM_INFINITY else min(value + slack, present)
    resource.setrlimit(what, (min(value, hard), hard))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, so that a killed worker leaves no compiler running."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the worker is gone")


def sandbox_environment(folder: str) -> dict[str, str]:
    """The environment of a sandbox whose home, caches and scratch files are in ``folder``."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **kept,
        "HOME": folder,
        "TMPDIR": folder,
        "XDG_CACHE_HOME": folder,
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
        # One thread a job: the worker runs several jobs, and CPU time then never exceeds time.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
    }
