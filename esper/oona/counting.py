"""Numbers of what happened, counted from any thread."""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["NAMES", "Counters"]

NAMES: Final = (
    "published",  # accepted by the bus
    "publish_failures",  # messages of calls to publish that raised
    "delivered",  # handed out to a consumer of ours
    "redelivered",  # of these, handed out before
    "acknowledged",  # were on the group's list
    "dead_letters",  # put among the dead letters, and acknowledged
    "dead_letters_refused",  # could not be put there: left pending, to be tried again
    "vanished",  # trimmed or deleted while they were pending: nobody will see them again
    "skipped",  # entries that are no messages, met outside a group
    "groups_recreated",  # groups that were gone and were made anew
    "retries",  # tries after the first, of calls that met no server
)


class Counters:
    """Counts by name."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(NAMES, 0)
        self._lock = threading.Lock()

    def add(self, name: str, by: int = 1) -> None:
        """Count ``by`` more."""
        with self._lock:
            self._counts[name] += by

    def snapshot(self) -> dict[str, int]:
        """A copy."""
        with self._lock:
            return dict(self._counts)

    def after_fork(self) -> None:
        """A child's copy of a lock may be held by a thread that it does not have."""
        self._lock = threading.Lock()
