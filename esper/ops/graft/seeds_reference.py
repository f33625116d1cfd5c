"""The seeds of a layer in plain PyTorch: the oracle of ``csrc/graft_seeds.cpp``. It looks at the plan and at alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.ops.graft import reference
from esper.ops.graft.bank_reference import activate, slope_times
from esper.ops.graft.layout import BlendLayout, Place
from esper.ops.graft.seeds import ACTIVATIONS, ALPHA, Plan, check_rows, check_seeds, groups_of
from esper.ops.registry import implements

__all__: list[str] = []


@dataclass(frozen=True)
class _Seed:
    """An awake seed, its parameters cut to what its kernel occupies."""

    index: int
    place: Place
    activation: str | None
    down: Tensor
    up: Tensor  # [own features, rank]
    bias: Tensor | None


def _awake(plan: Tensor, weights: Sequence[Tensor], features: int) -> list[_Seed]:
    downs, ups, biases = groups_of(weights, plan.shape[0])
    found = []
    for i, line in enumerate(plan.tolist()):
        code, rank, begin, end, replace, biased, _ = (line[column] for column in Plan)
        if code == 0 or rank == 0:
            continue
        up = ups[i][begin:end] if ups[i].shape[0] == features else ups[i]
        found.append(
            _Seed(
                i,
                Place(i, begin, end, bool(replace)),
                ACTIVATIONS[code - 1],
                downs[i][:rank],
                up[:, :rank],
                biases[i][:rank] if biased else None,
            )
        )
    return found


@implements("graft_seeds", "reference")
def graft_seeds(
    x: Tensor,
    h: Tensor,
    alpha: Tensor,
    flags: Tensor,
    plan: Tensor,
    weights: Sequence[Tensor],
    first_row: int,
    y: Tensor,
    effect: Tensor,
) -> None:
    """See :data:`esper.ops.graft.seeds.graft_seeds`."""
    check_seeds(x, h, plan, weights)
    check_rows(alpha, flags, plan, first_row)
    features, dim = h.shape[-1], h.dim() - 1
    seeds = _awake(plan, weights, features)
    rows = plan[:, Plan.ROW].long() + first_row
    own = alpha[rows]
    effect.copy_(torch.cat([plan, own[:, None].view(torch.int32)], 1))
    y.copy_(h)
    if not seeds:
        return
    layout = BlendLayout([seed.place for seed in seeds], features)
    parts = [F.linear(activate(F.linear(x, s.down, s.bias), s.activation), s.up) for s in seeds]
    blended = reference.blend(layout, h, parts, own, dim)
    trusted = [torch.isfinite(x).all(-1, keepdim=True)] * len(seeds)
    blamed = reference.faults(layout, h, blended, parts, trusted, own, dim)
    flags[rows[[seed.index for seed in seeds]]] |= blamed.to(flags.dtype)
    if blamed.any():
        effect[:, Plan.CODE] = 0
    else:
        y.copy_(blended)


@implements("graft_seeds_backward", "reference")
def graft_seeds_backward(
    gy: Tensor,
    x: Tensor,
    effect: Tensor,
    weights: Sequence[Tensor],
    want_x: bool,
    want_h: bool,
    want_weights: bool,
    grads: Sequence[Tensor],
) -> None:
    """See :data:`esper.ops.graft.seeds.graft_seeds_backward`."""
    plan, alpha = effect[:, : len(Plan)], effect[:, ALPHA].contiguous().view(torch.float32)
    check_seeds(x, gy, plan, weights)
    features = gy.shape[-1]
    seeds = _awake(plan, weights, features)
    layout = BlendLayout([seed.place for seed in seeds], features)
    flat_x, flat_gy = x.reshape(-1, x.shape[-1]), gy.reshape(-1, features)
    numbers: list[float] = alpha.tolist()
    gx, gh = torch.zeros_like(flat_x), flat_gy.clone()
    out = list(grads)
    out_x = out.pop(0) if want_x else None
    out_h = out.pop(0) if want_h else None
    gdowns, gups, gbiases = groups_of([t.zero_() for t in out], plan.shape[0]) if want_weights else ([], [], [])
    live: set[int] = set()
    for begin, end in layout.segments:
        host, pairs = layout.numbers(numbers, (begin, end))
        gh[:, begin:end] *= host
        live |= {i for i, _ in pairs}
    for i in sorted(live):
        seed = seeds[i]
        before = F.linear(flat_x, seed.down, seed.bias)
        after = activate(before, seed.activation)
        back = torch.zeros_like(before)
        gup = torch.zeros_like(seed.up)
        for begin, end in layout.segments:
            for j, c in layout.numbers(numbers, (begin, end))[1]:
                if j != i:
                    continue
                here = slice(begin - seed.place.begin, end - seed.place.begin)
                back += c * (flat_gy[:, begin:end] @ seed.up[here])
                gup[here] = c * (flat_gy[:, begin:end].t() @ after)
        back = slope_times(back, before, seed.activation)
        gx += back @ seed.down
        if want_weights:
            rank, place = seed.down.shape[0], seed.place
            gdowns[seed.index][:rank] = back.t() @ flat_x
            whole = gups[seed.index]
            own = whole[place.begin : place.end] if whole.shape[0] == features else whole
            own[:, :rank] = gup
            if seed.bias is not None:
                gbiases[seed.index][:rank] = back.sum(0)
    if out_x is not None:
        out_x.copy_(gx.view(x.shape))
    if out_h is not None:
        out_h.copy_(gh.view(gy.shape))
