"""What Esper knows of a host layer: where its features are, how many, and how its output lies over its input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = [
    "SUPPORTED_HOSTS",
    "ConvGeometry",
    "HostSpec",
    "describe_host",
    "device_of",
    "foreign_linear",
    "supported_hosts",
]

#: Layers that any shape passes through; their features are known at the first forward.
_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-D convolution walks over its input; every pair is (height, width).

    Attributes:
        kernel_size: Taps of the kernel.
        stride: Step between two outputs.
        padding: Total padding, both sides together, in pixels.
        dilation: Distance between two taps.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def excess(self) -> tuple[int, int]:
        """What the padding adds beyond what the kernel takes away: 0 keeps the size at stride 1.

        The output has ``floor((in + excess - 1) / stride) + 1`` pixels, so two convolutions agree on the output size of
        every input exactly when stride and excess agree.
        """
        (ph, pw), (kh, kw), (dh, dw) = self.padding, self.kernel_size, self.dilation
        return ph - dh * (kh - 1), pw - dw * (kw - 1)

    @property
    def pointwise_matches(self) -> bool:
        """Whether a 1x1 convolution with this stride gives an output of the host's size, for every input."""
        return self.excess == (0, 0)


@dataclass(frozen=True)
class HostSpec:
    """A host layer as the grafts see it.

    Attributes:
        type_name: Class of the host, for messages.
        kind: ``rows`` (features last) or ``nchw`` (features in dimension 1); None while unknown.
        d_in: Features of the input; None while unknown.
        d_out: Features of the output; None while unknown.
        geometry: Of a convolution; None for every other host.
        dtype: Of the host's parameters; None if it has none.
        images: Whether what a ``nchw`` host reads can be an image: BatchNorm1d reads [N, C] or [N, C, L].
    """

    type_name: str
    kind: Literal["rows", "nchw"] | None
    d_in: int | None
    d_out: int | None
    geometry: ConvGeometry | None = None
    dtype: torch.dtype | None = None
    images: bool = True

    @property
    def channel_dim(self) -> int:
        """Dimension of the features in input and output: 1 for ``nchw``, else -1."""
        return 1 if self.kind == "nchw" else -1

    @property
    def is_resolved(self) -> bool:
        """Whether kind and sizes are all known."""
        return self.kind is not None and self.d_in is not None and self.d_out is not None

    def resolve(self, shape: tuple[int, ...]) -> HostSpec:
        """The spec with what was unknown filled in from the shape of the host's output.

        An activation has no shape of its own: four dimensions are taken for an image [N, C, H, W], everything else for
        rows. What is known already stays, so the first shape seen decides for good; a single number, which has no
        features, decides nothing.
        """
        if self.is_resolved or not shape:
            return self
        kind = self.kind if self.kind is not None else ("nchw" if len(shape) == 4 else "rows")
        features = int(shape[1] if kind == "nchw" else shape[-1])  # a tracer may have tensors or symbols there
        return replace(
            self,
            kind=kind,
            d_in=features if self.d_in is None else self.d_in,
            d_out=features if self.d_out is None else self.d_out,
        )


def describe_host(module: nn.Module) -> HostSpec:
    """Describe a layer that can carry seeds.

    ============================ =========== ==================================================
    host                         features    size
    ============================ =========== ==================================================
    Linear                       last        ``in_features``, ``out_features``
    Conv2d                       dimension 1 ``in_channels``, ``out_channels``
    BatchNorm1d (NC or NCL), 2d  dimension 1 ``num_features``
    LayerNorm                    last        last of ``normalized_shape``
    MultiheadAttention           last        ``embed_dim``: x is the query, h the first output
    Conv1D of transformers       last        ``nx``, ``nf``: a Linear whose weight lies transposed (GPT-2)
    ReLU, GELU, Tanh, Sigmoid    see below   those of the first input
    ============================ =========== ==================================================

    The features of an activation are dimension 1 for a 4-D input and the last one otherwise, decided by the first
    input.

    Args:
        module: The layer; subclasses count as their base, also with a forward of their own, of which the first argument
            is x, and the result, or the first of a tuple, h.

    Returns:
        Its spec; :meth:`HostSpec.resolve` completes that of an activation.

    Raises:
        NotImplementedError: for every other type; the message names it.
        ValueError: a lazy layer that has seen no batch yet, and so has no sizes.
    """
    name = type(module).__name__
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"{module} has no sizes before its first batch, so no kernel could fit it: call the network with one "
            "batch, then wrap it"
        )
    for kind, describe in _DESCRIBE:
        if isinstance(module, kind):
            dtype = next((p.dtype for p in module.parameters()), None)
            return replace(describe(module, name), dtype=dtype)
    if isinstance(module, _ACTIVATIONS):
        return HostSpec(name, None, None, None)
    if isinstance(module, foreign_linear()):
        conv1d: Any = module
        return HostSpec(name, "rows", conv1d.nx, conv1d.nf, dtype=conv1d.weight.dtype)
    supported = ", ".join(kind.__name__ for kind in supported_hosts())
    raise NotImplementedError(f"{name} cannot carry seeds; supported layers: {supported}")


def foreign_linear() -> tuple[type[nn.Module], ...]:
    """Linear layers of other libraries, as far as these are loaded: the ``Conv1D`` of ``transformers``.

    Nothing is imported for it: a network with such a layer has loaded its library.
    """
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (conv1d,) if isinstance(conv1d, type) and issubclass(conv1d, nn.Module) else ()


def supported_hosts() -> tuple[type[nn.Module], ...]:
    """Every type that :func:`describe_host` takes now: :data:`SUPPORTED_HOSTS` and :func:`foreign_linear`."""
    return (*SUPPORTED_HOSTS, *foreign_linear())


def _linear(module: nn.Linear, name: str) -> HostSpec:
    return HostSpec(name, "rows", module.in_features, module.out_features)


def _conv(module: nn.Conv2d, name: str) -> HostSpec:
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    if module.padding == "valid":
        padding = (0, 0)
    elif module.padding == "same":
        padding = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
    else:
        one_side = _pair(module.padding)  # type: ignore[arg-type]
        padding = (2 * one_side[0], 2 * one_side[1])
    return HostSpec(
        name, "nchw", module.in_channels, module.out_channels, ConvGeometry(kernel, stride, padding, dilation)
    )


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> HostSpec:
    images = not isinstance(module, nn.BatchNorm1d)
    return HostSpec(name, "nchw", module.num_features, module.num_features, images=images)


def _layer_norm(module: nn.LayerNorm, name: str) -> HostSpec:
    features = int(module.normalized_shape[-1])
    return HostSpec(name, "rows", features, features)


def _attention(module: nn.MultiheadAttention, name: str) -> HostSpec:
    return HostSpec(name, "rows", module.embed_dim, module.embed_dim)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


_DESCRIBE: tuple[tuple[type[nn.Module], Callable[..., HostSpec]], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv),
    (nn.BatchNorm1d, _batch_norm),
    (nn.BatchNorm2d, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.MultiheadAttention, _attention),
)

#: The types of PyTorch that :func:`describe_host` takes.
SUPPORTED_HOSTS: tuple[type[nn.Module], ...] = (*(kind for kind, _ in _DESCRIBE), *_ACTIVATIONS)


def device_of(host: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU for one without any."""
    for tensor in (*host.parameters(), *host.buffers()):
        return tensor.device
    return torch.device("cpu")
