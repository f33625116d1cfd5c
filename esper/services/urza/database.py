"""The database: engine, transactions, and bringing the schema up to date.

SQLite runs in WAL mode, so that readers never wait for the writer. A transaction that will write says so when it
begins: SQLite would otherwise refuse it half-way, when another one wrote in between.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import alembic.command
import alembic.config
import alembic.util.exc
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from esper.contracts.errors import EsperError
from esper.services.urza.tables import changes, metadata, tokens

__all__ = ["Database", "DatabaseError"]

#: Of PostgreSQL's advisory locks, which are numbers: "esper urza".
_LOCK_ID: Final = 0x6573706572757A61 >> 1
_BUSY_TIMEOUT_S: Final = 15.0
_WRITE: Final = "urza_write"


class DatabaseError(EsperError, ConnectionError):
    """The database cannot be used: not reachable, or of a version that this program does not know."""


class Database:
    """Connections to one database; safe from several threads.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://USER:PASSWORD@HOST/NAME``.
        connections: Most connections at once.

    Raises:
        DatabaseError: if the URL is none, or of another kind of database.
    """

    def __init__(self, url: str, connections: int = 12) -> None:
        try:
            parsed = sa.make_url(url)
        except (sa.exc.ArgumentError, ValueError):
            # Not shown: there may be a password in it.
            raise DatabaseError(
                "the database's URL is not one; expected sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"
            ) from None
        if "@" in (parsed.host or ""):
            raise DatabaseError(
                "the database's URL has an '@' in its host; one that belongs to the password is written %40"
            )
        #: Where it is, without the password, and without what of a query need not be known: there may be one, too.
        place = {name: value for name, value in parsed.query.items() if name in ("host", "port")}
        self.shown = parsed.set(query=place).render_as_string(hide_password=True)
        #: Topic -> numbers that this process counted up to, and nobody has asked about yet.
        self._own: defaultdict[str, set[int]] = defaultdict(set)
        self._own_lock = threading.Lock()
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        try:
            if self.is_sqlite:
                self._engine = _sqlite(parsed, connections)
            elif parsed.get_backend_name() in ("postgresql", "postgres"):
                self._engine = _postgresql(parsed, connections)
            else:
                raise DatabaseError(f"{self.shown}: only sqlite and postgresql are supported")
        except sa.exc.ArgumentError as error:
            raise DatabaseError(f"{self.shown}: {error}") from error
        except ImportError as error:
            raise DatabaseError(
                f"{self.shown}: {error.name or 'its driver'} is not installed, which PostgreSQL needs; "
                "in Esper's folder: pip install '.[postgres]'"
            ) from error
        #: The same for people: of SQLite the file.
        self.place = str(Path(str(parsed.database)).absolute()) if self.is_sqlite else self.shown

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Around what a person asked for: SQLAlchemy's errors become one line without statements and their values.

        Raises:
            DatabaseError: in their place.
        """
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else type(error).__name__
            raise DatabaseError(f"{self.shown}: cannot be used: {reason}") from error

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection in a transaction that only reads."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self, *topics: str) -> Iterator[Connection]:
        """A connection in a transaction that writes; it is committed unless the block raises.

        Args:
            *topics: What is changed, for processes that keep copies of it.
        """
        numbers: dict[str, int] = {}
        with self._engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
            yield connection
            for topic in sorted(topics):
                count_up = sa.update(changes).where(changes.c.topic == topic).values(number=changes.c.number + 1)
                numbers[topic] = connection.execute(count_up.returning(changes.c.number)).scalar_one()
        # Not before the commit: a number whose transaction fails is another process's next one.
        with self._own_lock:
            for topic, number in numbers.items():
                self._own[topic].add(number)

    def others_changed(self, topic: str, before: int, now: int) -> bool:
        """Whether any of the changes from one number to the other was made by another process.

        Each number is asked about once: what is remembered of our own up to ``now`` is then forgotten.
        """
        with self._own_lock:
            own = {number for number in self._own[topic] if number <= now}
            self._own[topic] -= own
        return now < before or sum(number > before for number in own) < now - before

    def lock(self, connection: Connection) -> None:
        """Wait for the one lock that all processes share; it ends with the transaction, which must be a writing one."""
        # On SQLite a writing transaction is alone already.
        if not self.is_sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})

    def migrate(self) -> None:
        """Bring the schema up to date; of several processes that start at once, one does it and the others wait.

        Raises:
            DatabaseError: if the database cannot be reached, was made by a newer version, or lacks tables of the
                version that it says it has.
        """
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        try:
            if self.is_sqlite:
                self._use_wal()
            with self.failing(), self.write() as connection:
                self.lock(connection)
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
                lacking = sorted(set(metadata.tables) - set(sa.inspect(connection).get_table_names()))
        except alembic.util.exc.CommandError as error:
            raise DatabaseError(
                f"{self.shown}: its schema is not one that this version knows ({error}); "
                "was it made by a newer version of Esper?"
            ) from error
        if lacking:
            raise DatabaseError(
                f"{self.shown}: says that it is up to date, but has no {', '.join(lacking)}; restore a backup, or give "
                "another --database"
            )

    def is_made(self) -> bool:
        """Whether there is a database with Urza's tables; it is looked for, not made.

        Raises:
            DatabaseError: it cannot be reached, or is no database.
        """
        # SQLite makes the file that it is asked to open.
        if self.is_sqlite and not Path(self.place).is_file():
            return False
        with self.failing(), self.read() as connection:
            return sa.inspect(connection).has_table(tokens.name)

    def check(self) -> None:
        """Ask the database something; raises what SQLAlchemy raises when it does not answer."""
        with self.read() as connection:
            connection.execute(sa.select(changes.c.number).limit(1))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _use_wal(self) -> None:
        """The change to WAL does not wait for other processes as everything else does, so it is tried again."""
        database = self._engine.url.database
        if database and database != ":memory:":
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                with contextlib.closing(self._engine.raw_connection()) as raw:
                    raw.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except (sqlite3.Error, sa.exc.DBAPIError) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise DatabaseError(f"{self.shown}: cannot be used: {error}") from error
                time.sleep(0.02)


def _sqlite(url: sa.URL, connections: int) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise DatabaseError("a database in memory is gone when the program ends; give a file: sqlite:///PATH")
    engine = sa.create_engine(
        url,
        poolclass=sa.pool.QueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(raw: Any, _: Any) -> None:
        # We begin transactions ourselves, below; the driver's own habit begins them late and only for some statements.
        raw.isolation_level = None
        cursor = raw.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        # What was acknowledged survives a power cut.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: sa.URL, connections: int) -> Engine:
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=connections,
        max_overflow=0,
        # A connection that the server closed is found out before it is used.
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5},
    )
