"""How the statistics of many rows are divided among programs, and the launches that follow from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper.ops.stats.schema import CHUNK_FIELDS, FEATURE_FIELDS
from esper.ops.stats.views import View

__all__ = ["Plan", "cdiv", "launch_stripes", "plan"]

_TRITON_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Programs wanted: two a multiprocessor of the largest GPUs, all of which then work at once.
_PROGRAMS = 256


class Plan(NamedTuple):
    """The division: see ``esper.kernels.stats`` for the words.

    Attributes:
        far: Rows are numbered (far, near).
        near: Inner of the two.
        x_strides: Of far, near and channels, in elements.
        y_strides: The same of the output.
        blocks: Compile-time sizes of ``stats_kernel``.
        unit: Which elements lie side by side.
        tiles: Tiles that the widest chunk has.
        turns: Blocks of rows in a stripe.
        stripes: How many there are.
    """

    far: int
    near: int
    x_strides: tuple[int, int, int]
    y_strides: tuple[int, int, int]
    blocks: dict[str, int]
    unit: int
    tiles: int
    turns: int
    stripes: int


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def _rows(views: tuple[View, View]) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Sizes far and near, and both views' strides; one dimension of rows where one stride can walk them all."""
    outer, _, inner = views[0][:3]
    strides = [(view.outer_stride, view.inner_stride, view.channel_stride) for view in views]
    if inner == 1:
        return 1, outer, [(0, o, c) for o, _, c in strides]
    if outer == 1 or all(o == inner * i for o, i, _ in strides):
        return 1, outer * inner, [(0, i, c) for _, i, c in strides]
    if outer > inner and any(i != 1 for _, i, _ in strides):
        # Rows are a set, and blocks of them lie within one far: the fewer of those the better.
        return inner, outer, [(i, o, c) for o, i, c in strides]
    return outer, inner, strides


def plan(x: Tensor, view: View, y: Tensor, y_view: View, seeds: int) -> Plan:
    """Divide ``[rows, channels]``, both at least one; the result depends on nothing but tensors and seeds."""
    from esper.kernels import stats as kernels

    far, near, strides = _rows((view, y_view))
    channels = view.channels
    width = cdiv(channels, seeds)
    elements = 16 // x.element_size()
    even = all(tensor.data_ptr() % 16 == 0 for tensor in (x, y)) and all(f % elements == 0 for f, _, _ in strides)
    if all(n == 1 for _, n, _ in strides):
        unit = kernels.ROWS.value
        even = even and near % elements == 0 and all(c % elements == 0 for _, _, c in strides)
    elif all(c == 1 for _, _, c in strides):
        unit = kernels.FEATURES.value
        even = even and all(n % elements == 0 for _, n, _ in strides)
        even = even and channels % seeds == 0 and width % elements == 0
    else:
        unit, even = kernels.APART.value, False
    blocks = kernels.stripe_blocks(_TRITON_TYPES[x.dtype], unit, even, width, near)
    tiles = cdiv(width, blocks["COLS"])
    total = far * cdiv(near, blocks["BLOCK_R"])
    share = max(1, total * seeds * tiles // _PROGRAMS)
    turns = min(kernels.MOST_TURNS.value, 1 << (share.bit_length() - 1))
    return Plan(far, near, strides[0], strides[1], blocks, unit, tiles, turns, cdiv(total, turns))


def launch_stripes(
    x: Tensor, view: View, y: Tensor, y_view: View, act: int, features: Tensor, chunks: Tensor
) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Merge the statistics of many rows into the accumulators, or leave records behind.

    The caller has set the device.

    Returns:
        Records of features and how many, records of chunks and how many; of one that is merged already there are 0.
    """
    from esper.kernels import stats as kernels

    p = plan(x, view, y, y_view, seeds := chunks.shape[1])
    double = x.dtype is torch.float64
    channels, tiles, stripes = view.channels, p.tiles, p.stripes

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    acc = torch.float64 if double else torch.float32
    columns = empty(stripes, FEATURE_FIELDS, channels, dtype=acc)
    sums, bases = empty(seeds * tiles, p.far * p.near, dtype=acc), empty(seeds * tiles, stripes)
    kernels.stats_kernel[(stripes * seeds * tiles,)](
        x, y, columns, sums, bases, p.far, p.near, channels, *p.x_strides, *p.y_strides, seeds, tiles, p.turns,
        ACT=act, DOUBLE=double, UNIT=p.unit, FLAT=p.far == 1, **p.blocks, **kernels.OPTIONS,
    )  # fmt: skip

    join = kernels.JOIN
    groups = cdiv(stripes, join["FAN"])
    parts = cdiv(min(p.turns * p.blocks["BLOCK_R"], p.far * p.near), join["BLOCK_P"])
    slots = stripes * parts
    into_features = features if groups == 1 else empty(groups, FEATURE_FIELDS, channels)
    into_chunks = chunks if slots == 1 else empty(slots, CHUNK_FIELDS, seeds)
    programs = cdiv(channels, join["BLOCK_C"])
    kernels.join_kernel[(groups * programs + slots * seeds,)](
        columns, sums, bases, into_features, into_chunks, p.far, p.near, channels, seeds, tiles, p.turns, stripes,
        programs, parts, LAST_FEATURES=groups == 1, LAST_CHUNKS=slots == 1, BLOCK_R=p.blocks["BLOCK_R"],
        COLS=p.blocks["COLS"], **join, **kernels.JOIN_OPTIONS,
    )  # fmt: skip
    return (into_features, 0 if groups == 1 else groups), (into_chunks, 0 if slots == 1 else slots)
