"""Optimizers that follow a growing network.

:func:`attach` binds a ``torch.optim`` optimizer to a wrapped model. From then on every seed that wakes joins the
optimizer as one parameter group of its own, and every seed that is culled leaves it together with its state. What the
optimizer had learnt about all other parameters (momenta, second moments, step counts) is not touched, and learning-rate
schedulers that were built for fewer groups are brought along.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Attachment", "GrowingModel", "attach"]

#: Key in a parameter group that names the seed whose parameters it holds: ``"<layer>#<seed index>"``.
SEED_KEY = "esper_seed"

#: Per-group lists that schedulers keep beside ``optimizer.param_groups``; the first kind scales with the learning rate.
_RATE_LISTS = ("base_lrs", "max_lrs", "_last_lr")
_PLAIN_LISTS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")

#: Group options measured in learning rates, which a rate of one's own rescales (OneCycleLR and SWALR keep theirs here).
_RATE_OPTIONS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


GrowthEvent = Literal["bound", "unbound"]
GrowthCallback = Callable[[GrowthEvent, str, int, dict[str, nn.Parameter]], None]


class _Grafts(Protocol):
    @property
    def bound(self) -> Iterable[int]:
        """Seeds that are awake."""

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
    matter; a state whose seeds are not those of the model is refused with their names.

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
    optimizer = _innermost(optimizer)
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS keeps all parameters in one group and cannot take new ones; use SGD, AdamW or another")
    if lr is not None and not 0.0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r}: expected a finite learning rate of at least 0")
    _check_options(optimizer, group_options)
    for existing in _BY_OPTIMIZER.get(optimizer, []):
        if existing.model is model:
            return existing
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
        self._load_hook = optimizer.register_load_state_dict_pre_hook(_match_groups_by_seed)
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
        self._load_hook.remove()
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
            self._unbound(parameters)

    def _bound(self, layer: str, seed_idx: int, parameters: Mapping[str, nn.Parameter]) -> None:
        optimizer = self.optimizer
        if optimizer is None or not self._claims(layer, parameters):
            return
        template = optimizer.param_groups[0]
        mixed = _untagged_group_of(optimizer, parameters.values())
        if mixed is not None:
            # The optimizer was built over all parameters of a model that had grown already. In a group of their own
            # they can leave later, and a saved optimizer state finds them whatever the order of the parameters.
            template = mixed
            _drop_from_groups(optimizer, parameters.values())
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
            _extend_lists(scheduler, before, ratio)

    def _unbound(self, parameters: Mapping[str, nn.Parameter]) -> None:
        optimizer = self.optimizer
        if optimizer is None:
            return
        for parameter in parameters.values():
            optimizer.state.pop(parameter, None)
        before = len(optimizer.param_groups)
        emptied = _drop_from_groups(optimizer, parameters.values())
        if not emptied:
            return
        for index in reversed(emptied):
            del optimizer.param_groups[index]
        for scheduler in self._live_schedulers(optimizer):
            _shrink_lists(scheduler, before, emptied)

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
        return list(_find_schedulers(optimizer))


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


def _check_options(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    known = set(optimizer.param_groups[0]) - {"params", "param_names", "initial_lr", SEED_KEY}
    unknown = sorted(set(options) - known)
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"{type(optimizer).__name__} has no group option {names}; it has {', '.join(sorted(known))}")


def _untagged_group_of(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> dict[str, Any] | None:
    """A group not made here that holds some of ``parameters`` among others, or None."""
    wanted = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        inside = [id(p) in wanted for p in group["params"]]
        if SEED_KEY not in group and any(inside) and not all(inside):
            return group
    return None


def _drop_from_groups(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[int]:
    """Take ``parameters`` out of their groups; return the indices of seeds' groups that this left empty, ascending."""
    gone = {id(p) for p in parameters}
    emptied: list[int] = []
    for index, group in enumerate(optimizer.param_groups):
        keep = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        if len(keep) == len(group["params"]):
            continue
        group["params"] = [group["params"][i] for i in keep]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][i] for i in keep]
        if not keep and SEED_KEY in group:
            emptied.append(index)
    return emptied


def _find_schedulers(optimizer: Optimizer) -> Iterator[LRScheduler]:
    """Every live scheduler of ``optimizer``: torch keeps no reference from an optimizer to its schedulers."""
    seen: set[int] = set()
    for referrer in gc.get_referrers(optimizer):
        owners = [referrer]
        # Once a scheduler's __dict__ has been asked for, the dict and not the scheduler refers to the optimizer.
        if type(referrer) is dict and referrer.get("optimizer") is optimizer:
            owners = gc.get_referrers(referrer)
        for owner in owners:
            # type(), not isinstance(): lazy proxies among these objects would otherwise resolve themselves.
            if not issubclass(type(owner), (LRScheduler, Optimizer)) or id(owner) in seen:
                continue
            if getattr(owner, "optimizer", None) is optimizer:
                seen.add(id(owner))
                # An optimizer around this one has schedulers of its own over the same groups.
                found = [owner] if issubclass(type(owner), LRScheduler) else _find_schedulers(cast(Optimizer, owner))
                yield from cast(Iterable[LRScheduler], found)


def _innermost(optimizer: Optimizer) -> Optimizer:
    """What an optimizer around another one (accelerate's) hands on to: groups, state and hooks are its."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, Optimizer) else optimizer


def _extend_lists(scheduler: LRScheduler, groups_before: int, ratio: float) -> None:
    for name in (*_RATE_LISTS, *_PLAIN_LISTS):
        values = getattr(scheduler, name, None)
        if not isinstance(values, (list, tuple)) or len(values) != groups_before:
            continue
        first = values[0]
        if isinstance(first, torch.Tensor):
            first = first.clone()
        setattr(scheduler, name, [*values, first * ratio if name in _RATE_LISTS else first])


def _shrink_lists(scheduler: LRScheduler, groups_before: int, removed: Container[int]) -> None:
    for name in (*_RATE_LISTS, *_PLAIN_LISTS):
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and len(values) == groups_before:
            setattr(scheduler, name, [value for index, value in enumerate(values) if index not in removed])


def _match_groups_by_seed(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load-time hook: bring the saved groups into the optimizer's own order, seeds by tag and the rest in sequence."""
    saved_groups: list[dict[str, Any]] = state["param_groups"]
    saved: dict[str, list[dict[str, Any]]] = {}
    for group in saved_groups:
        if SEED_KEY in group:
            saved.setdefault(group[SEED_KEY], []).append(group)
    tags = [group.get(SEED_KEY) for group in optimizer.param_groups]
    # One optimizer may follow two models with layers of one name; equal tags then keep their sequence.
    missing = [tag for tag in tags if tag is not None and len(saved.get(tag, [])) < tags.count(tag)]
    surplus = [tag for tag, groups in saved.items() if len(groups) > tags.count(tag)]
    if missing or surplus:
        raise ValueError(
            "this optimizer state belongs to a model with other seeds awake: "
            + "; ".join(
                text
                for text in (
                    f"it has none for {', '.join(missing)}" if missing else "",
                    f"it has {', '.join(surplus)}, which the model has not" if surplus else "",
                )
                if text
            )
            + ". Rebuild the grown model first (esper.load), then attach, then load the optimizer's state."
        )
    rest = iter([group for group in saved_groups if SEED_KEY not in group])
    ordered = [saved[tag].pop(0) if tag is not None else next(rest, None) for tag in tags]
    # A different number of plain groups is left for torch to refuse in its own words.
    return {**state, "param_groups": [group for group in ordered if group is not None] + list(rest)}
