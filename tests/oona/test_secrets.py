"""Neither passwords nor what messages say shows in an error, its traceback, a log line or a warning."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Iterator

import pytest

from esper.contracts.bus import BusError
from tests.flaky_proxy import FlakyProxy
from tests.oona.buses import EPOCH, HEALTH, Place, message
from tests.servers import RedisServer, free_port, redis_server

PASSWORD = "pa55word-of-the-test"
PAYLOAD = "what-a-message-says"
QUICK = {"timeout_s": 0.3, "patience_s": 0.2, "start_patience_s": 0.3}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis"), requirepass=PASSWORD) as running:
        yield running


def told(call, caplog: pytest.LogCaptureFixture) -> str:
    """All that a failing call tells anyone."""
    with caplog.at_level(logging.DEBUG), pytest.raises(BusError) as caught:
        call()
    error = caught.value
    lines = [str(error), repr(error), error.reason, *traceback.format_exception(error), caplog.text]
    return "\n".join(lines) + pickle.dumps(str(error)).decode("latin-1")


def nothing_shows(text: str) -> None:
    assert PASSWORD not in text
    assert PAYLOAD not in text


def test_nothing_there(waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    for start in (
        "redis://user:{}@127.0.0.1:{}/0",
        "redis+sentinel://:{}@127.0.0.1:{}/main",
        "redis+cluster://:{}@127.0.0.1:{}",
    ):
        place = Place(start.format(PASSWORD, free_port()), waiting)
        client = place.client(**QUICK)
        nothing_shows(repr(client) + client.url)
        nothing_shows(told(client.connect, caplog))
        nothing_shows(told(lambda: client.publish(message(1, text=PAYLOAD)), caplog))  # noqa: B023
        nothing_shows(client.health_check().reason)
        place.close()


def test_a_wrong_password(locked: RedisServer, waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(f"redis://user:{PASSWORD}@127.0.0.1:{locked.port}", waiting)
    client = place.client(**QUICK)
    nothing_shows(told(client.connect, caplog))
    nothing_shows(client.health_check().reason)
    place.close()


def test_refusals(locked: RedisServer, waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(f"redis://:{PASSWORD}@127.0.0.1:{locked.port}/0", waiting)
    client = place.client(**QUICK)
    looking = locked.client()
    looking.flushall()
    looking.set(HEALTH, "no stream")
    client.connect()
    said = message(1, text=PAYLOAD), message(2, HEALTH, text=PAYLOAD)
    nothing_shows(told(lambda: client.publish(said[1]), caplog))
    nothing_shows(told(lambda: client.publish_many(said), caplog))
    looking.config_set("maxmemory", 1)
    try:
        nothing_shows(told(lambda: client.publish(said[0]), caplog))
        nothing_shows(told(lambda: client.publish_many(said), caplog))
    finally:
        looking.config_set("maxmemory", 0)
    locked.pause(True)
    try:
        nothing_shows(told(lambda: client.publish_many(said), caplog))
    finally:
        locked.pause(False)
    looking.close()
    place.close()


def test_a_bad_network(locked: RedisServer, waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    with FlakyProxy(locked.port) as proxy:
        place = Place(f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}/0", waiting)
        client = place.client(**QUICK)
        client.publish(message(1, text=PAYLOAD))
        proxy.refuse = True
        proxy.cut()
        nothing_shows(told(lambda: client.publish(message(2, text=PAYLOAD)), caplog))
        proxy.refuse, proxy.swallow = False, True
        nothing_shows(told(lambda: client.publish(message(3, text=PAYLOAD)), caplog))
        place.close()


def test_a_bad_entry_is_told_of_without_its_text(waiting: bool, locked: RedisServer, caplog) -> None:
    place = Place(f"redis://:{PASSWORD}@127.0.0.1:{locked.port}/0", waiting)
    client = place.client()
    looking = locked.client()
    looking.flushall()
    looking.xadd(EPOCH, {"message": '{"payload": "' + PAYLOAD + '"}'})
    with caplog.at_level(logging.DEBUG):
        assert client.consume([EPOCH], "g", "c", block=0) == []
    nothing_shows(caplog.text)
    (letter,) = client.dead_letters(EPOCH)
    assert PAYLOAD not in letter.reason
    assert PAYLOAD.encode() in letter.raw
    looking.close()
    place.close()
