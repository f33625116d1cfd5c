"""The parameter groups of an optimizer: those of seeds, which come and go, among those that somebody else made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.optim.schedulers import find_schedulers, reorder_lists

__all__ = [
    "SEED_KEY",
    "Place",
    "check_options",
    "drop_from_groups",
    "innermost",
    "lay_out_as_parameters",
    "match_groups_by_seed",
    "places_of",
    "put_back",
    "untagged_group_of",
]

#: Key in a parameter group that names the seed whose parameters it holds: ``"<layer>#<seed index>"``.
SEED_KEY = "esper_seed"


@dataclass(frozen=True)
class Place:
    """A parameter's place in an optimizer: which of the groups that are no seed's, where in it, and its name there."""

    group: int
    position: int
    name: str | None


def check_options(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for options that no group of this optimizer has."""
    known = set(optimizer.param_groups[0]) - {"params", "param_names", "initial_lr", SEED_KEY}
    unknown = sorted(set(options) - known)
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"{type(optimizer).__name__} has no group option {names}; it has {', '.join(sorted(known))}")


def untagged_group_of(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> dict[str, Any] | None:
    """A group not made here that holds some of ``parameters`` among others, or None."""
    wanted = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        inside = [id(p) in wanted for p in group["params"]]
        if SEED_KEY not in group and any(inside) and not all(inside):
            return group
    return None


def drop_from_groups(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[int]:
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


def places_of(optimizer: Optimizer) -> dict[int, Place]:
    """Where the parameters are in the groups that are no seed's, by id."""
    places = {}
    for number, group in enumerate(_plain_groups(optimizer)):
        names = group.get("param_names") or [None] * len(group["params"])
        for position, (parameter, name) in enumerate(zip(group["params"], names, strict=True)):
            places[id(parameter)] = Place(number, position, name)
    return places


def _plain_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups that no attachment made."""
    return [group for group in optimizer.param_groups if SEED_KEY not in group]


def put_back(optimizer: Optimizer, parameters: Iterable[nn.Parameter], places: Mapping[int, Place]) -> None:
    """Give ``parameters`` the places they had, from :func:`places_of`; those that had none stay out."""
    groups = _plain_groups(optimizer)
    for parameter in parameters:
        place = places.get(id(parameter))
        if place is None or place.group >= len(groups):
            continue
        group = groups[place.group]
        after = [
            i
            for i, other in enumerate(group["params"])
            if id(other) in places and places[id(other)].position > place.position
        ]
        at = after[0] if after else len(group["params"])
        group["params"].insert(at, parameter)
        if "param_names" in group:
            group["param_names"].insert(at, place.name)


def innermost(optimizer: Optimizer) -> Optimizer:
    """What an optimizer around another one (accelerate's) hands on to: groups, state and hooks are its."""
    inner = getattr(optimizer, "optimizer", None)
    return innermost(inner) if isinstance(inner, Optimizer) else optimizer


def match_groups_by_seed(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load-time hook: bring the optimizer's groups into the saved order, seeds by tag and the rest in sequence.

    Not the other way round: schedulers load what they keep of each group by its place.
    """
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
    if len(saved_groups) != len(tags):
        return None  # another number of plain groups, which torch refuses in its own words
    places: dict[str | None, list[int]] = {}
    for place, tag in enumerate(tags):
        places.setdefault(tag, []).append(place)
    order = [places[group.get(SEED_KEY)].pop(0) for group in saved_groups]
    if order != sorted(order):
        optimizer.param_groups[:] = [optimizer.param_groups[place] for place in order]
        for scheduler in find_schedulers(optimizer):
            reorder_lists(scheduler, order)
    return None


def lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Load-time hook: let what is kept beside a parameter lie in memory as the parameter does.

    Fused optimizers walk both from end to end, and many file formats know no strides.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for key, value in kept.items():
                same = type(value) is torch.Tensor and value.shape == parameter.shape
                if same and value.stride() != parameter.stride():
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
