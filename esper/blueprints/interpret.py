"""Run a blueprint node by node on PyTorch operations.

This is the oracle that every fused family is tested against, and the executor of blueprints that belong to none. It is
differentiable to any order, works on every floating dtype and device, never synchronises, and traces under
``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from esper.blueprints.ir import Blueprint, Node
from esper.contracts.errors import BlueprintError, BlueprintShapeError

__all__ = ["activate", "normalise", "run"]

_CONVOLUTIONS: Mapping[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(
    blueprint: Blueprint, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, *, channel_dim: int = -1
) -> torch.Tensor:
    """The sub-network's result ``k(x)``.

    Args:
        blueprint: What to run.
        tensors: Its weights by name, ``<node>.weight`` and ``<node>.bias``, of ``x``'s dtype and device, shaped as
            ``validate(...).tensors`` says. Names the blueprint does not know are ignored.
        x: The tap: any number of dimensions, ``d_in`` features along ``channel_dim``.
        channel_dim: Where the features are: -1 for row-major tensors, 1 for [N, C, H, W] (-3 takes unbatched images
            too).

    Returns:
        ``k``, with ``d_out`` features along ``channel_dim`` and, unless a depthwise node has changed the image's size,
        the other dimensions of ``x``.

    Raises:
        BlueprintError: where a tensor is missing; it names the node.
        BlueprintShapeError: where the features of ``x`` are not those of the first weights, or ``x`` is no image but a
            depthwise or pointwise node needs one.
    """
    dim = channel_dim % x.dim()
    values: dict[str, torch.Tensor] = {}
    for node in blueprint.order:
        values[node.name] = (
            x if node.op == "input" else _apply(node, [values[name] for name in node.inputs], tensors, dim)
        )
    return values[blueprint.order[-1].name]


def activate(kind: str, x: torch.Tensor) -> torch.Tensor:
    """One of :data:`esper.blueprints.nodes.ACTIVATIONS`, elementwise."""
    if kind == "relu":
        return torch.relu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "tanh":
        return torch.tanh(x)
    if kind == "sigmoid":
        return torch.sigmoid(x)
    if kind == "silu":
        return F.silu(x)
    raise BlueprintError(f"unknown activation {kind!r}")


def normalise(kind: str, x: torch.Tensor, eps: float, dim: int = -1) -> torch.Tensor:
    """Layer norm or RMS norm over dimension ``dim``, without weight and bias.

    ``layernorm``: ``(x - mean) / sqrt(variance + eps)``, population variance (Ba et al. 2016, "Layer Normalization").
    ``rmsnorm``: ``x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").
    """
    moved = x.movedim(dim, -1)
    shape = (moved.shape[-1],)
    if kind == "layernorm":
        return F.layer_norm(moved, shape, None, None, eps).movedim(-1, dim)
    if kind == "rmsnorm":
        return F.rms_norm(moved, shape, None, eps).movedim(-1, dim)
    raise BlueprintError(f"unknown norm {kind!r}")


def _apply(node: Node, inputs: list[torch.Tensor], tensors: Mapping[str, torch.Tensor], dim: int) -> torch.Tensor:
    x = inputs[0]
    if node.op == "output":
        return x
    if node.op == "add":
        return x + inputs[1]
    if node.op == "mul":
        return x * inputs[1]
    if node.op == "activation":
        return activate(node.attrs["kind"], x)
    if node.op == "norm":
        return normalise(node.attrs["kind"], x, node.attrs["eps"], dim)
    if node.op == "scale":
        return x * _per_feature(node, _tensor(node, "weight", tensors), x, dim)
    if node.op == "shift":
        return x + _per_feature(node, _tensor(node, "bias", tensors), x, dim)
    weight = _tensor(node, "weight", tensors)
    bias = _tensor(node, "bias", tensors) if node.attrs["bias"] else None
    if node.op == "depthwise":
        return _depthwise(node, x, weight, bias, dim)
    return _linear(node, x, weight, bias, dim)


def _linear(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dim: int) -> torch.Tensor:
    _check_features(node, x, weight.shape[1], dim)
    if node.op == "pointwise":
        _check_image(node, x, dim)
    spatial = x.dim() - 1 - dim
    if spatial == 0:
        return F.linear(x, weight, bias)
    if dim <= 1 and spatial in _CONVOLUTIONS:  # with the batch dimension or without, as the convolutions take it
        return _CONVOLUTIONS[spatial](x, weight.reshape(*weight.shape, *(1 for _ in range(spatial))), bias)
    return F.linear(x.movedim(dim, -1), weight, bias).movedim(-1, dim)


def _depthwise(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dim: int) -> torch.Tensor:
    _check_image(node, x, dim)
    _check_features(node, x, weight.shape[0], dim)
    attrs = node.attrs
    return F.conv2d(
        x,
        weight.unsqueeze(1),
        bias,
        stride=attrs["stride"],
        padding=attrs["padding"],
        dilation=attrs["dilation"],
        groups=weight.shape[0],
    )


def _per_feature(node: Node, vector: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """``vector`` shaped so that it multiplies or adds along ``dim``."""
    _check_features(node, x, vector.shape[0], dim)
    return vector.reshape(-1, *(1 for _ in range(x.dim() - 1 - dim)))


def _check_features(node: Node, x: torch.Tensor, features: int, dim: int) -> None:
    # Without this check a vector of one feature, or a tensor with one, would broadcast in silence.
    if x.shape[dim] != features:
        raise BlueprintShapeError(
            f"its weights take {features} features, but dimension {dim} of {tuple(x.shape)} has {x.shape[dim]}",
            node=node.name,
            expected=(features,),
            got=(x.shape[dim],),
        )


def _check_image(node: Node, x: torch.Tensor, dim: int) -> None:
    if dim > 1 or x.dim() - 1 - dim != 2:
        raise BlueprintShapeError(
            f"{node.op} needs [N, C, H, W] or [C, H, W], but got {tuple(x.shape)} with features in dimension {dim}",
            node=node.name,
            got=tuple(x.shape),
        )


def _tensor(node: Node, role: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = f"{node.name}.{role}"
    if name not in tensors:
        raise BlueprintError(f"tensor {name!r} is missing", node=node.name)
    return tensors[name]
