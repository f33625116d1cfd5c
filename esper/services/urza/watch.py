"""What a process holds in memory, and how it learns that another process changed the database.

Tokens and the cards of kernels are answered from memory. Changes of this process are seen at once; those of others (the
command line, a second server) within :data:`STALE_S`: the numbers in the table ``changes`` are looked at five times a
second, and while they cannot be looked at, nothing is answered from memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa

from esper.services.urza.database import Database
from esper.services.urza.roles import Caller, Tokens
from esper.services.urza.tables import changes

__all__ = ["STALE_S", "Watch"]

#: How old the knowledge may be by which a request is answered.
STALE_S: Final = 1.0
_PERIOD_S: Final = 0.2
_log = logging.getLogger("esper.urza")


class Watch:
    """Follows the table ``changes`` on the server's event loop.

    Args:
        database: Where it is.
        tokens: Read again when they changed.
        kernels_changed: Called, on the event loop, when another process changed a kernel.
    """

    def __init__(self, database: Database, tokens: Tokens, kernels_changed: Callable[[], None]) -> None:
        self._database = database
        self._tokens = tokens
        self._kernels_changed = kernels_changed
        self._numbers: dict[str, int] = {}
        self._checked = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None
        #: SHA-256 of a token -> who has it.
        self.callers: dict[str, Caller] = {}

    def is_fresh(self) -> bool:
        """Whether what is in memory may be used."""
        return time.monotonic() - self._checked < STALE_S

    async def ensure_fresh(self) -> None:
        """Look at the database unless that was done a moment ago; raises SQLAlchemy's errors if it does not answer."""
        if self.is_fresh():
            return
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
            self._refreshing.add_done_callback(self._refreshed)
        # Shielded: the request of one client that leaves must not end the wait of all others.
        await asyncio.shield(self._refreshing)

    def start(self) -> None:
        """Begin to follow."""
        self._follower = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """End following."""
        for task in (self._follower, self._refreshing):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, sa.exc.SQLAlchemyError):
                    await task

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self._refresh()
            except sa.exc.SQLAlchemyError as error:
                # The next request that needs the database says so to its client.
                _log.warning("the database does not answer: %s", type(error).__name__)

    async def _refresh(self) -> None:
        began = time.monotonic()
        numbers = await asyncio.to_thread(self._read)
        if numbers["tokens"] != self._numbers.get("tokens"):
            self.callers = await asyncio.to_thread(self._tokens.callers)
        if self._database.others_changed("kernels", self._numbers.get("kernels", -1), numbers["kernels"]):
            self._kernels_changed()
        self._numbers = numbers
        self._checked = began

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        if not task.cancelled():
            task.exception()  # everyone who waits has it; nobody need be waiting

    def _read(self) -> dict[str, int]:
        with self._database.read() as connection:
            return {topic: number for topic, number in connection.execute(sa.select(changes.c.topic, changes.c.number))}
