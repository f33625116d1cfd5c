"""What layers that bring their own seeds have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from esper.execution.grafts.reservation import Reservation
from esper.execution.grafts.reserved import ReservedGraftSet
from esper.execution.hosts import device_of
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout

__all__ = ["OwnSeeds", "Seeded", "step"]

#: Name of the child that holds the awake seeds' parameters; there is none while all seeds sleep.
GRAFTS = "grafts"


@functools.cache
def _common_cache() -> KernelCache:
    """The cache of all layers that were not given one, made when the first of them loads a kernel."""
    return KernelCache()


class OwnSeeds(KasminaLayer):
    """The seeds of a layer that hosts them itself.

    Attributes:
        standalone: Whether the layer keeps them; False once ``esper.wrap`` has taken them into a model.
    """

    def __init__(self, host: nn.Module, num_seeds: int, layer_name: str, kernel_cache: KernelCache | None) -> None:
        nn.Module.__init__(self)
        self.__dict__["default_transform"] = host
        self.standalone = True
        device = device_of(host)
        # A layer on the meta device has a state all the same: its seeds sleep.
        state = KasminaStateLayout(num_seeds, "cpu" if device.type == "meta" else device)
        # The layer may stand in torch's encoder, whose fused inference path looks for hooks before it passes by.
        self._setup(num_seeds, layer_name, True, cast(KernelCache, kernel_cache), state, (host,))

    @property
    def kernel_cache(self) -> KernelCache:
        """Where kernels come from."""
        given: KernelCache | None = self.__dict__["_given_cache"]
        return _common_cache() if given is None else given

    @kernel_cache.setter
    def kernel_cache(self, cache: KernelCache) -> None:
        self.__dict__["_given_cache"] = cache

    def hand_over(
        self,
        *,
        layer_name: str,
        kernel_cache: KernelCache,
        state_layout: KasminaStateLayout,
        telemetry_enabled: bool,
        fast_path: tuple[nn.Module, ...],
        reservation: Reservation | None = None,
    ) -> Self:
        """Go on as one of a model's layers, with the states, kernels and weights there are.

        Arguments as for :meth:`KasminaLayer.from_host`. Memory can be reserved only while all seeds sleep.
        """
        state_layout.copy_from(self.state_layout)
        self.adopt_state(state_layout)
        self.layer_name = layer_name
        self.kernel_cache = kernel_cache
        self.telemetry_enabled = telemetry_enabled
        self.standalone = False
        if reservation is not None:
            grafts = ReservedGraftSet(self.grafts.spec, state_layout, reservation, device_of(self.default_transform))
            self.grafts = self.__dict__["_grafts"] = grafts
        self._binding.remove()
        self._binding.give_up()
        self._bind_host(self.default_transform, fast_path)
        self._refresh()
        return self

    def _refresh(self) -> None:
        super()._refresh()
        # Only while there is something in it: a sleeping layer has the children of torch's own, which is none.
        children = self.default_transform._modules
        if self.standalone and self.grafts.bound:
            children[GRAFTS] = self.grafts
        else:
            children.pop(GRAFTS, None)


class Seeded(nn.Module):
    """Mixin: a layer of ``torch.nn`` that brings its own seeds.

    It stands in any network without ``esper.wrap``. While its seeds sleep it *is* the torch layer: same forward, same
    ``state_dict``, no children. An awake seed's parameters are those of a child called ``grafts``, and the
    ``state_dict`` then holds them and the seeds' states too.

    ``esper.wrap`` takes these seeds into the model as they are, awake ones included, whatever its ``target_layers``
    say; they need the model's number of seeds. From then on the model's clock, registry and ``state_dict`` are theirs.

    Attributes:
        seeds: The seeds, with everything that a ``KasminaLayer`` has.
    """

    seeds: OwnSeeds

    def _plant(self, num_seeds: int, layer_name: str | None, kernel_cache: KernelCache | None) -> None:
        # Past nn.Module, which would make it a child.
        self.__dict__["seeds"] = OwnSeeds(self, num_seeds, layer_name or type(self).__name__, kernel_cache)

    # -- seeds -------------------------------------------------------------------------------------

    @property
    def num_seeds(self) -> int:
        """How many seeds the layer has."""
        return self.seeds.num_seeds

    @property
    def state_layout(self) -> KasminaStateLayout:
        """The states of the seeds."""
        return self.seeds.state_layout

    async def load_kernel(self, seed_idx: int, artifact_id: str, *, alpha: float = 0.3, ramp_steps: int = 0) -> bool:
        """Fetch a kernel and wake a seed with it; see :meth:`KasminaLayer.load_kernel`."""
        return await self.seeds.load_kernel(seed_idx, artifact_id, alpha=alpha, ramp_steps=ramp_steps)

    async def unload_kernel(self, seed_idx: int) -> bool:
        """Put a seed to sleep and drop its kernel; see :meth:`KasminaLayer.unload_kernel`."""
        return await self.seeds.unload_kernel(seed_idx)

    def set_seed_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set a seed's blend factor at once; see :meth:`KasminaLayer.set_seed_alpha`."""
        self.seeds.set_seed_alpha(seed_idx, alpha)

    def get_layer_stats(self) -> dict[str, Any]:
        """Counters, states and the reason of every failure; see :meth:`KasminaLayer.get_layer_stats`."""
        return self.seeds.get_layer_stats()

    def step(self) -> None:
        """Do what is due between two training steps: ramps, timers, faults. It never waits.

        In a model made by ``esper.wrap`` the model's ``step()`` does this, and this one does nothing.
        """
        seeds = self.seeds
        lattice = seeds.state_layout.lattice
        if not seeds.standalone or not lattice.needs_step:
            return
        lattice.step(lattice.epoch + 1)
        for row, _, new in lattice.poll():
            if new is SeedLifecycleState.ERROR_RECOVERY:
                seeds.on_fault_limit(row)
        if lattice.device.type == "cuda":
            seeds.poll_latency()

    def shed(self) -> None:
        """Become the plain torch layer, without seeds. A subclass of the user's own keeps its type, and its seeds."""
        plain = type(self).__bases__[-1]
        if type(self).__module__ == "esper.nn.layers":
            del self.__dict__["seeds"]
            self._modules.pop(GRAFTS, None)
            self.__class__ = plain

    # -- nn.Module ---------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """As the torch layer's, and the number of seeds."""
        own = super().extra_repr()
        return f"{own}, num_seeds={self.num_seeds}" if own else f"num_seeds={self.num_seeds}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        seeds = self.seeds
        if seeds.standalone:
            if GRAFTS not in self._modules:
                seeds.grafts._apply(fn)  # seeds that wake later have the type that the layer has then
            lattice = seeds.state_layout.lattice
            device = fn(torch.empty(0, device=lattice.device)).device
            if device.type != "meta":
                lattice.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if GRAFTS in self._modules:
            for name, tensor in self.state_layout.lattice.state_dict().items():
                destination[f"{prefix}{GRAFTS}.lattice.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.seeds.standalone:
            self._load_seeds(state_dict, f"{prefix}{GRAFTS}.", error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_seeds(self, state_dict: dict[str, Any], marker: str, error_msgs: list[str]) -> None:
        """Take the seeds' states; leave in ``state_dict`` what the child will take."""
        # The very parameters: `assign=True` would make new ones of anything else.
        here = self.seeds.grafts.state_dict(keep_vars=True)
        theirs = {key[len(marker) :]: state_dict[key] for key in state_dict if key.startswith(marker)}
        if not theirs:
            # Entries of torch's own layer: they are complete, and what is missing of the seeds is what is here.
            state_dict.update({marker + key: value for key, value in here.items()})
            return
        lattice = {key.removeprefix("lattice."): theirs.pop(key) for key in [*theirs] if key.startswith("lattice.")}
        for key in lattice:
            del state_dict[f"{marker}lattice.{key}"]
        layout = self.state_layout
        kernels = lattice.get("active_kernel_id")
        if theirs.keys() != here.keys() or (
            kernels is not None and kernels.tolist() != layout.active_kernel_id.tolist()
        ):
            for key in theirs:
                del state_dict[marker + key]
            state_dict.update({marker + key: value for key, value in here.items()})
            error_msgs.append(
                f"{marker[:-1]}: the state_dict is of a layer with other awake seeds "
                f"(only there: {sorted(theirs.keys() - here.keys())[:4]}, only here: "
                f"{sorted(here.keys() - theirs.keys())[:4]}). Wake the same kernels first, or let esper.save and "
                "esper.load of the wrapped network rebuild them."
            )
            return
        try:
            layout.lattice.load_state_dict(lattice)
        except (ValueError, KeyError) as error:
            state_dict.update({marker + key: value for key, value in here.items()})
            error_msgs.append(f"{marker}lattice: {error}")
        self.seeds.forget_loads()


def step(network: nn.Module) -> None:
    """Call :meth:`Seeded.step` for every layer of a network that keeps its own seeds.

    It walks the modules at every call; ``esper.wrap`` gives the network one clock that does not have to.
    """
    for module in network.modules():
        if isinstance(module, Seeded):
            module.step()
