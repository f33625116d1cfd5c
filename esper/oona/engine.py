"""What a bus does, without doing it: every call is a generator that yields commands and is sent their answers.

The same generators serve the blocking client, the asyncio client and the bus in memory, which differ only in how a
command reaches a server. So publishing, groups, claims, dead letters, retries and replay exist once. A failed command
is thrown into the generator as an error of the contract.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, TypeAlias, TypeVar

from esper.contracts.backoff import Backoff
from esper.contracts.bus import BusHealth, Delivery
from esper.contracts.errors import BusError, BusFullError, BusUnavailableError
from esper.contracts.messages import MessageError, OonaMessage
from esper.oona.commands import (
    BEGINNING,
    Acknowledge,
    Add,
    Batch,
    Claim,
    Command,
    Entry,
    Info,
    MakeGroup,
    Newest,
    Pause,
    Pending,
    Ping,
    Range,
    Read,
    ReadGroup,
    Step,
    StreamEntries,
    Trim,
)
from esper.oona.counting import Counters
from esper.oona.entries import (
    DEAD,
    DeadLetter,
    dead_letter_fields,
    fields_of,
    message_of,
    order_of,
    read_dead_letter,
)
from esper.oona.failures import GroupExistsError, NoGroupError, failed_at_start
from esper.oona.retention import Trimmer
from esper.oona.settings import BusSettings
from esper.oona.urls import BusAddress

__all__ = ["Engine", "Steps"]

T = TypeVar("T")
Steps: TypeAlias = Generator[Step, Any, T]

#: Longest single wait inside the server: a group that vanishes under a waiting reader is noticed after it.
_LONGEST_BLOCK_MS: Final = 2_000
#: Pause between two looks at several streams of a cluster, which cannot be waited for together.
_LOOK_AGAIN_S: Final = 0.02
#: One round trip carries no more, so that it fits into the timeouts.
_MAX_BATCH_BYTES: Final = 16 << 20
_MAX_BATCH: Final = 1_000
_MAX_NAME: Final = 256
#: A group that vanishes so often during one call is being removed by somebody.
_MAX_RECREATED: Final = 3
_OLDEST_SERVER: Final = (6, 2)


class Engine:
    """The logic of one client.

    Args:
        address: Where the bus is.
        settings: How patient to be.
        split: Whether streams live apart from each other, so that a command can touch only one: a cluster.
    """

    def __init__(self, address: BusAddress, settings: BusSettings, *, split: bool) -> None:
        self.address = address
        self.settings = settings
        self.counters = Counters()
        self._split = split
        self._trimmer = Trimmer(settings.retention or {})
        self._backoff = Backoff(settings.first_pause_s, 0.0)
        self._joined: set[tuple[str, str]] = set()
        self._reached: dict[tuple[str, str], str] = {}
        self._look_for_dead: dict[tuple[str, str], float] = {}

    # -- being there --

    def connect(self) -> Steps[None]:
        """First contact: patient, and then one error that says what to check."""
        began = time.monotonic()
        before = self.counters.snapshot()["retries"]
        try:
            yield from self._ask(Ping(), patience_s=self.settings.start_patience_s)
        except BusUnavailableError as error:
            attempts = 1 + self.counters.snapshot()["retries"] - before
            raise failed_at_start(error, self.address, attempts, time.monotonic() - began) from None
        version = (yield from self._facts()).get("redis_version", "")
        parts = tuple(int(part) for part in str(version).split(".")[:2] if part.isdecimal())
        if len(parts) == 2 and parts < _OLDEST_SERVER:
            raise BusError(f"Redis at {self.address.shown} is version {version}; need 6.2 or newer")

    def health(self) -> Steps[BusHealth]:
        """One question, without a second try."""
        began = time.perf_counter()
        try:
            yield Ping()
            latency = time.perf_counter() - began
            facts = yield from self._facts()
        except BusError as error:
            return BusHealth(False, self.address.shown, reason=str(error))
        return BusHealth(
            True,
            self.address.shown,
            latency_s=latency,
            version=str(facts.get("redis_version", "")),
            memory_bytes=int(facts.get("used_memory", 0)),
            memory_limit_bytes=int(facts.get("maxmemory", 0)),
        )

    # -- publishing --

    def publish(self, messages: Sequence[OonaMessage]) -> Steps[list[str]]:
        """Append all; their entry ids."""
        wires = [(message.topic.value, message.to_bytes()) for message in messages]
        ids: list[str] = []
        for part in _parts(wires):
            adds = [Add(stream, fields_of(wire), self._trimmer.max_length(stream, len(wire))) for stream, wire in part]
            trims = self._trimmer.due([add.stream for add in adds])
            try:
                if len(adds) == 1 and not trims:
                    answers = [(yield from self._ask(adds[0]))]
                else:
                    answers = yield from self._ask(Batch([*adds, *trims], whole=True))
            except BusError:
                self.counters.add("publish_failures", len(wires) - len(ids))
                raise
            for add, entry_id in zip(adds, answers, strict=False):
                self._trimmer.published(add.stream, entry_id)
                ids.append(entry_id)
            self.counters.add("published", len(adds))
        return ids

    def trim(self, stream: str, max_length: int | None, max_age_s: float | None, exact: bool) -> Steps[int]:
        """Drop what is beyond a length, or older than an age by this machine's clock; how many entries went."""
        trims = []
        if max_length is not None:
            trims.append(Trim(_name("stream", stream), max_length=max_length, exact=exact))
        if max_age_s is not None:
            oldest = int(max(0.0, time.time() - max_age_s) * 1000)
            trims.append(Trim(_name("stream", stream), min_id=f"{oldest}-0", exact=exact))
        if not trims:
            raise ValueError("say what to trim to: max_length or max_age_s")
        counts: list[int] = yield from self._ask(Batch(trims))
        return sum(counts)

    # -- consuming --

    def consume(
        self, streams: Sequence[str], group: str, consumer: str, count: int, block_ms: int
    ) -> Steps[list[Delivery]]:
        """What dead consumers left, else what is new."""
        names = _checked(streams, count, block_ms)
        _name("consumer group", group)
        _name("consumer name", consumer)
        deadline = time.monotonic() + block_ms / 1000
        recreated = 0
        while True:
            try:
                for stream in names:
                    yield from self._join(stream, group)
                if found := (yield from self._claim_due(names, group, consumer, count)):
                    return found
                entries = yield from self._look(
                    names, deadline, lambda some, block: ReadGroup(some, group, consumer, count, block)
                )
            except NoGroupError:
                # The server lost its data, or somebody removed the group.
                recreated += 1
                if recreated > _MAX_RECREATED:
                    raise BusError(
                        f"the group {group!r} of {', '.join(names)} at {self.address.shown} vanishes as often as it is "
                        f"made; somebody removes it"
                    ) from None
                yield from self._recreate(names, group)
                continue
            found = []
            for stream, some in entries:
                for entry in some:
                    self._reached[stream, group] = entry.entry_id
                    found += yield from self._accept(stream, group, entry, 1)
            if found or time.monotonic() >= deadline:
                return found

    def claim(
        self, streams: Sequence[str], group: str, consumer: str, count: int, idle_s: float | None
    ) -> Steps[list[Delivery]]:
        """What was handed out ``idle_s`` ago or earlier and not acknowledged."""
        found: list[Delivery] = []
        _name("consumer group", group)
        _name("consumer name", consumer)
        for stream in _checked(streams, count, 0):
            try:
                found += yield from self._claim(
                    stream, group, consumer, count, self.settings.claim_idle_s if idle_s is None else idle_s
                )
            except NoGroupError:
                continue
        return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> Steps[int]:
        """Take them off the lists of their groups."""

        def place(each: Delivery) -> tuple[str, str]:
            return each.stream, each.consumer_group

        commands = [
            Acknowledge(stream, group, tuple(each.entry_id for each in some))
            for (stream, group), some in groupby(sorted(deliveries, key=place), key=place)
            if group
        ]
        if not commands:
            return 0
        counts: list[int] = yield from self._ask(Batch(commands))
        done = sum(counts)
        self.counters.add("acknowledged", done)
        return done

    # -- reading without a group --

    def page(self, stream: str, first: str, last: str, count: int) -> Steps[tuple[list[Delivery], str | None]]:
        """Messages from ``first`` to ``last``, and where the next page begins; None behind the last."""
        entries: list[Entry] = yield from self._ask(Range(_name("stream", stream), first, last, count))
        following = f"({entries[-1].entry_id}" if len(entries) == count else None
        return list(self._readable(stream, entries)), following

    def dead_page(self, stream: str, first: str, count: int) -> Steps[tuple[list[DeadLetter], str | None]]:
        """The same of a stream's dead letters."""
        entries: list[Entry] = yield from self._ask(Range(_name("stream", stream) + DEAD, first, "+", count))
        following = f"({entries[-1].entry_id}" if len(entries) == count else None
        return [read_dead_letter(stream, entry) for entry in entries], following

    def newest(self, streams: Sequence[str]) -> Steps[dict[str, str]]:
        """The place behind everything that is there now, in each stream."""
        names = _checked(streams, 1, 0)
        answers = yield from self._ask(Batch([Newest(stream) for stream in names]))
        return {name: answer[0].entry_id if answer else BEGINNING for name, answer in zip(names, answers, strict=True)}

    def read(
        self, places: Mapping[str, str], count: int, block_ms: int
    ) -> Steps[tuple[list[Delivery], dict[str, str]]]:
        """Messages behind a place in each stream, and the places behind those."""
        names = _checked(tuple(places), count, block_ms)
        reached = dict(places)
        deadline = time.monotonic() + block_ms / 1000
        while True:
            entries: StreamEntries = yield from self._look(
                names, deadline, lambda some, block: Read(tuple((each, reached[each]) for each in some), count, block)
            )
            found: list[Delivery] = []
            for stream, some in entries:
                found += self._readable(stream, some)
                reached[stream] = some[-1].entry_id
            if found or time.monotonic() >= deadline:
                return found, reached

    # -- within --

    def _ask(self, step: Command | Batch, *, patience_s: float | None = None) -> Steps[Any]:
        """``step``'s answer, trying again while the server cannot be reached and there is patience left."""
        give_up = time.monotonic() + (self.settings.patience_s if patience_s is None else patience_s)
        if isinstance(step, Batch) and len(step.commands) == 1:
            return [(yield from self._ask(step.commands[0], patience_s=patience_s))]
        attempt = 0
        while True:
            try:
                answer = yield step
            except BusUnavailableError as error:
                left_s = give_up - time.monotonic()
                if not error.retryable or left_s <= 0:
                    raise
                # The last try comes when patience ends, not before.
                pause = min(self._backoff.pause_s(attempt) or 0.0, left_s)
            else:
                return answer
            attempt += 1
            self.counters.add("retries")
            yield Pause(pause)

    def _look(
        self, names: tuple[str, ...], deadline: float, command: Callable[[tuple[str, ...], int], Command]
    ) -> Steps[StreamEntries]:
        """Entries of one command for all streams, or of one for each where they live apart. Waits once."""
        left_ms = max(0, int((deadline - time.monotonic()) * 1000))
        if not self._split or len(names) == 1:
            block = min(left_ms, _LONGEST_BLOCK_MS, int(self.settings.timeout_s * 500))
            answer: StreamEntries = yield from self._ask(command(names, block))
            return answer
        found: StreamEntries = []
        for stream in names:
            try:
                found += yield from self._ask(command((stream,), 0))
            except BusError:
                # What was handed out by another stream must reach the caller.
                if not found:
                    raise
        if not found and left_ms:
            yield Pause(min(_LOOK_AGAIN_S, left_ms / 1000))
        return found

    def _join(self, stream: str, group: str) -> Steps[None]:
        if (stream, group) in self._joined:
            return
        # A full server refuses before it looks. If there is no group, reading says so.
        with contextlib.suppress(GroupExistsError, BusFullError):
            yield from self._ask(MakeGroup(stream, group, BEGINNING))
        self._joined.add((stream, group))

    def _recreate(self, streams: tuple[str, ...], group: str) -> Steps[None]:
        """Make groups anew where they are missing, behind what was handed out here, unless that is gone too."""
        for stream in streams:
            newest: list[Entry] = yield from self._ask(Newest(stream))
            reached = self._reached.get((stream, group), BEGINNING)
            start = reached if newest and order_of(newest[0].entry_id) >= order_of(reached) else BEGINNING
            try:
                yield from self._ask(MakeGroup(stream, group, start))
            except GroupExistsError:
                continue
            self._joined.add((stream, group))
            self.counters.add("groups_recreated")

    def _claim_due(self, streams: tuple[str, ...], group: str, consumer: str, count: int) -> Steps[list[Delivery]]:
        """What dead consumers left, looked for a few times in the time after which it may be claimed."""
        found: list[Delivery] = []
        for stream in streams:
            now = time.monotonic()
            if now < self._look_for_dead.get((stream, group), 0.0):
                continue
            try:
                some = yield from self._claim(stream, group, consumer, count, self.settings.claim_idle_s)
            except BusError:
                if not found:
                    raise
                break
            # Where some were found there may be more.
            self._look_for_dead[stream, group] = now if some else now + self.settings.claim_idle_s / 4
            found += some
        return found

    def _claim(self, stream: str, group: str, consumer: str, count: int, idle_s: float) -> Steps[list[Delivery]]:
        # Not XAUTOCLAIM: it tells neither how often an entry was handed out, nor, in Redis 6, the id of a deleted one.
        idle_ms = max(1, int(idle_s * 1000))
        rows = yield from self._ask(Pending(stream, group, idle_ms, count))
        if not rows:
            return []
        ids = tuple(row.entry_id for row in rows)
        entries = {each.entry_id: each for each in (yield from self._ask(Claim(stream, group, consumer, idle_ms, ids)))}
        found: list[Delivery] = []
        for row in rows:
            entry = entries.get(row.entry_id)
            if entry is None:
                continue
            if row.times_delivered >= self.settings.max_deliveries:
                reason = f"handed out {row.times_delivered} times and never acknowledged"
                yield from self._bury(stream, group, entry, reason)
            else:
                found += yield from self._accept(stream, group, entry, row.times_delivered + 1)
        yield from self._forget_deleted(stream, group, [each for each in ids if each not in entries])
        return found

    def _forget_deleted(self, stream: str, group: str, ids: list[str]) -> Steps[None]:
        """Take entries off the list that were not to be had because they are no longer in the stream."""
        if not ids:
            return
        try:
            looked = yield from self._ask(Batch([Range(stream, each, each, 1) for each in ids]))
            # What somebody else claimed in between is there, and stays.
            gone = tuple(each for each, there in zip(ids, looked, strict=True) if not there)
            if gone:
                yield from self._ask(Acknowledge(stream, group, gone))
                self.counters.add("vanished", len(gone))
        except BusError:
            # They come round again; what was claimed along with them must reach the caller.
            return

    def _accept(self, stream: str, group: str, entry: Entry, times: int) -> Steps[list[Delivery]]:
        """A delivery; none for an entry that is no message, which goes to the dead letters."""
        try:
            message = message_of(stream, entry)
        except MessageError as error:
            yield from self._bury(stream, group, entry, str(error))
            return []
        self.counters.add("delivered")
        if times > 1:
            self.counters.add("redelivered")
        return [Delivery(stream, entry.entry_id, message, group, times)]

    def _bury(self, stream: str, group: str, entry: Entry, reason: str) -> Steps[None]:
        fields = dead_letter_fields(stream, entry, group, reason)
        letter = Add(stream + DEAD, fields, self.settings.dead_letters_kept)
        done = Acknowledge(stream, group, (entry.entry_id,))
        try:
            if self._split:
                yield from self._ask(letter)
                yield from self._ask(done)
            else:
                yield from self._ask(Batch([letter, done], whole=True))
        except BusError:
            # It stays pending and comes round again; what was handed out along with it must not wait for that.
            self.counters.add("dead_letters_refused")
        else:
            self.counters.add("dead_letters")

    def _readable(self, stream: str, entries: Sequence[Entry]) -> Iterator[Delivery]:
        for entry in entries:
            try:
                message = message_of(stream, entry)
            except MessageError:
                self.counters.add("skipped")
                continue
            yield Delivery(stream, entry.entry_id, message, times_delivered=0)

    def _facts(self) -> Steps[dict[str, Any]]:
        try:
            facts: dict[str, Any] = yield Info()
        except BusUnavailableError:
            raise
        except BusError:
            # Not every user may ask.
            return {}
        return facts


def _parts(wires: list[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Runs of messages, each for one round trip."""
    part: list[tuple[str, bytes]] = []
    size = 0
    for each in wires:
        if part and (len(part) >= _MAX_BATCH or size + len(each[1]) > _MAX_BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(each)
        size += len(each[1])
    if part:
        yield part


def _checked(streams: Sequence[str], count: int, block_ms: int) -> tuple[str, ...]:
    if isinstance(streams, str):
        raise TypeError(f"streams is {streams!r:.60}; need a sequence of names")
    names = tuple(dict.fromkeys(_name("stream", each) for each in streams))
    if not names:
        raise ValueError("streams is empty; need at least one name")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}; need an integer of at least 1")
    if isinstance(block_ms, bool) or not isinstance(block_ms, int) or block_ms < 0:
        raise ValueError(f"block is {block_ms!r}; need milliseconds, an integer of at least 0")
    return names


def _name(what: str, value: str) -> str:
    if not isinstance(value, str) or not value or len(value) > _MAX_NAME or not value.isprintable():
        raise ValueError(f"the {what} is {value!r:.80}; need printable text of 1 to {_MAX_NAME} characters")
    # A TopicNames is a str, and shows itself otherwise where it is formatted.
    return str(value)
