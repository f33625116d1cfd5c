"""The one thread that talks to the bus.

It takes captures and events from two deques, packs them, and publishes each batch in one call. While the bus is away,
and until the spool is empty again, everything goes through the spool, so that each layer's windows stay in order. What
may or may not have been sent is sent again, under the same ``event_id``.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from esper.contracts.backoff import Backoff
from esper.contracts.bus import Bus
from esper.contracts.commands import CommandOutcome
from esper.contracts.messages import MessageError, OonaMessage, TopicNames
from esper.contracts.telemetry import RunEvent
from esper.execution.telemetry.capture import Capture
from esper.execution.telemetry.commands import Accepted, Answer, Inbox
from esper.execution.telemetry.counts import Counts
from esper.execution.telemetry.packing import EVENT_TAG, Outgoing, Packer
from esper.execution.telemetry.spool import Record, Spool, SpoolError

__all__ = ["Report", "Sender", "Signal"]

#: What one call of ``publish_many`` carries: so little that a consumer reads the first layers of a large window while
#: the next are packed, and so much that a round trip is small beside it.
_BATCH: Final = 256
_PART_BYTES: Final = 1 << 17
#: Windows that are packed before something else gets its turn.
_WINDOWS: Final = 8
_REPLAY_BYTES: Final = 1 << 20
_FIRST_PAUSE_S: Final = 0.1
#: After so much work the replay of a spool rests three times as long, unless the spool grows meanwhile.
_REST: Final = 3.0
_SMOOTHING: Final = 0.25


class Signal:
    """Wakes the sender. In C, at a third of what a ``threading.Event`` costs the thread that sets it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Let a present or the next :meth:`wait` return. What was put into a deque before is seen by who waited."""
        if self._queue.empty():
            self._queue.put(None)

    def wait(self, timeout_s: float | None) -> None:
        """Wait to be woken, or for ``timeout_s``."""
        with contextlib.suppress(Empty):
            self._queue.get(timeout=timeout_s)


@dataclass(frozen=True, slots=True)
class Report:
    """An event or an outcome on its way to the sender."""

    content: RunEvent | CommandOutcome
    trace_id: str | None
    at_ns: int


class Sender:
    """Publishes for one model in one process; made on the training thread, started with :meth:`start`.

    Args:
        bus: Where to.
        packer: Makes the messages.
        counts: Shared with the training thread.
        spool_root: Folder of the spools for this bus; None for no spool.
        spool_bytes: Most that the spool holds.
        inbox: Where commands come from, if they are wanted.
        command_interval_s: Seconds from one look for commands to the next.
        on_commands: Told of commands and refusals, on this thread.
    """

    def __init__(
        self,
        bus: Bus,
        packer: Packer,
        counts: Counts,
        *,
        spool_root: Path | None,
        spool_bytes: int,
        inbox: Inbox | None,
        command_interval_s: float,
        on_commands: Callable[[list[Accepted], list[Answer]], None],
    ) -> None:
        self.captures: deque[Capture] = deque()
        self.reports: deque[Report] = deque()
        self.counts = counts
        self.wake = Signal()
        #: Bytes of the captures that were packed; the training thread counts those it handed over.
        self.packed_bytes = 0
        #: Processor seconds that one window takes, packing and publishing, smoothed.
        self.window_cpu_s = 0.0
        self.last_error = ""
        self.lag_s = 0.0
        self.spool_bytes = 0
        self._bus = bus
        self._packer = packer
        self._spool_root = spool_root
        self._max_spool_bytes = spool_bytes
        self._inbox = inbox
        self._command_interval_s = command_interval_s
        self._on_commands = on_commands
        self._spool: Spool | None = None
        self._backoff = Backoff(_FIRST_PAUSE_S, 0.0)
        self._failures = 0
        self._away_since: float | None = None
        self._retry_at = 0.0
        self._poll_at = 0.0
        self._last_length = 0
        self._deadline: float | None = None
        self._ending = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="esper-telemetry", daemon=True)

    # -- from other threads ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def away_s(self) -> float:
        """Seconds since the bus was last there; 0 while it is."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self, timeout_s: float) -> None:
        """Ask the thread to send what it has and end; what cannot be sent in time stays in the spool."""
        deadline = time.monotonic() + timeout_s
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        self.wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end.

        Returns:
            Whether it did. What it has in hand when it did not (the bus or the disk hangs) counts as dropped, and so
            does what came too late for it.
        """
        if self._thread.ident:
            self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        if not ended or self.captures or self.reports:
            self._give_up_the_rest()
        elif lost := self.counts.snapshot()["in_flight"]:
            # A fault of ours: nothing is left that could be in flight. Calling it dropped would hide it.
            self.last_error = f"{lost} messages are unaccounted for"
        return ended

    def forget(self) -> None:
        """In a forked child, where this thread does not exist: let go of the parent's files."""
        if self._spool is not None:
            self._spool.forget()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        # A thread of this kind does not push another off its processor when it wakes: on a busy machine that would be
        # the one that trains, which has just woken it.
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))
        try:
            self._open_spool()
            while not self._finished():
                self.wake.wait(self._patience_s())
                self._turn()
        except Exception as error:
            # A fault of ours: the run goes on, and what was in hand is counted.
            self.last_error = f"telemetry ended: {type(error).__name__}: {error}"
            self._give_up_the_rest()
        finally:
            if self._spool is not None:
                self._spool.close()

    def _turn(self) -> None:
        windows, began = min(_WINDOWS, len(self.captures)), time.thread_time()
        for part in _parts(self._outgoing()):
            self._ship(part)
        if windows:
            spent = (time.thread_time() - began) / windows
            known = self.window_cpu_s
            self.window_cpu_s = spent if not known else known + _SMOOTHING * (spent - known)
        if self._spool is not None and len(self._spool) and time.monotonic() >= self._retry_at:
            self._replay(self._spool)
        if self._inbox is not None and self._deadline is None and time.monotonic() >= self._poll_at:
            self._look_for_commands(self._inbox)

    def _finished(self) -> bool:
        if self._abandoned:
            return True
        if self._deadline is None:
            return False
        if not self._ending:
            # One more try, whenever the next was due.
            self._ending, self._failures, self._retry_at = True, 0, 0.0
            return False
        if self.captures or self.reports:
            return False
        waiting = self._spool is not None and len(self._spool) > 0
        return not waiting or self._failures > 0 or time.monotonic() >= self._deadline

    def _patience_s(self) -> float | None:
        """How long to sleep unless woken."""
        if self._deadline is not None:
            return 0.0
        until: list[float] = []
        if self._spool is not None and len(self._spool):
            until.append(self._retry_at)
        if self._inbox is not None:
            until.append(self._poll_at)
        return max(0.0, min(until) - time.monotonic()) if until else None

    # -- packing -----------------------------------------------------------------------------------

    def _outgoing(self) -> Iterator[Outgoing]:
        """Messages of what waits, made as they are asked for: some windows, each behind what happened before it."""
        for _ in range(_WINDOWS):
            try:
                capture = self.captures.popleft()
            except IndexError:
                break  # or the training thread dropped it
            self.packed_bytes += capture.nbytes
            yield from self._reported(capture.captured_ns)
            yield from self._packer.pack(capture, self.counts.dropped_windows)
        if self.captures:
            self.wake.set()
        else:
            yield from self._reported(None)

    def _reported(self, until_ns: int | None) -> Iterator[Outgoing]:
        """Messages of what happened by then, or of all that waits."""
        while self.reports and (until_ns is None or self.reports[0].at_ns <= until_ns):
            report = self.reports.popleft()
            content = report.content
            topic = content.topic if isinstance(content, RunEvent) else TopicNames.INNOVATION_FIELD_REPORTS
            message = self._packer.message(topic, content.to_payload(), report.trace_id)
            yield Outgoing(EVENT_TAG, message, report.at_ns)

    # -- publishing --------------------------------------------------------------------------------

    def _ship(self, part: Sequence[Outgoing]) -> None:
        """Publish what one call may carry, or keep it."""
        now = time.monotonic()
        waiting = self._spool is not None and len(self._spool) > 0
        late = self._deadline is not None and now >= self._deadline
        if waiting or late or (self._failures and now < self._retry_at):
            self._keep(part)
            return
        refused = self._publish([outgoing.message for outgoing in part])
        if refused is None:
            self._keep(part)
            return
        if not self._abandoned:
            self.counts.delivered += len(part) - len(refused)
        for index in refused:
            self._dropped(part[index].tag)
        self.lag_s = (time.monotonic_ns() - part[-1].captured_ns) * 1e-9

    def _publish(self, messages: Sequence[OonaMessage]) -> list[int] | None:
        """Publish all: which are no messages and were left out, or None if the bus did not take them."""
        try:
            try:
                self._bus.publish_many(messages)
                refused: list[int] = []
            except MessageError:
                refused = self._one_by_one(messages)
        except Exception as error:
            # Whatever a bus raises: it is one that somebody may have brought along.
            self._lost(error)
            return None
        self._failures, self._away_since = 0, None
        return refused

    def _one_by_one(self, messages: Sequence[OonaMessage]) -> list[int]:
        """Publish those that are messages; which are not."""
        refused: list[int] = []
        for index, message in enumerate(messages):
            try:
                self._bus.publish_many([message])
            except MessageError as error:
                self.last_error = str(error)
                refused.append(index)
        return refused

    def _lost(self, error: Exception) -> None:
        now = time.monotonic()
        self.last_error = f"{type(error).__name__}: {error}"
        self._away_since = now if self._away_since is None else self._away_since
        self._retry_at = now + (self._backoff.pause_s(self._failures) or 0.0)
        self._failures += 1

    # -- the spool ---------------------------------------------------------------------------------

    def _open_spool(self) -> None:
        if self._spool_root is None:
            return
        try:
            self._spool = Spool(self._spool_root, self._max_spool_bytes)
        except SpoolError as error:
            self.last_error = str(error)
            return
        if self._spool.damaged:
            self.last_error = f"{self._spool.damaged} spooled segments of an earlier process end in a torn record"
        self._settle_spool(self._spool)

    def _keep(self, batch: Sequence[Outgoing]) -> None:
        """Put messages on disk; what does not fit or cannot be written is dropped and counted."""
        spool = self._spool
        for outgoing in batch:
            if spool is not None:
                try:
                    spool.append(outgoing.tag, outgoing.message.to_bytes())
                    continue
                except (SpoolError, MessageError) as error:
                    self.last_error = str(error)
            self._dropped(outgoing.tag)
        if spool is not None:
            self._settle_spool(spool)

    def _settle_spool(self, spool: Spool) -> None:
        """Count what the spool holds and what it had to let go."""
        own, others = spool.take_dropped()
        if self._abandoned:
            return  # what was in hand is counted as dropped by now
        self.counts.spooled = spool.own
        self.spool_bytes = spool.size_bytes
        self.counts.recovered_dropped += others.total()
        for tag, number in own.items():
            self._dropped(tag, number)

    def _dropped(self, tag: int, number: int = 1) -> None:
        if self._abandoned:
            return
        self.counts.dropped_late += number
        if tag >= 0:
            self.counts.layers_dropped[tag] += number
        elif tag == EVENT_TAG:
            self.counts.events_dropped_late += number

    def _replay(self, spool: Spool) -> None:
        """Send the oldest of what is on disk."""
        began = time.thread_time()
        # One is enough to see whether the bus is back; reading a batch would cost more than asking.
        records = spool.head(_REPLAY_BYTES, 1 if self._failures else _BATCH)
        if not records:
            self._settle_spool(spool)  # what there was could not be read
            return
        readable: list[tuple[Record, OonaMessage]] = []
        lost: list[Record] = []
        for record in records:
            try:
                readable.append((record, OonaMessage.from_bytes(record.content)))
            except MessageError as error:
                # Its checksum is right, so it was written by a version that has other messages.
                self.last_error = f"a spooled message cannot be read: {error}"
                lost.append(record)
        refused = self._publish([message for _, message in readable]) if readable else []
        if refused is None:
            return
        lost += [readable[index][0] for index in refused]
        spool.take(records)
        self._settle_spool(spool)  # before it is delivered: nothing is counted twice, not for a moment
        if not self._abandoned:
            self._settle_replay(records, lost)
        self._rest(len(spool), time.thread_time() - began)

    def _settle_replay(self, records: Sequence[Record], lost: Sequence[Record]) -> None:
        """Count what was sent, all of it from one segment: written by this process, or taken over."""
        sent = len(records) - len(lost)
        if records[0].own:
            self.counts.delivered += sent
            for record in lost:
                self._dropped(record.tag)
        else:
            self.counts.recovered += sent
            self.counts.recovered_dropped += len(lost)

    def _rest(self, length: int, spent_s: float) -> None:
        """Let the training have the processor, unless the spool grows faster than it empties."""
        shrank, self._last_length = length < self._last_length, length
        self._retry_at = time.monotonic() + (_REST * spent_s if shrank and not self._ending else 0.0)

    # -- commands ----------------------------------------------------------------------------------

    def _look_for_commands(self, inbox: Inbox) -> None:
        now = time.monotonic()
        self._poll_at = now + self._command_interval_s
        if self._failures and now < self._retry_at:
            self._poll_at = self._retry_at
            return
        try:
            accepted, answers = inbox.poll()
        except Exception as error:
            self.last_error = f"{type(error).__name__}: {error}"
            self._poll_at = now + max(self._command_interval_s, 1.0)
            return
        if accepted or answers:
            self._on_commands(accepted, answers)

    # -- the end -----------------------------------------------------------------------------------

    def _give_up_the_rest(self) -> None:
        self._abandoned = True
        self.captures.clear()
        self.reports.clear()
        self.counts.dropped_late += max(0, self.counts.snapshot()["in_flight"])


def _parts(stream: Iterable[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    """What one call may carry, again and again."""
    part: list[Outgoing] = []
    size = 0
    for outgoing in stream:
        part.append(outgoing)
        size += outgoing.size
        if len(part) >= _BATCH or size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
