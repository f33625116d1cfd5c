"""One bound seed: its kernel, its parameters, and whether it fits the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.contracts.errors import ShapeMismatchError
from esper.execution.hosts import ConvGeometry, HostSpec
from esper.ops.graft.layout import Place, chunk_span

if TYPE_CHECKING:
    from esper.blueprints.families import Family
    from esper.blueprints.ir import Blueprint, Node
    from esper.execution.kernel_executor import LoadedKernel

__all__ = ["BoundSeed", "SeedWeights", "bind_seed"]


class SeedWeights(nn.Module):
    """The parameters of one seed, named as its blueprint names them: ``<node>.weight`` and ``<node>.bias``.

    Args:
        tensors: Their values, which are copied.
        dtype: Of the parameters.
        device: Of the parameters.
        by_columns: Name of a matrix that lies in memory column by column. A bank wants ``up`` so, and a parameter must
            lie from the start as it will: what an optimizer keeps beside it is laid out like it when it is first
            stepped, and fused optimizers walk both from end to end.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, by_columns: str | None = None
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            node, _, kind = name.rpartition(".")
            if node not in self._modules:
                self.add_module(node, nn.Module())
            stride = (1, tensor.shape[0]) if name == by_columns else None
            own = _copy(tensor.detach(), dtype, device, stride)
            self._modules[node].register_parameter(kind, nn.Parameter(own))  # type: ignore[union-attr]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in place now; under ``functional_call`` these are the caller's."""
        return {
            f"{node}.{kind}": tensor
            for node, module in self._modules.items()
            if module is not None
            for kind, tensor in module._parameters.items()
            if tensor is not None
        }


def _copy(tensor: Tensor, dtype: torch.dtype, device: torch.device, stride: tuple[int, int] | None) -> Tensor:
    if stride is None:
        return tensor.to(device=device, dtype=dtype, copy=True)
    return torch.empty_strided(tensor.shape, stride, dtype=dtype, device=device).copy_(tensor)


@dataclass(frozen=True)
class BoundSeed:
    """What a layer needs to run one seed.

    Attributes:
        place: Where its contribution goes.
        artifact_id: What it was loaded from.
        blueprint: What it computes.
        family: What :func:`esper.blueprints.families.match` made of it.
        strided: Step of the 1x1 sampling of the tap, (1, 1) for none: how a seed that reads the input of a strided
        convolution
            gets an image of the output's size.
        pointwise: Whether each position of k depends on the same position of the tap alone.
    """

    place: Place
    artifact_id: str
    blueprint: Blueprint
    family: Family
    strided: tuple[int, int]
    pointwise: bool

    @property
    def reads_input(self) -> bool:
        """Whether the tap is the layer's input (else it is its output)."""
        return self.blueprint.tap == "input"


def bind_seed(seed_idx: int, kernel: LoadedKernel, spec: HostSpec, num_seeds: int) -> BoundSeed:
    """Check that a kernel fits a layer whose shape is known.

    Raises:
        ShapeMismatchError: it does not; the message names both shapes.
    """
    blueprint = kernel.blueprint
    assert spec.d_in is not None and spec.d_out is not None
    d_tap = spec.d_in if blueprint.tap == "input" else spec.d_out
    begin, end = (0, spec.d_out) if blueprint.scope == "layer" else chunk_span(seed_idx, num_seeds, spec.d_out)
    if end == begin:
        raise ShapeMismatchError(
            f"seed {seed_idx} has no features of its own: {spec.type_name} has {spec.d_out} for {num_seeds} seeds; "
            "a chunk-scoped kernel needs at least one"
        )
    if (kernel.d_in, kernel.d_out) != (d_tap, end - begin):
        of = "" if blueprint.scope == "layer" else f" (its chunk is features {begin} to {end - 1} of {spec.d_out})"
        raise ShapeMismatchError(
            f"kernel {kernel.artifact_id} maps {kernel.d_in} features to {kernel.d_out}, but seed {seed_idx} of this "
            f"{spec.type_name} needs {d_tap} to {end - begin}{of}, tap {blueprint.tap}",
            expected=(d_tap, end - begin),
            got=(kernel.d_in, kernel.d_out),
        )
    depthwise = [node for node in blueprint.order if node.op == "depthwise"]
    return BoundSeed(
        place=Place(seed_idx, begin, end, blueprint.mode == "replace"),
        artifact_id=kernel.artifact_id,
        blueprint=blueprint,
        family=kernel.family,
        strided=_sampling(kernel, spec, depthwise),
        pointwise=not depthwise,
    )


def _sampling(kernel: LoadedKernel, spec: HostSpec, depthwise: list[Node]) -> tuple[int, int]:
    """How the tap is sampled so that k has the output's size; see :attr:`BoundSeed.strided`."""
    images_only = [node.op for node in kernel.blueprint.order if node.op in ("depthwise", "pointwise")]
    if images_only and (spec.kind != "nchw" or not spec.images):
        why = "are the last dimension" if spec.kind != "nchw" else "lie in [N, C] or [N, C, L]"
        raise ShapeMismatchError(
            f"kernel {kernel.artifact_id} has a {images_only[0]} node, which needs images [N, C, H, W], "
            f"but the features of this {spec.type_name} {why}"
        )
    host = (1, 1), (0, 0)
    if spec.geometry is not None and kernel.blueprint.tap == "input":
        host = spec.geometry.stride, spec.geometry.excess
    own = (1, 1), (0, 0)
    for node in depthwise:
        walk = _walk(node)
        if own != ((1, 1), (0, 0)) and walk != ((1, 1), (0, 0)):
            raise ShapeMismatchError(f"kernel {kernel.artifact_id} changes the size of the image more than once")
        own = walk if walk != ((1, 1), (0, 0)) else own
    if own == host:
        return 1, 1
    if own == ((1, 1), (0, 0)) and host[1] == (0, 0):
        return host[0]
    raise ShapeMismatchError(
        f"kernel {kernel.artifact_id} gives images of another size than this {spec.type_name}: "
        f"stride {own[0]} and padding excess {own[1]}, but the layer needs stride {host[0]} and excess {host[1]} "
        f"(tap {kernel.blueprint.tap}; excess is padding less dilation * (kernel_size - 1)); "
        "give the kernel's depthwise node the layer's geometry, or read the output"
    )


def _walk(node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    kernel, stride, padding, dilation = (
        _pair(node.attrs[key]) for key in ("kernel_size", "stride", "padding", "dilation")
    )
    geometry = ConvGeometry(kernel, stride, (2 * padding[0], 2 * padding[1]), dilation)
    return geometry.stride, geometry.excess


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
