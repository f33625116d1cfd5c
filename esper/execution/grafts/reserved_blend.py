"""The blend of a layer with reserved memory, from operations that look at no value.

Everything that waking changes is read from small tensors on the device: which seeds are awake, their ranks,
activations, features and modes (the *plan*), and their alphas. So one compiled or captured graph serves whatever the
seeds do.

    z = act(v down^T + b)          [.., S R]     v the tap; act by the row's code
    y = host * h + z (c up)^T                    c [d_out, S R] and host [d_out] from the plan and the alphas

Coefficients multiply the weights, which are small, and not the contributions of each seed: so S seeds cost one product
down and one up. With that no single contribution exists, and containment (see :mod:`esper.execution.grafts.blend`) has
to find the seeds at fault in another way; :func:`_faults` says how.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from esper.blueprints import interpret
from esper.execution.grafts import blend
from esper.execution.grafts.families import linear_along
from esper.ops.graft.reference import accumulation_dtype
from esper.ops.graft.seeds import ACTIVATIONS

__all__ = ["reserved_blend"]


def reserved_blend(
    tap: Tensor,
    h: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    plan: Tensor,
    alpha: Tensor,
    dim: int,
    activations: Collection[str | None] = ACTIVATIONS,
) -> tuple[Tensor, Tensor]:
    """Blend all seeds of a layer, awake or not, and contain faults.

    Args:
        tap: What the seeds read, ``d_tap`` features along ``dim``.
        h: The host's output, ``d_out`` features along ``dim``, otherwise of the tap's shape.
        weights: down ``[S R, d_tap]``, bias ``[S R]``, up ``[d_out, S R]``, seeds side by side.
        plan: int32 ``[S, 7]``, see :class:`Plan`.
        alpha: float32 ``[S]``.
        dim: Dimension of the features, not negative.
        activations: Those that awake seeds have; a graph that is to serve all seeds names all.

    Returns:
        y, of h's shape and dtype, and bool ``[S]``: the seeds at fault. If there is one, y is h and the gradient goes
        to h alone.
    """
    seeds = plan.shape[0]
    rank = weights[0].shape[0] // seeds
    wide = accumulation_dtype(h.dtype)
    features = (-1, *(1 for _ in range(h.dim() - 1 - dim)))
    with torch.no_grad():
        if torch.compiler.is_compiling():
            plan, alpha = _as_it_is_now(plan), _as_it_is_now(alpha)
        code, used, _, _, _, has_bias, _ = plan.unbind(1)
        share, host = _coefficients(plan, alpha.to(wide), weights[2].shape[0])
        # [S, R]: rows that a kernel occupies and that count. What lies behind a closed row is never read: memory of a
        # sleeping seed may hold anything, NaN too. It gets no gradient either, so padding stays 0 whatever act(0) is.
        rows = torch.arange(rank, device=plan.device) < used[:, None]
        rows = rows & (share != 0).any(1, keepdim=True)
        open_rows = rows.reshape(-1)
        codes = torch.where(rows, code[:, None], 0).reshape(features)
        biased = (rows & (has_bias != 0)[:, None]).reshape(-1)
        per_row = share.t().unsqueeze(2).expand(-1, -1, rank).reshape(-1, seeds * rank)
        host, counts = host.reshape(features), (share != 0).any(0).reshape(features)
    (v, down, bias, up), signal = blend.gate([tap, *weights])
    down = torch.where(open_rows[:, None], down, 0.0).to(tap.dtype)
    bias = torch.where(biased, bias, 0.0).to(tap.dtype)
    up = torch.where(open_rows & (per_row != 0), per_row * up.to(wide), 0.0).to(tap.dtype)
    z = _activated(linear_along(v, down, bias, dim), codes, activations)
    mixed = linear_along(z, up, None, dim)
    own = h.to(wide)
    # A factor of 0 must not multiply: 0 * inf is NaN. -0 leaves what it is added to as it is, a zero's sign included.
    y = (torch.where(host == 0, -0.0, host * own) + torch.where(counts, mixed.to(wide), -0.0)).to(h.dtype)
    with torch.no_grad():
        blamed = _faults(tap, h.detach(), y.detach(), z.detach(), up.detach(), seeds, dim)
    return blend.contain(y, h, signal, blamed.any()), blamed


def _as_it_is_now(t: Tensor) -> Tensor:
    """A copy that a compiler keeps for the backward.

    Left to itself it would read the original there again, which has moved by then, and compute the rest anew. Of what
    leaves a tensor as it is, a sum along a dimension of 1 is what partitioners do not compute twice.
    """
    return t.unsqueeze(0).cumsum(0, dtype=t.dtype)[0]


def _coefficients(plan: Tensor, alpha: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Each seed's coefficient ``[S, d_out]`` and the host's factor ``[d_out]`` (docs/grafts.md has the formula)."""
    code, _, begin, end, replace, _, _ = plan.unbind(1)
    feature = torch.arange(features, device=plan.device)
    inside = (feature >= begin[:, None]) & (feature < end[:, None])
    replaces = (replace != 0)[:, None]
    mine = torch.where(inside & (code != 0)[:, None], alpha[:, None], 0.0)
    replaced = torch.where(replaces, mine, 0.0).sum(0)
    scale = torch.where(replaces, replaced.clamp(min=1.0).reciprocal(), 1.0)
    return mine * scale, (1.0 - replaced).clamp(min=0.0)


def _activated(z: Tensor, codes: Tensor, activations: Collection[str | None]) -> Tensor:
    """Each row through its own activation; 0 in closed rows.

    The input of an activation is masked too: where another one counts, its slope must not meet an infinity.
    """
    result = torch.zeros_like(z)
    for kind in activations:
        here = codes == 1 + ACTIVATIONS.index(kind)
        if kind is None:
            result = torch.where(here, z, result)
        else:
            result = torch.where(here, interpret.activate(kind, torch.where(here, z, 0.0)), result)
    return result


def _faults(tap: Tensor, h: Tensor, y: Tensor, z: Tensor, up: Tensor, seeds: int, dim: int) -> Tensor:
    """The seeds at fault, bool ``[S]``, for what is not finite in y.

    A contribution ``c (z up)`` is not finite where z is not (a position's worth) or where ``c up`` is not (everywhere),
    because 0 * inf is NaN; both are looked at in full. What remains is overflow of the product, or of the sum: then the
    contributions are computed apart, at the first position where y broke, and the rules of the blend are applied there.
    A seed that overflows at another position alone is found when it is the first, in one of the next steps.
    """
    trusted = torch.isfinite(tap).all(dim, keepdim=True)
    rank = up.shape[1] // seeds
    odd_z = ((~torch.isfinite(z) & trusted).movedim(dim, -1)).reshape(-1, seeds, rank).any(2).any(0)
    odd_up = (~torch.isfinite(up)).reshape(-1, seeds, rank).any(2).any(0) & trusted.any()
    broken = (~torch.isfinite(y) & torch.isfinite(h) & trusted).movedim(dim, -1).reshape(-1, h.shape[dim])
    position = broken.any(1).to(torch.uint8).argmax(0, keepdim=True)
    here = broken.index_select(0, position)[0]
    at = z.movedim(dim, -1).reshape(-1, seeds * rank).index_select(0, position)
    wide = accumulation_dtype(h.dtype)
    parts = (at.to(wide) * up.to(wide)).reshape(-1, seeds, rank).sum(2).to(h.dtype)
    odd = ~torch.isfinite(parts)
    sizes = torch.where(odd, 0.0, parts.abs())
    # Where no single contribution broke, the largest ones broke the sum.
    largest = (sizes == sizes.amax(1, keepdim=True)) & (sizes > 0) & (here & ~odd.any(1))[:, None]
    return odd_z | odd_up | (here[:, None] & (odd | largest)).any(0)
