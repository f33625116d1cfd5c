"""Small networks with reserved memory, and seeds woken in them."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from torch import nn

import esper


def mlp(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def wrap(network: nn.Module | None = None, rank: int = 4, **options: Any) -> esper.MorphableModel:
    options.setdefault("telemetry_enabled", False)
    return esper.wrap(mlp() if network is None else network, reserve_rank=rank, **options)


def compiled_kernel(
    model: esper.MorphableModel, layer: str, name: str = "bottleneck", *, rank: int = 2, seed: int = 0, **params: Any
) -> str:
    """A kernel that fits the layer's reservation, in the default registry."""
    reservation: Any = model.layer(layer).grafts.reservation  # type: ignore[attr-defined]
    return esper.compile(
        name,
        d_in=reservation.d_tap,
        d_out=reservation.d_out,
        registry=None,
        seed=seed,
        rank=rank,
        tap=reservation.tap,
        **params,
    )


def wake(
    model: esper.MorphableModel,
    layer: str,
    seed_idx: int,
    name: str = "bottleneck",
    *,
    alpha: float = 0.5,
    **params: Any,
) -> None:
    """Wake a seed whose weights are all away from zero: the library's own start gives a contribution of zero."""
    kernel = compiled_kernel(model, layer, name, **params)
    done = asyncio.run(model.load_kernel(layer, seed_idx, kernel, alpha=alpha))
    assert done, model.get_layer_stats(layer)["errors"]
    generator = torch.Generator().manual_seed(seed_idx)
    with torch.no_grad():
        for tensor in model.layer(layer).grafts.seed_tensors(seed_idx).values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor))
