"""Operations: one schema each, several backends, one registry that picks.

Importing the package declares every family's operations.
"""

from esper.ops import graft, lattice, linear, stats

__all__ = ["graft", "lattice", "linear", "stats"]
