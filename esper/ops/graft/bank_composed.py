"""A bank on CUDA without Triton: the products by cuBLAS through PyTorch, the blend and its faults by CUDA kernels.

The products run in the dtype of the layer (sums are float32 inside of cuBLAS), where the reference takes everything to
float32 first. What a seed contributes is rounded once more for that, as it is in a network that was written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.ops.graft.bank import BankLayout, bank_layout, check_bank
from esper.ops.graft.bank_reference import activate, rows_on, slope_times
from esper.ops.graft.reference import unaffected_by_autocast
from esper.ops.graft.schema import graft_blend, graft_blend_backward
from esper.ops.registry import Backend, implements, unavailable

__all__: list[str] = []


class _Hidden:
    """The way down, with all that the way back needs. Rows of seeds that are off are 0, whatever their weights hold."""

    def __init__(
        self,
        x: Tensor,
        on: Tensor,
        down: Tensor,
        value: Tensor | None,
        bias: Tensor | None,
        value_bias: Tensor | None,
        activation: str | None,
    ) -> None:
        self.down = _masked(down, on)
        self.value = None if value is None else _masked(value, on)
        self.before = F.linear(x, self.down, None if bias is None else _masked(bias, on))
        self.active = activate(self.before, activation)
        self.second: Tensor | None = None
        self.result = self.active
        if self.value is not None:
            self.second = F.linear(x, self.value, None if value_bias is None else _masked(value_bias, on))
            self.result = self.active * self.second


def _masked(t: Tensor, on: Tensor) -> Tensor:
    return torch.where(on if t.dim() == 1 else on[:, None], t, 0.0)


def _places(layout: BankLayout) -> list[int]:
    """Four numbers a seed, as :data:`graft_blend` wants them."""
    return [int(n) for p in layout.blend.places for n in (p.index, p.begin, p.end, p.replace)]


def _register(blend: Callable[..., Any], blend_backward: Callable[..., Any]) -> None:
    @implements("graft_bank", "cuda")
    @unaffected_by_autocast
    def forward(
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
        layout = check_bank(x, h, alpha, down, value, up, bias, value_bias, seats, activation)
        on = rows_on(layout, alpha)
        hidden = _Hidden(x, on, down, value, bias, value_bias, activation).result
        up = _masked(up, on)
        parts = [
            hidden[..., first:last] @ up[first:last, place.begin : place.end]
            for (first, last), place in zip(layout.rows, layout.blend.places, strict=True)
        ]
        trusted = torch.isfinite(x).all(-1, keepdim=True)
        y, faults = blend(h, parts, [trusted] * len(parts), alpha, _places(layout), h.dim() - 1)
        return y, faults

    @implements("graft_bank_backward", "cuda")
    @unaffected_by_autocast
    def backward(
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
        check_bank(x, gy, alpha, down, value, up, bias, value_bias, seats, activation)
        layout = bank_layout(tuple(seats), gy.shape[-1], down.shape[0])
        gh, parts = blend_backward(gy, alpha, faults, _places(layout), gy.dim() - 1)
        empty = gy.new_empty(0)
        found = [gh if want_h else empty.clone()]
        if not (want_x or want_weights):
            return (empty.clone(), *found, *(empty.clone() for _ in range(5)))
        # Zero times what is not finite is not zero, so where nothing may pass it is written.
        open_ = rows_on(layout, alpha) & (faults == 0).all()
        rows, parts = x.reshape(-1, x.shape[-1]), [part.reshape(-1, part.shape[-1]) for part in parts]
        hidden = _Hidden(rows, open_, down, value, bias, value_bias, activation)
        spans = [
            (slice(*stretch), slice(place.begin, place.end))
            for stretch, place in zip(layout.rows, layout.blend.places, strict=True)
        ]
        up = _masked(up, open_)
        g = torch.cat([part @ up[rank, span].t() for part, (rank, span) in zip(parts, spans, strict=True)], 1)
        g = torch.where(open_, g, 0.0)
        gz = g if hidden.second is None else g * hidden.second
        gz = torch.where(open_, slope_times(gz, hidden.before, activation), 0.0)
        gv = None if hidden.second is None else torch.where(open_, g * hidden.active, 0.0)
        gx = empty.clone()
        if want_x:
            gx = gz @ hidden.down
            if gv is not None and hidden.value is not None:
                gx = gx + gv @ hidden.value
            gx = torch.where((faults == 0).all(), gx, 0.0).view(x.shape)
        weights = [empty.clone() for _ in range(5)]
        if want_weights:
            gup = torch.zeros_like(up, memory_format=torch.contiguous_format)
            for part, (rank, span) in zip(parts, spans, strict=True):
                gup[rank, span] = hidden.result[:, rank].t() @ part
            weights[0], weights[2] = _masked(gz.t() @ rows, open_), _masked(gup, open_)
            if gv is not None:
                weights[1] = _masked(gv.t() @ rows, open_)
            if bias is not None:
                weights[3] = gz.sum(0)
            if value_bias is not None and gv is not None:
                weights[4] = gv.sum(0)
        return (gx, *found, *weights)


_reason = graft_blend.reason(Backend.CUDA)
if _reason:
    for _name in ("graft_bank", "graft_bank_backward"):
        unavailable(_name, "cuda", _reason)
else:
    _register(graft_blend.backend(Backend.CUDA), graft_blend_backward.backend(Backend.CUDA))
