"""The fused linear layer: what it is called with, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from esper.ops.graft.bank import check_bank
from esper.ops.graft.variants import ACTIVATION_CODES
from esper.ops.registry import define
from esper.ops.stats.schema import FEATURE_FIELDS

__all__ = ["MAX_RANKS", "WAYS", "check_linear", "fused_linear"]

#: Rows of the bank that fit beside a tile of y.
MAX_RANKS: Final = 64

#: How a call may run: the host's product by the library and the rest behind it; or one kernel, with z beside its
#: product (``inline``) or from a product in front of it (``given``; without a graft the two are one).
WAYS: Final = ("library", "inline", "given")


def check_linear(
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
) -> None:
    """Raise ValueError unless kernels may trust these tensors."""
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(map(str, ACTIVATION_CODES))}")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; weight is [d_out, d_in]")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, but weight {tuple(weight.shape)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and (tensor.dtype is not x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    given = [t is not None for t in (alpha, down, up)]
    if any(given) != all(given) or any(given) != bool(seats) or (graft_bias is not None and not any(given)):
        raise ValueError("a graft needs alpha, down, up and seats, and a layer without one has none of them")
    if alpha is not None and down is not None and up is not None:
        check_bank(x, _shape_of_h(x, weight), alpha, down, None, up, graft_bias, None, seats, graft_activation)


def _shape_of_h(x: Tensor, weight: Tensor) -> Tensor:
    """A tensor with the shape of h and no memory of that size."""
    return weight.new_empty(1).expand(*x.shape[:-1], weight.shape[0])


def _fake(
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
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return (
        y,
        torch.empty_like(y) if keep else x.new_empty(0),
        x.new_empty((FEATURE_FIELDS, weight.shape[0]) if stats else 0, dtype=torch.float64),
        x.new_empty(len(seats) // 6, dtype=torch.uint8),
    )


#: y, before, features and faults.
#:
#: ``h = act(x @ weight.T + bias)``, and y is h with the seeds of ``graft_bank`` (no gated ones) blended in.
#:
#: - ``x``: ``[..., d_in]``; ``weight``: ``[d_out, d_in]``; ``bias``: ``[d_out]``; float16, bfloat16, float32,
#:   float64.
#: - ``activation``: as blueprints name them, or None.
#: - ``alpha``, ``down``, ``up``, ``graft_bias``, ``seats``, ``graft_activation``: as :data:`graft_bank` has them; None
#:   and an empty list without seeds.
#: - ``keep``: whether ``before``, which is ``x @ weight.T + bias``, is wanted (the backward needs it where there is an
#:   activation); empty otherwise.
#: - ``stats``: whether ``features`` is: float64 ``[5, d_out]`` as :mod:`esper.ops.stats.schema` has them, of y; where a
#:   seed is at fault, of y before the fault was contained or after it.
#:
#: ``faults`` is uint8, one a seed.
fused_linear = define(
    "fused_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? alpha, Tensor? down, Tensor? up, "
    "Tensor? graft_bias, int[] seats, str? graft_activation, bool keep, bool stats) -> "
    "(Tensor y, Tensor before, Tensor features, Tensor faults)",
    doc="a linear layer with activation, statistics and low-rank seeds in the epilogue of its product",
    fake=_fake,
)
