"""The two forwards of a model with reserved memory, and making both of them before training.

Asleep, every host runs its own forward, bit for bit. As soon as one seed of the model is awake, all layers run with
their grafts, and go on so until the last seed sleeps again. What seeds do in between is data on the device. So a
compiler has two graphs to make for a model, whatever happens in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from esper.core.naming import GraftTree
from esper.core.unchanged import unchanged
from esper.execution.grafts import ReservedGraftSet

if TYPE_CHECKING:
    from esper.core.morphable import MorphableModel

__all__ = ["TwoForwards", "Variants"]


class Variants:
    """Which of the two forwards of a model stands in place; see the module.

    Args:
        model: The model; with elastic grafts each layer goes its own way, and nothing here does anything.
    """

    def __init__(self, model: MorphableModel) -> None:
        self._model = model
        self._holds = 0
        # A copy may come with layers that were held: the first look brings them in line in any case.
        self._awake = None if model.reserve_rank else False

    def follow(self) -> None:
        """Bring the layers in line with what is awake."""
        layers = self._model.kasmina_layers.values()
        reserved = self._model.reserve_rank > 0
        awake = reserved and (self._holds > 0 or any(layer.grafts.bound for layer in layers))
        if awake != self._awake:
            self._awake = awake
            for layer in layers:
                layer.hold_path(awake)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the awake forward in place inside the block, whatever sleeps."""
        if not self._model.reserve_rank:
            raise ValueError("this model has no reserved memory; wrap it with reserve_rank=R")
        self._holds += 1
        self.follow()
        try:
            yield
        finally:
            self._holds -= 1
            self.follow()

    def prepare(self, step: Callable[[], object], repeats: int) -> None:
        """See :meth:`TwoForwards.prepare`."""
        model = self._model
        if not model.reserve_rank:
            raise ValueError("this model has no reserved memory; wrap it with reserve_rank=R")
        if model.morphogenetic_active:
            raise RuntimeError("prepare() makes the graphs of both forwards; call it while all seeds are asleep")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        for layer in model.kasmina_layers.values():
            if isinstance(layer.grafts, ReservedGraftSet):
                layer.grafts.keep_addresses()
        with _as_it_was(model):
            _run(model, step, repeats)
            with self.awake():
                _run(model, step, repeats)


class TwoForwards(nn.Module):
    """The part of a wrapped model that users of reserved memory call."""

    reserve_rank: int
    esper: GraftTree
    _variants: Variants

    def prepare(self, step: Callable[[], object], *, repeats: int = 3) -> None:
        """Let everything be compiled and recorded that training will need, before it starts.

        A model with reserved memory has two forwards: asleep, and with grafts. ``step`` is run in both, so that waking
        a seed later finds its graph there: nothing is compiled, recompiled or recorded again by waking, ramping,
        culling or faults. Gradients, buffers and random numbers are afterwards as they were. On several ranks every
        rank calls it.

            compiled = torch.compile(model)
            model.prepare(lambda: loss(compiled(x), target).backward())

        Args:
            step: What a training step does up to the backward, through the compiled callable; it must not move
                parameters, nor call :attr:`step`. No parameter of the model has a gradient when it is called.
            repeats: How often it is run in each; a CUDA graph of ``mode="reduce-overhead"`` is there after three.

        Raises:
            ValueError: the model has no reserved memory.
            RuntimeError: a seed is awake.
        """
        self._variants.prepare(step, repeats)

    def awake_path(self) -> AbstractContextManager[None]:
        """A block in which all layers run with their grafts although all seeds may sleep.

        For capturing a ``torch.cuda.graph`` by hand: what is captured inside serves whatever seeds do later, and with
        all of them asleep gives the host's numbers.

        Raises:
            ValueError: on entry, the model has no reserved memory.
        """
        return self._variants.awake()

    def reserved_stats(self) -> dict[str, int]:
        """What reserved memory takes: ``rank``, ``parameters`` (numbers) and ``bytes``; zeros where there is none.

        Each gradient and each moment of an optimizer takes as many again.
        """
        found = [parameter for parameter in self.esper.parameters() if self.reserve_rank]
        return {
            "rank": self.reserve_rank,
            "parameters": sum(parameter.numel() for parameter in found),
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in found),
        }


def _run(model: nn.Module, step: Callable[[], object], repeats: int) -> None:
    """Run the step so often, each time from parameters without gradients."""
    for _ in range(repeats):
        # CUDA graph trees write the gradients of every run into memory of their own. What an earlier run left there is
        # gone by the next one's backward, and adding to it raises.
        for parameter in model.parameters():
            parameter.grad = None
        step()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random numbers as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with unchanged(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
