"""Learning-rate schedulers of an optimizer whose groups come and go."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["extend_lists", "find_schedulers", "reorder_lists", "shrink_lists"]

#: Per-group lists that schedulers keep beside ``optimizer.param_groups``; the first kind scales with the learning rate.
_RATE_LISTS = ("base_lrs", "max_lrs", "_last_lr")
_PLAIN_LISTS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")


def find_schedulers(optimizer: Optimizer) -> Iterator[LRScheduler]:
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
                found = [owner] if issubclass(type(owner), LRScheduler) else find_schedulers(cast(Optimizer, owner))
                yield from cast(Iterable[LRScheduler], found)


def extend_lists(scheduler: LRScheduler, groups_before: int, ratio: float) -> None:
    """One group more: its rates are the first group's times ``ratio``."""
    for name in (*_RATE_LISTS, *_PLAIN_LISTS):
        values = getattr(scheduler, name, None)
        if not isinstance(values, (list, tuple)) or len(values) != groups_before:
            continue
        first = values[0]
        if isinstance(first, torch.Tensor):
            first = first.clone()
        setattr(scheduler, name, [*values, first * ratio if name in _RATE_LISTS else first])


def reorder_lists(scheduler: LRScheduler, order: Sequence[int]) -> None:
    """Let group i be the one that was ``order[i]``."""
    for name in (*_RATE_LISTS, *_PLAIN_LISTS):
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and len(values) == len(order):
            setattr(scheduler, name, [values[place] for place in order])


def shrink_lists(scheduler: LRScheduler, groups_before: int, removed: Container[int]) -> None:
    """Without the groups whose indices are in ``removed``."""
    for name in (*_RATE_LISTS, *_PLAIN_LISTS):
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and len(values) == groups_before:
            setattr(scheduler, name, [value for index, value in enumerate(values) if index not in removed])
