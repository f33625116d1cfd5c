"""Counting messages so that nothing is lost in silence.

produced = delivered + spooled + dropped + in flight. Each number has one thread that writes it, so none needs a lock;
who reads while both run sees some message a moment late as in flight, never one twice.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Counts"]


class Counts:
    """Messages of one process and one model.

    Attributes:
        produced_windows: Health messages of captured windows; written by the training thread.
        produced_events: Events and outcomes; written under the publisher's own rules.
        dropped_early: Given up before they reached the sender: the queue was full; written by the training thread.
        windows_dropped_early: Whole windows among these; each cost every layer one.
        delivered: Accepted by the bus.
        spooled: On disk now, of this process's own.
        dropped_late: Given up by the sender: the spool was full or could not be written, or a message was refused.
        recovered: Accepted by the bus, of those that an earlier process left.
        recovered_dropped: Given up, of those.
        layers_dropped: Windows given up by the sender, by number of the layer.
        events_dropped_early: Events given up before they reached the sender; written by the training thread.
        events_dropped_late: Events given up by the sender.
    """

    __slots__ = (
        "delivered",
        "dropped_early",
        "dropped_late",
        "events_dropped_early",
        "events_dropped_late",
        "layers_dropped",
        "produced_events",
        "produced_windows",
        "recovered",
        "recovered_dropped",
        "spooled",
        "windows_dropped_early",
    )

    def __init__(self, layers: int) -> None:
        self.produced_windows = 0
        self.produced_events = 0
        self.dropped_early = 0
        self.windows_dropped_early = 0
        self.delivered = 0
        self.spooled = 0
        self.dropped_late = 0
        self.recovered = 0
        self.recovered_dropped = 0
        self.layers_dropped = [0] * layers
        self.events_dropped_early = 0
        self.events_dropped_late = 0

    @property
    def events_dropped(self) -> int:
        """Events given up so far."""
        return self.events_dropped_early + self.events_dropped_late

    def dropped_windows(self, layer: int) -> int:
        """Windows of a layer given up so far."""
        return self.windows_dropped_early + self.layers_dropped[layer]

    def snapshot(self) -> dict[str, Any]:
        """produced, delivered, spooled, dropped, in_flight, recovered, recovered_dropped."""
        # Ends first, the beginning last, and what is spooled between them: what moves on meanwhile is in flight.
        delivered, dropped = self.delivered, self.dropped_early + self.dropped_late
        spooled = self.spooled
        produced = self.produced_windows + self.produced_events
        return {
            "produced": produced,
            "delivered": delivered,
            "spooled": spooled,
            "dropped": dropped,
            "in_flight": produced - delivered - spooled - dropped,
            "recovered": self.recovered,
            "recovered_dropped": self.recovered_dropped,
        }
