"""The kernels in memory: least recently used first out, by bytes and by number."""

from __future__ import annotations

from collections import OrderedDict

import torch

from esper.execution.kernel_executor import LoadedKernel

__all__ = ["KernelMemory"]


class KernelMemory:
    """Kernels by id and device. It has no lock: its user has one.

    Args:
        max_bytes: Most bytes of artifacts held; a kernel larger than this is not kept.
        max_entries: Most kernels held.
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.evictions = 0
        self._kernels: OrderedDict[tuple[str, torch.device], LoadedKernel] = OrderedDict()

    def get(self, artifact_id: str, device: torch.device) -> LoadedKernel | None:
        """A kernel, which is now the most recently used."""
        key = artifact_id, device
        kernel = self._kernels.get(key)
        if kernel is not None:
            self._kernels.move_to_end(key)
        return kernel

    def put(self, kernel: LoadedKernel, device: torch.device) -> None:
        """Keep a kernel, and let go of those that it leaves no room for."""
        key = kernel.artifact_id, device
        self._drop(key)
        if kernel.nbytes > self.max_bytes or self.max_entries == 0:
            return
        self._kernels[key] = kernel
        self.nbytes += kernel.nbytes
        while self.nbytes > self.max_bytes or len(self._kernels) > self.max_entries:
            _, evicted = self._kernels.popitem(last=False)
            self.nbytes -= evicted.nbytes
            self.evictions += 1

    def pop(self, artifact_id: str) -> bool:
        """Let go of a kernel on all devices; whether it was held."""
        keys = [key for key in self._kernels if key[0] == artifact_id]
        for key in keys:
            self._drop(key)
        return bool(keys)

    def clear(self) -> None:
        """Let go of all kernels."""
        self._kernels.clear()
        self.nbytes = 0

    def _drop(self, key: tuple[str, torch.device]) -> None:
        kernel = self._kernels.pop(key, None)
        if kernel is not None:
            self.nbytes -= kernel.nbytes

    def __len__(self) -> int:
        return len(self._kernels)
