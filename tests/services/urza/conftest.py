"""What the service's tests run on. A missing package leaves out tests, and must not stop the loading of this file."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.services.urza.api import Api


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    pytest.importorskip("psycopg")
    from tests.services.urza import postgres

    reason = postgres.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgres.running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
    else:
        server = request.getfixturevalue("postgres_server")
        from tests.services.urza.postgres import fresh_database

        with fresh_database(server, f"t{secrets.token_hex(6)}") as url:
            yield url


@pytest.fixture
def api(tmp_path: Path, database: str) -> Iterator[Api]:
    """The API over an empty database of either kind."""
    from tests.services.urza.api import running_api

    with running_api(tmp_path, database=database) as running:
        yield running


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Api]:
    """The API over SQLite, for what has nothing to do with the database."""
    from tests.services.urza.api import running_api

    with running_api(tmp_path) as running:
        yield running
