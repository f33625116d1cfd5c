"""Every layout as one: ``[outer, channels, inner]`` with three strides.

``[N, C]`` and ``[B, T, C]`` have their positions in ``outer``; NCHW has images in ``outer`` and pixels in ``inner``,
and so has ``channels_last``, with other strides. A kernel that takes three strides takes them all, without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPE_CODES", "Sample", "View", "sample", "view3", "view_pair"]

#: As ``csrc/stats_core.h`` numbers them.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: Images that a sample of an NCHW tensor is spread over, at most.
_IMAGES = 8


class View(NamedTuple):
    """Sizes, and strides in elements."""

    outer: int
    channels: int
    inner: int
    outer_stride: int
    channel_stride: int
    inner_stride: int

    @property
    def positions(self) -> int:
        """Rows: positions that each hold one value of every feature."""
        return self.outer * self.inner


class Sample(NamedTuple):
    """Some positions of a view: the smaller view, and how far its start may be moved along each axis."""

    view: View
    outer_step: int
    inner_step: int

    def offset(self, phase: int, full: View) -> int:
        """Elements to skip so that successive phases see different rows."""
        outer_phase, inner_phase = phase % self.outer_step, phase % self.inner_step
        return outer_phase * full.outer_stride + inner_phase * full.inner_stride


def _merge_dims(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring dimensions that one stride can walk become one: ``[(size, stride), ...]``."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups


def view3(x: Tensor, channel_dim: int) -> tuple[Tensor, View]:
    """``x`` as ``[outer, channels, inner]``.

    Args:
        x: Floating point, at least one dimension; two if ``channel_dim`` is 1.
        channel_dim: -1 (features last) or 1 (NCHW, NCL, or ``[N, C]``).

    Returns:
        The tensor the view is of (``x``, or a dense copy when three strides cannot describe it) and the view.

    Raises:
        ValueError: if ``channel_dim`` or the number of dimensions is wrong.
        TypeError: if the dtype is not float32, float64, bfloat16 or float16.
    """
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"statistics need float32, float64, bfloat16 or float16 activations, not {x.dtype}")
    dim = x.dim()
    if channel_dim == -1 and dim >= 1:
        shape, strides = tuple(x.shape), x.stride()
        channels, channel_stride = shape[-1], strides[-1]
        groups = _merge_dims(shape[:-1], strides[:-1])
        if x.numel() == 0:
            rows = 0 if channels else 1
            return x, View(rows, channels, 1, 0, 1, 0)
        if len(groups) > 2:
            return view3(x.contiguous(), channel_dim)
        if not groups:
            return x, View(1, channels, 1, 0, channel_stride, 0)
        if len(groups) == 1:
            size, stride = groups[0]
            # Features apart and rows together (a transposed matrix) is what NCHW looks like: rows go inside.
            if stride == 1 and channel_stride != 1:
                return x, View(1, channels, size, 0, channel_stride, 1)
            return x, View(size, channels, 1, stride, channel_stride, 0)
        return x, View(groups[0][0], channels, groups[1][0], groups[0][1], channel_stride, groups[1][1])
    if channel_dim == 1 and dim >= 2:
        shape, strides = tuple(x.shape), x.stride()
        if x.numel() == 0:
            return x, View(0, shape[1], 1, 0, 1, 0)
        groups = _merge_dims(shape[2:], strides[2:])
        if len(groups) > 1:
            return view3(x.contiguous(), channel_dim)
        inner, inner_stride = groups[0] if groups else (1, 0)
        return x, View(shape[0], shape[1], inner, strides[0], strides[1], inner_stride)
    raise ValueError(
        f"channel_dim {channel_dim} on shape {tuple(x.shape)}: expected -1, or 1 with at least two dimensions"
    )


def view_pair(x: Tensor, channel_dim: int) -> tuple[Tensor, View, Tensor, View]:
    """An input and an empty output of its shape, both as ``[outer, channels, inner]`` with the same sizes.

    Returns:
        Input (``x`` or a copy), its view, output, its view. The output has ``x``'s memory format where three strides
        describe it, and is contiguous otherwise.
    """
    x = x.detach()
    y = torch.empty_like(x)
    viewed, y_view = view3(y, channel_dim)
    if viewed is not y:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _, y_view = view3(y, channel_dim)
    base, view = view3(x, channel_dim)
    if view[:3] != y_view[:3]:
        # The two layouts group the dimensions differently: give the input the output's.
        base = torch.empty_like(y).copy_(x)
        _, view = view3(base, channel_dim)
    return base, view, y, y_view


def sample(view: View, rows: int) -> Sample:
    """About ``rows`` positions spread evenly over the batch, and over the image where there is one."""
    if view.positions <= rows:
        return Sample(view, 1, 1)
    if view.inner == 1:
        outer, inner = rows, 1
    elif view.outer == 1:
        outer, inner = 1, rows
    else:
        outer = min(view.outer, _IMAGES, rows)
        inner = min(view.inner, max(1, rows // outer))
    outer_step, inner_step = view.outer // outer, view.inner // inner
    small = View(
        outer,
        view.channels,
        inner,
        view.outer_stride * outer_step,
        view.channel_stride,
        view.inner_stride * inner_step,
    )
    return Sample(small, outer_step, inner_step)
