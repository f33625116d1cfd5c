"""The life of a seed: its states, the legal transitions between them, and the error for the others."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from esper.ops.lattice import table

__all__ = ["AWAKE", "TIMED", "TRANSITIONS", "LifecycleError", "SeedLifecycleState", "is_legal"]


class SeedLifecycleState(IntEnum):
    """Where a seed stands. The numbers are those of the ``lifecycle_states`` tensor."""

    DORMANT = table.DORMANT
    LOADING = table.LOADING
    ACTIVE = table.ACTIVE
    ERROR_RECOVERY = table.ERROR_RECOVERY
    FOSSILIZED = table.FOSSILIZED
    GRAFTING = table.GRAFTING
    TRAINING = table.TRAINING
    CULLED = table.CULLED


def _members(bits: int) -> frozenset[SeedLifecycleState]:
    return frozenset(state for state in SeedLifecycleState if bits >> state & 1)


#: What may follow each state; read from the one table in :mod:`esper.ops.lattice.table`.
TRANSITIONS: Mapping[SeedLifecycleState, frozenset[SeedLifecycleState]] = MappingProxyType(
    {state: _members(table.TRANSITIONS[state]) for state in SeedLifecycleState}
)

#: States in which the seed's kernel is bound and runs.
AWAKE: frozenset[SeedLifecycleState] = _members(table.AWAKE)

#: States that ``state_timer`` ends, and what follows them.
TIMED: Mapping[SeedLifecycleState, SeedLifecycleState] = MappingProxyType(
    {
        SeedLifecycleState.TRAINING: SeedLifecycleState.ACTIVE,
        SeedLifecycleState.CULLED: SeedLifecycleState.DORMANT,
    }
)


class LifecycleError(ValueError):
    """A transition that the table does not allow. Nothing was changed."""


def is_legal(old: SeedLifecycleState, new: SeedLifecycleState) -> bool:
    """Whether a seed may go from ``old`` to ``new``. No state may follow itself."""
    return table.legal(old, new)
