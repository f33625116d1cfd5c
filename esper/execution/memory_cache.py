"""The kernels in memory: least recently used first out, by bytes and by number."""

from __future__ import annotations

from collections import OrderedDict

from esper.execution.kernel_executor import LoadedKernel

__all__ = ["KernelMemory"]


class KernelMemory:
    """Kernels by id. It has no lock: its user has one.

    Args:
        max_bytes: Most bytes of artifacts held; a kernel larger than this is not kept.
        max_entries: Most kernels held.
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.nbytes = 0
        self.evictions = 0
        self._kernels: OrderedDict[str, LoadedKernel] = OrderedDict()

    def get(self, artifact_id: str) -> LoadedKernel | None:
        """A kernel, which is now the most recently used."""
        kernel = self._kernels.get(artifact_id)
        if kernel is not None:
            self._kernels.move_to_end(artifact_id)
        return kernel

    def put(self, kernel: LoadedKernel) -> None:
        """Keep a kernel, and let go of those that it leaves no room for."""
        self.pop(kernel.artifact_id)
        if kernel.nbytes > self.max_bytes or self.max_entries == 0:
            return
        self._kernels[kernel.artifact_id] = kernel
        self.nbytes += kernel.nbytes
        while self.nbytes > self.max_bytes or len(self._kernels) > self.max_entries:
            _, evicted = self._kernels.popitem(last=False)
            self.nbytes -= evicted.nbytes
            self.evictions += 1

    def pop(self, artifact_id: str) -> bool:
        """Let go of a kernel; whether it was held."""
        kernel = self._kernels.pop(artifact_id, None)
        if kernel is not None:
            self.nbytes -= kernel.nbytes
        return kernel is not None

    def clear(self) -> None:
        """Let go of all kernels."""
        self._kernels.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kernels)
