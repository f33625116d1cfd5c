"""C++ on the CPU, by raw address. Shapes are checked here; the kernels trust them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.ops import native
from esper.ops.registry import implements, unavailable
from esper.ops.stats.schema import (
    ACTIVATIONS,
    HEALTH_FIELDS,
    empty_accumulators,
    merge_check,
)
from esper.ops.stats.views import DTYPE_CODES, Sample, View, sample, view3, view_pair

_OPS = ("channel_stats", "act_stats", "observe", "stats_merge", "seed_health")
_PLAN_LIMIT = 4096


def _register(module: Any) -> None:
    stats_observe = module.stats_observe

    @implements("channel_stats", "cpu")
    def channel_stats(x: Tensor, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor]:
        base, view = view3(x, channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        stats_observe(base.data_ptr(), DTYPE_CODES[x.dtype], *view, seeds, features.data_ptr(), chunks.data_ptr())
        return features, chunks

    @implements("act_stats", "cpu")
    def act_stats(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        base, view, y, y_view = view_pair(x, channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        module.stats_activate(
            base.data_ptr(),
            y.data_ptr(),
            DTYPE_CODES[x.dtype],
            ACTIVATIONS[activation],
            *view,
            *y_view[3:],
            seeds,
            features.data_ptr(),
            chunks.data_ptr(),
        )
        return y, features, chunks

    # What to pass for a shape seen before: the probe's cost is mostly Python's, so it is worked out once.
    plans: dict[tuple[Any, ...], tuple[int, View, Sample] | None] = {}

    @implements("observe", "cpu")
    def observe(
        x: Tensor, seeds: int, channel_dim: int, rows: int, phase: int, features: Tensor, chunks: Tensor
    ) -> None:
        key = (x.shape, x.stride(), x.dtype, channel_dim, rows)
        try:
            plan = plans[key]
        except KeyError:
            base, full = view3(x, channel_dim)
            # None: no three strides describe it, and it has to be copied first.
            plan = (DTYPE_CODES[x.dtype], full, sample(full, rows)) if base is x else None
            if len(plans) >= _PLAN_LIMIT:
                plans.clear()
            plans[key] = plan
        if plan is None:
            x = x.contiguous()
            _, full = view3(x, channel_dim)
            plan = (DTYPE_CODES[x.dtype], full, sample(full, rows))
        code, full, part = plan
        merge_check(features, chunks, full.channels, seeds)
        start = x.data_ptr() + part.offset(phase, full) * x.element_size()
        stats_observe(start, code, *part.view, seeds, features.data_ptr(), chunks.data_ptr())

    @implements("stats_merge", "cpu")
    def stats_merge(features: Tensor, chunks: Tensor, new_features: Tensor, new_chunks: Tensor) -> None:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        merge_check(new_features, new_chunks, channels, seeds)
        module.stats_merge(
            features.data_ptr(), chunks.data_ptr(), new_features.data_ptr(), new_chunks.data_ptr(), channels, seeds
        )

    @implements("seed_health", "cpu")
    def seed_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        out = torch.empty((HEALTH_FIELDS, seeds), dtype=torch.float64)
        module.stats_health(features.data_ptr(), chunks.data_ptr(), channels, seeds, eps, out.data_ptr())
        return out


_module = native.load()
if _module is not None:
    _register(_module)
else:
    for _name in _OPS:
        unavailable(_name, "cpu", native.reason())
