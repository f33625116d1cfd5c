"""The statistics in CUDA C++, through the extension module, on PyTorch's current stream."""

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
from esper.ops.stats.views import DTYPE_CODES, View, sample, view3, view_pair

_OPS = ("channel_stats", "act_stats", "observe", "stats_merge", "seed_health")


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def _register(module: Any) -> None:
    def accumulate(
        x: Tensor, view: View, y: Tensor, y_view: View, act: int, features: Tensor, chunks: Tensor, skip: int = 0
    ) -> None:
        """Merge the statistics of ``y`` (``x`` itself when ``act`` is 0), from ``skip`` elements into both."""
        seeds = chunks.shape[1]
        size = module.stats_workspace_cuda(view.positions, view.channels, seeds)
        # The caching allocator hands the memory out again in stream order, so it may go as soon as this returns.
        workspace = torch.empty(size, dtype=torch.float64, device=x.device)
        skip_bytes = skip * x.element_size()
        with torch.cuda.device(x.device):
            module.stats_accumulate_cuda(
                x.data_ptr() + skip_bytes,
                y.data_ptr() + skip_bytes,
                DTYPE_CODES[x.dtype],
                act,
                *view,
                *y_view[3:],
                seeds,
                features.data_ptr(),
                chunks.data_ptr(),
                workspace.data_ptr(),
                _stream(x),
            )

    @implements("channel_stats", "cuda")
    def channel_stats(x: Tensor, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor]:
        base, view = view3(x, channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        accumulate(base, view, base, view, 0, features, chunks)
        return features, chunks

    @implements("act_stats", "cuda")
    def act_stats(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        base, view, y, y_view = view_pair(x, channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        accumulate(base, view, y, y_view, ACTIVATIONS[activation], features, chunks)
        return y, features, chunks

    @implements("observe", "cuda")
    def observe(
        x: Tensor, seeds: int, channel_dim: int, rows: int, phase: int, features: Tensor, chunks: Tensor
    ) -> None:
        base, full = view3(x, channel_dim)
        merge_check(features, chunks, full.channels, seeds)
        part = sample(full, rows)
        accumulate(base, part.view, base, part.view, 0, features, chunks, part.offset(phase, full))

    @implements("stats_merge", "cuda")
    def stats_merge(features: Tensor, chunks: Tensor, new_features: Tensor, new_chunks: Tensor) -> None:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        merge_check(new_features, new_chunks, channels, seeds)
        with torch.cuda.device(features.device):
            module.stats_merge_cuda(
                features.data_ptr(),
                chunks.data_ptr(),
                new_features.data_ptr(),
                new_chunks.data_ptr(),
                channels,
                seeds,
                _stream(features),
            )

    @implements("seed_health", "cuda")
    def seed_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        out = features.new_empty((HEALTH_FIELDS, seeds))
        with torch.cuda.device(features.device):
            module.stats_health_cuda(
                features.data_ptr(), chunks.data_ptr(), channels, seeds, eps, out.data_ptr(), _stream(features)
            )
        return out


_module = native.load()
_reason = native.cuda_reason()
if _module is not None and not _reason:
    _register(_module)
else:
    for _name in _OPS:
        unavailable(_name, "cuda", _reason)
