"""Every layer with seeds beside the torch layer it stands in for, and a way to wake one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper import nn as enn
from esper.artifacts.artifact import Artifact
from esper.execution.kernel_executor import LoadedKernel
from esper.services.tezzeret.forge import build


@dataclass(frozen=True)
class Case:
    """A pair of layers, their common arguments, and an input."""

    name: str
    seeded: type[enn.Seeded]
    plain: type[nn.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[enn.Seeded, nn.Module]:
        """Both layers, drawn from the same random numbers."""
        layers = []
        for kind in (self.seeded, self.plain):
            torch.manual_seed(3)
            layers.append(kind(*self.args, **self.options).to(dtype))
        return layers[0], layers[1]

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(dtype)


CASES = (
    Case("linear", enn.SeededLinear, nn.Linear, (7, 5), (3, 7)),
    Case("linear-no-bias", enn.SeededLinear, nn.Linear, (7, 5, False), (2, 3, 7)),
    Case("linear-empty", enn.SeededLinear, nn.Linear, (7, 5), (0, 7)),
    Case("conv", enn.SeededConv2d, nn.Conv2d, (3, 6, 3), (2, 3, 7, 9)),
    Case(
        "conv-options",
        enn.SeededConv2d,
        nn.Conv2d,
        (4, 6, (3, 1), (2, 1)),
        (2, 4, 9, 5),
        {"padding": (1, 0), "groups": 2, "bias": False, "padding_mode": "reflect"},
    ),
    Case("relu", enn.SeededReLU, nn.ReLU, (), (3, 5)),
    Case("relu-in-place", enn.SeededReLU, nn.ReLU, (True,), (2, 4, 3, 3)),
    Case("gelu", enn.SeededGELU, nn.GELU, (), (1, 1, 5)),
    Case("gelu-tanh", enn.SeededGELU, nn.GELU, ("tanh",), (4, 5)),
    Case("tanh", enn.SeededTanh, nn.Tanh, (), (5,)),
    Case("sigmoid", enn.SeededSigmoid, nn.Sigmoid, (), (2, 3, 4)),
    Case("layernorm", enn.SeededLayerNorm, nn.LayerNorm, (6,), (3, 6)),
    Case(
        "layernorm-options",
        enn.SeededLayerNorm,
        nn.LayerNorm,
        ((2, 6), 1e-3),
        (3, 2, 6),
        {"bias": False},
    ),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kernel(blueprint: str, d_in: int, d_out: int, *, seed: int = 0, **options: Any) -> LoadedKernel:
    """A kernel as the registry would give it."""
    return LoadedKernel.from_artifact(Artifact.open(build(blueprint, d_in=d_in, d_out=d_out, seed=seed, **options)))


def wake(layer: enn.Seeded, seed_idx: int, found: LoadedKernel, alpha: float = 0.5) -> None:
    """Wake a seed with weights that are not zero."""
    assert layer.seeds.commit(seed_idx, found, alpha=alpha), layer.get_layer_stats()["errors"]
    generator = torch.Generator().manual_seed(50 + seed_idx)
    with torch.no_grad():
        for parameter in layer.seeds.grafts.seed_parameters(seed_idx).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern: unlike ``==`` it tells -0.0 from 0.0 and lets NaN equal itself."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(views[tensor.element_size()])


def registry_url(folder: Path) -> str:
    return (folder / "registry").as_uri()
