"""Launches the fused linear kernel: one launch, and with seeds three more that return at once unless there was a fault.

Which way a call takes is a matter of measurement (:mod:`esper.ops.linear.measure`); without one it is the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.ops.choices import CHOICES, bucket
from esper.ops.graft.bank import BankLayout, bank_layout
from esper.ops.graft.reference import unaffected_by_autocast
from esper.ops.graft.triton import (
    FAULTS_AT,
    blame,
    cdiv,
    choose,
    contain,
    is_aligned,
    matrix,
    on_device,
    processors,
    tables,
)
from esper.ops.graft.variants import ACTIVATION_CODES, DTYPE_NAMES, SEATS
from esper.ops.linear.reference import by_library
from esper.ops.linear.schema import MAX_RANKS, WAYS, check_linear
from esper.ops.registry import implements, triton_interprets, unavailable
from esper.ops.stats.schema import CHUNK_FIELDS, FEATURE_FIELDS
from esper.ops.stats.triton import join_blocks

__all__ = ["choice_key", "runs_fused"]


def choice_key(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    ranks: int,
    graft_activation: str | None,
    keep: bool,
    stats: bool,
) -> str:
    """Under which name the way of such a call is kept; none for tensors that the operation does not take."""
    if x.dim() == 0 or weight.dim() != 2:
        return ""
    rows = bucket(x.numel() // max(x.shape[-1], 1))
    sizes = f"{rows}x{weight.shape[1]}x{weight.shape[0]}+{ranks}"
    flags = "".join(name[0] for name, on in {"bias": bias is not None, "keep": keep, "stats": stats}.items() if on)
    return f"fused_linear/{DTYPE_NAMES.get(x.dtype, x.dtype)}/{sizes}/{activation}/{graft_activation}/{flags}"


def _possible(x: Tensor, weight: Tensor, down: Tensor | None, seats: Sequence[int]) -> bool:
    return (
        x.dtype in DTYPE_NAMES
        and 0 < x.numel() < 2**31
        and x.numel() // x.shape[-1] * weight.shape[0] < 2**31
        and (down is None or (down.shape[0] <= MAX_RANKS and len(seats) // 6 <= SEATS))
    )


def runs_fused(
    way: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    alpha: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    graft_bias: Tensor | None,
    seats: Sequence[int],
    graft_activation: str | None,
    keep: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation by one of :data:`~esper.ops.linear.schema.WAYS`.

    Raises:
        ValueError: an unknown way; or tensors that the operation does not take.
    """
    if way not in WAYS:
        raise ValueError(f"way {way!r}: expected one of {', '.join(WAYS)}")
    if way != "library":  # which checks by itself
        check_linear(x, weight, bias, activation, alpha, down, up, graft_bias, seats, graft_activation)
    if way == "library" or not _possible(x, weight, down, seats):
        return by_library(
            x, weight, bias, activation, alpha, down, up, graft_bias, seats, graft_activation, keep, stats
        )
    from esper.kernels import fused_linear as kernels

    grafted = alpha is not None and down is not None and up is not None
    flat_x, weight = matrix(x), matrix(weight)
    (rows, d_in), d_out = flat_x.shape, weight.shape[0]
    y = torch.empty((*x.shape[:-1], d_out), dtype=x.dtype, device=x.device)
    before = torch.empty_like(y) if keep else y.new_empty(0)
    flat_y = y.view(rows, d_out)
    layout: BankLayout | None = None
    ranks = 0
    seat_tables: tuple[Tensor, ...]
    flags = torch.zeros(FAULTS_AT + len(seats) // 6, dtype=torch.uint8, device=x.device)
    suspect, faults = flags[:1], flags[FAULTS_AT:]
    nothing = flat_y.new_empty(0)
    if grafted:
        assert alpha is not None and down is not None and up is not None
        ranks = down.shape[0]
        layout = bank_layout(tuple(seats), d_out, ranks)
        down, up = down.contiguous(), up.contiguous()
        seat_tables = (alpha.contiguous(), *tables(layout, tuple(seats), x.device))
        if way == "given":
            # A seed asleep gives a column that is not read.
            nothing = torch.mm(flat_x, down.t())
    else:
        seat_tables = (flags,) * 4
    z = nothing
    z_row = z.stride(0) if z.dim() == 2 else 16
    mode = 0 if not grafted else WAYS.index(way)
    numbers = [d_in, d_out, flat_x.stride(0), weight.stride(0), d_out, z_row]
    aligned = all(n % 16 == 0 for n in numbers) if layout is None else is_aligned(layout, *numbers)
    dtype = DTYPE_NAMES[x.dtype]
    tiles, options = kernels.linear_blocks(dtype, rows, ranks, mode == 1, aligned)
    kind: dict[str, Any] = {"ACT": ACTIVATION_CODES[activation], "BIASED": bias is not None, "ALIGNED": aligned}
    kind |= {"EMULATE": triton_interprets(), "SEATS": SEATS}
    graft_kind = {"GRAFT": mode, "GRAFT_ACT": ACTIVATION_CODES[graft_activation] if grafted else 0}
    graft_kind |= {"GRAFT_BIASED": graft_bias is not None}
    constants, launch = choose(
        kernels.fused_linear_kernel, dtype, x.device,
        kind | graft_kind | {"KEEP": keep, "STATS": stats, "GUARDED": False} | tiles, options,
    )  # fmt: skip
    blocks = cdiv(rows, constants["BLOCK_M"])
    programs = blocks * cdiv(d_out, constants["BLOCK_N"])
    shape = (blocks, FEATURE_FIELDS, d_out) if stats else (1,)
    parts = torch.empty(shape, dtype=torch.float64, device=x.device)
    unused = flat_y
    bias_there = unused if bias is None else bias.contiguous()
    graft_weights = (
        unused if down is None else down,
        unused if up is None else up,
        unused if graft_bias is None else graft_bias.contiguous(),
    )
    seeds, groups = (0, 0) if layout is None else (len(layout.rows), len(layout.blend.segments))
    sizes = (rows, d_in, d_out, ranks, seeds, groups)
    strides = (flat_x.stride(0), weight.stride(0), d_out, z_row)
    features = y.new_empty(0, dtype=torch.float64)
    with on_device(x):
        launch(
            programs, flat_x, weight, bias_there, flat_y, before.view(-1, d_out) if keep else unused, *graft_weights,
            z if z.dim() == 2 else unused, *seat_tables, parts, suspect, *sizes, *strides,
        )  # fmt: skip
        if stats:
            features = parts.new_zeros(parts.shape[1:])
            join_blocks(
                (parts, parts.new_empty(blocks, CHUNK_FIELDS, 0)), blocks, features, parts.new_empty(CHUNK_FIELDS, 0)
            )
        if layout is not None:
            # h is in no memory. Should it be needed, it is computed again, into memory that nothing touches otherwise.
            h = torch.empty_like(flat_y)
            constants, again = choose(
                kernels.fused_linear_kernel, dtype, x.device,
                kind
                | {"GRAFT": 0, "GRAFT_ACT": 0, "GRAFT_BIASED": False, "KEEP": False, "STATS": False, "GUARDED": True}
                | tiles,
                options,
            )  # fmt: skip
            again(
                min(programs, 2 * processors(x.device)), flat_x, weight, bias_there, h, unused, *graft_weights, unused,
                *seat_tables, parts, suspect, *sizes, *strides,
            )  # fmt: skip
            assert down is not None and up is not None
            weights = (down, down, up, down if graft_bias is None else graft_weights[2], down)
            graft = {"ACT": ACTIVATION_CODES[graft_activation], "GATED": False, "BIASED": graft_bias is not None}
            graft |= {"EMULATE": kind["EMULATE"], "SEATS": SEATS}
            blame(flat_x, h, flat_y, weights, seat_tables, suspect, faults, layout, graft)
            contain(h, flat_y, faults)
    return y, before, features, faults


def _register() -> None:
    import esper.kernels.fused_linear  # noqa: F401  # Whether it imports is the question.

    @implements("fused_linear", "triton")
    @unaffected_by_autocast
    def fused_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        alpha: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        graft_bias: Tensor | None,
        seats: Sequence[int],
        graft_activation: str | None,
        keep: bool,
        stats: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranks = 0 if down is None or down.dim() == 0 else down.shape[0]
        key = choice_key(x, weight, bias, activation, ranks, graft_activation, keep, stats)
        way = CHOICES.get(key, x.device) or "library"
        return runs_fused(
            way if way in WAYS else "library",
            x, weight, bias, activation, alpha, down, up, graft_bias, seats, graft_activation, keep, stats,
        )  # fmt: skip


try:
    _register()
except ImportError as error:
    unavailable("fused_linear", "triton", f"triton does not import: {error}")
