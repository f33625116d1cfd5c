"""A bank of seeds in plain PyTorch: the oracle of the Triton kernels. Nothing here looks at a value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.ops.graft.bank import BankLayout, bank_layout, check_bank
from esper.ops.graft.reference import accumulation_dtype, join, narrow, unaffected_by_autocast
from esper.ops.registry import implements

__all__ = ["activate", "bank_blend", "rows_on", "slope", "slope_times"]


def activate(v: Tensor, activation: str | None) -> Tensor:
    """The activation by its name, or nothing."""
    if activation is None:
        return v
    if activation == "gelu_tanh":
        return F.gelu(v, approximate="tanh")
    result: Tensor = getattr(F if activation in ("gelu", "silu") else torch, activation)(v)
    return result


def slope(v: Tensor, activation: str | None) -> Tensor:
    """Derivative of the activation."""
    return slope_times(torch.ones_like(v), v, activation)


def slope_times(g: Tensor, v: Tensor, activation: str | None) -> Tensor:
    """A gradient through the activation, by PyTorch's own backward functions, which need no graph."""
    aten = torch.ops.aten
    found: Tensor = g
    if activation == "relu":
        found = aten.threshold_backward(g, v, 0)
    elif activation in ("gelu", "gelu_tanh"):
        found = aten.gelu_backward(g, v, approximate="none" if activation == "gelu" else "tanh")
    elif activation == "silu":
        found = aten.silu_backward(g, v)
    elif activation == "tanh":
        found = aten.tanh_backward(g, torch.tanh(v))
    elif activation == "sigmoid":
        found = aten.sigmoid_backward(g, torch.sigmoid(v))
    return found


def _read(t: Tensor, on: Tensor) -> Tensor:
    """Rows of seeds that are off are not read: 0 in their place."""
    wide = accumulation_dtype(t.dtype)
    return torch.where(on if t.dim() == 1 else on[:, None], t.to(wide), 0.0)


def _inner(
    x: Tensor, on: Tensor, down: Tensor, value: Tensor | None, bias: Tensor | None, value_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The product or the products down, before the activation."""
    wide = x.to(accumulation_dtype(x.dtype))
    before = F.linear(wide, _read(down, on), None if bias is None else _read(bias, on))
    if value is None:
        return before, None
    return before, F.linear(wide, _read(value, on), None if value_bias is None else _read(value_bias, on))


def rows_on(layout: BankLayout, alpha: Tensor) -> Tensor:
    """Which rows of the bank belong to a seed whose alpha is not 0."""
    # Views of alpha: a table of indices would be an upload, for which the thread waits.
    seeds = zip(layout.rows, layout.blend.places, strict=True)
    return torch.cat([alpha[place.index].expand(last - first) for (first, last), place in seeds]) != 0


def _contribution(
    hidden: Tensor, up: Tensor, rows: tuple[int, int], span: tuple[int, int], c: Tensor, dtype: torch.dtype
) -> Tensor:
    """One seed's addition to a segment; 0 where its coefficient is."""
    first, last = rows
    scaled = torch.where(c == 0, 0.0, c * hidden[..., first:last]).to(dtype).to(hidden.dtype)
    return scaled @ torch.where(c == 0, 0.0, up[first:last, span[0] : span[1]].to(hidden.dtype))


@unaffected_by_autocast
def bank_blend(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    down: Tensor,
    value: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    value_bias: Tensor | None,
    seats: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The blend before containment, and the faults; the blend is differentiable."""
    layout = check_bank(x, h, alpha, down, value, up, bias, value_bias, seats, activation)
    wide = accumulation_dtype(h.dtype)
    alpha = alpha.to(wide)
    before, second = _inner(x, rows_on(layout, alpha), down, value, bias, value_bias)
    hidden = activate(before, activation)
    if second is not None:
        hidden = hidden * second
    trusted = torch.isfinite(x).all(-1, keepdim=True)
    blamed = [h.new_zeros((), dtype=torch.bool) for _ in layout.rows]
    pieces: list[Tensor | None] = []
    for segment in layout.blend.segments:
        host, pairs = layout.blend.tensors(alpha, segment)
        own = narrow(h, h.dim() - 1, 0, segment, h.shape[-1])
        total = own.to(wide)
        if host is not None:
            total = torch.where(host == 0, -0.0, host * total)
        parts = [(i, c, _contribution(hidden, up, layout.rows[i], segment, c, h.dtype)) for i, c in pairs]
        for _, c, k in parts:
            total = total + torch.where(c == 0, -0.0, k)
        pieces.append(total)
        # Judged in h's dtype: what the layer would hand on is what must be finite.
        broken = ~torch.isfinite(total.to(h.dtype))
        rounded = [(i, c, k.to(h.dtype)) for i, c, k in parts]
        overflow = broken & torch.isfinite(own) & trusted
        for i, c, k in rounded:
            bad = ~torch.isfinite(k) & (c != 0)
            blamed[i] = blamed[i] | (broken & bad & trusted).any()
            overflow = overflow & ~bad
        if rounded:
            sizes = torch.stack([torch.where(c == 0, 0.0, k.abs()) for _, c, k in rounded])
            largest = torch.where(torch.isfinite(sizes), sizes, 0.0).amax(0)
            for (i, _, _), size in zip(rounded, sizes, strict=True):
                blamed[i] = blamed[i] | (overflow & (size == largest) & (size > 0)).any()
    return join(pieces, h, h.dim() - 1), torch.stack(blamed)


@implements("graft_bank", "reference")
@unaffected_by_autocast
def graft_bank(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    down: Tensor,
    value: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    value_bias: Tensor | None,
    seats: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """See :data:`esper.ops.graft.graft_bank`."""
    y, blamed = bank_blend(x, h, alpha, down, value, up, bias, value_bias, seats, activation)
    return torch.where(blamed.any(), h, y).contiguous(), blamed.to(torch.uint8)


@implements("graft_bank_backward", "reference")
@unaffected_by_autocast
def graft_bank_backward(
    gy: Tensor,
    x: Tensor,
    alpha: Tensor,
    faults: Tensor,
    down: Tensor,
    value: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    value_bias: Tensor | None,
    seats: Sequence[int],
    activation: str | None,
    want_x: bool,
    want_h: bool,
    want_weights: bool,
) -> tuple[Tensor, ...]:
    """See :data:`esper.ops.graft.graft_bank_backward`."""
    check_bank(x, gy, alpha, down, value, up, bias, value_bias, seats, activation)
    layout = bank_layout(tuple(seats), gy.shape[-1], down.shape[0])
    dtype, wide = gy.dtype, accumulation_dtype(gy.dtype)
    alpha = alpha.to(wide)
    fault = (faults != 0).any()
    on = rows_on(layout, alpha)
    flat_x = x.reshape(-1, x.shape[-1])
    flat_gy = gy.reshape(-1, gy.shape[-1])
    before, second = _inner(flat_x, on, down, value, bias, value_bias)
    active = activate(before, activation)
    hidden = active if second is None else active * second
    rounded = hidden.to(dtype).to(wide)
    ga = torch.zeros_like(hidden)
    gup = torch.zeros(up.shape, dtype=wide, device=up.device)
    gh: list[Tensor | None] = []
    for segment in layout.blend.segments:
        host, pairs = layout.blend.tensors(alpha, segment)
        begin, end = segment
        here = flat_gy[:, begin:end]
        gh.append(here if host is None else torch.where(host == 0, 0.0, host * here.to(wide)).to(dtype))
        for i, c in pairs:
            first, last = layout.rows[i]
            weight = torch.where(c == 0, 0.0, up[first:last, begin:end].to(wide))
            ga[:, first:last] += torch.where(c == 0, 0.0, c * (here.to(wide) @ weight.t()))
            gup[first:last, begin:end] = torch.where(c == 0, 0.0, c * (rounded[:, first:last].t() @ here.to(wide)))
    gz = ga * slope(before, activation)
    gv = None
    if second is not None:
        gz, gv = gz * second, ga * active
    gz = torch.where(on, gz, 0.0).to(dtype).to(wide)
    gx = gz @ _read(down, on)
    empty = gy.new_empty(0)
    weights = [empty] * 5
    gdown = torch.where(on[:, None], gz.t() @ flat_x.to(wide), 0.0)
    gvalue = None
    if gv is not None and value is not None:
        gv = torch.where(on, gv, 0.0).to(dtype).to(wide)
        gx = gx + gv @ _read(value, on)
        gvalue = torch.where(on[:, None], gv.t() @ flat_x.to(wide), 0.0)
    if want_weights:
        found = (
            gdown,
            gvalue,
            gup,
            None if bias is None else gz.sum(0),
            None if value_bias is None or gv is None else gv.sum(0),
        )
        weights = [empty if t is None else torch.where(fault, 0.0, t).to(dtype) for t in found]
    return (
        torch.where(fault, 0.0, gx).to(dtype).view(x.shape) if want_x else empty.clone(),
        torch.where(fault, flat_gy, torch.cat([p for p in gh if p is not None], 1)).view(gy.shape)
        if want_h
        else empty.clone(),
        *(w.clone() if w is empty else w for w in weights),
    )
