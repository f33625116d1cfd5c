"""``esper.wrap`` and ``esper.unwrap``: which layers of a model get seeds, and how they are found."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from esper.contracts.bus import Bus
from esper.contracts.registry import RegistryClient
from esper.core.morphable import MorphableModel
from esper.core.naming import check_host
from esper.execution.grafts.reservation import Reservation, Tap
from esper.execution.host_binding import fast_path_ancestors
from esper.execution.host_forwards import check_free
from esper.execution.hosts import describe_host, foreign_linear, supported_hosts
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import KasminaStateLayout, Lattice
from esper.execution.telemetry.options import TelemetryOptions
from esper.nn.seeded import Seeded

__all__ = ["ROOT_NAME", "MorphableModel", "find_bus", "find_targets", "grown_model", "unwrap", "wrap"]

#: Layer name of a model that is itself a target (its dotted name would be empty).
ROOT_NAME = "root"

#: What the sender waits for an answer at most. It retries by itself, and spools meanwhile.
BUS_TIMEOUT_S = 2.0
#: How long a bus that is asked for may take to be there at the start.
BUS_PATIENCE_S = 10.0

DEFAULT_TARGETS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)


def wrap(
    model: nn.Module,
    target_layers: Iterable[type[nn.Module] | str] | None = None,
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
    telemetry_enabled: bool = True,
    preserve_original: bool = True,
    *,
    registry: RegistryClient | str | os.PathLike[str] | None = None,
    bus: Bus | str | None = None,
    reserve_rank: int = 0,
    reserve_tap: Tap = "input",
    monitor_budget: float = 0.005,
    telemetry: TelemetryOptions | None = None,
) -> MorphableModel:
    """Give every target layer of a model a few dormant seeds.

    The wrapped model computes what the model computed, bit for bit, until a seed is woken.

    Args:
        model: Any network. Its layers stay in place; its ``state_dict`` keys stay valid.
        target_layers: Module types, dotted names of single layers, or both; None means Linear and Conv2d (and
            the ``Conv1D`` of ``transformers``, which is a Linear). Layers that bring their own seeds
            (:mod:`esper.nn`) come on top, with these seeds as they are.
        seeds_per_layer: Seeds of each layer.
        cache_size_mb: Memory for fetched kernels, in MiB, for the whole model.
        telemetry_enabled: Whether the activations are monitored; without, ``REDIS_URL`` is not looked at either.
        preserve_original: True wraps a copy and keeps a reference to ``model``; False wraps ``model`` itself and
            copies no weight.
        registry: Where kernels come from: a client, a path, a ``file://`` or ``http(s)://`` URL. None means
            ``ESPER_REGISTRY``, else the user's own registry folder.
        bus: Where the model publishes its telemetry: a client, or a URL (``redis://``, ``rediss://``, ``memory://``).
            None means ``REDIS_URL``; where that is not set either, nothing is published and no thread is started.
        reserve_rank: R > 0 sets memory aside for every seed from the start, for low-rank kernels of rank up to R:
            parameters, shapes and addresses then never change, which is what DDP, FSDP2, ``torch.compile`` and CUDA
            graphs want (docs/reserved.md). 0 lets the memory grow as seeds wake.
        reserve_tap: What kernels in reserved memory read: their layer's "input" or its "output".
        monitor_budget: Share of the host's time that monitoring may take (0.005 = 0.5 %).
        telemetry: How it publishes; None for the defaults.

    Raises:
        ValueError: an unknown layer name, a layer that its parent never calls, a lazy layer that has seen no batch and
            so has no sizes, an argument out of range, a layer that brings another number of seeds than
            ``seeds_per_layer``, a layer that another wrapped model has (networks that share layers, wrapped in place),
            memory to be reserved for a layer that has no size of its own (an activation) or brings awake seeds, a
            module of the network's own that is named ``esper``, or, where the model publishes, an ``ESPER_RUN_ID`` that
            is no name of a run.
        NotImplementedError: a target type that Esper does not support; the message names it.
        TypeError: ``model`` is not a module, or is wrapped already; ``target_layers`` is no list; or ``bus`` is neither
            a client nor a URL.
        BusError: nothing answers at the bus's URL, or it refuses; the message says what to check.
    """
    _check_arguments(model, seeds_per_layer, reserve_rank, reserve_tap, monitor_budget)
    with torch.inference_mode(False):  # a copy that is made in inference mode could not be trained
        body = copy.deepcopy(model) if preserve_original else model
    targets = find_targets(body, target_layers)
    if not targets:
        wanted = "Linear or Conv2d" if target_layers is None else ", ".join(map(_describe, target_layers))
        warnings.warn(
            f"{type(model).__name__} has no layer to give seeds to (looked for {wanted}); "
            "name others in target_layers=",
            stacklevel=2,
        )
    _check_seeds(targets, seeds_per_layer, reserve_rank)
    for name, host in targets.items():
        if not (isinstance(host, Seeded) and host.seeds.standalone):
            check_free(host, name)
    reserved = {
        name: Reservation.of(describe_host(host), reserve_rank, reserve_tap, name)
        for name, host in targets.items()
        if reserve_rank
    }
    client = find_bus(bus, telemetry_enabled)
    cache = KernelCache(cache_size_mb, registry=registry)
    lattice = Lattice(len(targets), seeds_per_layer)
    layers = {
        name: _layer(
            host,
            telemetry_enabled=telemetry_enabled,
            layer_name=name,
            kernel_cache=cache,
            state_layout=lattice.layer(index),
            fast_path=tuple(fast_path_ancestors(body, "" if host is body else name)),
            reservation=reserved.get(name),
        )
        for index, (name, host) in enumerate(targets.items())
    }
    wrapped = MorphableModel(
        body,
        layers,
        model if preserve_original else None,
        lattice=lattice,
        monitor_budget=monitor_budget,
        reserve_rank=reserve_rank,
        reserve_tap=reserve_tap,
    )
    if client is not None:
        try:
            wrapped.publish_to(client, telemetry, owns_bus=client is not bus)
        except BaseException:
            if client is not bus:
                client.close()
            raise
    return wrapped


def find_bus(bus: Bus | str | None, telemetry_enabled: bool = True) -> Bus | None:
    """The bus that :func:`wrap` publishes to: met once if it is given as a URL or by ``REDIS_URL``; or None.

    Raises:
        TypeError: neither a client nor a URL.
        BusError: nothing answers there, or it refuses.
    """
    if bus is None and not (telemetry_enabled and os.environ.get("REDIS_URL", "").strip()):
        return None
    if bus is None or isinstance(bus, str):
        # Loads the client's package only where one is wanted.
        from esper.oona import BusSettings, OonaClient

        settings = BusSettings(timeout_s=BUS_TIMEOUT_S, patience_s=0.0, start_patience_s=BUS_PATIENCE_S)
        return OonaClient(bus, settings=settings)
    if not isinstance(bus, Bus):
        raise TypeError(f"bus takes a client or a URL, got {type(bus).__name__}")
    return bus


def _check_seeds(targets: Mapping[str, nn.Module], seeds_per_layer: int, reserve_rank: int) -> None:
    """Raise ValueError where a layer brings seeds that do not fit the model's."""
    for name, host in targets.items():
        if not isinstance(host, Seeded):
            continue
        if host.num_seeds != seeds_per_layer:
            raise ValueError(
                f"layer '{name}' is a {type(host).__name__} with {host.num_seeds} seeds, but seeds_per_layer is "
                f"{seeds_per_layer}; all layers of a model have the same number of seeds"
            )
        if reserve_rank and host.seeds.grafts.bound:
            raise ValueError(
                f"layer '{name}' brings awake seeds, whose memory is their own; with reserve_rank wake them after wrap"
            )


def _layer(host: nn.Module, *, state_layout: KasminaStateLayout, **options: Any) -> KasminaLayer:
    if isinstance(host, Seeded):
        return host.seeds.hand_over(state_layout=state_layout, **options)
    return KasminaLayer.from_host(
        host, num_seeds=state_layout.num_seeds, state_layout=state_layout, register_host=False, **options
    )


def unwrap(model: MorphableModel) -> nn.Module:
    """The model given to :func:`wrap` if it was preserved, else the wrapped one, as it was trained.

    It gives the layers up: they may be wrapped again, and ``model`` goes on until they are. Seeds that are awake then
    stay in the network, as a part of it that the new model knows nothing of; ``model`` wakes no others.

    Raises:
        TypeError: ``model`` is not one that :func:`wrap` gave.
    """
    model = grown_model(model, "unwrap")
    for layer in model.kasmina_layers.values():
        layer.give_up_host()
    return model.original_model if model.original_model is not None else model.wrapped_model


def grown_model(model: object, function: str) -> MorphableModel:
    """What :func:`wrap` gave: ``model``, or what ``torch.compile`` was handed to make it.

    Raises:
        TypeError: it is something else; the message says what ``function`` was given.
    """
    if isinstance(model, MorphableModel):
        return model
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, MorphableModel):
        return compiled
    inside = "; its .module is one" if isinstance(getattr(model, "module", None), MorphableModel) else ""
    raise TypeError(f"{function} needs a model that esper.wrap gave, got {type(model).__name__}{inside}")


def find_targets(
    model: nn.Module, target_layers: Iterable[type[nn.Module] | str] | None = None
) -> dict[str, nn.Module]:
    """The layers that :func:`wrap` would give seeds to, or that bring their own, by name, each module once.

    Raises:
        ValueError: a name that does not exist, or names a layer that its parent never calls.
        NotImplementedError: a type that Esper does not support.
        TypeError: no list of module types and names.
    """
    if isinstance(target_layers, str | type):
        given = repr(target_layers) if isinstance(target_layers, str) else target_layers.__name__
        raise TypeError(f"target_layers is {given}; it takes a list of module types and layer names: [{given}]")
    wanted = tuple((*DEFAULT_TARGETS, *foreign_linear()) if target_layers is None else target_layers)
    types = tuple(entry for entry in wanted if not isinstance(entry, str))
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"target_layers holds module types or layer names, got {kind!r}")
        if not issubclass(kind, supported_hosts()):
            supported = ", ".join(host.__name__ for host in supported_hosts())
            raise NotImplementedError(f"Esper does not support layers of type {kind.__name__}; supported: {supported}")
    modules = dict(model.named_modules(remove_duplicate=False))
    bypassed = _bypassed(model)
    found: dict[str, nn.Module] = {}
    for entry in (entry for entry in wanted if isinstance(entry, str)):
        name = "" if entry == ROOT_NAME and ROOT_NAME not in modules else entry
        if name not in modules:
            raise ValueError(f"Layer '{entry}' not found; the model has: {', '.join(filter(None, modules))}")
        if id(modules[name]) in bypassed:
            raise ValueError(
                f"Layer '{entry}' is never called: nn.MultiheadAttention reads its weight directly. "
                f"Target the attention layer itself, '{name.rpartition('.')[0]}'."
            )
        found[entry] = modules[name]
    known = {id(module) for module in found.values()}
    kinds: tuple[type[nn.Module], ...] = (*types, Seeded)
    for name, module in modules.items():
        if isinstance(module, kinds) and id(module) not in bypassed | known:
            found[name or ROOT_NAME] = module
            known.add(id(module))
    order = {id(module): position for position, module in enumerate(model.modules())}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1])]))


def _bypassed(model: nn.Module) -> set[int]:
    """Layers whose weights their parent reads without ever calling them."""
    return {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


def _check_arguments(
    model: nn.Module, seeds_per_layer: int, reserve_rank: int, reserve_tap: str, budget: float
) -> None:
    if isinstance(model, MorphableModel):
        raise TypeError("the model is wrapped already; esper.unwrap(model) gives back what was wrapped")
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap needs a torch.nn.Module, got {type(model).__name__}")
    check_host(model)
    if seeds_per_layer < 1:
        raise ValueError(f"seeds_per_layer must be at least 1, got {seeds_per_layer}")
    if not 0 <= budget <= 1:
        raise ValueError(f"monitor_budget is a share of the host's time, between 0 and 1, got {budget}")
    if not isinstance(reserve_rank, int) or isinstance(reserve_rank, bool) or reserve_rank < 0:
        raise ValueError(f"reserve_rank is a whole number of at least 0, got {reserve_rank!r}")
    if reserve_tap not in ("input", "output"):
        raise ValueError(f"reserve_tap is 'input' or 'output', got {reserve_tap!r}")


def _describe(entry: type[nn.Module] | str) -> str:
    return repr(entry) if isinstance(entry, str) else entry.__name__
