"""The seed state machine as data: which state may follow which, and what the device does on its own.

This is the one copy that Python reads. The Triton kernels get it as compile-time constants; the C++ and CUDA library
has its numbers compiled in, and :mod:`esper.ops.lattice.cpu` refuses a library whose numbers differ from these.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ACTIVE",
    "AWAKE",
    "CULLED",
    "DORMANT",
    "ERROR_RECOVERY",
    "FOSSILIZED",
    "GRAFTING",
    "HEALTH_RATE",
    "LOADING",
    "MAX_FAULTS",
    "TIMED",
    "TRAINING",
    "TRANSITIONS",
    "legal",
]

DORMANT: Final = 0
LOADING: Final = 1
ACTIVE: Final = 2
ERROR_RECOVERY: Final = 3
FOSSILIZED: Final = 4
GRAFTING: Final = 5
TRAINING: Final = 6
CULLED: Final = 7


def _bits(*states: int) -> int:
    return sum(1 << state for state in states)


#: Bit t of entry s: a seed in state s may go to state t.
TRANSITIONS: Final[tuple[int, ...]] = (
    _bits(LOADING, ACTIVE, GRAFTING, TRAINING, ERROR_RECOVERY),  # DORMANT
    _bits(DORMANT, ACTIVE, GRAFTING, TRAINING, ERROR_RECOVERY),  # LOADING
    _bits(DORMANT, GRAFTING, TRAINING, FOSSILIZED, CULLED, ERROR_RECOVERY),  # ACTIVE
    _bits(DORMANT, LOADING, CULLED),  # ERROR_RECOVERY
    _bits(ERROR_RECOVERY),  # FOSSILIZED
    _bits(DORMANT, ACTIVE, TRAINING, FOSSILIZED, CULLED, ERROR_RECOVERY),  # GRAFTING
    _bits(DORMANT, ACTIVE, GRAFTING, FOSSILIZED, CULLED, ERROR_RECOVERY),  # TRAINING
    _bits(DORMANT),  # CULLED
)

#: States in which the seed's kernel is bound and runs.
AWAKE: Final = _bits(ACTIVE, FOSSILIZED, GRAFTING, TRAINING)

#: States that a timer ends, and what follows: bit set, and the successor by state.
TIMED: Final = _bits(TRAINING, CULLED)

#: Faults in a row that send an awake seed to ERROR_RECOVERY.
MAX_FAULTS: Final = 3

#: Share of a new sample in the exponential mean of health (rounded to float32 where it is used).
HEALTH_RATE: Final = 0.1


def legal(old: int, new: int) -> bool:
    """Whether the table lets a seed go from state ``old`` to state ``new``."""
    return bool(TRANSITIONS[old] >> new & 1)
