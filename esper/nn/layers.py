"""Layers of ``torch.nn`` that bring their own seeds.

Each takes what its torch layer takes, and by keyword:

    num_seeds: Seeds, each watching its share of the output's features.
    layer_name: Name in statistics, messages and errors; the class's by default.
    kernel_cache: Where kernels come from; by default one cache that all such layers of the process share, over
        ``ESPER_REGISTRY`` or the user's own registry folder.

and raises ``ValueError`` for fewer than one seed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from esper.execution.kernel_cache import KernelCache
from esper.nn.seeded import Seeded

__all__ = [
    "SeededConv2d",
    "SeededGELU",
    "SeededLayerNorm",
    "SeededLinear",
    "SeededReLU",
    "SeededSigmoid",
    "SeededTanh",
]

_Pair = int | tuple[int, int]


class SeededLinear(Seeded, nn.Linear):
    """``nn.Linear`` with seeds: ``[..., in_features]`` to ``[..., out_features]``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_seeds: int = 4,
        layer_name: str | None = None,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededConv2d(Seeded, nn.Conv2d):
    """``nn.Conv2d`` with seeds: ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: str | _Pair = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_seeds: int = 4,
        layer_name: str | None = None,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededReLU(Seeded, nn.ReLU):
    """``nn.ReLU`` with seeds; the first input decides where the features are, see ``describe_host``."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        num_seeds: int = 4,
        layer_name: str | None = None,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        super().__init__(inplace)
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededGELU(Seeded, nn.GELU):
    """``nn.GELU`` with seeds; the first input decides where the features are, see ``describe_host``."""

    def __init__(
        self,
        approximate: str = "none",
        *,
        num_seeds: int = 4,
        layer_name: str | None = None,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        super().__init__(approximate)
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededTanh(Seeded, nn.Tanh):
    """``nn.Tanh`` with seeds; the first input decides where the features are, see ``describe_host``."""

    def __init__(
        self, *, num_seeds: int = 4, layer_name: str | None = None, kernel_cache: KernelCache | None = None
    ) -> None:
        super().__init__()
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededSigmoid(Seeded, nn.Sigmoid):
    """``nn.Sigmoid`` with seeds; the first input decides where the features are, see ``describe_host``."""

    def __init__(
        self, *, num_seeds: int = 4, layer_name: str | None = None, kernel_cache: KernelCache | None = None
    ) -> None:
        super().__init__()
        self._plant(num_seeds, layer_name, kernel_cache)


class SeededLayerNorm(Seeded, nn.LayerNorm):
    """``nn.LayerNorm`` with seeds: ``[..., *normalized_shape]`` to the same; features are the last dimension."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_seeds: int = 4,
        layer_name: str | None = None,
        kernel_cache: KernelCache | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._plant(num_seeds, layer_name, kernel_cache)
