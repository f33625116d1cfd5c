"""The lattice operations: what they take, what they give. One launch each for all seeds of a model.

``storage`` is the uint8 buffer of :mod:`esper.ops.lattice.layout`, contiguous, its address a multiple of 16. None of
these is called inside a model's forward, so none has a shape function.
"""

from __future__ import annotations

from esper.ops import registry

__all__ = ["lattice_compact", "lattice_crc", "lattice_snapshot", "lattice_step"]

lattice_step = registry.define(
    "lattice_step",
    "(Tensor(a!) storage, int rows, int epoch) -> int",
    doc="moves every seed by one step; returns how many changed state, or -1 where asking would wait for the device",
)

lattice_compact = registry.define(
    "lattice_compact",
    "(Tensor storage, int rows, Tensor(a!) indices, Tensor(b!) count) -> ()",
    doc="writes the ascending rows of awake seeds to indices[rows] (int32, -1 behind them), their number to count[1]",
)

lattice_snapshot = registry.define(
    "lattice_snapshot",
    "(Tensor storage, int rows, Tensor(a!) out) -> ()",
    doc="copies the persistent fields to a (pinned) host buffer, asynchronously where the device allows",
)

lattice_crc = registry.define(
    "lattice_crc",
    "(Tensor storage, int rows) -> int",
    doc="CRC-32C of the persistent fields; waits for the device",
)
