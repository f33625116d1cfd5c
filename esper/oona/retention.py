"""When to trim which stream, as a side effect of publishing to it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

from esper.oona.commands import Trim
from esper.oona.settings import Retention

__all__ = ["Trimmer"]

#: Old entries are looked for so often, for each stream.
_AGE_EVERY_S: Final = 30.0
#: Weight of the newest message in the average of their sizes.
_WEIGHT: Final = 0.1


class Trimmer:
    """Keeps the average size of a stream's messages, and the server's clock as its entry ids show it."""

    def __init__(self, retention: Mapping[str, Retention]) -> None:
        self._retention = retention
        self._mean: dict[str, float] = {}
        self._newest_ms: dict[str, int] = {}
        self._next: dict[str, float] = {}

    def max_length(self, stream: str, size: int) -> int | None:
        """What the length of ``stream`` is to be bounded by when a message of ``size`` bytes is added."""
        kept = self._retention.get(stream)
        if kept is None:
            return None
        mean = self._mean.get(stream, float(size))
        self._mean[stream] = mean = mean + _WEIGHT * (size - mean)
        bounds = [] if kept.max_length is None else [kept.max_length]
        if kept.max_bytes is not None:
            bounds.append(max(1, int(kept.max_bytes / mean)))
        return min(bounds, default=None)

    def published(self, stream: str, entry_id: str) -> None:
        """``entry_id`` was the server's answer."""
        self._newest_ms[stream] = int(entry_id.partition("-")[0])

    def due(self, streams: Sequence[str]) -> list[Trim]:
        """What to send along with a publication to ``streams``."""
        now = time.monotonic()
        trims = []
        for stream in dict.fromkeys(streams):
            kept = self._retention.get(stream)
            newest = self._newest_ms.get(stream)
            if kept is None or kept.max_age_s is None or newest is None or now < self._next.get(stream, 0.0):
                continue
            self._next[stream] = now + min(_AGE_EVERY_S, kept.max_age_s)
            trims.append(Trim(stream, min_id=f"{max(0, newest - int(kept.max_age_s * 1000))}-0"))
        return trims
