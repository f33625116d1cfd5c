"""What the seeds of a layer contribute, on PyTorch operations: seeds of one kind run together.

Seeds of a family that read the same thing through the same norm share their products: their weights side by side make
one wide matrix, so S seeds cost one product down, not S. The way up stays apart a seed: containment has to see each
contribution. Everything else runs node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.blueprints import interpret
from esper.execution.grafts.seed import BoundSeed

__all__ = ["contributions", "linear_along", "sample_strided", "sample_tap"]

#: Roles whose products a group of seeds shares, by family.
_SHARED: Mapping[str, tuple[str, ...]] = {
    "lowrank": ("down",),
    "bottleneck": ("down",),
    "gated": ("gate", "value"),
    "dense": ("linear",),
}


def contributions(
    seeds: Sequence[BoundSeed], tensors: Sequence[Mapping[str, Tensor]], taps: Sequence[Tensor], dim: int
) -> list[Tensor]:
    """``k`` of each seed.

    Args:
        seeds: What to run.
        tensors: Their weights by the blueprint's names.
        taps: What each reads, sampled by :func:`sample_tap`; the same object where seeds read the same.
        dim: Dimension of the features, not negative.

    Returns:
        One tensor a seed, with the seed's own features along ``dim``. Differentiable.
    """
    groups: dict[object, list[int]] = {}
    for i, (seed, tap) in enumerate(zip(seeds, taps, strict=True)):
        family = seed.family
        shared = family.name in _SHARED
        key = (str(family.name), id(tap), family.norm, family.eps, family.biases) if shared else i
        groups.setdefault(key, []).append(i)
    results: dict[int, Tensor] = {}
    for group in groups.values():
        first = seeds[group[0]]
        tap = taps[group[0]]
        if first.family.name in _SHARED:
            ks = _together([seeds[i] for i in group], [tensors[i] for i in group], tap, dim)
        else:
            ks = [interpret.run(first.blueprint, tensors[group[0]], tap, channel_dim=dim)]
        results.update(zip(group, ks, strict=True))
    return [results[i] for i in range(len(seeds))]


def sample_tap(seed: BoundSeed, x: Tensor, h: Tensor) -> Tensor:
    """What the seed reads: x or h, every ``strided``-th pixel of it."""
    return sample_strided(x if seed.reads_input else h, seed.strided)


def sample_strided(tap: Tensor, stride: tuple[int, int]) -> Tensor:
    """Every ``stride``-th pixel; the tensor itself for (1, 1)."""
    sh, sw = stride
    return tap if (sh, sw) == (1, 1) else tap[..., ::sh, ::sw]


def _together(
    seeds: Sequence[BoundSeed], tensors: Sequence[Mapping[str, Tensor]], tap: Tensor, dim: int
) -> list[Tensor]:
    family = seeds[0].family
    if family.norm is not None:
        assert family.eps is not None
        tap = interpret.normalise(family.norm, tap, family.eps, dim)
    inner = [_wide(role, seeds, tensors, tap, dim) for role in _SHARED[family.name]]
    results = []
    for i, (seed, weights) in enumerate(zip(seeds, tensors, strict=True)):
        z = inner[0][i]
        if seed.family.activation is not None:
            z = interpret.activate(seed.family.activation, z)
        if len(inner) == 2:
            z = z * inner[1][i]
        results.append(
            linear_along(z, weights[seed.family.tensor("up")], None, dim) if "up" in seed.family.roles else z
        )
    return results


def _wide(
    role: str, seeds: Sequence[BoundSeed], tensors: Sequence[Mapping[str, Tensor]], tap: Tensor, dim: int
) -> Sequence[Tensor]:
    """One product for the weights of all seeds in this role, split again."""
    weights = [t[s.family.tensor(role)] for s, t in zip(seeds, tensors, strict=True)]
    biased = role in seeds[0].family.biases
    biases = [t[s.family.tensor(role, "bias")] for s, t in zip(seeds, tensors, strict=True)] if biased else []
    if len(seeds) == 1:
        return [linear_along(tap, weights[0], biases[0] if biased else None, dim)]
    wide = linear_along(tap, torch.cat(weights), torch.cat(biases) if biased else None, dim)
    return torch.split(wide, [w.shape[0] for w in weights], dim)


def linear_along(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """A linear map along ``dim``; on images a 1x1 convolution, which needs no permuted copy."""
    spatial = x.dim() - 1 - dim
    if spatial == 0:
        return F.linear(x, weight, bias)
    if spatial == 1:
        return F.conv1d(x, weight[:, :, None], bias)
    if spatial > 2:
        return F.linear(x.movedim(dim, -1), weight, bias).movedim(-1, dim)
    return F.conv2d(x, weight[:, :, None, None], bias)
