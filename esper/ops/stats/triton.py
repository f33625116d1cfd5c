"""Launches the Triton kernels of ``esper.kernels.stats``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from esper.ops.registry import implements, unavailable
from esper.ops.stats.schema import (
    ACTIVATIONS,
    CHUNK_FIELDS,
    FEATURE_FIELDS,
    HEALTH_FIELDS,
    empty_accumulators,
    merge_check,
)
from esper.ops.stats.views import View, sample, view3, view_pair

_OPS = ("channel_stats", "act_stats", "observe", "stats_merge", "seed_health")
_REDUCE_BLOCK = 64
_HEALTH_BLOCK = 128


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def join_blocks(parts: tuple[Tensor, Tensor], count: int, features: Tensor, chunks: Tensor) -> None:
    """Join ``count`` blocks level by level; the last level merges into the accumulators.

    The caller has set the device. Without chunks (``[4, 0]``) features are joined alone.
    """
    from esper.kernels import stats as kernels

    fan_in = kernels.FAN_IN
    channels, seeds = features.shape[1], chunks.shape[1]
    feature_programs, chunk_programs = _cdiv(channels, _REDUCE_BLOCK), _cdiv(seeds, _REDUCE_BLOCK)
    step = 1
    while True:
        groups = _cdiv(_cdiv(count, step), fan_in)
        kernels.reduce_kernel[(groups * (feature_programs + chunk_programs),)](
            *parts,
            features,
            chunks,
            channels,
            seeds,
            count,
            step,
            feature_programs,
            chunk_programs,
            LAST=groups == 1,
            FAN=fan_in,
            BLOCK_C=_REDUCE_BLOCK,
            num_warps=2,
            enable_fp_fusion=False,
        )
        if groups == 1:
            return
        step *= fan_in


def _register() -> None:
    from esper.kernels import stats as kernels

    block_rows = kernels.BLOCK_ROWS

    def launch(x: Tensor, view: View, y: Tensor, y_view: View, act: int, features: Tensor, chunks: Tensor) -> None:
        """Merge the statistics of ``y`` (``x`` itself when ``act`` is 0) into ``features`` and ``chunks``."""
        rows, seeds = view.positions, chunks.shape[1]
        if rows == 0 or view.channels == 0:
            return
        blocks = _cdiv(rows, block_rows)
        double = x.dtype is torch.float64
        direct = blocks == 1
        parts = (features, chunks)
        if not direct:
            parts = (
                torch.empty((blocks, FEATURE_FIELDS, view.channels), dtype=torch.float64, device=x.device),
                torch.empty((blocks, CHUNK_FIELDS, seeds), dtype=torch.float64, device=x.device),
            )
        with _on(x):
            kernels.stats_kernel[(blocks * seeds,)](
                x,
                y,
                *parts,
                rows,
                view.channels,
                view.inner,
                *view[3:],
                *y_view[3:],
                seeds,
                ACT=act,
                DOUBLE=double,
                DIRECT=direct,
                BLOCK_R=block_rows,
                BLOCK_C=kernels.BLOCK_FEATURES_DOUBLE if double else kernels.BLOCK_FEATURES,
                num_warps=4,
                enable_fp_fusion=False,
            )
            if not direct:
                join_blocks(parts, blocks, features, chunks)

    @implements("channel_stats", "triton")
    def channel_stats(x: Tensor, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor]:
        base, view = view3(x.detach(), channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        launch(base, view, base, view, 0, features, chunks)
        return features, chunks

    @implements("act_stats", "triton")
    def act_stats(x: Tensor, activation: str, seeds: int, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        base, view, y, y_view = view_pair(x, channel_dim)
        features, chunks = empty_accumulators(x, view.channels, seeds)
        launch(base, view, y, y_view, ACTIVATIONS[activation], features, chunks)
        return y, features, chunks

    @implements("observe", "triton")
    def observe(
        x: Tensor, seeds: int, channel_dim: int, rows: int, phase: int, features: Tensor, chunks: Tensor
    ) -> None:
        base, full = view3(x.detach(), channel_dim)
        merge_check(features, chunks, full.channels, seeds)
        part = sample(full, rows)
        skip = part.offset(phase, full)
        if skip:
            base = torch.as_strided(base, (1,), (1,), base.storage_offset() + skip)
        launch(base, part.view, base, part.view, 0, features, chunks)

    @implements("stats_merge", "triton")
    def stats_merge(features: Tensor, chunks: Tensor, new_features: Tensor, new_chunks: Tensor) -> None:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        merge_check(new_features, new_chunks, channels, seeds)
        with _on(features):
            join_blocks((new_features, new_chunks), 1, features, chunks)

    limits: dict[tuple[float, torch.device], Tensor] = {}

    @implements("seed_health", "triton")
    def seed_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        out = features.new_empty((HEALTH_FIELDS, seeds))
        # A Python float would reach the kernel as float32. The upload happens once a device.
        limit = limits.get((eps, features.device))
        if limit is None:
            limit = limits[eps, features.device] = torch.full((1,), eps, dtype=torch.float64, device=features.device)
        with _on(features):
            kernels.health_kernel[(seeds,)](
                features,
                chunks,
                limit,
                out,
                channels,
                seeds,
                BLOCK_C=_HEALTH_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
        return out


try:
    _register()
except ImportError as error:
    for _name in _OPS:
        unavailable(_name, "triton", f"triton does not import: {error}")
