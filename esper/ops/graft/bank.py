"""The bank of a layer's low-rank, bottleneck or gated seeds: one operation forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from esper.ops.graft.layout import BlendLayout, Place
from esper.ops.graft.variants import ACTIVATION_CODES
from esper.ops.registry import define

__all__ = ["BankLayout", "bank_layout", "check_bank", "graft_bank", "graft_bank_backward"]


@dataclass(frozen=True)
class BankLayout:
    """Whose the rows of a bank are.

    Attributes:
        blend: Where the seeds' contributions go.
        rows: First row and one past the last of each seed.
        owner: Which seed each row belongs to.
    """

    blend: BlendLayout
    rows: tuple[tuple[int, int], ...]
    owner: tuple[int, ...]


@lru_cache(maxsize=1024)
def bank_layout(seats: tuple[int, ...], features: int, ranks: int) -> BankLayout:
    """From six numbers a seed, see :data:`graft_bank`.

    Raises:
        ValueError: not six numbers a seed, features outside of the layer, or rows that are not the bank's in order.
    """
    if len(seats) % 6 or not seats:
        raise ValueError(f"seats holds {len(seats)} numbers; a bank needs six for each of at least one seed")
    places: list[Place] = []
    rows: list[tuple[int, int]] = []
    owner: list[int] = []
    for i, (index, begin, end, replace, row, last) in enumerate(zip(*[iter(seats)] * 6, strict=True)):
        if not 0 <= begin < end <= features:
            raise ValueError(f"seed {i} changes features {begin} to {end}, but the layer has {features}")
        if index < 0 or row != len(owner) or last <= row:
            raise ValueError(
                f"seed {i} has row {index} of alpha and rows {row} to {last} of the bank; "
                f"rows must follow one another, and the next is {len(owner)}"
            )
        places.append(Place(index, begin, end, bool(replace)))
        rows.append((row, last))
        owner += [i] * (last - row)
    if len(owner) != ranks:
        raise ValueError(f"the seeds have {len(owner)} rows, the bank {ranks}")
    return BankLayout(BlendLayout(places, features), tuple(rows), tuple(owner))


def check_bank(
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
) -> BankLayout:
    """Raise ValueError unless kernels may trust these tensors; the layout if so. ``h`` may be its gradient."""
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(map(str, ACTIVATION_CODES))}")
    if x.dim() == 0 or x.shape[:-1] != h.shape[:-1]:
        raise ValueError(f"x is {tuple(x.shape)} and h {tuple(h.shape)}; all but the last dimension must agree")
    ranks = down.shape[0] if down.dim() else 0
    expected = {
        "down": (down, (ranks, x.shape[-1])),
        "value": (value, (ranks, x.shape[-1])),
        "up": (up, (ranks, h.shape[-1])),
        "bias": (bias, (ranks,)),
        "value_bias": (value_bias, (ranks,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but x {tuple(x.shape)} and {ranks} rows need {shape}")
    for name, tensor in {"x": x, **{name: pair[0] for name, pair in expected.items()}}.items():
        if tensor is not None and (tensor.dtype is not h.dtype or tensor.device != h.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but h is {h.dtype} on {h.device}")
    if alpha.dtype is not torch.float32 or alpha.dim() != 1 or alpha.device != h.device:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)} on {alpha.device}; it must be float32 beside h")
    if value is None and value_bias is not None:
        raise ValueError("value_bias without value")
    if value is not None and (bias is None) != (value_bias is None):
        raise ValueError("a gated bank has both biases or none")
    layout = bank_layout(tuple(seats), h.shape[-1], ranks)
    highest = max(place.index for place in layout.blend.places)
    if highest >= alpha.shape[0]:
        raise ValueError(f"a seed has row {highest} of alpha, which has {alpha.shape[0]}")
    return layout


def _fake_bank(
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
    return h.new_empty(h.shape), torch.empty(len(seats) // 6, dtype=torch.uint8, device=h.device)


def _fake_backward(
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
    weights = [t if want_weights else None for t in (down, value, up, bias, value_bias)]
    return (
        x.new_empty(x.shape if want_x else 0),
        gy.new_empty(gy.shape if want_h else 0),
        *(gy.new_empty(0 if t is None else t.shape) for t in weights),
    )


#: y and faults.
#:
#: With ``z = act(x @ down.T + bias)``, or ``act(x @ down.T + bias) * (x @ value.T + value_bias)`` if there is a value,
#: seed s contributes ``(c_s * z_s) @ up_s`` from its own rows of the bank; ``c_s * z_s`` is rounded to h's dtype, and
#: everything else is summed in float32 at least.
#:
#: - ``x``: ``[..., d_in]``, ``h``: ``[..., d_out]``, float16, bfloat16, float32 or float64.
#: - ``alpha``: float32, one a seed of the layer, read on the device.
#: - ``down``, ``value``: ``[R, d_in]``; ``up``: ``[R, d_out]``; ``bias``, ``value_bias``: ``[R]``. Outside of its
#:   seed's features a row of ``up`` is not read.
#: - ``seats``: six numbers a seed: its row of alpha, first feature, one past the last, 1 for mode replace, first row of
#:   the bank, one past the last. Rows follow one another.
#: - ``activation``: as blueprints name them, or None.
#:
#: ``y`` is the blend, or h in full if a seed is at fault; ``faults`` uint8 ``[seeds]`` says which. docs/grafts.md has
#: the rules.
graft_bank = define(
    "graft_bank",
    "(Tensor x, Tensor h, Tensor alpha, Tensor down, Tensor? value, Tensor up, Tensor? bias, Tensor? value_bias, "
    "int[] seats, str? activation) -> (Tensor y, Tensor faults)",
    doc="a layer's low-rank, bottleneck or gated seeds blended into it in one pass",
    fake=_fake_bank,
)

#: Gradients of y for x, h and the weights: true to the formula, or after a fault gy for h and 0 for the rest. What is
#: not wanted, or has no tensor, comes back empty.
graft_bank_backward = define(
    "graft_bank_backward",
    "(Tensor gy, Tensor x, Tensor alpha, Tensor faults, Tensor down, Tensor? value, Tensor up, Tensor? bias, "
    "Tensor? value_bias, int[] seats, str? activation, bool want_x, bool want_h, bool want_weights) -> "
    "(Tensor gx, Tensor gh, Tensor gdown, Tensor gvalue, Tensor gup, Tensor gbias, Tensor gvalue_bias)",
    doc="gradients of graft_bank",
    fake=_fake_backward,
)
