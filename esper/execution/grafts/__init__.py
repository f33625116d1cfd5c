"""Grafts: the awake seeds of a layer, blended into it. :class:`GraftSet` is what a layer holds."""

from esper.execution.grafts.bound import SeedState
from esper.execution.grafts.graft_set import GraftSet
from esper.execution.grafts.reservation import Reservation, ReservationError
from esper.execution.grafts.reserved import ReservedGraftSet
from esper.ops.graft.layout import BlendLayout, Place, chunk_span

__all__ = [
    "BlendLayout",
    "GraftSet",
    "Place",
    "Reservation",
    "ReservationError",
    "ReservedGraftSet",
    "SeedState",
    "chunk_span",
]
