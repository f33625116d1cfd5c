"""Plain PyTorch in float64: the oracle of the other backends, and what runs on devices they do not reach."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.ops.registry import implements
from esper.ops.stats.schema import CHUNK_FIELDS, FEATURE_FIELDS, HEALTH_FIELDS, chunk_bounds, merge_check
from esper.ops.stats.views import sample, view3

__all__ = ["activate", "channel_stats", "seed_health"]


def activate(x: Tensor, activation: str) -> Tensor:
    """PyTorch's own activation by our name.

    Raises:
        ValueError: if the name is unknown.
    """
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "silu":
            return F.silu(x)
    raise ValueError(f"unknown activation {activation!r}; known: relu, gelu, gelu_tanh, tanh, sigmoid, silu")


def _rows(x: Tensor, channel_dim: int) -> Tensor:
    """``x`` as ``[rows, C]`` in float64."""
    last = x.detach().movedim(channel_dim, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1]).double()


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 over dimension 0 of ``values`` where ``weight`` is 1 (two passes, the second corrected)."""
    count = weight.sum(0)
    safe = count.clamp(min=1)
    mean = (values * weight).sum(0) / safe
    delta = (values - mean) * weight
    m2 = (delta * delta).sum(0) - delta.sum(0) ** 2 / safe
    return count, mean, m2.clamp(min=0)


def _stats_of_rows(rows: Tensor, seeds: int) -> tuple[Tensor, Tensor]:
    channels = rows.shape[1]
    finite = rows.isfinite()
    values = torch.where(finite, rows, 0)
    weight = finite.double()
    features = rows.new_zeros((FEATURE_FIELDS, channels))
    chunks = rows.new_zeros((CHUNK_FIELDS, seeds))
    if rows.shape[0] == 0 or channels == 0:
        return features, chunks
    count, mean, m2 = _moments(values, weight)
    torch.stack((count, mean, m2, values.abs().amax(0), (~finite).double().sum(0)), out=features)
    for seed in range(seeds):
        begin, end = chunk_bounds(seed, channels, seeds)
        if begin == end:
            continue
        whole = finite[:, begin:end].all(1).double()
        # About the features' means, because the variance is the same and the sum of large numbers is not.
        sums = (values[:, begin:end] - mean[begin:end]).sum(1)
        n, row_mean, row_m2 = _moments(sums, whole)
        chunks[0, seed] = n
        chunks[1, seed] = torch.where(n > 0, row_mean + mean[begin:end].sum(), 0)
        chunks[2, seed] = row_m2
        chunks[3, seed] = rows.shape[0] - n
    return features, chunks


def _chan(into: Tensor, new: Tensor) -> None:
    """Merge count, mean and M2: rows 0 to 2 of both."""
    n = into[0] + new[0]
    weight = torch.where(n > 0, new[0] / n.clamp(min=1), 0)
    delta = new[1] - into[1]
    m2 = into[2] + new[2] + delta * delta * (into[0] * weight)
    mean = into[1] + delta * weight
    into[0], into[1], into[2] = n, mean, m2


@implements("channel_stats", "reference")
def channel_stats(x: Tensor, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    """See ``schema.py``."""
    view3(x, channel_dim)  # for its checks
    _check_seeds(seeds)
    return _stats_of_rows(_rows(x, channel_dim), seeds)


@implements("act_stats", "reference")
def act_stats(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``schema.py``."""
    y = activate(x, activation)
    return y, *channel_stats(y, seeds, channel_dim)


@implements("observe", "reference")
def observe(x: Tensor, seeds: int, channel_dim: int, rows: int, phase: int, features: Tensor, chunks: Tensor) -> None:
    """See ``schema.py``."""
    merge_check(features, chunks, x.shape[channel_dim], seeds)
    base, view = view3(x, channel_dim)
    if view.positions == 0:
        return
    part = sample(view, rows)
    size, stride = part.view[:3], part.view[3:]
    start = base.storage_offset() + part.offset(phase, view)
    picked = torch.as_strided(base.detach(), size, stride, start)
    new_features, new_chunks = _stats_of_rows(_rows(picked, 1), seeds)
    stats_merge(features, chunks, new_features, new_chunks)


@implements("stats_merge", "reference")
def stats_merge(features: Tensor, chunks: Tensor, new_features: Tensor, new_chunks: Tensor) -> None:
    """See ``schema.py``."""
    merge_check(features, chunks, new_features.shape[-1], new_chunks.shape[-1])
    _chan(features, new_features)
    features[3] = torch.maximum(features[3], new_features[3])
    features[4] += new_features[4]
    _chan(chunks, new_chunks)
    chunks[3] += new_chunks[3]


def _check_seeds(seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; a layer has at least one")


@implements("seed_health", "reference")
def seed_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
    """See ``schema.py`` and docs/monitoring.md; no synchronisation, no loop over seeds."""
    channels, seeds = features.shape[1], chunks.shape[1]
    device = features.device
    index = torch.arange(seeds, device=device)
    begin, end = index * channels // seeds, (index + 1) * channels // seeds
    width = (end - begin).double()
    # The seed of feature c: the last s with floor(s*C/S) <= c.
    owner = ((torch.arange(channels, device=device) + 1) * seeds - 1) // channels if channels else index[:0]

    def gather(values: Tensor) -> Tensor:
        return torch.zeros(seeds, dtype=torch.float64, device=device).scatter_add_(0, owner, values)

    count, mean_c, m2 = features[0], features[1], features[2]
    n = gather(count)
    safe = n.clamp(min=1)
    # Two steps, so that a large common level costs no digits.
    level = gather(count * mean_c) / safe
    mean = level + gather(count * (mean_c - level[owner])) / safe
    between = gather(count * (mean_c - mean[owner]) ** 2)
    within = gather(m2)
    variance = (within + between) / safe
    sum_variance = gather(m2 / count.clamp(min=1))
    dead = gather(((count > 0) & (features[3] <= eps)).double()) / width.clamp(min=1)
    bad = gather(features[4])
    pairs = (width - 1).clamp(min=1)
    defined = (width > 1) & (chunks[0] > 0) & (sum_variance > 0)
    row_variance = chunks[2] / chunks[0].clamp(min=1)
    correlation = (row_variance - sum_variance) / (pairs * torch.where(defined, sum_variance, 1))
    correlation = torch.where(defined, torch.minimum(torch.maximum(correlation, -1 / pairs), width.new_ones(())), 0)
    w = within / safe
    moving = torch.where(w > 0, w / torch.where(w > 0, w + 1e-4 * (variance + mean * mean), 1), 0)
    score = (1 - dead) * (1 - correlation.clamp(min=0)) * moving
    score = torch.where(bad > 0, 0, torch.where(n > 0, score, torch.nan))
    out = features.new_empty((HEALTH_FIELDS, seeds))
    return torch.stack((n, mean, variance, dead, correlation, bad, score), out=out)
