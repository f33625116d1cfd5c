"""Names: a wrapped model answers to its host's, and what Esper adds stands under one prefix beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.execution.grafts import GraftSet
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import AWAKE
from esper.execution.state_layout import Lattice

__all__ = [
    "GRAFT_PREFIX",
    "WRAPPED",
    "GraftTree",
    "HostNames",
    "check_host",
    "is_lattices",
    "is_sharded",
    "seeds_prefix",
]

#: Attribute of a MorphableModel that holds the host.
WRAPPED = "wrapped_model"

#: First part of the names of all grafts and of the lattice.
GRAFT_PREFIX = "esper"


def is_sharded(module: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was called on the module: it changes the module's class."""
    return hasattr(type(module), "reshard")


def graft_key(layer_name: str) -> str:
    """A layer's name as one attribute name: module names cannot contain dots."""
    return layer_name.replace(".", "/")


def seeds_prefix(layer_name: str) -> str:
    """What the names of a layer's graft parameters begin with in a wrapped model; the seed's index follows."""
    return f"{GRAFT_PREFIX}.{graft_key(layer_name)}.seed"


def is_lattices(name: str) -> bool:
    """Whether an entry under :data:`GRAFT_PREFIX` is the lattice's, and not a graft's in a layer called "lattice"."""
    head, _, field = name.partition(".")
    return head == "lattice" and "." not in field


def check_host(host: nn.Module) -> None:
    """Raise ValueError for a host with a module whose names would be taken for those that Esper adds."""
    if host._modules.get(GRAFT_PREFIX) is not None:
        raise ValueError(
            f"{type(host).__name__} has a module named '{GRAFT_PREFIX}': names in it begin as those of seeds do in a "
            "wrapped model. Give the module another name"
        )


class GraftTree(nn.Module):
    """The grafts of a model's layers, as ``esper.<layer>.<parameter>``."""

    def __init__(self, layers: Mapping[str, KasminaLayer]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(graft_key(name), layer.grafts)

    def layers(self) -> Iterator[tuple[str, GraftSet]]:
        """The grafts of each layer, by the layer's name as it stands in the keys."""
        yield from self._modules.items()  # type: ignore[misc]


class HostNames(nn.Module):
    """The part of a wrapped model that is an ``nn.Module`` with its host's names, hooks and attributes."""

    wrapped_model: nn.Module
    esper: GraftTree
    lattice: Lattice

    def __init__(self, wrapped_model: nn.Module) -> None:
        super().__init__()
        check_host(wrapped_model)
        self.wrapped_model = wrapped_model
        # The root's own parameters are this module's too, so that a name without a dot resolves as it does on the host.
        self.__dict__["_parameters"] = wrapped_model._parameters
        self.__dict__["_buffers"] = wrapped_model._buffers
        self.__dict__["_non_persistent_buffers_set"] = wrapped_model._non_persistent_buffers_set
        self.training = wrapped_model.training
        self.register_load_state_dict_post_hook(_host_names)

    def _touch(self) -> None:
        """Called when the lattice or the grafts changed."""
        raise NotImplementedError("a wrapped model says what a change means to its clock")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get(WRAPPED)
            if host is None:
                raise
            return getattr(host, name)

    def _is_the_hosts(self, name: str) -> bool:
        """Whether setting an attribute is meant for the host: it has one of that name, and this module has none."""
        own = self.__dict__
        if "_complete" not in own or name in own or name in own["_modules"] or hasattr(type(self), name):
            return False
        return hasattr(self.wrapped_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is read through must be written through, or the host would go on with what it had.
        if self._is_the_hosts(name):
            setattr(self.wrapped_model, name, value)
        elif "_complete" in self.__dict__ and isinstance(value, (nn.Module, nn.Parameter)):
            if self._modules.get(name) is value:
                return  # what converts a network sets every module again, changed or not
            self._refuse_own(name)
            self.__dict__.pop(name, None)  # a None that held the place
            setattr(self.wrapped_model, name, value)
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module to the host, as setting an attribute does; it has no seeds.

        Raises:
            AttributeError: the wrapped model itself uses the name.
        """
        if "_complete" not in self.__dict__:
            super().add_module(name, module)
        elif module is None or self._modules.get(name) is not module:  # as above
            self._refuse_own(name)
            self.wrapped_model.add_module(name, module)

    def _refuse_own(self, name: str) -> None:
        """Raise AttributeError where a module or parameter of that name would hide what this module is made of."""
        if name in self.__dict__["_own"] or name in self._modules or hasattr(type(self), name):
            raise AttributeError(f"{name!r} is a name that a wrapped model uses itself; choose another")

    def __delattr__(self, name: str) -> None:
        if self._is_the_hosts(name):
            delattr(self.wrapped_model, name)
        else:
            super().__delattr__(name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The host and its modules under the host's names, then those of the grafts; this module itself is a skin.

        Parameters and buffers get their names from here, inside wrappers like DDP too.
        """
        seen = set() if memo is None else memo
        if is_sharded(self) and self not in seen:
            # FSDP2 keeps what it knows of its root with the root itself, and looks for it here.
            seen.add(self)
            yield prefix, self
        yield from self.wrapped_model.named_modules(seen, prefix, remove_duplicate)
        ours = f"{prefix}.{GRAFT_PREFIX}" if prefix else GRAFT_PREFIX
        yield from self.esper.named_modules(seen, ours, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The host's entries under the host's keys, then grafts and lattice under ``esper.``.

        Hooks that were registered here are given this module, and all of its entries.
        """
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        state = self.entries(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for after in self._state_dict_hooks.values():
            result = after(self, state, prefix, {"version": self._version})
            if result is not None:
                # As torch: only hooks that were registered by the older, private way may give another dictionary.
                if getattr(after, "_from_public_api", False):
                    raise RuntimeError("state_dict post-hook must return None")
                state = result
        return state

    def entries(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """What :meth:`state_dict` gives, past the hooks that were registered on this module."""
        state = self.wrapped_model.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        self.esper.state_dict(destination=state, prefix=f"{prefix}{GRAFT_PREFIX}.", keep_vars=keep_vars)
        for name, tensor in self.lattice.state_dict().items():
            state[f"{prefix}{GRAFT_PREFIX}.lattice.{name}"] = tensor
        return state

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
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # torch recurses into children by attribute name, so the host's keys get its attribute's name back here.
        # Working inside the recursion keeps DDP and other wrappers of this module loadable too. A bare host's entries
        # are complete: what is missing of the grafts is then what is here.
        marker = f"{prefix}{GRAFT_PREFIX}."
        # The very parameters: `assign=True` would make new ones of anything else.
        here = self.esper.state_dict(keep_vars=True)
        ours = {key[len(marker) :]: state_dict.pop(key) for key in [*state_dict] if key.startswith(marker)}
        lattice = {key.removeprefix("lattice."): ours.pop(key) for key in [*ours] if is_lattices(key)}
        if ours or lattice:
            reason = self._refusal(here, ours, lattice)
            if reason is None:
                try:
                    self.lattice.load_state_dict(lattice)
                except (ValueError, KeyError) as error:
                    reason = f"lattice: {error}"
            if reason is not None:
                # What torch will copy from now on is what is here: whoever is refused is as before, the host too.
                error_msgs.append(reason)
                ours = here
                for key in [key for key in state_dict if key.startswith(prefix)]:
                    del state_dict[key]
                state_dict.update(self.wrapped_model.state_dict(prefix=prefix, keep_vars=True))
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}{WRAPPED}.{key[len(prefix) :]}"] = state_dict.pop(key)
        state_dict.update({marker + key: value for key, value in (ours or here).items()})
        self._touch()

    def _refusal(self, here: Mapping[str, Any], ours: Mapping[str, Any], lattice: Mapping[str, Any]) -> str | None:
        """Why entries of grafts and their lattice cannot be this model's; None if they can. Changes nothing.

        What the lattice finds wrong with its own entries is not looked for here.
        """
        if ours.keys() != here.keys():
            only = sorted(ours.keys() - here.keys())[:4], sorted(here.keys() - ours.keys())[:4]
            odd = f"only there: {only[0]}, only here: {only[1]}"
        else:
            shapes = ((name, getattr(ours[name], "shape", None), tensor.shape) for name, tensor in here.items())
            other = [f"{name!r} is {theirs} there, {tuple(own)} here" for name, theirs, own in shapes if theirs != own]
            odd = ", ".join((other or self._other_seeds(lattice))[:4])
        if not odd:
            return None
        return (
            f"the state_dict is of a network with other awake seeds ({odd}). "
            "esper.save and esper.load rebuild the grown structure by themselves."
        )

    def _other_seeds(self, lattice: Mapping[str, Any]) -> list[str]:
        """Seeds that are awake in ``lattice`` and have no kernel here, or the other way round, or another kernel.

        With reserved memory the names are the same whatever is awake.
        """
        states, kernels = (lattice.get(name) for name in ("lifecycle_states", "active_kernel_id"))
        if not all(isinstance(t, Tensor) and t.shape == (self.lattice.num_seeds,) for t in (states, kernels)):
            return []
        there = zip(states.tolist(), kernels.tolist(), strict=True)  # type: ignore[union-attr]
        seeds = ((name, grafts, i) for name, grafts in self.esper.layers() for i in range(self.lattice.seeds_per_layer))
        odd: list[str] = []
        for (name, grafts, seed_idx), (state, kernel_id) in zip(seeds, there, strict=True):
            bound = seed_idx in grafts.bound
            if bound != (state in AWAKE):
                odd.append(f"seed {seed_idx} of '{name}'")
            elif bound and grafts.kernel(seed_idx).kernel_id != kernel_id:
                odd.append(f"seed {seed_idx} of '{name}' has another kernel")
        return odd

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The root's tables are shared with the host, so the default would convert its own tensors twice.
        self.wrapped_model._apply(fn, recurse)
        self.esper._apply(fn)
        # The lattice follows the device and keeps its types.
        self.lattice.to(fn(torch.empty(0, device=self.lattice.device)).device)
        self._touch()
        return self

    # Hooks of calls belong to the host: its __call__ is the one that runs.
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As on the host, which is the ``module`` that the hook is given."""
        return self.wrapped_model.register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As on the host, which is the ``module`` that the hook is given."""
        return self.wrapped_model.register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As on the host, which is the ``module`` that the hook is given."""
        return self.wrapped_model.register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As on the host, which is the ``module`` that the hook is given."""
        return self.wrapped_model.register_full_backward_pre_hook(*args, **kwargs)


def _host_names(module: nn.Module, incompatible: Any) -> None:
    """Report missing and unexpected keys under the host's names."""
    for keys in incompatible:
        keys[:] = [key.replace(f"{WRAPPED}.", "", 1) for key in keys]
