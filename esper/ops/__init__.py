"""Operations: one schema each, several backends, one registry that picks.

Importing the package declares every family's operations.
"""

from esper.ops import lattice, stats

__all__ = ["lattice", "stats"]
