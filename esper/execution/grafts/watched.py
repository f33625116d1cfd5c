"""Noticing that a bank's parameters are others by now, or elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import Tensor

from esper.execution.grafts.seed import SeedWeights
from esper.ops import native

__all__ = ["Watched"]

# C-level accessors: a Python loop over the parameters would cost as much as the product of a small layer.
_slot = dict.__getitem__
_is = operator.is_


class Watched:
    """Parameters in their places in modules: :meth:`_add` each, :meth:`_house` it in a buffer, then :meth:`_watch`."""

    #: Whether every parameter is still the one that was there, where it was.
    whole: Callable[[], bool]
    #: Changes when a parameter is written to.
    versions: Callable[[], bytes]

    def __init__(self) -> None:
        self._dicts: list[dict[str, Tensor | None]] = []
        self._keys: list[str] = []
        self.parameters: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def available() -> bool:
        """Whether the extension has what watches."""
        return hasattr(native.load(), "GraftGuard")  # neither missing nor older than this package

    def _add(self, module: SeedWeights, node: str, kind: str) -> None:
        slots = module._modules[node]._parameters  # type: ignore[union-attr]
        parameter = slots[kind]
        assert parameter is not None
        self._dicts.append(slots)  # type: ignore[arg-type]
        self._keys.append(kind)
        self.parameters.append(parameter)

    def _house(self, parameter: Tensor, place: Tensor) -> None:
        """Move a parameter into its place in a buffer.

        One whose place has gaps keeps its own memory, and is copied by :meth:`_refresh`: a fused optimizer walks a
        parameter's memory from end to end, and would write into what lies in the gaps.
        """
        place.copy_(parameter)
        # Lines of length 1 have no gaps, whatever lies between them; `is_contiguous` knows that.
        if place.is_contiguous() or place.t().is_contiguous():
            parameter.data = place
        else:
            # `.data`, because the buffer as autograd knows it must not count as changed: `versions` watches parameters.
            self._copied.append((place.data, parameter.detach()))

    def _refresh(self) -> None:
        """Bring what keeps memory of its own into the buffer, as it is now."""
        for place, parameter in self._copied:
            place.copy_(parameter)

    def _watch(self) -> None:
        """Look after the parameters as they are now."""
        module = native.load()
        assert module is not None
        guard = module.GraftGuard(self._dicts, self._keys, self.parameters)
        self.whole, self.versions = guard.whole, guard.versions

    def swapped(self) -> bool:
        """Whether other tensors stand in the parameters' places, as under ``functional_call``."""
        return not all(map(_is, map(_slot, self._dicts, self._keys), self.parameters))
