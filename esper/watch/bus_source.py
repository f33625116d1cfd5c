"""The bus as a source: what it kept of the last minutes, then what comes.

Reading is without a group: watchers take nothing from anybody, and leave nothing behind on the server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Final

from esper.contracts.bus import Delivery
from esper.contracts.errors import BusError
from esper.contracts.messages import TopicNames
from esper.oona import Follower, OonaClient
from esper.oona.entries import order_of
from esper.watch.decode import TOPICS, decode
from esper.watch.facts import Fact, Unreadable, clean
from esper.watch.recording import Recorder
from esper.watch.watcher import ReplayClock, Watcher

__all__ = ["BEHIND_S", "HISTORY_S", "BusSource"]

#: Entries of each stream in one answer; the largest message has a megabyte.
_COUNT: Final = 64
_BLOCK_MS: Final = 250
#: The stream of windows is read on from its end when reading is so far behind it, by the bus's clock: whoever watches
#: wants to see what is, and windows are states, of which the latest tells all.
BEHIND_S: Final = 5.0
#: How long it may take to read what the bus kept.
HISTORY_S: Final = 5.0
_LOOK_S: Final = 1.0
_RETRY_S: Final = 0.5
_LAST_READS: Final = 16

_HEALTH: Final = TopicNames.TELEMETRY_SEED_HEALTH.value


class BusSource:
    """Reads a bus.

    Args:
        bus: Its client.
        since_s: How much of what the bus kept is read first, seconds by this machine's clock; None begins with
            what is new.
        follow: Go on after that; else end, after at most ``patience_s`` seconds if nothing was there.
        patience_s: As said.
        recorder: Gets every message.
    """

    live = True
    replay: ReplayClock | None = None

    def __init__(
        self,
        bus: OonaClient,
        *,
        since_s: float | None = 300.0,
        follow: bool = True,
        patience_s: float = 2.0,
        recorder: Recorder | None = None,
    ) -> None:
        self.name = bus.url
        self._bus = bus
        self._since_s = since_s or 0.0
        self._follow = follow
        self._patience_s = patience_s
        self._recorder = recorder
        self._streams = [topic.value for topic in TOPICS]
        self._unreadable = bus.counters()["skipped"]
        # "From now on" is from here, not from when a thread gets to read. Not caught: a bus that was never there is the
        # user's to mend.
        self._from_now = bus.follow(self._streams) if since_s is None else None

    def run(self, watcher: Watcher) -> None:
        """See :class:`~esper.watch.watcher.Source`; a bus that is lost later is waited for."""
        reader = self._from_now
        if reader is not None:
            ends = dict(reader.places)
        else:
            ends = self._bus.follow(self._streams).places
            reader = self._bus.follow(self._streams, max(0.0, time.time() - self._since_s))
        began = looked = time.monotonic()
        history = True
        while not watcher.stopping:
            try:
                found = reader.read(_COUNT, 0 if history else _BLOCK_MS)
                # Nothing more before the end: the rest was trimmed meanwhile.
                history = history and bool(found) and _behind(reader.places, ends)
                self._tell(watcher, found, ends)
                if len(found) >= _COUNT and time.monotonic() - looked > _LOOK_S:
                    looked = time.monotonic()
                    reader = self._keep_up(watcher, reader, patient=history and looked - began < HISTORY_S)
            except BusError as error:
                if not error.retryable:
                    raise
                watcher.report("no answer", clean(error))
                watcher.wait(_RETRY_S)
                continue
            watcher.report("reading" if history else "live")
            if not history and not self._follow and (found or time.monotonic() - began > self._patience_s):
                watcher.report("read")
                return
        if not watcher.alarm:
            self._drain(watcher, reader, ends)

    def _drain(self, watcher: Watcher, reader: Follower, ends: Mapping[str, str]) -> None:
        """What is there when watching ends: a job that exports itself has told its last just before."""
        with contextlib.suppress(BusError):
            for _ in range(_LAST_READS):
                found = reader.read(_COUNT, 0)
                self._tell(watcher, found, ends)
                if not found:
                    return

    def _keep_up(self, watcher: Watcher, reader: Follower, *, patient: bool) -> Follower:
        """The reader, or one that stands at the end of the windows when this one is too far behind."""
        end = self._bus.follow([_HEALTH]).places[_HEALTH]
        behind = (order_of(end)[0] - order_of(reader.places[_HEALTH])[0]) / 1000
        if patient or behind <= BEHIND_S:
            return reader
        watcher.skip(behind)
        return Follower(self._bus, {**reader.places, _HEALTH: end})

    def _tell(self, watcher: Watcher, found: list[Delivery], ends: Mapping[str, str]) -> None:
        batch: list[Fact | Unreadable] = []
        for each, fact in _in_order(found):
            if self._recorder is not None:
                self._recorder.write(each.message)
            if order_of(each.entry_id) <= order_of(ends[each.stream]):
                # What was there before we were is told at the time at which it came to the bus.
                watcher.hear([fact], each.published_at)
            else:
                batch.append(fact)
        skipped = self._bus.counters()["skipped"]
        batch += [Unreadable("an entry of a stream is no message")] * (skipped - self._unreadable)
        self._unreadable = skipped
        if batch:
            watcher.hear(batch, time.time())
        if self._recorder is not None and found:
            self._recorder.flush()


def _in_order(found: list[Delivery]) -> list[tuple[Delivery, Fact | Unreadable]]:
    """What came stream by stream, as it happened: a run's start comes before its windows.

    By milliseconds of the bus's clock. Within one, where the numbers of different streams mean nothing, by the sender's
    clock, which changes nothing about the order in one stream though it be set back.
    """
    latest: dict[str, float] = {}
    keyed: list[tuple[tuple[int, float], tuple[Delivery, Fact | Unreadable]]] = []
    for each in found:
        fact = decode(each.message)
        at = max(latest.get(each.stream, 0.0), fact.at if isinstance(fact, Fact) else 0.0)
        latest[each.stream] = at
        keyed.append(((order_of(each.entry_id)[0], at), (each, fact)))
    return [read for _, read in sorted(keyed, key=lambda each: each[0])]


def _behind(places: Mapping[str, str], ends: Mapping[str, str]) -> bool:
    return any(order_of(places[stream]) < order_of(end) for stream, end in ends.items())
