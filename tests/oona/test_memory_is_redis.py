"""The bus in memory does what a Redis does, whatever is asked of it: one history on both, step by step."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.bus import BusFullError
from esper.oona import OonaClient
from esper.oona.commands import Add, Newest
from esper.oona.memory_broker import MemoryBroker
from esper.oona.urls import parse
from tests.oona.buses import EPOCH, HEALTH, MemoryPlace, RedisPlace, message
from tests.servers import RedisServer

STREAMS = st.lists(st.sampled_from([EPOCH, HEALTH]), min_size=1, max_size=2, unique=True)
GROUPS = st.sampled_from(["g", "h"])
STEPS = st.one_of(
    st.tuples(st.just("publish"), st.lists(st.sampled_from([EPOCH, HEALTH]), max_size=4)),
    st.tuples(st.just("bad"), st.sampled_from([EPOCH, HEALTH])),
    st.tuples(st.just("consume"), STREAMS, GROUPS, st.integers(1, 3)),
    # An hour, or nothing at all: no clock decides.
    st.tuples(st.just("claim"), STREAMS, GROUPS, st.integers(1, 3), st.sampled_from([0.0, 3600.0])),
    st.tuples(st.just("acknowledge"), st.integers(0, 20)),
    st.tuples(st.just("trim"), st.sampled_from([EPOCH, HEALTH]), st.integers(1, 4)),
    st.tuples(st.just("replay"), st.sampled_from([EPOCH, HEALTH]), st.integers(1, 3)),
    st.tuples(st.just("drop group"), st.sampled_from([EPOCH, HEALTH]), GROUPS),
    st.tuples(st.just("forget")),
)


class History:
    """Steps on one bus; entries are known by what they carry, because their ids are times."""

    def __init__(self, place: Any) -> None:
        self.place = place
        self.client = place.client(max_deliveries=3, dead_letters_kept=5)
        self.number = 0
        self.had: list[Any] = []
        self.groups: set[tuple[str, str]] = set()

    def do(self, step: tuple[Any, ...]) -> Any:
        kind, *rest = step
        client = self.client
        if kind == "publish":
            sent = [message(self.number + index, topic) for index, topic in enumerate(rest[0])]
            self.number += len(sent)
            return len(client.publish_many(sent))
        if kind == "bad":
            self.number += 1
            self.place.put(rest[0], {"message": str(self.number)})
            return None
        if kind == "consume":
            streams, group, count = rest
            self.groups |= {(stream, group) for stream in streams}
            return self.seen(client.consume(streams, group, "c", count, block=0))
        if kind == "claim":
            streams, group, count, idle_s = rest
            # Longer than the shortest idle time there is, on both.
            time.sleep(0.005)
            return self.seen(client.claim(streams, group, "d", count, idle_s=idle_s))
        if kind == "acknowledge":
            return client.acknowledge(self.had[rest[0] : rest[0] + 2])
        if kind == "trim":
            return client.trim(rest[0], max_length=rest[1], exact=True)
        if kind == "replay":
            return [each.message.payload["number"] for each in client.replay(rest[0], page=rest[1])]
        if kind == "drop group":
            stream, group = rest
            if (stream, group) in self.groups:
                self.groups.discard((stream, group))
                self.place.drop_group(stream, group)
            return None
        # No id of before can come again.
        time.sleep(0.005)
        self.place.forget()
        self.groups.clear()
        return None

    def seen(self, deliveries: list[Any]) -> list[Any]:
        self.had += deliveries
        # Every stream whose group was missing has one again.
        return [(each.stream, each.message.payload["number"], each.times_delivered) for each in deliveries]

    def end(self) -> Any:
        letters = [[(each.reason, each.raw) for each in self.client.dead_letters(name)] for name in (EPOCH, HEALTH)]
        counters = self.client.counters()
        counters.pop("retries")
        return letters, counters, [self.place.length(name) for name in (EPOCH, HEALTH)]


@settings(max_examples=60)
@given(steps=st.lists(STEPS, max_size=25))
def test_one_history_on_both(shared_server: RedisServer, steps) -> None:
    memory, redis = History(MemoryPlace(False)), History(RedisPlace(shared_server, False))
    try:
        for step in steps:
            assert memory.do(step) == redis.do(step)
        assert memory.end() == redis.end()
    finally:
        memory.place.close()
        redis.place.close()


def test_clients_without_a_url_share_one_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    with OonaClient() as one, OonaClient() as other, OonaClient("memory://elsewhere") as third:
        assert one.url == "memory://"
        one.publish(message(1))
        assert len(other.consume([EPOCH], "g", "c")) == 1
        assert third.consume([EPOCH], "g", "c", block=0) == []
    # The last client has taken it along.
    with OonaClient() as later:
        assert later.consume([EPOCH], "g", "c", block=0) == []


SCRAPS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([message(1).to_json().encode(), b'{"version":1}', b"[" * 50, b"null", b'"\\ud800"']),
    st.tuples(st.integers(0, 250), st.binary(max_size=3)).map(lambda cut: _cut(*cut)),
)


def _cut(at: int, put: bytes) -> bytes:
    text = message(1).to_json().encode()
    return text[:at] + put + text[at + len(put) :]


@given(entries=st.lists(st.dictionaries(st.one_of(st.just(b"message"), st.binary(max_size=9)), SCRAPS, min_size=1)))
def test_whatever_stands_in_a_stream_the_consumer_goes_on(entries) -> None:
    place = MemoryPlace(False)
    client = place.client()
    for fields in entries:
        place.put(EPOCH, fields)
    client.publish(message(99))
    got = client.consume([EPOCH], "g", "c", count=1000, block=0)
    assert got[-1].message.payload["number"] == 99
    letters = list(client.dead_letters(EPOCH))
    assert len(got) + len(letters) == len(entries) + 1
    assert all(letter.reason.isprintable() for letter in letters)
    assert client.acknowledge(got) == place.pending(EPOCH, "g") + len(got)
    assert len(list(client.replay(EPOCH))) == len(got)
    assert client.counters()["skipped"] == len(letters)
    place.close()


def test_memory_is_bounded() -> None:
    address = parse("memory://bounded")
    bus = MemoryBroker(address, max_bytes=20_000)
    with pytest.raises(BusFullError, match=r"memory://bounded has no memory left for jobs: .*its limit is 20000"):
        for _ in range(1000):
            bus.run(Add("jobs", {"message": "x" * 1000}))
    assert bus._bytes < 22_000
    for number in range(50):
        # A stream that is trimmed makes room itself, but only once it is in.
        with pytest.raises(BusFullError):
            bus.run(Add("bounded", {"message": str(number)}, 3))


def test_ids_grow_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = MemoryBroker(parse("memory://clock"))
    times = iter([10.0, 10.0, 9.0, 11.0])
    monkeypatch.setattr("esper.oona.memory_broker.time.time", lambda: next(times))
    assert [bus.run(Add("s", {"a": "b"})) for _ in range(4)] == ["10000-0", "10000-1", "10000-2", "11000-0"]
    assert bus.run(Newest("s"))[0].entry_id == "11000-0"
