"""What the blocking and the asyncio client have in common: all but waiting."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

from esper.contracts.errors import BusError, BusURLError
from esper.oona.engine import Engine
from esper.oona.entries import first_id, id_before
from esper.oona.settings import DEFAULT_RETENTION, MEMORY_RETENTION, BusSettings
from esper.oona.urls import BusAddress, parse

__all__ = ["REDIS_URL", "Base", "Place"]

#: Where the bus is when nothing else is said.
REDIS_URL: Final = "REDIS_URL"
_IN_PROCESS: Final = "memory://"

#: A point in a stream: seconds since 1970 by the bus's clock, a time with its zone, or the id of an entry.
Place = float | datetime | str


class Base:
    """Address, settings and engine of a client.

    Raises:
        BusURLError: not a bus's URL.
    """

    def __init__(self, url: str | None, settings: BusSettings | None, link: Callable[[BusAddress, float], Any]) -> None:
        found = os.environ.get(REDIS_URL, "").strip() or _IN_PROCESS if url is None else url
        try:
            self._address = parse(found)
        except BusURLError as error:
            raise BusURLError(f"{error} (from {REDIS_URL})" if url is None else str(error)) from None
        settings = settings or BusSettings()
        if settings.retention is None:
            kept = MEMORY_RETENTION if self._address.kind == "memory" else DEFAULT_RETENTION
            settings = dataclasses.replace(settings, retention=kept)
        self._link = link(self._address, settings.timeout_s)
        self._engine = Engine(self._address, settings, split=self._link.split)
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """Where the bus is, without user, password and options."""
        return self._address.shown

    @property
    def settings(self) -> BusSettings:
        """How patient this client is, and what it keeps."""
        return self._engine.settings

    def counters(self) -> dict[str, int]:
        """What happened so far, by the names in :mod:`esper.oona.counting`."""
        return self._engine.counters.snapshot()

    def _begin(self) -> None:
        """Before every call: is the client open, and still in the process that made it?"""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._after_fork()
        if self._closed:
            raise BusError(f"this client of {self.url} is closed")

    def _after_fork(self) -> None:
        self._link.after_fork()
        self._engine.counters.after_fork()

    @staticmethod
    def _before(streams: Sequence[str], since: Place) -> dict[str, str]:
        place = id_before(first_id(since))
        return dict.fromkeys(map(str, streams), place)

    @staticmethod
    def _first(since: Place | None) -> str:
        return "-" if since is None else first_id(since)

    @staticmethod
    def _last(until: Place | None) -> str:
        # A time ends before its millisecond; an id is the last one itself.
        if until is None:
            return "+"
        return first_id(until) if isinstance(until, str) else id_before(first_id(until))
