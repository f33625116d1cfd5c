"""The blend and its faults in plain PyTorch: the oracle of the other backends, and what compilers trace.

Nothing here looks at a value, so nothing synchronises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from esper.ops.graft.layout import BlendLayout
from esper.ops.registry import implements

__all__ = ["accumulation_dtype", "blend", "faults", "join", "narrow", "unaffected_by_autocast"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def unaffected_by_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """What an operation computes in follows from its tensors alone; its first argument is one."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 at least."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def blend(layout: BlendLayout, h: Tensor, parts: Sequence[Tensor], alpha: Tensor, dim: int) -> Tensor:
    """The blend for alphas that only the device knows; see :data:`esper.ops.graft.graft_blend`.

    A factor of 0 must not multiply: 0 * inf is NaN. ``where`` leaves the product out, and -0 stands in its place
    because -0 + k is k, the sign of zero included.
    """
    wide = accumulation_dtype(h.dtype)
    alpha = alpha.to(wide)
    pieces: list[Tensor | None] = []
    for segment in layout.segments:
        host, pairs = layout.tensors(alpha, segment)
        total = narrow(h, dim, 0, segment, layout.features).to(wide)
        if host is not None:
            total = torch.where(host == 0, -0.0, host * total)
        for i, c in pairs:
            k = narrow(parts[i], dim, layout.places[i].begin, segment, parts[i].shape[dim]).to(wide)
            total = total + torch.where(c == 0, -0.0, c * k)
        pieces.append(total)
    return join(pieces, h, dim)


def faults(
    layout: BlendLayout,
    h: Tensor,
    y: Tensor,
    parts: Sequence[Tensor | None],
    trusted: Sequence[Tensor],
    alpha: Tensor,
    dim: int,
) -> Tensor:
    """Which seeds are at fault for what is not finite in y.

    Args:
        layout: Of the seeds.
        h: The host's output.
        y: The blend.
        parts: Per seed ``k``, or None where its alpha is 0.
        trusted: Per seed a bool tensor, as its k or with 1 along ``dim``: where the tap is finite.
        alpha: The layer's alphas, on h's device.
        dim: Dimension of the features, not negative.

    Returns:
        bool [len(parts)] on h's device. Nothing is looked at, nothing synchronises.
    """
    blamed = [h.new_zeros((), dtype=torch.bool) for _ in parts]
    wide = accumulation_dtype(h.dtype)
    alpha = alpha.to(wide)
    for segment in layout.segments:
        _, pairs = layout.tensors(alpha, segment)
        here = narrow(h, dim, 0, segment, layout.features)
        result = narrow(y, dim, 0, segment, layout.features)
        # Where the sum broke although the host is sound: an overflow, if no single contribution is broken there.
        overflow = ~torch.isfinite(result) & torch.isfinite(here)
        sizes: list[tuple[int, Tensor]] = []
        for i, c in pairs:
            part = parts[i]
            if part is None:
                continue
            k = narrow(part, dim, layout.places[i].begin, segment, part.shape[dim])
            # Judged in h's dtype: what the layer would hand on is what must be finite.
            scaled = (c * k.to(wide)).to(h.dtype)
            broken = ~torch.isfinite(scaled) & (c != 0)
            sound = trusted[i]
            if sound.shape[dim] != 1:
                sound = narrow(sound, dim, layout.places[i].begin, segment, sound.shape[dim])
            blamed[i] = blamed[i] | (broken & sound).any()
            overflow = overflow & ~broken & sound
            sizes.append((i, torch.where(c == 0, 0.0, scaled.abs())))
        if sizes:
            largest = torch.stack([size for _, size in sizes]).amax(0)
            for i, size in sizes:
                blamed[i] = blamed[i] | (overflow & (size == largest) & (size > 0)).any()
    return torch.stack(blamed)


def narrow(t: Tensor, dim: int, origin: int, segment: tuple[int, int], features: int) -> Tensor:
    """The segment of a tensor whose features begin at ``origin``; the tensor itself if that is all of the layer."""
    begin, end = segment
    if end - begin == features:
        return t
    return t.narrow(dim, begin - origin, end - begin)


def join(pieces: Sequence[Tensor | None], h: Tensor, dim: int) -> Tensor:
    """The segments side by side again, in the dtype of h."""
    whole = [piece for piece in pieces if piece is not None]
    y = whole[0] if len(whole) == 1 else torch.cat(whole, dim)
    return y.to(h.dtype)


@implements("graft_blend", "reference")
def graft_blend(
    h: Tensor, parts: Sequence[Tensor], trusted: Sequence[Tensor], alpha: Tensor, places: Sequence[int], dim: int
) -> tuple[Tensor, Tensor]:
    """See :data:`esper.ops.graft.graft_blend`."""
    layout = BlendLayout.from_flat(places, h.shape[dim])
    y = blend(layout, h, parts, alpha, dim)
    blamed = faults(layout, h, y, parts, trusted, alpha, dim)
    return torch.where(blamed.any(), h, y), blamed.to(torch.uint8)


@implements("graft_blend_backward", "reference")
def graft_blend_backward(
    gy: Tensor, alpha: Tensor, blamed: Tensor, places: Sequence[int], dim: int
) -> tuple[Tensor, list[Tensor]]:
    """See :data:`esper.ops.graft.graft_blend_backward`."""
    layout = BlendLayout.from_flat(places, gy.shape[dim])
    fault = (blamed != 0).any()
    wide = alpha.to(accumulation_dtype(gy.dtype))
    host_pieces: list[Tensor | None] = []
    pieces: list[list[Tensor | None]] = [[] for _ in layout.places]
    for segment in layout.segments:
        host, pairs = layout.tensors(wide, segment)
        here = narrow(gy, dim, 0, segment, layout.features)
        host_pieces.append(here if host is None else torch.where(fault, here, (host * here).to(gy.dtype)))
        for i, c in pairs:
            pieces[i].append(torch.where(fault | (c == 0), 0.0, (c * here).to(gy.dtype)))
    return join(host_pieces, gy, dim), [join(line, gy, dim) for line in pieces]
