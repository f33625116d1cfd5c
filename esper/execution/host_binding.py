"""Putting a forward in front of a module's own, and taking it away again without a trace.

A host stays in its place in the network. What has to run instead of its forward, while a seed is awake or a probe is
armed, shadows the method by an instance attribute; :meth:`HostBinding.remove` deletes it and the class's own forward
is back, bit for bit.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Forward", "HostBinding", "fast_path_ancestors", "held_hosts", "is_held"]

Forward = Callable[..., Any]

#: Who has each host, by the host's id: a binding keeps its host, so while it is here no other object has that id.
_holders: weakref.WeakValueDictionary[int, HostBinding] = weakref.WeakValueDictionary()


class HostBinding:
    """One host and the forward that may stand in front of its own.

    A host has one binding at a time, the first that claimed it: two would take each other's forwards away. What is
    copied or unpickled claims its host when it first installs something.

    Args:
        host: The module whose forward can be shadowed.
        ancestors: Modules around it with a fused inference path that reads the host's weights without calling it
            (see :func:`fast_path_ancestors`); the path is closed while a graft is installed.
    """

    def __init__(self, host: nn.Module, ancestors: Iterable[nn.Module] = ()) -> None:
        self.host = host
        self._ancestors = tuple(ancestors)
        self._patched: Forward | None = host.__dict__.get("forward")
        self._owner: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self._given_up = False
        self.base: Forward = self._own_forward()
        #: The host, if its forward is the product with its attributes ``weight`` and ``bias`` and nothing else.
        self.product = host if self.untouched and _is_linear(type(host)) else None

    @property
    def untouched(self) -> bool:
        """Whether the host's forward is its class's: nobody had put another in front of it."""
        return self._patched is None

    def claim(self) -> bool:
        """Have the host to oneself; False where another binding has it.

        One that gave its host up goes on with it until somebody else claims it.
        """
        if self._given_up:
            return id(self.host) not in _holders
        return _holders.setdefault(id(self.host), self) is self

    def give_up(self) -> None:
        """Let others claim the host. What is installed stays until it is removed, in front of or behind theirs."""
        self._given_up = True
        if _holders.get(id(self.host)) is self:
            del _holders[id(self.host)]

    def install(self, owner: nn.Module, method: str, *, closes_fast_path: bool) -> None:
        """Let ``owner.method`` run in place of the host's forward; nothing happens where another binding has it.

        ``closes_fast_path`` is for forwards that change the result: fused paths around the host would not call it. A
        probe leaves them open, because closing one changes the rounding of the host's own result.
        """
        if not self.claim():
            return
        self.host.__dict__["forward"] = getattr(owner, method)
        self._owner = owner
        if closes_fast_path and self._ancestors and self._hook is None:
            # A forward hook on the host is what torch's fused encoder path checks for.
            self._hook = self.host.register_forward_hook(_leave_unchanged)
            for ancestor in self._ancestors:
                _close_nested(ancestor)
        elif not closes_fast_path:
            self._reopen()

    def remove(self) -> None:
        """Give the host its own forward back."""
        current = self.host.__dict__.get("forward")
        # Somebody else may have put a forward in front of ours meanwhile: it is theirs to take away.
        if self._owner is not None and getattr(current, "__self__", None) is self._owner:
            if self._patched is None:
                del self.host.__dict__["forward"]
            else:
                self.host.__dict__["forward"] = self._patched
            self._owner = None
        self._reopen()

    def _own_forward(self) -> Forward:
        # Not `host.forward`: that would find the shadow when this runs during unpickling.
        return self._patched or types.MethodType(type(self.host).forward, self.host)

    def _reopen(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            for ancestor in self._ancestors:
                _open_nested(ancestor)

    def __getstate__(self) -> dict[str, Any]:
        # A bound method pickles as getattr(host, "forward"), which finds the shadow: rebuild it instead.
        return {name: value for name, value in self.__dict__.items() if name != "base"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.base = self._own_forward()


def _is_linear(kind: type[nn.Module]) -> bool:
    """Whether modules of this class multiply with their ``weight``, add their ``bias``, and do nothing else."""
    code = getattr(nn.Linear.forward, "__code__", None)  # somebody may have put another in its place for all
    return (
        issubclass(kind, nn.Linear)
        and kind.forward is nn.Linear.forward
        and code is not None
        and code.co_filename == nn.Linear.extra_repr.__code__.co_filename
        and kind.__getattribute__ is object.__getattribute__
        and kind.__getattr__ is nn.Module.__getattr__
        and not any(name in vars(base) for base in kind.__mro__ for name in ("weight", "bias"))
    )


def is_held(host: nn.Module) -> bool:
    """Whether a binding has the host."""
    return id(host) in _holders


def held_hosts() -> list[nn.Module]:
    """All hosts that a binding has, in the whole process."""
    return [binding.host for binding in list(_holders.values())]


def fast_path_ancestors(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules above ``name`` in ``root`` whose fused inference path would pass the host by."""
    parts = name.split(".")
    around = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return [module for module in around if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))]


def _leave_unchanged(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: its presence is the message."""


# nn.TransformerEncoder turns padded batches into nested tensors for the fused path before it asks its layers; with
# that path closed they would meet an ordinary forward. Several hosts may sit in one encoder, hence the count.
def _close_nested(module: nn.Module) -> None:
    if isinstance(module, nn.TransformerEncoder):
        closed, original = module.__dict__.get("_esper_closed", (0, getattr(module, "use_nested_tensor", False)))
        module.__dict__["_esper_closed"] = (closed + 1, original)
        module.use_nested_tensor = False


def _open_nested(module: nn.Module) -> None:
    if isinstance(module, nn.TransformerEncoder) and "_esper_closed" in module.__dict__:
        closed, original = module.__dict__["_esper_closed"]
        if closed > 1:
            module.__dict__["_esper_closed"] = (closed - 1, original)
        else:
            del module.__dict__["_esper_closed"]
            module.use_nested_tensor = original
