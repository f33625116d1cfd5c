"""The clock of a wrapped model: forwards and training steps, and when something is due.

Both are counted on every step, while the host's forward has just driven everything else out of the caches; so the
extension has a clock in C (csrc/clock.cpp), and :class:`Clock` is the same in Python for where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from esper.ops import native

__all__ = ["Clock", "Timed", "call_through_clock", "make_clock"]

_GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
_jit_tracing = torch._C._get_tracing_state


class Clock:
    """Counts forwards and steps. Slots: an attribute of an ``nn.Module`` costs twenty times as much to set.

    Calling it counts a forward and calls the host: by ``forward`` where ``plain`` is true and no hook is registered,
    which saves the frames of ``nn.Module.__call__``; else by ``host_call``.

    Attributes:
        calls: Forwards so far.
        steps: Training steps so far.
        due: The step at which ``on_due`` is called next.
        seen_calls: ``calls`` when somebody last looked.
        on_due: Called with the clock when a step is due.
        host: The module that a call goes to.
        host_call: Its full call.
        tracing: Gives None unless ``torch.jit`` is tracing.
        plain: Whether ``forward`` may be called directly when no hook is there.
        watched: Tables of global hooks.
    """

    __slots__ = (
        "calls",
        "due",
        "host",
        "host_call",
        "on_due",
        "plain",
        "seen_calls",
        "steps",
        "tracing",
        "watched",
    )

    host: nn.Module
    host_call: Callable[..., Any]
    on_due: Callable[[Any], None]
    tracing: Callable[[], Any]
    watched: tuple[dict[int, Any], ...]

    def __init__(self) -> None:
        self.calls = 0
        self.steps = 0
        self.due = 0
        self.seen_calls = 0
        self.plain = False

    def tick(self) -> None:
        """Count a training step; call ``on_due`` if it is due."""
        self.steps += 1
        if self.steps >= self.due:
            self.on_due(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Count a forward and call the host."""
        self.calls += 1
        host = self.host
        if (
            not self.plain
            or host._forward_hooks
            or host._forward_pre_hooks
            or host._backward_hooks
            or host._backward_pre_hooks
            or any(self.watched)
            or self.tracing()
        ):
            return self.host_call(*args, **kwargs)
        return host.forward(*args, **kwargs)


def make_clock(calls: int = 0, steps: int = 0) -> Clock:
    """A clock, the extension's where it is there, that has counted so much already."""
    module = native.load()
    clock: Clock = Clock() if module is None else module.Clock()
    clock.calls, clock.steps = calls, steps
    clock.watched, clock.tracing = _GLOBAL_HOOKS, _jit_tracing
    return clock


class Timed:
    """A module with a clock.

    Both attributes are slots, since they are read on every step: an entry of the module's dictionary would cost a
    microsecond more each time, once the host's forward has emptied the caches.

    Attributes:
        step: Do what is due between two training steps: ramps, faults, finished loads, samples. It never waits, and
            takes 0.1 us when nothing is due. An error here would break a run, so what goes wrong with a seed is put on
            record instead. A subclass may have a method of this name.
    """

    __slots__ = ("_clock", "step")

    _clock: Clock
    step: Callable[[], None]

    def set_clock(self, clock: Clock) -> None:
        """Let ``clock`` count from now on."""
        _clock_slot.__set__(self, clock)
        _step_slot.__set__(self, clock.tick)


# A module's own way of setting an attribute would put the step into the dictionary where a subclass has a method.
_clock_slot: Any = Timed.__dict__["_clock"]
_step_slot: Any = Timed.__dict__["step"]


def call_through_clock(module_class: type[nn.Module]) -> None:
    """Let calls of a :class:`Timed` module go to its clock at once, past the Python frame of ``__call__``, if they can.

    ``__call__`` must do the same: it is what ``torch.compile`` reads, what subclasses inherit, and what runs without
    the extension.
    """
    module = native.load()
    if module is not None:
        module.call_through_clock(module_class, _clock_slot)
