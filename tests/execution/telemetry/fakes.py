"""A bus whose moods the test decides, and small models to publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import esper
from esper.contracts.bus import Bus, BusError, BusHealth, Delivery
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.telemetry import HealthWindow, RunEvent, read_payload
from esper.execution.telemetry.options import TelemetryOptions


class Reader:
    def __init__(self, bus: FakeBus, at: int) -> None:
        self.bus, self.at = bus, at

    def read(self, count: int = 100, block: int = 1000) -> list[Delivery]:
        self.bus.check()
        found = self.bus.inbox[self.at : self.at + count]
        self.at += len(found)
        return found


class FakeBus:
    """Keeps what it takes.

    Attributes:
        fail: Raised by every call, if set.
        hold: Calls wait for this, if set.
        messages: What was published, in order, with duplicates.
        calls: Sizes of the batches that were offered.
        after: Calls that succeed before ``fail`` counts.
    """

    def __init__(self) -> None:
        self.fail: Exception | None = None
        self.hold: threading.Event | None = None
        self.messages: list[OonaMessage] = []
        self.calls: list[int] = []
        self.inbox: list[Delivery] = []
        self.skipped = 0
        self.closed = False
        self.threads: set[str] = set()

    @property
    def url(self) -> str:
        return "fake://bus"

    def check(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.hold is not None:
            self.hold.wait(60)
        if self.fail is not None:
            raise self.fail

    def publish(self, message: OonaMessage) -> str:
        return self.publish_many([message])[0]

    def publish_many(self, messages: Sequence[OonaMessage]) -> list[str]:
        self.calls.append(len(messages))
        self.check()
        for message in messages:
            message.to_json()
        self.messages.extend(messages)
        return [f"{time.time_ns() // 1_000_000}-{i}" for i in range(len(messages))]

    def consume(
        self, streams: Sequence[str], consumer_group: str, consumer_name: str, count: int = 1, block: int = 1000
    ) -> list[Delivery]:
        raise BusError("nobody consumes here")

    def acknowledge(self, deliveries: Sequence[Delivery]) -> int:
        raise BusError("nobody consumes here")

    def health_check(self) -> BusHealth:
        return BusHealth(self.fail is None, self.url)

    def counters(self) -> Mapping[str, int]:
        return {"skipped": self.skipped}

    def follow(self, streams: Sequence[str], since: float | str | None = None) -> Reader:
        assert list(streams) == [TopicNames.CONTROL_KASMINA_COMMANDS]
        self.check()
        return Reader(self, 0)

    def close(self) -> None:
        self.closed = True

    # -- for tests --

    def command(self, payload: dict[str, Any], published_at: float | None = None) -> None:
        message = OonaMessage("operator", "trace-7", TopicNames.CONTROL_KASMINA_COMMANDS, payload)
        at = time.time() if published_at is None else published_at
        self.inbox.append(Delivery(message.topic, f"{int(at * 1000)}-{len(self.inbox)}", message))

    def windows(self) -> list[HealthWindow]:
        payloads = [read_payload(message) for message in tuple(self.messages)]
        return [payload for payload in payloads if isinstance(payload, HealthWindow)]

    def events(self) -> list[RunEvent]:
        payloads = [read_payload(message) for message in tuple(self.messages)]
        return [payload for payload in payloads if isinstance(payload, RunEvent)]

    def outcomes(self) -> list[Any]:
        payloads = [read_payload(message) for message in tuple(self.messages)]
        return [payload for payload in payloads if not isinstance(payload, HealthWindow | RunEvent)]


def is_a_bus(bus: FakeBus) -> Bus:
    """For the type checker: the fake has all that a bus has."""
    return bus


def host() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def published(bus: FakeBus, spool: Path, **options: Any) -> esper.MorphableModel:
    """A small model that publishes after every step, unless told otherwise."""
    model = esper.wrap(host(), seeds_per_layer=2, monitor_budget=0.0)
    chosen = {"every_steps": 1, "spool_dir": spool, **options}
    model.publish_to(bus, TelemetryOptions(**chosen))
    return model


def settled(model: esper.MorphableModel, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> Any:
    """The model's statistics once they are as wanted."""
    deadline = time.monotonic() + timeout_s
    while True:
        stats = model.telemetry_stats()
        if condition(stats):
            return stats
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {stats}")
        time.sleep(0.005)


def add_up(stats: Mapping[str, Any], produced: int | None = None) -> None:
    """Produced is delivered and spooled and dropped.

    While some are in flight, which is the rest by definition, it takes the number ``produced`` to check anything.
    """
    total = stats["delivered"] + stats["spooled"] + stats["dropped"] + stats["in_flight"]
    assert stats["produced"] == total, stats
    if produced is None:
        assert stats["in_flight"] == 0, stats
    else:
        assert stats["in_flight"] >= 0, stats
        assert stats["produced"] == produced, stats
