"""Launches the Triton kernels of ``esper.kernels.stats`` and ``esper.kernels.stats_records``."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
from torch import Tensor

from esper.ops.registry import implements, unavailable
from esper.ops.stats.schema import (
    ACTIVATIONS,
    HEALTH_FIELDS,
    empty_accumulators,
    merge_check,
)
from esper.ops.stats.stripes import cdiv, launch_stripes
from esper.ops.stats.views import View, sample, view3, view_pair

_OPS = ("channel_stats", "act_stats", "observe", "stats_merge", "seed_health")
_HEALTH_BLOCK = 128


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def join_blocks(parts: tuple[Tensor, Tensor], count: int, features: Tensor, chunks: Tensor) -> None:
    """Join ``count`` blocks level by level; the last level merges into the accumulators.

    The caller has set the device. Without chunks (``[4, 0]``) features are joined alone.
    """
    from esper.kernels import stats_records as kernels

    fan_in, block = kernels.FAN_IN, kernels.REDUCE_COLUMNS
    channels, seeds = features.shape[1], chunks.shape[1]
    feature_programs, chunk_programs = cdiv(channels, block), cdiv(seeds, block)
    step = 1
    while True:
        groups = cdiv(cdiv(count, step), fan_in)
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
            BLOCK_C=block,
            **kernels.OPTIONS,
        )
        if groups == 1:
            return
        step *= fan_in


def _register() -> None:
    from esper.kernels import stats  # noqa: F401  # Whether it imports is the question.
    from esper.kernels import stats_records as kernels

    def launch(x: Tensor, view: View, y: Tensor, y_view: View, act: int, features: Tensor, chunks: Tensor) -> None:
        """Merge the statistics of ``y`` (``x`` itself when ``act`` is 0) into ``features`` and ``chunks``."""
        rows, channels, seeds = view.positions, view.channels, chunks.shape[1]
        if rows == 0 or channels == 0:
            return
        with _on(x):
            if rows <= kernels.WINDOW_ROWS and cdiv(channels, seeds) <= kernels.WINDOW_WIDTH:
                double = x.dtype is torch.float64
                kernels.window_kernel[(seeds,)](
                    x,
                    y,
                    features,
                    chunks,
                    rows,
                    channels,
                    view.inner,
                    *view[3:],
                    *y_view[3:],
                    seeds,
                    ACT=act,
                    DOUBLE=double,
                    BLOCK_R=kernels.WINDOW_ROWS,
                    BLOCK_C=kernels.WINDOW_FEATURES_DOUBLE if double else kernels.WINDOW_FEATURES,
                    **kernels.OPTIONS,
                )
                return
            columns, sums = launch_stripes(x, view, y, y_view, act, features, chunks)
            # One kind at a time: there are not as many of the one as of the other.
            if columns[1]:
                join_blocks((columns[0], chunks), columns[1], features, chunks[:, :0])
            if sums[1]:
                join_blocks((features, sums[0]), sums[1], features[:, :0], chunks)

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

    @implements("seed_health", "triton")
    def seed_health(features: Tensor, chunks: Tensor, eps: float) -> Tensor:
        channels, seeds = features.shape[-1], chunks.shape[-1]
        merge_check(features, chunks, channels, seeds)
        out = features.new_empty((HEALTH_FIELDS, seeds))
        (bits,) = struct.unpack("<q", struct.pack("<d", eps))
        with _on(features):
            kernels.health_kernel[(seeds,)](
                features,
                chunks,
                bits,
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
