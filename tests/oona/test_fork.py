"""Clients in several processes: a child's connections are its own, and what a killed consumer had goes to another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from esper.oona import BusSettings, OonaClient
from tests.oona.buses import EPOCH, message
from tests.servers import RedisServer, wait_until

ROOT = Path(__file__).parents[2]

PROLOGUE = """
import os, sys, threading
from esper.contracts.messages import OonaMessage
from esper.oona import OonaClient
def message(number): return OonaMessage("tests", "trace", "system.events.epoch", {"number": number})
def numbers(found): return [each.message.payload["number"] for each in found]
def in_child(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child
def end(child):
    assert os.waitpid(child, 0)[1] == 0
STREAM = ["system.events.epoch"]
"""


def run(code: str, *args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_redis(server: RedisServer) -> None:
    run(
        """
client = OonaClient(sys.argv[1])
client.publish(message(0))
# A lock that a thread holds in the moment of the fork is held for ever in the child.
with client._link._lock, client._engine.counters._lock:
    child = in_child(lambda: [client.publish(message(number)) for number in range(1, 101)])
# Both at once: on a shared connection the answers would be mixed up.
for number in range(101, 201):
    client.publish(message(number))
end(child)
got = numbers(client.consume(STREAM, "g", "c", count=500))
assert sorted(got) == list(range(201)), got
assert [each for each in got if each <= 100] == list(range(101))
import time
for _ in range(200):
    connections = client._link._client.client_list()
    if len(connections) == 1: break
    time.sleep(0.05)
# The child's is gone with it. Ours are the one that we have had all along.
assert len(connections) == 1, connections
assert client.counters()["published"] == 101
""",
        server.url,
    )


def test_a_client_may_be_closed_in_the_child(server: RedisServer) -> None:
    run(
        """
client = OonaClient(sys.argv[1])
child = in_child(client.close)
end(child)
client.publish(message(1))
assert numbers(client.replay(STREAM[0])) == [1]
assert client.counters()["retries"] == 0
""",
        server.url,
    )


def test_a_grandchild(server: RedisServer) -> None:
    run(
        """
client = OonaClient(sys.argv[1])
def second():
    client.publish(message(2))
    end(in_child(lambda: client.publish(message(3))))
    client.publish(message(4))
end(in_child(second))
client.publish(message(5))
assert numbers(client.replay(STREAM[0])) == [2, 3, 4, 5]
""",
        server.url,
    )


def test_memory() -> None:
    run(
        """
client = OonaClient("memory://fork")
client.publish(message(1))
def work():
    assert client.consume(STREAM, "g", "c", block=0) == []
    client.publish(message(2))
    assert numbers(client.consume(STREAM, "g", "c")) == [2]
with client._link._broker._lock:
    child = in_child(work)
end(child)
assert numbers(client.consume(STREAM, "g", "c")) == [1]
"""
    )


def test_a_consumer_that_is_killed(server: RedisServer) -> None:
    with OonaClient(server.url, settings=BusSettings(claim_idle_s=0.3)) as client:
        client.publish_many([message(number) for number in range(5)])
        code = (
            PROLOGUE
            + "client = OonaClient(sys.argv[1])\nprint(numbers(client.consume(STREAM, 'g', 'doomed', count=3)))\n"
        )
        doomed = subprocess.Popen(
            [sys.executable, "-c", code + "sys.stdout.flush()\nsys.stdin.read()", server.url],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with doomed:
            assert doomed.stdout is not None
            assert doomed.stdout.readline() == "[0, 1, 2]\n"
            doomed.kill()
        seen: dict[int, int] = {}

        def all_seen() -> bool:
            some = client.consume([EPOCH], "g", "heir", count=9, block=50)
            client.acknowledge(some)
            seen.update({each.message.payload["number"]: each.times_delivered for each in some})
            return len(seen) == 5

        wait_until(all_seen, "the heir has all")
        assert seen == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}
