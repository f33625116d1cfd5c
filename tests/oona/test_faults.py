"""A Redis that is killed, paused, emptied, slow, full, or that refuses: no hang, one clear error, and on it goes."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import pytest

from esper.contracts.bus import (
    BusDeniedError,
    BusError,
    BusFullError,
    BusUnavailableError,
    BusWrongTypeError,
)
from esper.oona import AsyncOonaClient, BusSettings, OonaClient
from tests.flaky_proxy import FlakyProxy
from tests.oona.buses import EPOCH, HEALTH, Place, Waiting, message
from tests.oona.test_bus import numbers
from tests.servers import RedisServer, free_port, redis_server, wait_until

#: A second is what a busy machine may add to anything.
SLACK_S = 1.0
#: Impatient enough for tests, patient enough to see retries.
QUICK = {"timeout_s": 0.5, "patience_s": 0.3, "start_patience_s": 0.5}


def timed(call) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def fails(call, kind: type[BusError] = BusUnavailableError) -> BusError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def test_nothing_there_at_the_start_is_one_error_that_says_what_to_check(waiting: bool) -> None:
    port = free_port()
    url = f"redis://user:SECRET@127.0.0.1:{port}/3"
    began = time.monotonic()
    if waiting:
        client = Waiting(AsyncOonaClient(url, settings=BusSettings(**QUICK)))
        error = fails(client.connect)
        client.close()
    else:
        error = fails(lambda: OonaClient(url, settings=BusSettings(**QUICK)))
    took = time.monotonic() - began
    text = str(error)
    assert text.startswith(f"no Redis at redis://***@127.0.0.1:{port}/3 after ")
    assert "attempts in" in text
    assert "Connection refused" in text
    assert "Check that redis-server runs there, that host and port in REDIS_URL are right" in text
    assert "SECRET" not in text
    assert QUICK["start_patience_s"] <= took < QUICK["start_patience_s"] + SLACK_S


def test_a_server_that_comes_up_late_is_waited_for(tmp_path, waiting: bool) -> None:
    late = RedisServer(tmp_path)
    place = Place(late.url, waiting)
    timer = threading.Timer(0.5, late.start)
    timer.start()
    try:
        client = place.client(start_patience_s=30.0)
        client.connect()
        client.publish(message(1))
        assert client.counters()["retries"] >= 1
    finally:
        timer.join()
        place.close()
        late.kill()


def test_a_server_that_never_answers_is_not_waited_for(waiting: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = Place(f"redis://127.0.0.1:{silent.getsockname()[1]}", waiting)
        client = place.client(**QUICK)
        assert timed(lambda: fails(client.connect)) < QUICK["start_patience_s"] + 2 * QUICK["timeout_s"] + SLACK_S
        assert timed(lambda: fails(lambda: client.publish(message(1)))) < 1.3 + SLACK_S
        place.close()


def test_killed_and_back(server: RedisServer, own: Place) -> None:
    client = own.client(**QUICK)
    client.publish(message(1))
    server.kill()
    error = fails(lambda: client.publish(message(2)))
    assert error.retryable
    assert str(error).startswith(f"Redis at redis://127.0.0.1:{server.port}/0 does not answer: ")
    assert not client.health_check().ok
    assert "does not answer" in client.health_check().reason
    fails(lambda: client.consume([EPOCH], "g", "c"))
    server.start()
    client.publish(message(3))
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == [1, 3]
    counters = client.counters()
    assert (counters["published"], counters["publish_failures"]) == (2, 1)
    assert counters["retries"] > 0


def test_a_short_absence_is_bridged(server: RedisServer, own: Place) -> None:
    client = own.client(patience_s=30.0)
    client.publish(message(1))
    server.kill()
    timer = threading.Timer(0.4, server.start)
    timer.start()
    try:
        client.publish(message(2))
    finally:
        timer.join()
    assert client.counters()["retries"] >= 1
    assert numbers(client.replay(EPOCH)) == [1, 2]


def test_paused(server: RedisServer, own: Place) -> None:
    client = own.client(**QUICK)
    client.publish_many([message(1), message(2, HEALTH)])
    (first,) = client.consume([EPOCH], "g", "c")
    bound = QUICK["patience_s"] + 2 * QUICK["timeout_s"] + SLACK_S
    server.pause(True)
    try:
        assert timed(lambda: fails(lambda: client.publish(message(3)))) < bound
        assert timed(lambda: fails(lambda: client.publish_many([message(4), message(5)]))) < bound
        assert timed(lambda: fails(lambda: client.consume([EPOCH], "g", "c", block=100))) < bound + 0.1
        assert timed(lambda: fails(lambda: client.acknowledge([first]))) < bound
        assert timed(lambda: fails(lambda: list(client.replay(EPOCH)))) < bound
        assert timed(client.health_check) < bound
        assert not client.health_check().ok
    finally:
        server.pause(False)
    # Late answers to what was given up must not be taken for answers to what is asked now.
    wait_until(lambda: client.health_check().ok, "it answers")
    ids = [client.publish(message(number)) for number in range(10, 20)]
    assert len(set(ids)) == 10
    assert client.acknowledge([first]) in (0, 1)
    found = list(client.replay(EPOCH))
    assert [each.entry_id for each in found if each.message.payload["number"] >= 10] == ids
    assert numbers(client.replay(HEALTH)) == [2]


def test_restarted_with_lost_data(server: RedisServer, own: Place) -> None:
    client = own.client(**QUICK | {"patience_s": 10.0})
    client.publish_many([message(1), message(2)])
    got = client.consume([EPOCH], "g", "c", count=9)
    server.lose_data()
    server.start()
    client.publish(message(3))
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == [3]
    assert client.counters()["groups_recreated"] == 1
    assert client.acknowledge(got) == 0


def test_a_follower_goes_on_after_lost_data(server: RedisServer, own: Place) -> None:
    client = own.client(**QUICK | {"patience_s": 10.0})
    follower = client.follow([EPOCH])
    client.publish_many([message(1), message(2)])
    assert numbers(follower.read(count=1)) == [1]
    server.lose_data()
    fails(lambda: own.client(**QUICK).connect())
    server.start()
    client.publish(message(3))
    assert numbers(follower.read()) == [3]


def test_a_replica_says_that_it_is_one(server: RedisServer, own: Place) -> None:
    looking = server.client()
    looking.replicaof("127.0.0.1", free_port())
    error = fails(lambda: own.client(**QUICK).publish(message(1)))
    assert "cannot serve us now" in str(error)
    assert "read only replica" in str(error)
    looking.replicaof("no", "one")
    own.client(**QUICK).publish(message(2))
    looking.close()


def test_a_group_that_vanishes_under_a_waiting_reader(server: RedisServer, own: Place) -> None:
    client, other = own.client(), own.client()
    got: list = []
    thread = threading.Thread(target=lambda: got.extend(client.consume([EPOCH], "g", "c", block=20_000)))
    thread.start()
    looking = server.client()
    wait_until(lambda: looking.exists(EPOCH), "it waits")
    looking.delete(EPOCH)
    looking.close()
    other.publish(message(1))
    thread.join(30)
    assert numbers(got) == [1]


def test_slow_network(server: RedisServer, waiting: bool) -> None:
    with FlakyProxy(server.port) as proxy:
        place = Place(f"redis://127.0.0.1:{proxy.port}", waiting)
        client = place.client(**QUICK)
        proxy.delay_s = 0.05
        client.publish(message(1))
        assert client.health_check().latency_s >= 0.09
        proxy.delay_s = 2.0
        error = fails(lambda: client.publish(message(2)))
        assert "imeout" in str(error)
        proxy.heal()
        client.publish(message(3))
        proxy.swallow = True
        fails(lambda: client.consume([EPOCH], "g", "c", block=50))
        proxy.heal()
        proxy.cut()
        # Message 2 was on its way when it was given up: it may have arrived, and is known by its id.
        found = wait_until(lambda: client.consume([EPOCH], "g", "c", count=9), "messages")
        assert {1, 3} <= set(numbers(found)) <= {1, 2, 3}
        place.close()


def test_cut_in_the_middle_of_answers(server: RedisServer, waiting: bool) -> None:
    with FlakyProxy(server.port) as proxy:
        place = Place(f"redis://127.0.0.1:{proxy.port}", waiting)
        client = place.client(timeout_s=5.0, patience_s=10.0, claim_idle_s=0.2, max_deliveries=1000)
        for number in range(30):
            proxy.cut_after = 10 + 7 * number
            client.publish_many([message(number), message(number, HEALTH)])
        assert proxy.cuts > 0
        assert client.counters()["retries"] > 0
        # In order, each at least once; twins have one event_id.
        found = list(client.replay(EPOCH))
        first_of = {each.message.event_id: each.message.payload["number"] for each in reversed(found)}
        assert sorted(first_of.values()) == list(range(30))
        assert len(first_of) == 30
        firsts = [number for index, number in enumerate(numbers(found)) if number not in numbers(found)[:index]]
        assert firsts == list(range(30))
        seen: set[int] = set()
        cuts = itertools.cycle([500, None, None])

        def all_seen() -> bool:
            # Not always: what is oldest is handed out first, and would be cut off every time.
            proxy.cut_after = next(cuts)
            some = client.consume([EPOCH], "g", "c", count=3, block=50)
            seen.update(numbers(some))
            client.acknowledge(some)
            return seen == set(range(30))

        wait_until(all_seen, "what was lost on the way is handed out again", pause_s=0)
        place.close()


def test_memory_full(server: RedisServer, own: Place) -> None:
    client = own.client(**QUICK)
    client.publish_many([message(number) for number in range(3)])
    looking = server.client()
    looking.xadd(EPOCH, {"message": "{"})
    # Made before: Redis refuses even to say that there is one when it is full.
    looking.xgroup_create(EPOCH, "g", 0)
    looking.config_set("maxmemory", 1)
    error = fails(lambda: client.publish(message(3)), BusFullError)
    assert error.retryable
    assert f"has no memory left for {EPOCH}: " in str(error)
    assert "maxmemory" in str(error)
    # A batch is refused as a whole.
    fails(lambda: client.publish_many([message(4), message(5, HEALTH)]), BusFullError)
    assert looking.xlen(EPOCH) == 4
    assert looking.exists(HEALTH) == 0
    # Reading goes on; a bad entry that cannot be put among the dead letters stays pending and is not lost.
    got = client.consume([EPOCH], "g", "c", count=9)
    assert numbers(got) == [0, 1, 2]
    assert client.counters()["dead_letters_refused"] == 1
    assert client.acknowledge(got) == 3
    assert looking.xpending(EPOCH, "g")["pending"] == 1
    looking.config_set("maxmemory", 0)
    time.sleep(0.02)
    assert client.claim([EPOCH], "g", "c", idle_s=0.001) == []
    assert [letter.raw for letter in client.dead_letters(EPOCH)] == [b"{"]
    client.publish(message(6))
    counters = client.counters()
    assert (counters["published"], counters["publish_failures"], counters["dead_letters"]) == (4, 3, 1)
    looking.close()


@pytest.mark.parametrize("login", ["", ":WRONG-SECRET@", "nobody:WRONG-SECRET@"])
def test_a_password_that_is_missing_or_wrong(tmp_path, waiting: bool, login: str) -> None:
    with redis_server(tmp_path, requirepass="RIGHT-SECRET") as server:
        place = Place(f"redis://{login}127.0.0.1:{server.port}", waiting)
        # Nobody waits for a password to become right.
        client = place.client(patience_s=60.0, start_patience_s=60.0)
        for call in (client.connect, lambda: client.publish(message(1)), lambda: client.consume([EPOCH], "g", "c")):
            error = fails(call, BusDeniedError)
            assert not error.retryable
            assert "refused us" in str(error)
            assert "Check the user and the password in the URL" in str(error)
            assert "SECRET" not in str(error)
        assert client.counters()["retries"] == 0
        assert "refused us" in client.health_check().reason
        right = place.client(f"redis://:RIGHT-SECRET@127.0.0.1:{server.port}")
        right.publish(message(1))
        place.close()


def test_a_user_who_may_not(server: RedisServer, waiting: bool) -> None:
    looking = server.client()
    looking.acl_setuser(
        "reader", enabled=True, passwords=["+SECRET"], keys=["*"], categories=["+@read"], commands=["+ping"]
    )
    place = Place(f"redis://reader:SECRET@127.0.0.1:{server.port}", waiting)
    client = place.client()
    # INFO is forbidden too, and nobody needs it.
    client.connect()
    assert client.health_check().ok
    error = fails(lambda: client.publish(message(1)), BusDeniedError)
    assert "no permissions to run the 'xadd' command" in str(error)
    assert "(ACL)" in str(error)
    assert list(client.replay(EPOCH)) == []
    place.close()
    looking.close()


def test_something_else_under_the_name_of_a_stream(server: RedisServer, own: Place) -> None:
    looking = server.client()
    looking.set(HEALTH, "what?")
    client = own.client(**QUICK)
    calls = (
        lambda: client.publish(message(1, HEALTH)),
        lambda: client.publish_many([message(1), message(2, HEALTH)]),
        lambda: client.consume([EPOCH, HEALTH], "g", "c"),
        lambda: list(client.replay(HEALTH)),
        lambda: client.follow([HEALTH]),
        lambda: client.trim(HEALTH, max_length=1),
    )
    for call in calls:
        error = fails(call, BusWrongTypeError)
        assert not error.retryable
        assert "something other than a stream" in str(error)
        assert HEALTH in str(error)
    # The dead letters' name is taken: what belongs there stays pending.
    looking.set(EPOCH + ".dead", "what?")
    looking.delete(EPOCH)
    looking.xadd(EPOCH, {"message": "{"})
    client.publish(message(3))
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == [3]
    assert client.counters()["dead_letters_refused"] == 1
    looking.close()


def test_closing_ends_a_call_that_is_being_patient() -> None:
    client = OonaClient(f"redis://127.0.0.1:{free_port()}", settings=BusSettings(patience_s=60.0), connect=False)
    timer = threading.Timer(0.3, client.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(BusError):
        client.publish(message(1))
    assert time.monotonic() - began < 10
    timer.join()


def test_an_old_server_is_refused(server: RedisServer, own: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.oona.commands import Info

    monkeypatch.setattr(Info, "read", lambda self, answer: {**answer, "redis_version": "6.0.16"})
    with pytest.raises(BusError, match=r"is version 6\.0\.16; need 6\.2 or newer"):
        own.client().connect()
