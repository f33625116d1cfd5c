"""Servers and buses for the tests of the message bus."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oona.buses import KINDS, MemoryPlace, Place, RedisPlace
from tests.servers import RedisServer, redis_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for tests that do it no harm. One entry a node makes its approximate trimming exact."""
    with redis_server(tmp_path_factory.mktemp("redis"), stream_node_max_entries=1, appendonly="no") as running:
        yield running


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each kind of bus in turn, empty."""
    waiting = request.param.endswith("async")
    found: Place
    if request.param.startswith("memory"):
        found = MemoryPlace(waiting)
    else:
        found = RedisPlace(request.getfixturevalue("shared_server"), waiting)
    yield found
    found.close()


@pytest.fixture(params=["blocking", "async"])
def waiting(request: pytest.FixtureRequest) -> bool:
    """Which client speaks to a Redis that is about to be harmed."""
    return bool(request.param == "async")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def own(server: RedisServer, waiting: bool) -> Iterator[Place]:
    """Both clients in turn, on the test's own Redis."""
    found = Place(server.url, waiting)
    yield found
    found.close()
