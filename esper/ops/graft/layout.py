"""Where each seed's contribution goes, and with which coefficient.

    residual seed:  coefficient alpha
    replace seed:   coefficient alpha / max(1, A'),  host factor 1 - min(1, A')

A' is the sum of the alphas of the replace seeds that change a feature. A chunk-scoped seed changes only its own
features, so A' may differ from chunk to chunk; between two borders it does not. Such a stretch of features is a
*segment*.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlendLayout", "Place", "chunk_span"]


def chunk_span(seed_idx: int, num_seeds: int, features: int) -> tuple[int, int]:
    """Features [begin, end) that seed ``seed_idx`` of ``num_seeds`` watches.

    They are the ones it changes when its scope is ``chunk``.
    """
    return seed_idx * features // num_seeds, (seed_idx + 1) * features // num_seeds


@dataclass(frozen=True)
class Place:
    """One seed's part in the blend.

    Attributes:
        index: The seed, a row of ``alpha_blend``.
        begin: First feature it changes.
        end: One past the last.
        replace: Whether its mode is ``replace``.
    """

    index: int
    begin: int
    end: int
    replace: bool


class BlendLayout:
    """The segments of a set of seeds, and the coefficients in each.

    Args:
        places: The seeds, in the order of their contributions.
        features: Features of the layer.
    """

    def __init__(self, places: Sequence[Place], features: int) -> None:
        self.places = tuple(places)
        self.features = features
        borders = sorted({0, features, *(p.begin for p in places), *(p.end for p in places)})
        self.segments = tuple(itertools.pairwise(borders))
        self.flat = [int(number) for p in self.places for number in (p.index, p.begin, p.end, p.replace)]

    @classmethod
    def from_flat(cls, numbers: Sequence[int], features: int) -> BlendLayout:
        """From index, begin, end, replace (0 or 1) of each seed in a row, as :attr:`flat` holds them."""
        lines = zip(*[iter(numbers)] * 4, strict=True)
        return cls([Place(index, begin, end, bool(replace)) for index, begin, end, replace in lines], features)

    def members(self, segment: tuple[int, int]) -> list[int]:
        """Positions in ``places`` of the seeds that change this segment."""
        begin, end = segment
        return [i for i, p in enumerate(self.places) if p.begin <= begin and end <= p.end]

    def numbers(self, alpha: Sequence[float], segment: tuple[int, int]) -> tuple[float, list[tuple[int, float]]]:
        """The host's factor and (position, coefficient) of each seed that counts, as Python numbers.

        ``alpha`` holds one number a seed of the layer. A seed whose coefficient is 0 is left out: it must not even be
        read.
        """
        members = self.members(segment)
        total = sum(alpha[self.places[i].index] for i in members if self.places[i].replace)
        scale = 1.0 / total if total > 1.0 else 1.0
        host = 0.0 if total >= 1.0 else 1.0 - total
        pairs = [(i, alpha[self.places[i].index] * (scale if self.places[i].replace else 1.0)) for i in members]
        return host, [(i, c) for i, c in pairs if c != 0.0]

    def tensors(self, alpha: Tensor, segment: tuple[int, int]) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
        """The same as 0-dimensional tensors on ``alpha``'s device, without looking at their values.

        The host's factor is None where no replace seed changes the segment: it is 1.
        """
        members = self.members(segment)
        replaced = [alpha[self.places[i].index] for i in members if self.places[i].replace]
        if not replaced:
            return None, [(i, alpha[self.places[i].index]) for i in members]
        total = torch.stack(replaced).sum()
        scale = total.clamp(min=1.0).reciprocal()
        pairs = [(i, alpha[self.places[i].index] * scale if self.places[i].replace else alpha[self.places[i].index])
                 for i in members]  # fmt: skip
        return (1.0 - total).clamp(min=0.0), pairs
