"""Grafts as plain modules: a host and its seeds as one ``torch.fx.GraphModule`` of ordinary torch layers.

A graph module carries its own code, so an exported network is scripted, saved and loaded by torch alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx import Node as FxNode
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from esper.blueprints.ir import Node
from esper.core.export_fold import ExportedSeed, computes_as

__all__ = ["graft_module", "grafted_host", "with_hooks"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
}

#: What ``nn.Module`` keeps of the hooks that run when it is called, and those of the gradients of such a call.
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


#: Forward pre-hooks that compute a weight from other parameters of the module they are given.
_MAKING_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)


def grafted_host(host: nn.Module, seeds: Sequence[ExportedSeed], host_factor: Tensor, channel_dim: int) -> GraphModule:
    """A module of one input in place of ``host``.

    A Linear's weight and bias stay where they were (``.weight``, ``.bias``); any other host stands under ``host``, and
    so does a Linear whose weight is computed from other parameters.

    Args:
        host: The layer; one that works in place does so no longer.
        seeds: Its seeds with a coefficient that is not zero.
        host_factor: float64 ``[features]``, what the host's output is multiplied by.
        channel_dim: Dimension of the features: -1, or 1 for NCHW.
    """
    root = nn.Module()
    graph = Graph()
    x = graph.placeholder("input")
    if isinstance(host, nn.Linear) and computes_as(host, nn.Linear):
        for kind in ("weight", "bias"):
            root.register_parameter(kind, host._parameters[kind])
        bias = None if host.bias is None else graph.get_attr("bias")
        h = graph.call_function(nn.functional.linear, (x, graph.get_attr("weight"), bias))
    else:
        if host.__dict__.get("inplace"):
            host.__dict__["inplace"] = False  # it would overwrite what its seeds are to read
        root.add_module("host", host)
        h = graph.call_module("host", (x,))
    images = channel_dim == 1 and not isinstance(host, nn.BatchNorm1d)
    writer = _Writer(root, graph, channel_dim, images)
    graph.output(writer.blend(x, h, seeds, host_factor))
    module = GraphModule(root, graph, class_name=f"Grafted{type(host).__name__}")
    if "host" not in root._modules and host.bias is None:
        module.register_parameter("bias", None)
    module.train(host.training)
    return module


def with_hooks(host: nn.Module, grafted: GraphModule) -> nn.Module:
    """``grafted`` with the hooks of the host it holds or stands for: around the blend, as in the wrapped model.

    A graph module loses its hooks when it is copied or saved, so they stand on an ``nn.Sequential`` around it. Hooks of
    torch's own that make the host's weight stay with the host. Without others the result is ``grafted`` itself.
    """
    making = {key for key, hook in host._forward_pre_hooks.items() if isinstance(hook, _MAKING_WEIGHTS)}
    moved = {table: [key for key in getattr(host, table) if key not in making] for table in _HOOK_TABLES}
    if not any(moved.values()):
        return grafted
    around = nn.Sequential(grafted)
    around.training = grafted.training
    for table, keys in moved.items():
        for key in keys:
            getattr(around, table)[key] = getattr(host, table).pop(key)
    around._is_full_backward_hook, host._is_full_backward_hook = host._is_full_backward_hook, None
    return around


def graft_module(seeds: Sequence[ExportedSeed], host_factor: Tensor) -> GraphModule:
    """A module of two inputs, what the host read and what it gave, for hosts that have to stay as they are."""
    root = nn.Module()
    graph = Graph()
    x, h = graph.placeholder("x"), graph.placeholder("h")
    graph.output(_Writer(root, graph, -1, False).blend(x, h, seeds, host_factor))
    return GraphModule(root, graph, class_name="Graft")


class _Writer:
    """Writes seeds into a graph, their weights into its root module."""

    def __init__(self, root: nn.Module, graph: Graph, channel_dim: int, images: bool) -> None:
        self.root = root
        self.graph = graph
        self.channel_dim = channel_dim
        self.images = images

    def blend(self, x: FxNode, h: FxNode, seeds: Sequence[ExportedSeed], host_factor: Tensor) -> FxNode:
        """``host_factor * h + sum of coefficient * k`` over the seeds."""
        features = len(host_factor)
        dtype_of = next(iter(seeds[0].tensors.values())) if seeds[0].tensors else torch.zeros(())
        total: FxNode | None = None
        if bool((host_factor != 0.0).any()):
            total = self._scaled(h, host_factor, "host_factor", dtype_of)
        for number, seed in enumerate(seeds):
            k = self._seed(f"seed{number}", seed, x if seed.reads_input else h)
            k = self._scaled(k, seed.coefficient, f"seed{number}_coefficient", dtype_of)
            k = self._padded(k, seed.begin, features - seed.end)
            total = k if total is None else self.graph.call_function(operator.add, (total, k))
        assert total is not None
        return total

    def _seed(self, prefix: str, seed: ExportedSeed, tap: FxNode) -> FxNode:
        if seed.strided != (1, 1):
            index: Any = (Ellipsis, slice(None, None, seed.strided[0]), slice(None, None, seed.strided[1]))
            tap = self.graph.call_function(operator.getitem, (tap, index))
        made: dict[str, FxNode] = {}
        for node in seed.blueprint.order:
            inputs = [made[name] for name in node.inputs]
            made[node.name] = tap if node.op == "input" else self._node(f"{prefix}_{node.name}", node, inputs, seed)
        return made[seed.blueprint.order[-1].name]

    def _node(self, name: str, node: Node, inputs: Sequence[FxNode], seed: ExportedSeed) -> FxNode:
        v = inputs[0]
        weight = seed.tensors.get(f"{node.name}.weight")
        bias = seed.tensors.get(f"{node.name}.bias")
        if node.op == "output":
            return v
        if node.op in ("add", "mul"):
            return self.graph.call_function(getattr(operator, node.op), tuple(inputs))
        if node.op == "activation":
            kind = node.attrs["kind"]
            return self._call(name, nn.GELU("tanh") if kind == "gelu_tanh" else _ACTIVATIONS[kind](), v)
        if node.op == "scale":
            assert weight is not None
            return self._per_feature(name, operator.mul, v, weight)
        if node.op == "shift":
            assert bias is not None
            return self._per_feature(name, operator.add, v, bias)
        if node.op == "norm":
            return self._norm(name, node, v, seed)
        assert weight is not None
        if node.op == "depthwise":
            channels = weight.shape[0]
            geometry = {key: node.attrs[key] for key in ("kernel_size", "stride", "padding", "dilation")}
            layer: nn.Module = nn.Conv2d(channels, channels, groups=channels, bias=bias is not None, **geometry)
            return self._call(name, _with(layer, weight[:, None], bias), v)
        if self.images:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
            return self._call(name, _with(layer, weight[:, :, None, None], bias), v)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        return self._features_last(v, lambda moved: self._call(name, _with(layer, weight, bias), moved))

    def _norm(self, name: str, node: Node, v: FxNode, seed: ExportedSeed) -> FxNode:
        width = seed.widths[node.name]
        kind = nn.LayerNorm if node.attrs["kind"] == "layernorm" else nn.RMSNorm
        layer = kind(width, eps=node.attrs["eps"], elementwise_affine=False)
        return self._features_last(v, lambda moved: self._call(name, layer, moved))

    def _call(self, name: str, layer: nn.Module, v: FxNode) -> FxNode:
        self.root.add_module(name, layer)
        return self.graph.call_module(name, (v,))

    def _features_last(self, v: FxNode, write: Callable[[FxNode], FxNode]) -> FxNode:
        """What ``write`` makes of ``v`` with its features in the last dimension, moved back."""
        if self.channel_dim == -1:
            return write(v)
        moved = self.graph.call_method("movedim", (v, self.channel_dim, -1))
        return self.graph.call_method("movedim", (write(moved), -1, self.channel_dim))

    def _per_feature(self, name: str, operation: Callable[..., Any], v: FxNode, values: Tensor) -> FxNode:
        shaped = values.detach().clone()
        if self.images:
            shaped = shaped[:, None, None]
        self.root.register_parameter(name, nn.Parameter(shaped, requires_grad=values.requires_grad))
        if self.images:
            return self.graph.call_function(operation, (v, self.graph.get_attr(name)))
        return self._features_last(v, lambda m: self.graph.call_function(operation, (m, self.graph.get_attr(name))))

    def _scaled(self, v: FxNode, factors: Tensor, name: str, like: Tensor) -> FxNode:
        """``v`` times ``factors`` (``[features of v]``): a number where they are all equal, else a buffer."""
        first = float(factors[0])
        if bool((factors == first).all()):
            return v if first == 1.0 else self.graph.call_function(operator.mul, (v, first))
        shaped = factors.to(device=like.device, dtype=like.dtype)
        self.root.register_buffer(name, shaped[:, None, None] if self.images else shaped)
        if self.images:
            return self.graph.call_function(operator.mul, (v, self.graph.get_attr(name)))
        return self._features_last(v, lambda m: self.graph.call_function(operator.mul, (m, self.graph.get_attr(name))))

    def _padded(self, v: FxNode, before: int, after: int) -> FxNode:
        """``v`` with zeros for the features that a chunk leaves alone."""
        if before == after == 0:
            return v
        pad = nn.functional.pad
        if self.images:
            return self.graph.call_function(pad, (v, (0, 0, 0, 0, before, after)))
        return self._features_last(v, lambda moved: self.graph.call_function(pad, (moved, (before, after))))


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """``layer`` with copies of these weights, of their dtype, on their device."""
    layer.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad))
    return layer
