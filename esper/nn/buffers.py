"""Buffers whose type is part of what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor, nn

__all__ = ["KeepsTypes"]


class KeepsTypes(nn.Module):
    """A module some of whose buffers follow it to other devices, but not to other types (``half()``, ``to(dtype)``).

    Attributes:
        kept: Names of these buffers.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name in self.kept if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype is not old.dtype:
                # From the value there was: on its way through a narrower type it would have been rounded.
                self._buffers[name] = old.to(new.device)
        return self
