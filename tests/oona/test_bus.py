"""What every bus does: Redis through both clients, and the bus in memory."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import pytest

from esper.contracts.bus import AsyncBus, Bus, BusError
from esper.contracts.messages import MAX_MESSAGE_BYTES, MessageError
from esper.oona import Retention
from tests.oona.buses import EPOCH, HEALTH, Place, Waiting, message
from tests.servers import wait_until

#: Idle times long enough to be told apart from none on a busy machine, short enough to wait for.
IDLE_S = 0.3


def numbers(deliveries) -> list[int]:
    return [each.message.payload["number"] for each in deliveries]


def test_a_client_is_what_lower_layers_are_handed(place: Place) -> None:
    client = place.client()
    assert isinstance(client.client, AsyncBus) if isinstance(client, Waiting) else isinstance(client, Bus)
    assert client.url == place.url


def test_a_message_arrives_as_it_was_published(place: Place) -> None:
    client = place.client()
    sent = message(7, text="ü\n\x00", nested={"list": [1, 2.5, None, True]})
    entry = client.publish(sent)
    (got,) = client.consume([EPOCH], "g", "c")
    assert got.message == sent
    assert (got.stream, got.entry_id, got.consumer_group, got.times_delivered) == (EPOCH, entry, "g", 1)
    assert abs(got.published_at - time.time()) < 60
    assert place.pending(EPOCH, "g") == 1
    assert client.acknowledge([got]) == 1
    assert client.acknowledge([got]) == 0
    assert place.pending(EPOCH, "g") == 0
    counters = client.counters()
    assert (counters["published"], counters["delivered"], counters["acknowledged"]) == (1, 1, 1)


def test_a_batch_keeps_its_order_and_reaches_each_topics_stream(place: Place) -> None:
    client = place.client()
    sent = [message(number, [EPOCH, HEALTH][number % 2]) for number in range(20)]
    ids = client.publish_many(sent)
    assert len(ids) == len(set(zip([each.topic for each in sent], ids, strict=True))) == 20
    got = client.consume([EPOCH, HEALTH], "g", "c", count=50)
    for stream in (EPOCH, HEALTH):
        assert [each.message for each in got if each.stream == stream] == [
            each for each in sent if each.topic == stream
        ]
    assert {each.entry_id for each in got} == set(ids)
    assert client.acknowledge(got) == 20
    assert client.publish_many([]) == []


def test_a_batch_too_large_for_one_round_trip_arrives_whole(place: Place) -> None:
    client = place.client()
    sent = [message(number) for number in range(1003)]
    assert len(client.publish_many(sent)) == 1003
    got = client.consume([EPOCH], "g", "c", count=2000)
    assert numbers(got) == list(range(1003))


def test_nothing_of_a_batch_is_sent_when_one_message_is_too_long(place: Place) -> None:
    client = place.client()
    with pytest.raises(MessageError, match="limit"):
        client.publish_many([message(0), message(1, text="x" * MAX_MESSAGE_BYTES)])
    assert place.length(EPOCH) == 0


def test_consumers_of_a_group_share_and_groups_do_not(place: Place) -> None:
    client, other = place.client(), place.client()
    client.publish_many([message(number) for number in range(4)])
    first = client.consume([EPOCH], "g", "a", count=2)
    second = other.consume([EPOCH], "g", "b", count=9)
    assert numbers(first) == [0, 1]
    assert numbers(second) == [2, 3]
    assert numbers(other.consume([EPOCH], "h", "b", count=9)) == [0, 1, 2, 3]
    assert client.consume([EPOCH], "g", "a", block=0) == []


def test_a_group_may_be_there_before_its_stream(place: Place) -> None:
    client, other = place.client(), place.client()
    assert client.consume([EPOCH], "g", "a", block=0) == []
    # The other client finds the group made.
    assert other.consume([EPOCH], "g", "b", block=0) == []
    client.publish(message(1))
    assert numbers(other.consume([EPOCH], "g", "b")) == [1]


def test_waiting_ends_when_a_message_comes_or_the_time_is_over(place: Place) -> None:
    client = place.client()
    began = time.monotonic()
    assert client.consume([EPOCH], "g", "c", block=200) == []
    assert time.monotonic() - began >= 0.19
    got: list = []
    thread = threading.Thread(target=lambda: got.extend(client.consume([EPOCH], "g", "c", block=30_000)))
    thread.start()
    time.sleep(0.1)
    # Not through the waiting client, whose event loop is busy if it has one.
    place.client().publish(message(3))
    thread.join(20)
    assert numbers(got) == [3]


def test_what_a_dead_consumer_left_goes_to_another(place: Place) -> None:
    dead, living = place.client(), place.client(claim_idle_s=IDLE_S)
    dead.publish_many([message(number) for number in range(3)])
    left = dead.consume([EPOCH], "g", "dead", count=2)
    assert numbers(living.consume([EPOCH], "g", "living", count=9)) == [2]

    def claimed():
        return living.consume([EPOCH], "g", "living", count=9, block=20)

    got = wait_until(claimed, "the dead consumer's messages", pause_s=0.01)
    assert time.time() - left[0].published_at >= IDLE_S
    # Message 2 is on the living consumer's own list, and comes round with them.
    assert [(each.message.payload["number"], each.times_delivered) for each in got][:2] == [(0, 2), (1, 2)]
    assert [each.entry_id for each in got[:2]] == [each.entry_id for each in left]
    assert living.counters()["redelivered"] == len(got)
    # The dead one was only slow: acknowledging is still right, and once.
    assert dead.acknowledge(left) == 2
    assert living.acknowledge(got[:2]) == 0


def test_claiming_now(place: Place) -> None:
    client = place.client()
    client.publish(message(5))
    client.consume([EPOCH], "g", "a")
    assert client.claim([EPOCH], "g", "b", idle_s=3600.0) == []
    time.sleep(0.02)
    (got,) = client.claim([EPOCH], "g", "b", idle_s=0.001)
    assert (got.message.payload["number"], got.times_delivered) == (5, 2)
    assert client.claim([EPOCH], "unknown", "b", idle_s=0.001) == []


def test_a_message_that_kills_its_consumers_ends_among_the_dead_letters(place: Place) -> None:
    client = place.client(max_deliveries=2)
    client.publish_many([message(0), message(1)])
    client.consume([EPOCH], "g", "a", count=1)
    time.sleep(0.02)
    assert [each.times_delivered for each in client.claim([EPOCH], "g", "b", idle_s=0.001)] == [2]
    time.sleep(0.02)
    assert client.claim([EPOCH], "g", "c", idle_s=0.001) == []
    (letter,) = client.dead_letters(EPOCH)
    assert letter.reason == "handed out 2 times and never acknowledged"
    assert (letter.stream, letter.consumer_group) == (EPOCH, "g")
    assert b'"number":0' in letter.raw
    assert place.pending(EPOCH, "g") == 0
    assert client.counters()["dead_letters"] == 1
    assert numbers(client.consume([EPOCH], "g", "a", count=9)) == [1]


BAD = {
    "no message": ({"other": "x"}, "the entry has no field 'message'; it has: b'other'"),
    "not JSON": ({"message": "{"}, "not valid JSON"),
    "not text": ({"message": b"\xff\xfe"}, "not UTF-8"),
    "no envelope": ({"message": "[]"}, "a message is an object"),
    "a later version": ({"message": '{"version":2,"more":1}'}, "message version 2 is unknown"),
    "another stream's": ({"message": message(1, HEALTH).to_json()}, "stands in the stream system.events.epoch"),
    "an unknown topic": ({"message": message(1).to_json().replace(EPOCH, "weather.report")}, "topic 'weather.report'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_entry_that_is_no_message_goes_to_the_dead_letters_and_the_consumer_goes_on(place: Place, kind: str) -> None:
    fields, reason = BAD[kind]
    client = place.client()
    client.publish(message(1))
    entry = place.put(EPOCH, fields)
    client.publish(message(2))
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == [1, 2]
    (letter,) = client.dead_letters(EPOCH)
    assert reason in letter.reason
    assert letter.entry_id == entry
    raw = fields.get("message", b"")
    assert letter.raw == (raw if isinstance(raw, bytes) else raw.encode())
    assert place.pending(EPOCH, "g") == 2
    assert client.counters()["dead_letters"] == 1


def test_a_consumer_waits_on_after_nothing_but_bad_entries(place: Place) -> None:
    client = place.client()
    place.put(EPOCH, {"message": "{"})
    began = time.monotonic()
    assert client.consume([EPOCH], "g", "c", block=200) == []
    assert time.monotonic() - began >= 0.19
    assert client.counters()["dead_letters"] == 1


def test_dead_letters_are_bounded(place: Place) -> None:
    client = place.client(dead_letters_kept=3)
    for number in range(8):
        place.put(EPOCH, {"message": str(number)})
    assert client.consume([EPOCH], "g", "c", count=9, block=0) == []
    assert [letter.raw for letter in client.dead_letters(EPOCH)] == [b"5", b"6", b"7"]


def test_what_was_trimmed_while_it_was_pending_is_counted(place: Place) -> None:
    client = place.client()
    client.publish_many([message(number) for number in range(3)])
    client.consume([EPOCH], "g", "a", count=9)
    client.trim(EPOCH, max_length=1, exact=True)
    time.sleep(0.02)
    assert numbers(client.claim([EPOCH], "g", "b", count=9, idle_s=0.001)) == [2]
    assert client.counters()["vanished"] == 2
    assert place.pending(EPOCH, "g") == 1


def test_retention_by_length(place: Place) -> None:
    client = place.client(retention={EPOCH: Retention(max_length=5)})
    for number in range(8):
        client.publish(message(number))
    client.publish_many([message(number) for number in range(8, 12)])
    assert [each.message.payload["number"] for each in client.replay(EPOCH)] == [7, 8, 9, 10, 11]
    # Nothing was said of the other stream.
    client.publish_many([message(number, HEALTH) for number in range(12)])
    assert place.length(HEALTH) == 12


def test_retention_by_bytes(place: Place) -> None:
    size = len(message(0, text="x" * 10_000).to_json())
    client = place.client(retention={EPOCH: Retention(max_bytes=10 * size)})
    for number in range(30):
        client.publish(message(number, text="x" * 10_000))
    # The numbers take one digit or two: the average is a byte off.
    assert place.length(EPOCH) in (9, 10)


def test_retention_by_age(place: Place) -> None:
    client = place.client(retention={EPOCH: Retention(max_age_s=IDLE_S)})
    client.publish_many([message(0), message(1)])
    time.sleep(1.5 * IDLE_S)
    began = time.time()
    # The first tells what time it is there, the second sends that along.
    client.publish(message(2))

    def gone() -> bool:
        client.publish(message(3))
        return {0, 1}.isdisjoint(numbers(client.replay(EPOCH)))

    wait_until(gone, "the old ones go", 10)
    assert 2 in numbers(client.replay(EPOCH)) or time.time() - began > IDLE_S


def test_trimming_when_asked(place: Place) -> None:
    client = place.client()
    client.publish_many([message(number) for number in range(6)])
    assert client.trim(EPOCH, max_length=4, exact=True) == 2
    time.sleep(0.05)
    client.publish(message(6))
    assert client.trim(EPOCH, max_age_s=3600, exact=True) == 0
    found = list(client.replay(EPOCH))
    age = time.time() - found[-2].published_at - 0.001
    assert client.trim(EPOCH, max_age_s=age, exact=True) == 4
    assert numbers(client.replay(EPOCH)) == [6]
    assert client.trim("no.such.stream", max_length=1) == 0
    with pytest.raises(ValueError, match="max_length or max_age_s"):
        client.trim(EPOCH)


def test_replay(place: Place) -> None:
    client = place.client()
    client.publish_many([message(number) for number in range(3)])
    time.sleep(0.01)
    middle = time.time()
    time.sleep(0.01)
    ids = client.publish_many([message(number) for number in range(3, 7)])
    place.put(EPOCH, {"message": "{"})
    assert numbers(client.replay(EPOCH, page=2)) == [0, 1, 2, 3, 4, 5, 6]
    assert client.counters()["skipped"] == 1
    assert numbers(client.replay(EPOCH, middle)) == [3, 4, 5, 6]
    assert numbers(client.replay(EPOCH, datetime.fromtimestamp(middle, UTC), page=1)) == [3, 4, 5, 6]
    assert numbers(client.replay(EPOCH, until=middle)) == [0, 1, 2]
    assert numbers(client.replay(EPOCH, ids[1], ids[2])) == [4, 5]
    assert numbers(client.replay(EPOCH, time.time() + 60)) == []
    assert list(client.replay("no.such.stream")) == []
    assert all(each.times_delivered == 0 and each.consumer_group == "" for each in client.replay(EPOCH))
    # Nothing of it was taken from a group.
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == list(range(7))
    with pytest.raises(ValueError, match="time zone"):
        list(client.replay(EPOCH, datetime.now()))
    with pytest.raises(ValueError, match="no entry id"):
        list(client.replay(EPOCH, "yesterday"))


def test_following(place: Place) -> None:
    client = place.client()
    client.publish(message(0))
    late = client.follow([EPOCH, HEALTH])
    early = client.follow([EPOCH], since=0.0)
    time.sleep(0.01)
    ids = client.publish_many([message(1), message(2, HEALTH)])
    place.put(EPOCH, {"message": "{"})
    client.publish(message(3))
    assert sorted(numbers(late.read())) == [1, 2, 3]
    assert numbers(early.read(count=1)) == [0]
    assert numbers(early.read()) == [1, 3]
    assert late.read(block=0) == early.read(block=50) == []
    client.publish(message(4))
    assert numbers(late.read()) == numbers(early.read()) == [4]
    assert numbers(client.follow([EPOCH], since=ids[0]).read()) == [1, 3, 4]


def test_a_group_that_vanishes_is_made_anew_behind_what_was_had(place: Place) -> None:
    client = place.client()
    client.publish_many([message(0), message(1)])
    client.acknowledge(client.consume([EPOCH], "g", "c", count=9))
    place.drop_group(EPOCH, "g")
    client.publish(message(2))
    assert numbers(client.consume([EPOCH], "g", "c", count=9)) == [2]
    assert client.counters()["groups_recreated"] == 1


def test_lost_data_loses_no_later_message(place: Place) -> None:
    client = place.client()
    client.publish_many([message(0, HEALTH), message(1)])
    client.acknowledge(client.consume([EPOCH, HEALTH], "g", "c", count=9))
    # An id of before cannot come again.
    time.sleep(0.005)
    place.forget()
    client.publish(message(2))
    assert numbers(client.consume([EPOCH, HEALTH], "g", "c", count=9)) == [2]
    client.publish(message(3, HEALTH))
    assert numbers(client.consume([EPOCH, HEALTH], "g", "c", count=9)) == [3]
    assert client.counters()["groups_recreated"] == 2


def test_health(place: Place) -> None:
    health = place.client().health_check()
    assert health.ok
    assert health.reason == ""
    assert health.url == place.url
    assert 0 < health.latency_s < 60
    assert health.memory_bytes >= 0


def test_a_closed_client_says_so(place: Place) -> None:
    client = place.client()
    client.publish(message(0))
    if isinstance(client, Waiting):
        client.run(client.client.close())
    else:
        client.close()
    with pytest.raises(BusError, match="closed"):
        client.publish(message(1))
    with pytest.raises(BusError, match="closed"):
        client.consume([EPOCH], "g", "c")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([], "g", "c"), "streams is empty"),
        ((EPOCH, "g", "c"), "need a sequence of names"),
        (([""], "g", "c"), "the stream is ''"),
        (([EPOCH], "", "c"), "the consumer group is ''"),
        (([EPOCH], "g", "c\n"), "the consumer name is"),
        (([EPOCH], "g", "c", 0), "count is 0"),
        (([EPOCH], "g", "c", 1, -1), "block is -1"),
        (([EPOCH], "g", "c", 1, 0.5), "block is 0.5"),
    ],
)
def test_arguments_that_cannot_be(place: Place, arguments, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        place.client().consume(*arguments)
