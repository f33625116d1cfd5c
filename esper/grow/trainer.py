"""One network, one optimizer, one pass over the data at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from esper.grow.data import Split

__all__ = ["EpochRecord", "Interrupted", "Trainer", "evaluate"]

#: Devices that PyTorch has a fused AdamW for.
_FUSED: Final = ("cpu", "cuda", "mps", "xpu")


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked to stop
    """The user asked to stop, between two steps."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to; losses are mean cross-entropies in nats, accuracy is a share in [0, 1]."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy of ``model`` on ``x`` ``[n, features]``, ``y`` ``[n]``, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        logits = model(x)
    finally:
        model.train(was_training)
    loss = functional.cross_entropy(logits, y)
    accuracy = (logits.argmax(dim=1) == y).float().mean()
    values: list[float] = torch.stack((loss, accuracy)).tolist()
    return values[0], values[1]


class Trainer:
    """Mini-batch AdamW on a split; batch order depends on ``seed`` alone, so that networks compare fairly."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        *,
        seed: int,
        batch_size: int = 64,
        lr: float = 5e-3,
        weight_decay: float = 0.3,
    ) -> None:
        """Bind ``model`` to ``split``; ``lr`` and ``weight_decay`` are AdamW's."""
        self.model = model
        self.split = split
        self.batch_size = batch_size
        # One call for all parameters: one by one they would take longer than such a network's forward and backward.
        fused = split.train_x.device.type in _FUSED
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
        self.epochs_done = 0
        self._order = torch.Generator().manual_seed(seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return -(-len(self.split.train_y) // self.batch_size)

    def epoch(
        self, after_step: Callable[[], object] | None = None, stop: Callable[[], bool] = lambda: False
    ) -> EpochRecord:
        """Train for one pass and evaluate.

        Args:
            after_step: Called after each optimizer step (a growing model's ``step``).
            stop: Asked before each step.

        Raises:
            Interrupted: when ``stop()`` says so; the network is left as the last whole step made it.
        """
        split, model, optimizer = self.split, self.model, self.optimizer
        model.train()
        count = len(split.train_y)
        order = torch.randperm(count, generator=self._order).to(split.train_y.device)
        # Gathered once, not batch by batch: networks as small as these wait for every operation.
        xs, ys = (values[order].split(self.batch_size) for values in (split.train_x, split.train_y))
        # Added up on the device and read once: reading each step's loss would wait for the device every step.
        losses: list[torch.Tensor] = []
        for x, y in zip(xs, ys, strict=True):
            if stop():
                raise Interrupted
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
            if after_step is not None:
                after_step()
        weights = losses[0].new_tensor([len(y) / count for y in ys])
        train_loss = float(torch.stack(losses) @ weights)
        self.epochs_done += 1
        validation_loss, validation_accuracy = evaluate(model, split.validation_x, split.validation_y)
        return EpochRecord(self.epochs_done, train_loss, validation_loss, validation_accuracy)
