"""The networks and inputs that benchmarks share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A network and a batch for it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def make(self) -> tuple[nn.Module, Tensor]:
        """The network and one batch, the same at every call, on the GPU where there is one."""
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.build().to(device), torch.randn(self.shape).to(device)


def mlp(width: int) -> nn.Module:
    """6 x [Linear(width), GELU]."""
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))


def cnn() -> nn.Module:
    """A small convolutional classifier for 3 x 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


def encoder() -> nn.Module:
    """A transformer encoder of four layers, width 64, without dropout (so that every forward is the same work)."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), 4)


WORKLOADS = (
    Workload("mlp-64x8", lambda: mlp(64), (8, 64)),
    Workload("mlp-256x32", lambda: mlp(256), (32, 256)),
    Workload("mlp-1024x64", lambda: mlp(1024), (64, 1024)),
    Workload("cnn-8", cnn, (8, 3, 32, 32)),
    Workload("encoder-4x16", encoder, (4, 16, 64)),
)


def same_weights(network: nn.Module) -> nn.Module:
    """A second network over the same parameters: two copies differ by some 0.3 % through their addresses alone."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo=shared)  # type: ignore[arg-type]


class Composed(nn.Module):
    """A Linear and its low-rank additions as one would write them, the alphas plain numbers."""

    def __init__(self, linear: nn.Linear, seeds: int, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.ModuleList(nn.Linear(linear.in_features, rank, bias=False) for _ in range(seeds))
        self.up = nn.ModuleList(nn.Linear(rank, linear.out_features, bias=False) for _ in range(seeds))
        self.alpha = [0.5] * seeds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        for alpha, down, up in zip(self.alpha, self.down, self.up, strict=True):
            y = y + alpha * up(down(x))
        return y


def composed(network: nn.Module, seeds: int, rank: int) -> nn.Module:
    """The network over the same parameters with such additions on each of its Linears."""
    grown = same_weights(network)
    for name, module in list(grown.named_children()):
        if isinstance(module, nn.Linear):
            setattr(grown, name, Composed(module, seeds, rank))
    return grown
