"""The statistics operations: what they are called with, and what they give.

Accumulators are float64, whatever the dtype of the activations, and contiguous:

- ``features`` ``[5, C]``: per feature the count of finite samples, mean, M2 (sum of squared deviations), max ``|y|``
  over the finite samples, and the count of non-finite ones; rows in the order of :class:`Field`.
- ``chunks`` ``[4, S]``: per seed the count, mean and M2 of the row sums over its chunk (a row is one position: a batch
  item, a token, a pixel), and how many rows were left out because the chunk held a non-finite value; rows in the order
  of :class:`ChunkField`.

Seed ``s`` of ``S`` watches the features ``[floor(s*C/S), floor((s+1)*C/S))``; with more seeds than features some chunks
are empty. A zeroed accumulator is an empty one, and merging into it copies.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from esper.ops.registry import define

__all__ = [
    "ACTIVATIONS",
    "CHUNK_FIELDS",
    "FEATURE_FIELDS",
    "HEALTH_FIELDS",
    "ChunkField",
    "Field",
    "HealthField",
    "act_stats",
    "channel_stats",
    "chunk_bounds",
    "empty_accumulators",
    "merge_check",
    "observe",
    "seed_health",
    "stats_merge",
]


class Field(enum.IntEnum):
    """Rows of ``features``."""

    COUNT = 0
    MEAN = 1
    M2 = 2
    ABS_MAX = 3
    NON_FINITE = 4


class ChunkField(enum.IntEnum):
    """Rows of ``chunks``."""

    ROWS = 0
    MEAN = 1
    M2 = 2
    SKIPPED = 3


class HealthField(enum.IntEnum):
    """Rows of what :data:`seed_health` returns."""

    SAMPLES = 0
    MEAN = 1
    VARIANCE = 2
    DEAD_RATIO = 3
    CORRELATION = 4
    NON_FINITE = 5
    SCORE = 6


FEATURE_FIELDS = len(Field)
CHUNK_FIELDS = len(ChunkField)
HEALTH_FIELDS = len(HealthField)

#: Name of each activation to its code in ``csrc/stats_core.h`` and ``kernels/stats_math.py``.
ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "tanh": 4, "sigmoid": 5, "silu": 6}


def chunk_bounds(seed: int, channels: int, seeds: int) -> tuple[int, int]:
    """The half-open range of features that ``seed`` of ``seeds`` watches."""
    return seed * channels // seeds, (seed + 1) * channels // seeds


def empty_accumulators(x: Tensor, channels: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Accumulators of nothing yet, float64 on the device of ``x``: features ``[5, channels]``, chunks ``[4, seeds]``.

    Raises:
        ValueError: there are no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; a layer has at least one")
    return (
        torch.zeros((FEATURE_FIELDS, channels), dtype=torch.float64, device=x.device),
        torch.zeros((CHUNK_FIELDS, seeds), dtype=torch.float64, device=x.device),
    )


def merge_check(features: Tensor, chunks: Tensor, channels: int, seeds: int) -> None:
    """Refuse accumulators that a kernel would write past.

    Raises:
        ValueError: naming the shape and dtype found and those needed.
    """
    if (
        features.shape == (FEATURE_FIELDS, channels)
        and chunks.shape == (CHUNK_FIELDS, seeds)
        and features.dtype is torch.float64
        and chunks.dtype is torch.float64
        and features.is_contiguous()
        and chunks.is_contiguous()
    ):
        return
    raise ValueError(
        f"accumulators are {tuple(features.shape)} {features.dtype} and {tuple(chunks.shape)} {chunks.dtype}; "
        f"need contiguous float64 [{FEATURE_FIELDS}, {channels}] and [{CHUNK_FIELDS}, {seeds}]"
    )


def _fake_channel_stats(x: Tensor, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[channel_dim]
    return (
        x.new_empty((FEATURE_FIELDS, channels), dtype=torch.float64),
        x.new_empty((CHUNK_FIELDS, seeds), dtype=torch.float64),
    )


def _fake_act_stats(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty_like(x), *_fake_channel_stats(x, seeds, channel_dim))


def _fake_nothing(*args: object) -> None:
    return None


def _fake_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
    return features.new_empty((HEALTH_FIELDS, chunks.shape[1]))


channel_stats = define(
    "channel_stats",
    "(Tensor x, int seeds, int channel_dim) -> (Tensor, Tensor)",
    doc="statistics per feature and per seed's chunk, one pass over memory",
    fake=_fake_channel_stats,
)
act_stats = define(
    "act_stats",
    "(Tensor x, str activation, int seeds, int channel_dim) -> (Tensor, Tensor, Tensor)",
    doc="activation and the statistics of its output in the same pass over memory",
    fake=_fake_act_stats,
)
observe = define(
    "observe",
    "(Tensor x, int seeds, int channel_dim, int rows, int phase, Tensor(a!) features, Tensor(b!) chunks) -> ()",
    doc="statistics of a few strided rows, merged into a window",
    fake=_fake_nothing,
)
stats_merge = define(
    "stats_merge",
    "(Tensor(a!) features, Tensor(b!) chunks, Tensor new_features, Tensor new_chunks) -> ()",
    doc="merges one window's statistics into another's (Chan's formula)",
    fake=_fake_nothing,
)
seed_health = define(
    "seed_health",
    "(Tensor features, Tensor chunks, float eps) -> Tensor",
    doc="health of every seed of a layer from a window's statistics",
    fake=_fake_health,
)
