"""The library's product, then activation, seeds and statistics: what runs unless another way was measured faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.ops.graft import bank_reference
from esper.ops.graft.bank import graft_bank
from esper.ops.graft.reference import unaffected_by_autocast
from esper.ops.linear.schema import check_linear
from esper.ops.registry import implements
from esper.ops.stats import channel_stats
from esper.ops.stats import reference as stats_reference

__all__ = ["by_library", "linear_blend"]


@unaffected_by_autocast
def linear_blend(
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
) -> Tensor:
    """Y before containment, differentiable."""
    h = bank_reference.activate(F.linear(x, weight, bias), activation)
    if alpha is None or down is None or up is None:
        return h
    return bank_reference.bank_blend(x, h, alpha, down, None, up, graft_bias, None, seats, graft_activation)[0]


@unaffected_by_autocast
def by_library(
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
    *,
    blend: Callable[..., Any] = graft_bank,
    observe: Callable[..., Any] = channel_stats,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :data:`esper.ops.linear.fused_linear`; ``blend`` and ``observe`` do what follows the product."""
    check_linear(x, weight, bias, activation, alpha, down, up, graft_bias, seats, graft_activation)
    before = F.linear(x, weight, bias)
    y = bank_reference.activate(before, activation)
    faults = torch.zeros(0, dtype=torch.uint8, device=x.device)
    if alpha is not None and down is not None and up is not None:
        y, faults = blend(x, y, alpha, down, None, up, graft_bias, None, seats, graft_activation)
    features = observe(y, 1, -1)[0] if stats else x.new_empty(0, dtype=torch.float64)
    kept = before if keep else x.new_empty(0)
    # Results of an operation may not be one another.
    return y.clone() if keep and y is before else y, kept, features, faults


@implements("fused_linear", "reference")
def _plain(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return by_library(*args, blend=bank_reference.graft_bank, observe=stats_reference.channel_stats)


@implements("fused_linear", "cpu")
@implements("fused_linear", "cuda")
def _composed(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return by_library(*args)
