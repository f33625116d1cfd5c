"""``esper.export``: a grown network as plain modules, without Esper on its path.

Seeds that are linear maps are folded into their host's own weights; every other host with awake seeds becomes a
``torch.fx.GraphModule`` of ordinary layers. Alphas are constants from then on.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from esper.blueprints.validation import validate
from esper.contracts.errors import EsperError
from esper.core.export_fold import ExportedSeed, computes_as, fold
from esper.core.export_graph import graft_module, grafted_host, with_hooks
from esper.core.model_wrapper import MorphableModel, grown_model
from esper.execution.grafts.seed import BoundSeed, bind_seed
from esper.execution.host_binding import fast_path_ancestors
from esper.execution.kasmina_layer import KasminaLayer
from esper.nn.attention import GraftedAttention
from esper.nn.seeded import Seeded

__all__ = ["ExportError", "export"]


class ExportError(EsperError, ValueError):
    """The network cannot be exported as it is; the message says what to do first."""


def export(model: MorphableModel) -> nn.Module:
    """Copy a grown network into plain modules.

    The result computes what ``model`` computes now, to rounding (a seed whose output is not finite is no longer
    contained). It shares no memory with ``model``, trains like any network, and needs nothing of Esper: ``torch.save``
    and ``torch.load`` work where Esper is not installed. One exception: a ``MultiheadAttention`` with awake seeds is an
    :class:`esper.nn.attention.GraftedAttention`, which unpickling must be able to import.

    Hosts without awake seeds, and hosts whose seeds could be folded, keep their type and their ``state_dict`` keys. A
    Linear host that could not be folded keeps the keys ``weight`` and ``bias``; any other moves to ``<name>.host``, and
    so does one whose weight is computed (parametrized, pruned), because nothing can be folded into that: make it a
    plain one first where that is wanted (``remove_parametrizations``, ``prune.remove``).

    Hooks stay, and see what they see in ``model``: a layer's input and its output with the seeds in it. Around a host
    that could not be folded they stand on an ``nn.Sequential``, which is the ``module`` they are given; the keys then
    begin with ``<name>.0``. A ``MultiheadAttention`` keeps its own.

    Args:
        model: The wrapped model; it is not changed.

    Returns:
        The network, in the same mode (training or evaluation) and on the same device.

    Raises:
        TypeError: ``model`` is not one that ``esper.wrap`` gave.
        ExportError: a seed is awake on an activation that has never been called, so that its shape is not known, or on
            a ``MultiheadAttention`` that is parametrized or whose forward is not torch's own.
    """
    twin = copy.deepcopy(grown_model(model, "export"))
    twin.close()
    body = twin.wrapped_model
    tied = _tied_parameters(body)
    for name, layer in twin.kasmina_layers.items():
        seeds, host_factor = _awake(layer)
        host = layer.default_transform
        _detach(layer)
        # A seed at alpha 0 adds nothing, and with none left the host stands as it was.
        if seeds:
            body = _replace(body, name, host, seeds, host_factor, layer.channel_dim, tied)
    return body


def _replace(
    body: nn.Module,
    name: str,
    host: nn.Module,
    seeds: list[ExportedSeed],
    host_factor: Tensor,
    channel_dim: int,
    tied: set[int],
) -> nn.Module:
    """The network with ``host`` and its seeds made one."""
    # Folding changes a weight in place; one that others use too has to stay.
    shared = any(id(p) in tied for p in host.parameters(recurse=False))
    if not shared and fold(host, seeds, host_factor):
        return body
    if isinstance(host, nn.MultiheadAttention):
        if not computes_as(host, nn.MultiheadAttention):
            reason = (
                "is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it a plain one"
                if is_parametrized(host)
                else "has another forward than MultiheadAttention's; put its seeds on a layer behind it"
            )
            raise ExportError(
                f"layer '{name}' ({type(host).__name__}) has awake seeds and {reason}: the module that stands in for "
                "an attention layer computes what torch's own does"
            )
        plain: nn.Module = GraftedAttention.from_host(host, graft_module(seeds, host_factor))
    else:
        plain = with_hooks(host, grafted_host(host, seeds, host_factor, channel_dim))
    if host is body:
        return plain
    _close_fast_paths(body, host)
    # Listed before the first is replaced: `plain` may itself hold the host.
    places = [(m, key) for m in body.modules() for key, child in m._modules.items() if child is host]
    for parent, key in places:
        parent._modules[key] = plain
    return body


def _awake(layer: KasminaLayer) -> tuple[list[ExportedSeed], Tensor]:
    """The layer's seeds that count, with their coefficients, and the host's factor per feature."""
    spec = layer.grafts.spec
    bound = [i for i in layer.grafts.bound if i not in layer.grafts.misfits]
    alpha: list[float] = layer.state_layout.alpha_blend.tolist()
    if not any(alpha[i] for i in bound):
        return [], torch.ones(1, dtype=torch.float64)
    if not spec.is_resolved or spec.d_out is None:
        raise ExportError(
            f"layer '{layer.layer_name}' ({spec.type_name}) has awake seeds but has seen no input, so its shape is not "
            "known: call the model once, then export"
        )
    places: list[BoundSeed] = [bind_seed(i, layer.grafts.kernel(i), spec, layer.num_seeds) for i in bound]
    replaced = torch.zeros(spec.d_out, dtype=torch.float64)
    for seed in places:
        if seed.place.replace:
            replaced[seed.place.begin : seed.place.end] += alpha[seed.place.index]
    host_factor = 1.0 - replaced.clamp(max=1.0)
    seeds = []
    for seed in places:
        kernel = layer.grafts.kernel(seed.place.index)
        coefficient = torch.full_like(replaced, alpha[seed.place.index])
        if seed.place.replace:
            coefficient /= replaced.clamp(min=1.0)
        coefficient = coefficient[seed.place.begin : seed.place.end]
        if bool(coefficient.any()):
            seeds.append(
                ExportedSeed(
                    blueprint=seed.blueprint,
                    tensors={name: _own(t) for name, t in layer.grafts.seed_tensors(seed.place.index).items()},
                    widths=validate(seed.blueprint, kernel.d_in, kernel.d_out).widths,
                    begin=seed.place.begin,
                    end=seed.place.end,
                    coefficient=coefficient,
                    strided=seed.strided,
                )
            )
    return seeds, host_factor


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _detach(layer: KasminaLayer) -> None:
    """Give the host its own forward back; one of :mod:`esper.nn` becomes torch's."""
    for seed_idx in layer.grafts.bound:
        layer.grafts.unbind(seed_idx)
    layer.disarm_probe()
    layer.hold_path(False)
    if isinstance(layer.default_transform, Seeded):
        layer.default_transform.shed()


def _tied_parameters(body: nn.Module) -> set[int]:
    """Parameters that stand in more than one module."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in body.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _close_fast_paths(body: nn.Module, host: nn.Module) -> None:
    """Make torch's fused encoder paths, which read weights without calling their layers, leave this host alone.

    They look at these two attributes before they look at anything of the layers that have changed.
    """
    for name, module in body.named_modules(remove_duplicate=False):
        if module is host:
            for ancestor in fast_path_ancestors(body, name):
                if isinstance(ancestor, nn.TransformerEncoderLayer):
                    ancestor.activation_relu_or_gelu = 0
                else:
                    ancestor.__dict__["use_nested_tensor"] = False
