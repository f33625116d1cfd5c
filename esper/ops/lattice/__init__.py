"""Operations on the state of all seeds of a model: step, compaction, snapshot and checksum.

The semantics are in ``docs/lattice.md``; every backend gives the same bits.
"""

from esper.ops.lattice.layout import ALIGN, FIELDS, PERSISTENT, Layout, layout_of, views
from esper.ops.lattice.schema import lattice_compact, lattice_crc, lattice_snapshot, lattice_step

from . import cpu, cuda, reference, triton  # noqa: F401  (each registers its backend)

__all__ = [
    "ALIGN",
    "FIELDS",
    "PERSISTENT",
    "Layout",
    "lattice_compact",
    "lattice_crc",
    "lattice_snapshot",
    "lattice_step",
    "layout_of",
    "views",
]
