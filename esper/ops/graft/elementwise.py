"""A layer's elementwise seeds: one operation forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from esper.ops.graft.layout import BlendLayout
from esper.ops.graft.variants import ACTIVATION_CODES
from esper.ops.registry import define

__all__ = ["blank", "check_elementwise", "graft_elementwise", "graft_elementwise_backward", "is_channels_last"]


@lru_cache(maxsize=1024)
def _layout(places: tuple[int, ...], features: int) -> BlendLayout:
    layout = BlendLayout.from_flat(places, features)
    for place in layout.places:
        if not 0 <= place.begin < place.end <= features:
            raise ValueError(f"a seed changes features {place.begin} to {place.end}, but the layer has {features}")
    return layout


def check_elementwise(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
) -> BlendLayout:
    """Raise ValueError unless kernels may trust these tensors; the layout if so. ``h`` may be its gradient."""
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(map(str, ACTIVATION_CODES))}")
    if not 0 <= dim < h.dim() or x.shape != h.shape:
        raise ValueError(f"x is {tuple(x.shape)} and h {tuple(h.shape)}; they must agree and have a dimension {dim}")
    seeds, features = len(places) // 4, h.shape[dim]
    if not seeds or len(places) % 4:
        raise ValueError(f"places holds {len(places)} numbers; each of at least one seed needs four")
    for name, tensor in {"scale": scale, "shift": shift}.items():
        if tensor is not None and tuple(tensor.shape) != (seeds, features):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but {seeds} seeds of {features} features need a row each"
            )
    for name, tensor in {"x": x, "scale": scale, "shift": shift}.items():
        if tensor is not None and (tensor.dtype is not h.dtype or tensor.device != h.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but h is {h.dtype} on {h.device}")
    if alpha.dtype is not torch.float32 or alpha.dim() != 1 or alpha.device != h.device:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)} on {alpha.device}; it must be float32 beside h")
    layout = _layout(tuple(places), features)
    for place in layout.places:
        if not 0 <= place.index < alpha.shape[0]:
            raise ValueError(f"a seed has row {place.index} of alpha, which has {alpha.shape[0]}")
    return layout


def is_channels_last(t: Tensor, dim: int) -> bool:
    """Whether ``t`` is images whose features lie side by side in memory."""
    return dim == 1 and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def blank(like: Tensor, dim: int) -> Tensor:
    """An empty tensor for a result: laid out as ``like`` if that is channels_last, else contiguous."""
    kind = torch.channels_last if is_channels_last(like, dim) else torch.contiguous_format
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=kind)


def _fake_forward(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
) -> tuple[Tensor, Tensor]:
    return blank(h, dim), torch.empty(len(places) // 4, dtype=torch.uint8, device=h.device)


def _fake_backward(
    gy: Tensor,
    x: Tensor,
    alpha: Tensor,
    faults: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    places: Sequence[int],
    activation: str | None,
    dim: int,
    want_x: bool,
    want_h: bool,
    want_weights: bool,
) -> tuple[Tensor, ...]:
    return (
        blank(gy, dim) if want_x else gy.new_empty(0),
        blank(gy, dim) if want_h else gy.new_empty(0),
        *(gy.new_empty(0 if t is None or not want_weights else t.shape) for t in (scale, shift)),
    )


#: y and faults.
#:
#: Seed s contributes ``scale_s * act(x) + shift_s`` on its own features, computed in float32 at least.
#:
#: - ``x``, ``h``: of one shape, C features along ``dim`` (not negative); float16, bfloat16, float32 or float64.
#: - ``alpha``: float32, one a seed of the layer, read on the device.
#: - ``scale``, ``shift``: ``[seeds, C]``; outside of its features a seed's row is not read.
#: - ``places``: four numbers a seed: its row of alpha, first feature, one past the last, 1 for mode replace.
#: - ``activation``: as blueprints name them, or None.
#:
#: ``y`` is the blend, or h in full if a seed is at fault; ``faults`` uint8 ``[seeds]`` says which. A seed of this
#: family reads nothing but the element that it writes: that is the position whose tap has to be finite for blame.
graft_elementwise = define(
    "graft_elementwise",
    "(Tensor x, Tensor h, Tensor alpha, Tensor scale, Tensor? shift, int[] places, str? activation, int dim) -> "
    "(Tensor y, Tensor faults)",
    doc="a layer's elementwise seeds computed and blended into it in one pass",
    fake=_fake_forward,
)

#: Gradients of y for x, h, scale and shift: true to the formula, or after a fault gy for h and 0 for the rest. What is
#: not wanted, or has no tensor, comes back empty.
graft_elementwise_backward = define(
    "graft_elementwise_backward",
    "(Tensor gy, Tensor x, Tensor alpha, Tensor faults, Tensor scale, Tensor? shift, int[] places, str? activation, "
    "int dim, bool want_x, bool want_h, bool want_weights) -> (Tensor gx, Tensor gh, Tensor gscale, Tensor gshift)",
    doc="gradients of graft_elementwise",
    fake=_fake_backward,
)
