"""What the routes share: database, blobs, tokens, caches, limits; and what happens at the start and at the end."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Final

import anyio.to_thread
import sqlalchemy as sa

from esper.services.urza import job_store, kernel_store, scratch
from esper.services.urza.blobs import BlobStore, open_blobs
from esper.services.urza.cards import Card, Cards, make_card
from esper.services.urza.database import Database
from esper.services.urza.errors import forbidden, unauthorized
from esper.services.urza.limits import WriteLimit
from esper.services.urza.metrics import Metrics
from esper.services.urza.roles import ANONYMOUS, Caller, Role, Tokens, digest
from esper.services.urza.settings import Settings
from esper.services.urza.tables import kernels
from esper.services.urza.verify import Verifier
from esper.services.urza.watch import Watch

__all__ = ["Service", "binary_ref"]

_log = logging.getLogger("esper.urza")
_MAX_BLOB_FACTS: Final = 65_536


class Service:
    """One registry as one process sees it. Making one brings the database up to date.

    Raises:
        DatabaseError: if the database cannot be used.
        ApiError: if the blobs' folder cannot be.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Threads of requests, and a few for the watch, metrics and the start.
        self.database = Database(settings.database, settings.threads + 4)
        self.database.migrate()
        self.blobs: BlobStore = open_blobs(settings)
        self.tokens = Tokens(self.database)
        self.limit = WriteLimit(settings.write_rate, settings.write_burst)
        self.verifier = Verifier()
        self.cards = Cards()
        self.watch = Watch(self.database, self.tokens, self.cards.clear)
        self.metrics = Metrics(self._count_kernels, self._count_jobs)
        self._uploads: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._blob_facts: dict[str, tuple[str, int]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin the work that goes on beside requests."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = self.settings.threads
        self.watch.start()
        self.verifier.warm()
        self._sweeping = asyncio.create_task(asyncio.to_thread(self._sweep))

    async def stop(self) -> None:
        """End it, and close all connections."""
        if self._sweeping is not None:
            await self._sweeping
        await self.watch.stop()
        await asyncio.to_thread(self.verifier.close)
        self.database.close()

    def authorize(self, header: str | None, role: Role) -> Caller:
        """Who calls, given the ``Authorization`` header; :attr:`watch` must be fresh.

        Raises:
            ApiError: 401 or 403.
        """
        if header is None:
            if role == "read" and self.settings.open_read:
                return ANONYMOUS
            raise unauthorized("this needs a token: Authorization: Bearer TOKEN")
        scheme, _, token = header.partition(" ")
        caller = self.watch.callers.get(digest(token.strip())) if scheme.lower() == "bearer" else None
        if caller is None:
            raise unauthorized("the token is not known, or was revoked")
        if role not in caller.roles:
            raise forbidden(f"the token {caller.name!r} has not the role {role!r}")
        return caller

    def card(self, artifact_id: str) -> Card:
        """The answer about one kernel, from memory or made new; blocking.

        Raises:
            ApiError: 404.
        """
        found = self.cards.get(artifact_id)
        if found is not None:
            return found
        generation = self.cards.generation
        with self.database.read() as connection:
            facts = kernel_store.card(connection, artifact_id)
        address = self.blobs.sign(facts["sha256"], self.settings.presign_s)
        # Half of a presigned address's life is left for the client.
        lifetime = None if address is None else self.settings.presign_s / 2
        card = make_card(facts, address or binary_ref(artifact_id), lifetime)
        self.cards.put(artifact_id, card, generation)
        return card

    def blob_facts(self, artifact_id: str) -> tuple[str, int]:
        """SHA-256 and size of a kernel's blob; blocking. Kept for ever, because they never change.

        Raises:
            ApiError: 404.
        """
        facts = self._blob_facts.get(artifact_id)
        if facts is None:
            query = sa.select(kernels.c.sha256, kernels.c.size).where(kernels.c.artifact_id == artifact_id)
            with self.database.read() as connection:
                row = connection.execute(query).first()
            if row is None:
                raise kernel_store.missing(artifact_id)
            facts = row.sha256, row.size
            self.keep_blob_facts(artifact_id, *facts)
        return facts

    def blob_facts_known(self, artifact_id: str) -> tuple[str, int] | None:
        """The same as far as this process knows, without asking the database."""
        return self._blob_facts.get(artifact_id)

    def keep_blob_facts(self, artifact_id: str, sha256: str, size: int) -> None:
        """Remember what a recorded kernel's blob is."""
        self._blob_facts[artifact_id] = sha256, size
        if len(self._blob_facts) > _MAX_BLOB_FACTS:
            self._blob_facts.pop(next(iter(self._blob_facts)), None)

    def upload_lock(self, sha256: str) -> asyncio.Lock:
        """Held while bytes with this hash are taken in, so that the second of two uploads finds the first."""
        return self._uploads.setdefault(sha256, asyncio.Lock())

    def drop_unrecorded(self, sha256: str) -> None:
        """Remove a blob that was stored for a kernel which then could not be recorded."""
        with self.database.write() as connection:
            # Whoever records the same bytes at this moment does so before, or finds the blob gone.
            self.database.lock(connection)
            if kernel_store.by_sha256(connection, sha256) is None:
                self.blobs.delete(sha256)

    def _sweep(self) -> None:
        """Remove what earlier processes left behind; a failure is logged and is no reason not to serve.

        Only what their own marks name: a blob that the database does not know may be another database's.
        """
        try:
            removed = scratch.sweep(self.settings.scratch, self.drop_unrecorded)
        except Exception as error:
            _log.warning("what earlier processes left behind could not be removed: %s", error)
        else:
            if removed:
                _log.info("removed %d files that earlier processes left behind", removed)

    def _count_kernels(self) -> dict[str, int]:
        with self.database.read() as connection:
            return kernel_store.count_by_status(connection)

    def _count_jobs(self) -> dict[str, int]:
        with self.database.read() as connection:
            return job_store.count_by_status(connection)


def binary_ref(artifact_id: str) -> str:
    """Where the API gives a kernel's bytes."""
    return f"/api/v1/kernels/{artifact_id}/blob"
