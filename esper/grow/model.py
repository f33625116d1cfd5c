"""The networks of the main job: a host that is too small, and a static one of any size to compare with."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["build", "count_parameters", "host_width", "width_for"]


def host_width(classes: int) -> int:
    """Hidden width of a host that is too small: two units for five classes (digits: four for ten), at least two."""
    return max(2, math.ceil(0.4 * classes))


def build(features: int, classes: int, *, width: int, seed: int) -> nn.Sequential:
    """A multilayer perceptron ``features -> width -> width -> classes`` with ReLU, initialised from ``seed`` alone.

    Input ``[batch, features]`` float32, output (logits) ``[batch, classes]``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars, a shared parameter counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameters_of_width(features: int, classes: int, width: int) -> int:
    """Trainable scalars of ``build(features, classes, width=width)``."""
    return (features + 1) * width + (width + 1) * width + (width + 1) * classes


def width_for(features: int, classes: int, parameters: int) -> int:
    """The hidden width (at least 1) whose parameter count is nearest ``parameters``; the smaller of two as near."""
    width = 1
    while parameters_of_width(features, classes, width + 1) <= parameters:
        width += 1
    below = parameters - parameters_of_width(features, classes, width)
    above = parameters_of_width(features, classes, width + 1) - parameters
    return width if below <= above else width + 1
