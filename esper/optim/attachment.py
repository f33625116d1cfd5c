"""The bond between an optimizer and a model that grows."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.optim.groups import (
    SEED_KEY,
    Place,
    check_options,
    drop_from_groups,
    innermost,
    lay_out_as_parameters,
    match_groups_by_seed,
    places_of,
    put_back,
    untagged_group_of,
)
from esper.optim.schedulers import extend_lists, find_schedulers, shrink_lists

__all__ = ["Attachment", "GrowingModel", "attach"]

#: Group options measured in learning rates, which a rate of one's own rescales (OneCycleLR and SWALR keep theirs here).
_RATE_OPTIONS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


GrowthEvent = Literal["bound", "unbound"]
GrowthCallback = Callable[[GrowthEvent, str, int, dict[str, nn.Parameter]], None]


class _Grafts(Protocol):
    @property
    def bound(self) -> Iterable[int]:
        """Seeds that are awake."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of awake seeds and, where memory is reserved, of sleeping ones."""

    def seed_parameters(self, seed_idx: int) -> dict[str, nn.Parameter]:
        """Parameters of one awake seed."""


class _Layer(Protocol):
    @property
    def default_transform(self) -> nn.Module:
        """The host."""

    @property
    def grafts(self) -> _Grafts:
        """What grows beside it."""


class GrowingModel(Protocol):
    """What :func:`attach` needs of a model; :class:`esper.core.model_wrapper.MorphableModel` has it."""

    @property
    def kasmina_layers(self) -> Mapping[str, _Layer]:
        """The layers with seeds, by name."""

    def on_growth(self, callback: GrowthCallback) -> Callable[[], None]:
        """Call ``callback(event, layer_name, seed_idx, parameters)`` when a seed's parameters come or go."""


_BY_OPTIMIZER: weakref.WeakKeyDictionary[Optimizer, list[Attachment]] = weakref.WeakKeyDictionary()
_BY_MODEL: weakref.WeakKeyDictionary[GrowingModel, list[weakref.ref[Attachment]]] = weakref.WeakKeyDictionary()
#: Where the parameters were in an optimizer's groups before the first attachment: by id.
_PLACES: weakref.WeakKeyDictionary[Optimizer, dict[int, Place]] = weakref.WeakKeyDictionary()


def attach(
    optimizer: Optimizer,
    model: GrowingModel,
    *,
    lr: float | None = None,
    layers: Container[str] | None = None,
    schedulers: Sequence[LRScheduler] | None = None,
    **group_options: Any,
) -> Attachment:
    """Let the parameters of seeds join and leave ``optimizer`` as ``model`` grows and shrinks.

    A seed's parameters form one parameter group, tagged ``group["esper_seed"] = "<layer>#<index>"``. It inherits every
    option of the optimizer's first group, the learning rate a scheduler has arrived at included, except what ``lr`` and
    ``group_options`` say. Seeds that are awake already join at once. Attaching the same pair again returns the first
    attachment, changes nothing else, and never makes a duplicate.

    With several optimizers attached to one model, a seed goes to those that train its host layer's own parameters; the
    seeds of a host without parameters (an activation), or of one that no attached optimizer trains, go to the first.

    ``optimizer.load_state_dict`` matches groups of seeds by their tag, so the order in which seeds were woken does not
    matter; a state whose seeds are not those of the model is refused with their names. What it brings for a parameter
    is laid out in memory as the parameter is, whatever file format it went through.

    Reserved memory that the optimizer trained while it slept goes back to its place when the seed is culled.

    Args:
        optimizer: Any optimizer of ``torch.optim`` with parameter groups (not LBFGS, which has one group only), or one
            around it, such as accelerate's.
        model: The wrapped model.
        lr: Base learning rate of the new groups. A scheduler that is under way applies its current factor to it. None
            inherits the first group's.
        layers: Names of the layers whose seeds join; None leaves it to the rule above.
        schedulers: Schedulers of this optimizer, to be kept in step. None finds them: they are looked for among the
            objects the garbage collector knows, whenever a seed joins or leaves an optimizer that has been scheduled
            (some 10 ms each time). Naming them spares that.
        **group_options: Options of the new groups, such as ``weight_decay=0.0``.

    Returns:
        The attachment; it needs not be kept, and :meth:`Attachment.detach` ends it.

    Raises:
        TypeError: if ``optimizer`` is not a ``torch.optim.Optimizer``, or ``model`` is not one that can grow.
        ValueError: if the optimizer cannot take further groups, ``lr`` is negative or not finite, or an option is
            unknown.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if not hasattr(model, "on_growth"):
        raise TypeError(f"model is a {type(model).__name__}; expected what esper.wrap gave")
    optimizer = innermost(optimizer)
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS keeps all parameters in one group and cannot take new ones; use SGD, AdamW or another")
    if lr is not None and not 0.0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r}: expected a finite learning rate of at least 0")
    check_options(optimizer, group_options)
    for existing in _BY_OPTIMIZER.get(optimizer, []):
        if existing.model is model:
            return existing
    _warn_of_another_model(optimizer, model)
    _PLACES.setdefault(optimizer, places_of(optimizer))
    attachment = Attachment(optimizer, model, lr=lr, layers=layers, schedulers=schedulers, options=group_options)
    _BY_OPTIMIZER.setdefault(optimizer, []).append(attachment)
    _BY_MODEL.setdefault(model, []).append(weakref.ref(attachment))
    attachment._adopt_awake_seeds()
    return attachment


class Attachment:
    """The bond between one optimizer and one model, made by :func:`attach`; it lives as long as both of them."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: GrowingModel,
        *,
        lr: float | None,
        layers: Container[str] | None,
        schedulers: Sequence[LRScheduler] | None,
        options: Mapping[str, Any],
    ) -> None:
        """Use :func:`attach`."""
        self.lr = lr
        self.layers = layers
        self.options = dict(options)
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self._schedulers: list[weakref.ref[LRScheduler]] | None = None
        if schedulers is not None:
            self._schedulers = [weakref.ref(scheduler) for scheduler in schedulers]
        self._load_hooks = (
            optimizer.register_load_state_dict_pre_hook(match_groups_by_seed),
            optimizer.register_load_state_dict_post_hook(lay_out_as_parameters),
        )
        self._follower = weakref.ref(_Follower(self, model))
        weakref.finalize(optimizer, _stop, self._follower).atexit = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None when it is gone."""
        return self._optimizer()

    @property
    def model(self) -> GrowingModel | None:
        """The model, or None when it is gone."""
        return self._model()

    def detach(self) -> None:
        """Stop following the model. Groups that have joined stay; calling it again does nothing."""
        _stop(self._follower)
        for hook in self._load_hooks:
            hook.remove()
        optimizer, model = self.optimizer, self.model
        if optimizer is not None and self in _BY_OPTIMIZER.get(optimizer, []):
            _BY_OPTIMIZER[optimizer].remove(self)
        if model is not None and model in _BY_MODEL:
            _BY_MODEL[model] = [ref for ref in _BY_MODEL[model] if ref() not in (None, self)]

    def _adopt_awake_seeds(self) -> None:
        model = self.model
        assert model is not None
        for name, layer in model.kasmina_layers.items():
            for seed_idx in layer.grafts.bound:
                self._bound(name, seed_idx, layer.grafts.seed_parameters(seed_idx))

    def _on_growth(self, event: GrowthEvent, layer: str, seed_idx: int, parameters: Mapping[str, nn.Parameter]) -> None:
        if event == "bound":
            if (optimizer := self.optimizer) is not None:
                # Reserved memory may have been stepped while it slept: its zeros have counted steps, and a count that
                # is ahead of its moments makes the first updates too large.
                for parameter in parameters.values():
                    optimizer.state.pop(parameter, None)
            self._bound(layer, seed_idx, parameters)
        else:
            self._unbound(layer, parameters)

    def _bound(self, layer: str, seed_idx: int, parameters: Mapping[str, nn.Parameter]) -> None:
        optimizer = self.optimizer
        if optimizer is None or not self._claims(layer, parameters):
            return
        template = optimizer.param_groups[0]
        mixed = untagged_group_of(optimizer, parameters.values())
        if mixed is not None:
            # The optimizer was built over all parameters of a model that had grown already. In a group of their own
            # they can leave later, and a saved optimizer state finds them whatever the order of the parameters.
            template = mixed
            drop_from_groups(optimizer, parameters.values())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [(name, p) for name, p in parameters.items() if id(p) not in held]
        if not new:
            return
        before = len(optimizer.param_groups)
        group, ratio = self._new_group(template, f"{layer}#{seed_idx}")
        named = "param_names" in template
        group["params"] = [(f"{layer}#{seed_idx}.{name}", p) for name, p in new] if named else [p for _, p in new]
        optimizer.add_param_group(group)
        for scheduler in self._live_schedulers(optimizer):
            extend_lists(scheduler, before, ratio)

    def _unbound(self, layer: str, parameters: Mapping[str, nn.Parameter]) -> None:
        optimizer, model = self.optimizer, self.model
        if optimizer is None or model is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [p for p in parameters.values() if id(p) in held]
        for parameter in mine:
            optimizer.state.pop(parameter, None)
        before = len(optimizer.param_groups)
        emptied = drop_from_groups(optimizer, mine)
        # Reserved memory outlives its seeds. An optimizer made anew over the model has all of it in its groups, and one
        # that has trained for long must look the same, or neither could load the other's state.
        lasting = {id(p) for p in model.kasmina_layers[layer].grafts.parameters()}
        places = _PLACES[optimizer]
        put_back(optimizer, [p for p in mine if id(p) in lasting], places)
        for parameter in mine:
            if id(parameter) not in lasting:
                places.pop(id(parameter), None)
        if not emptied:
            return
        for index in reversed(emptied):
            del optimizer.param_groups[index]
        for scheduler in self._live_schedulers(optimizer):
            shrink_lists(scheduler, before, emptied)

    def _claims(self, layer: str, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this optimizer is the one that trains the seed (see :func:`attach` for the rule)."""
        if self.layers is not None:
            return layer in self.layers
        rivals = [other for other in _attachments_of(self.model) if other.layers is None]
        if len(rivals) <= 1:
            return True
        owners = [a for a in rivals if a._holds(parameters.values())] or [a for a in rivals if a._trains_host(layer)]
        return self in owners if owners else rivals[0] is self

    def _trains_host(self, layer: str) -> bool:
        model = self.model
        assert model is not None
        return self._holds(model.kasmina_layers[layer].default_transform.parameters())

    def _holds(self, parameters: Iterable[nn.Parameter]) -> bool:
        optimizer = self.optimizer
        if optimizer is None:
            return False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for p in parameters)

    def _new_group(self, template: Mapping[str, Any], tag: str) -> tuple[dict[str, Any], float]:
        """Options of a new group, and its learning rate as a multiple of the template's."""
        group = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in template.items()
            if key not in ("params", "param_names", SEED_KEY)
        }
        ratio = 1.0
        if self.lr is not None:
            base = float(template.get("initial_lr", template["lr"]))
            if base > 0.0:
                ratio = self.lr / base
                for key in _RATE_OPTIONS:
                    if key in group:
                        group[key] = group[key] * ratio
            elif "initial_lr" not in template:
                group["lr"] = self.lr
        return {**group, **self.options, SEED_KEY: tag}, ratio

    def _live_schedulers(self, optimizer: Optimizer) -> list[LRScheduler]:
        if self._schedulers is not None:
            return [scheduler for ref in self._schedulers if (scheduler := ref()) is not None]
        # Every scheduler but ReduceLROnPlateau writes initial_lr into the groups. That one mends its list by itself,
        # unless it was given one floor per group; it then says so, and needs to be named in `schedulers`.
        if all("initial_lr" not in group for group in optimizer.param_groups):
            return []
        return list(find_schedulers(optimizer))


class _Follower:
    """The callback. The model holds it, it holds the way out; towards the optimizer there are weak references only.

    So a model keeps no optimizer alive and an optimizer no model.
    """

    def __init__(self, attachment: Attachment, model: GrowingModel) -> None:
        self._attachment = weakref.ref(attachment)
        self.stop = model.on_growth(self)

    def __call__(self, event: GrowthEvent, layer: str, seed_idx: int, parameters: dict[str, nn.Parameter]) -> None:
        attachment = self._attachment()
        if attachment is not None:
            attachment._on_growth(event, layer, seed_idx, parameters)


def _stop(follower_ref: weakref.ref[_Follower]) -> None:
    follower = follower_ref()
    if follower is not None:
        follower.stop()


def _attachments_of(model: GrowingModel | None) -> list[Attachment]:
    refs = _BY_MODEL.get(model, []) if model is not None else []
    return [attachment for ref in refs if (attachment := ref()) is not None and attachment.optimizer is not None]


def _warn_of_another_model(optimizer: Optimizer, model: GrowingModel) -> None:
    trainable = {id(p) for p in getattr(model, "parameters", list)() if p.requires_grad}
    # Seeds that are awake join right away.
    trainable -= {id(p) for layer in model.kasmina_layers.values() for p in layer.grafts.parameters()}
    if trainable and trainable.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
        warnings.warn(
            "the optimizer has no parameter of this model, so it trains none of what the model is now. esper.wrap "
            "copies the network unless preserve_original=False is given: make the optimizer from model.parameters()",
            stacklevel=3,
        )
