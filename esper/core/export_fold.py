"""Folding grafts into their hosts: where a seed is a linear map, it and the host are one layer again.

With ``k(v) = K v + q``, coefficient ``c`` and host factor ``a`` (both per feature), a host ``h = W x + b`` gives

    tap input:   y = (a W + c K) x + (a b + c q)
    tap output:  y = M (W x) + M b + c q,   M = diag(a) + diag(c) K

All products are formed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from esper.blueprints import interpret
from esper.blueprints.ir import Blueprint

__all__ = ["ExportedSeed", "computes_as", "fold", "is_linear"]

#: What a host that is folded into multiplies by and adds.
_WEIGHTS = ("weight", "bias")

_LINEAR_OPS = frozenset({"input", "output", "linear", "pointwise", "scale", "shift", "add"})


@dataclass(frozen=True)
class ExportedSeed:
    """One awake seed, with its alpha turned into a constant.

    Attributes:
        blueprint: What it computes.
        tensors: Its weights by the blueprint's names.
        widths: Features of each node's result, by node.
        begin: First feature it changes.
        end: One past the last.
        coefficient: float64 ``[end - begin]``.
        strided: Step of the sampling of its tap.
    """

    blueprint: Blueprint
    tensors: Mapping[str, Tensor]
    widths: Mapping[str, int]
    begin: int
    end: int
    coefficient: Tensor
    strided: tuple[int, int]

    @property
    def reads_input(self) -> bool:
        """Whether the tap is the layer's input."""
        return self.blueprint.tap == "input"

    @property
    def tap_width(self) -> int:
        """Features of the tap."""
        return self.widths[self.blueprint.order[0].name]


def is_linear(blueprint: Blueprint) -> bool:
    """Whether ``k`` is an affine map of each position's features."""
    return all(node.op in _LINEAR_OPS for node in blueprint.order)


def fold(host: nn.Module, seeds: Sequence[ExportedSeed], host_factor: Tensor) -> bool:
    """Work ``seeds`` into ``host``'s own weights, if the algebra allows it for every one of them.

    Args:
        host: Changed in place when the result is True.
        seeds: All seeds of the layer whose coefficient is not zero.
        host_factor: float64 ``[features]``, what the host's output is multiplied by.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    if not all(is_linear(seed.blueprint) for seed in seeds):
        return False
    if isinstance(host, nn.Linear) and computes_as(host, nn.Linear):
        return _fold_linear(host, seeds, host_factor)
    if isinstance(host, nn.Conv2d) and computes_as(host, nn.Conv2d):
        return _fold_conv(host, seeds, host_factor)
    for kind in (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d):
        if isinstance(host, kind) and computes_as(host, kind):
            return _fold_affine(host, seeds, host_factor)
    return False


def computes_as(host: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``host`` is a ``kind`` whose forward nobody has replaced: only then its weights say what it computes.

    Nor may they be computed from other parameters: parametrized, pruned, normed by a hook. Such a weight is made anew
    for every call, and what is written into it is lost.
    """
    if not isinstance(host, kind) or type(host).forward is not kind.forward or "forward" in host.__dict__:
        return False
    return not is_parametrized(host) and all(name in host._parameters for name in _WEIGHTS if hasattr(host, name))


def _fold_linear(host: nn.Linear, seeds: Sequence[ExportedSeed], host_factor: Tensor) -> bool:
    mixing, offset = _on_output(seeds, host_factor)
    weight = mixing @ host.weight.detach().double().cpu()
    for seed in seeds:
        if seed.reads_input:
            matrix, _ = _affine(seed)
            weight[seed.begin : seed.end] += seed.coefficient[:, None] * matrix
    _store(host, weight, mixing, offset)
    return True


def _fold_conv(host: nn.Conv2d, seeds: Sequence[ExportedSeed], host_factor: Tensor) -> bool:
    mixing, offset = _on_output(seeds, host_factor)
    if host.groups > 1 and (any(seed.reads_input for seed in seeds) or not _is_diagonal(mixing)):
        return False
    row, column = _own_pixel(host) or (-1, -1)
    if any(seed.reads_input for seed in seeds) and row < 0:
        return False
    weight = torch.einsum("om,mikl->oikl", mixing, host.weight.detach().double().cpu())
    for seed in seeds:
        if seed.reads_input:
            matrix, _ = _affine(seed)
            weight[seed.begin : seed.end, :, row, column] += seed.coefficient[:, None] * matrix
    _store(host, weight, mixing, offset)
    return True


def _fold_affine(
    host: nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d, seeds: Sequence[ExportedSeed], host_factor: Tensor
) -> bool:
    # A norm's own weights act per feature, so only seeds that do the same can be folded into them.
    if any(seed.reads_input for seed in seeds) or host.weight is None or host.weight.dim() != 1:
        return False
    mixing, offset = _on_output(seeds, host_factor)
    if not _is_diagonal(mixing):
        return False
    _store(host, mixing.diagonal() * host.weight.detach().double().cpu(), mixing, offset)
    return True


def _on_output(seeds: Sequence[ExportedSeed], host_factor: Tensor) -> tuple[Tensor, Tensor]:
    """``M`` ``[features, features]`` over the host's output, and the sum of all constant terms ``[features]``."""
    features = len(host_factor)
    mixing = torch.diag(host_factor.double())
    offset = torch.zeros(features, dtype=torch.float64)
    for seed in seeds:
        rows = slice(seed.begin, seed.end)
        matrix, constant = _affine(seed)
        offset[rows] += seed.coefficient * constant
        if not seed.reads_input:
            mixing[rows] += seed.coefficient[:, None] * matrix
    return mixing, offset


def _affine(seed: ExportedSeed) -> tuple[Tensor, Tensor]:
    """``K`` ``[end - begin, tap width]`` and ``q`` ``[end - begin]`` of ``k(v) = K v + q``, in float64."""
    tensors = {name: tensor.detach().double().cpu() for name, tensor in seed.tensors.items()}
    # Without its constants k is linear, and its columns are what it makes of the unit vectors: nothing cancels.
    bare = {name: torch.zeros_like(t) if name.endswith(".bias") else t for name, t in tensors.items()}
    width = seed.tap_width
    identity = torch.eye(width, dtype=torch.float64)
    matrix = _run(seed.blueprint, bare, identity).t()
    constant = _run(seed.blueprint, tensors, torch.zeros(1, width, dtype=torch.float64))[0]
    return matrix, constant


def _run(blueprint: Blueprint, tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """``k`` of each row; as an image of one pixel where the blueprint insists on images."""
    if any(node.op == "pointwise" for node in blueprint.order):
        return interpret.run(blueprint, tensors, rows[:, :, None, None], channel_dim=1)[:, :, 0, 0]
    return interpret.run(blueprint, tensors, rows)


def _is_diagonal(matrix: Tensor) -> bool:
    return bool((matrix == torch.diag(matrix.diagonal())).all())


def _own_pixel(host: nn.Conv2d) -> tuple[int, int] | None:
    """The tap of ``host``'s kernel that reads the pixel that a 1x1 kernel of its stride would; None if none does."""
    padding: tuple[int, ...] = (0, 0)  # of "valid"
    if host.padding == "same":
        if any((d * (k - 1)) % 2 for d, k in zip(host.dilation, host.kernel_size, strict=True)):
            return None
        padding = tuple(d * (k - 1) // 2 for d, k in zip(host.dilation, host.kernel_size, strict=True))
    elif not isinstance(host.padding, str):
        padding = tuple(host.padding)
    where = []
    for kernel, pad, dilation in zip(host.kernel_size, padding, host.dilation, strict=True):
        index, rest = divmod(pad, dilation)
        if rest or index >= kernel:
            return None
        where.append(index)
    return where[0], where[1]


def _store(host: nn.Module, weight: Tensor, mixing: Tensor, offset: Tensor) -> None:
    """Write the folded weight, and the folded bias (made where there was none and one is needed)."""
    old: Any = host._parameters["weight"]
    bias = host._parameters["bias"]
    constant = offset if bias is None else mixing @ bias.detach().double().cpu() + offset
    with torch.no_grad():
        old.copy_(weight)
        if bias is not None:
            bias.copy_(constant)
        elif bool(constant.any()):
            made = constant.to(device=old.device, dtype=old.dtype)
            host.bias = nn.Parameter(made, requires_grad=old.requires_grad)
