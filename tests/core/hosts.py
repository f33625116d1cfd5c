"""Small networks, one or more for every kind of host, with inputs that suit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, the layer types to wrap, and its inputs."""

    name: str
    build: Callable[[], nn.Module]
    targets: tuple[type[nn.Module], ...]
    shapes: tuple[tuple[int, ...], ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    low_precision: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes)

    def __str__(self) -> str:
        return self.name


class Attention(nn.Module):
    """Self-attention called with keywords, as user code does."""

    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y, weights = self.attention(x, x, value=x, need_weights=self.need_weights, attn_mask=mask)
        assert (weights is not None) == self.need_weights
        return y if weights is None else y + weights.sum()


class Shared(nn.Module):
    """One Linear used at two places under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class ReadsWeights(nn.Module):
    """A tied decoder: the second use reads the weight and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.encode(x), self.encode.weight.t())


class Nested(nn.Module):
    """Layers in lists and dictionaries, positional and keyword arguments, a result that is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(2)]
        )
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Tensor]:
        for block in self.blocks:
            x = x + block["down"](input=torch.tanh(block["up"](x)))
        return {"y": x * self.scale + shift}


def _conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 8, 3, **options), nn.ReLU())


CASES: tuple[Case, ...] = (
    Case("linear", lambda: nn.Linear(10, 7), (nn.Linear,), ((5, 10),)),
    Case("linear-no-bias", lambda: nn.Sequential(nn.Linear(10, 7, bias=False)), (nn.Linear,), ((5, 10),)),
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 3)),
        (nn.Linear, nn.GELU),
        ((2, 5, 10),),
    ),
    *(
        Case(f"conv-{name}", _conv(**options), (nn.Conv2d, nn.ReLU), ((2, 4, 9, 11),))
        for name, options in {
            "plain": {},
            "stride": {"stride": (2, 1)},
            "dilation": {"dilation": 2},
            "groups": {"groups": 2},
            "no-bias": {"bias": False},
            "same": {"padding": "same"},
            "zeros": {"padding": 1},
            "reflect": {"padding": 1, "padding_mode": "reflect"},
            "replicate": {"padding": 1, "padding_mode": "replicate"},
            "circular": {"padding": 1, "padding_mode": "circular"},
        }.items()
    ),
    *(
        Case(
            f"activation-{name}",
            lambda module=module: nn.Sequential(nn.Linear(9, 9), module()),
            (nn.Linear, kind),
            ((6, 9),),
        )
        for name, module, kind in (
            ("relu", nn.ReLU, nn.ReLU),
            ("gelu", nn.GELU, nn.GELU),
            ("gelu-tanh", lambda: nn.GELU("tanh"), nn.GELU),
            ("tanh", nn.Tanh, nn.Tanh),
            ("sigmoid", nn.Sigmoid, nn.Sigmoid),
            ("relu-inplace", lambda: nn.ReLU(inplace=True), nn.ReLU),
        )
    ),
    Case("layernorm", lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (nn.LayerNorm, nn.Linear), ((3, 8),)),
    Case("layernorm-two-dims", lambda: nn.Sequential(nn.LayerNorm((4, 8))), (nn.LayerNorm,), ((3, 4, 8),)),
    Case("batchnorm1d", lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), (nn.BatchNorm1d,), ((8, 6),)),
    Case("batchnorm1d-length", lambda: nn.Sequential(nn.BatchNorm1d(6)), (nn.BatchNorm1d,), ((4, 6, 5),)),
    Case(
        "batchnorm2d",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
        (nn.Conv2d, nn.BatchNorm2d),
        ((4, 3, 7, 7),),
    ),
    Case("attention-batch-first", lambda: Attention(True, False), (nn.MultiheadAttention,), ((2, 5, 16),)),
    Case("attention-sequence-first", lambda: Attention(False, True), (nn.MultiheadAttention,), ((5, 2, 16),)),
    Case(
        "attention-masked",
        lambda: Attention(True, False),
        (nn.MultiheadAttention,),
        ((2, 5, 16),),
        {"mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)},
    ),
    Case("shared", Shared, (nn.Linear,), ((4, 12),)),
    Case("reads-weights", ReadsWeights, (nn.Linear,), ((4, 10),)),
    Case("nested", Nested, (nn.Linear,), ((4, 8),), {"shift": 0.5}),
    Case(
        "encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        (nn.Linear, nn.LayerNorm, nn.MultiheadAttention),
        ((2, 5, 16),),
    ),
)
BY_NAME = {case.name: case for case in CASES}
