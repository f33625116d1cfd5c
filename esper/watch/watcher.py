"""A source read in a thread of its own into a state that others look at under a lock."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from esper.watch.facts import Fact, RunReport, Unreadable
from esper.watch.state import JobState

__all__ = ["ReplayClock", "Source", "Watcher"]


class Source(Protocol):
    """Where facts come from.

    Attributes:
        name: For the heading; without credentials.
        live: What it tells happens now, so that the time since capture means something.
        replay: Its clock, where there is one to pause and to set faster.
    """

    name: str
    live: bool
    replay: ReplayClock | None

    def run(self, watcher: Watcher) -> None:
        """Tell ``watcher`` everything, until there is no more or it has had enough.

        Raises:
            EsperError, OSError, ValueError: what the user has to be told in one line.
        """


class Watcher:
    """Reads one source.

    Attributes:
        source: What is read.
        state: The picture; to be looked at inside :meth:`looking`.
        mode: What the source is doing, for the heading.
        alarm: What is wrong with the source at present; empty if nothing is.
        error: Why reading ended; None while it goes on and after a good end.
        done: Set when reading has ended.
    """

    def __init__(self, source: Source, state: JobState | None = None) -> None:
        self.source = source
        self.state = JobState() if state is None else state
        self.mode = "reading"
        self.alarm = ""
        self.error: Exception | None = None
        self.done = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._now = 0.0
        self._heard = 0
        self._listeners: list[Callable[[JobState, float], None]] = []
        self._thread = threading.Thread(target=self._run, name="esper-watch", daemon=True)

    def start(self) -> Watcher:
        """Begin to read."""
        self._thread.start()
        return self

    def stop(self, timeout_s: float = 5.0) -> None:
        """Have the source stop, and wait for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def listen(self, listener: Callable[[JobState, float], None]) -> None:
        """Have ``listener(state, now)`` called, on the thread that reads, whenever something was heard."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def looking(self) -> Iterator[JobState]:
        """The state, which does not change meanwhile."""
        with self._lock:
            yield self.state

    @property
    def heard(self) -> int:
        """Facts so far; changes when there is something new to see."""
        return self._heard

    def now(self) -> float:
        """Seconds since 1970: of this machine for a live source, else the time that is replayed."""
        return time.time() if self.source.live else self._now

    # -- for sources --

    @property
    def stopping(self) -> bool:
        """Whether it is time to end."""
        return self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, unless it is time to end; whether it is."""
        return self._stop.wait(seconds)

    def hear(self, facts: list[Fact | Unreadable], now: float) -> None:
        """Take in some facts, heard at ``now``."""
        with self._lock:
            for fact in facts:
                self.state.apply(fact, now)
                if isinstance(fact, RunReport) and fact.epoch is not None and fact is not facts[-1]:
                    # Of epochs that are heard together each is a point of its curve.
                    self._tell(now)
            self._tell(now)
        self._heard += len(facts)
        self._now = max(self._now, now)

    def _tell(self, now: float) -> None:
        for listener in self._listeners:
            listener(self.state, now)

    def skip(self, seconds: float) -> None:
        """So much was left unread, to keep up."""
        with self._lock:
            self.state.skip(seconds)

    def tick(self, now: float) -> None:
        """The time that is replayed goes on, though nothing happens."""
        self._now = max(self._now, now)
        self._heard += 1

    def report(self, mode: str, alarm: str = "") -> None:
        """Say what the source is doing, in a word, and what is wrong, in a sentence."""
        if (mode, alarm) != (self.mode, self.alarm):
            self.mode, self.alarm = mode, alarm
            self._heard += 1

    def _run(self) -> None:
        try:
            self.source.run(self)
        except Exception as error:
            self.error = error
        finally:
            self._heard += 1
            self.done.set()


class ReplayClock:
    """The time of a recording: runs at a multiple of real time, and may be paused. Safe to use from two threads."""

    SLOWEST = 1 / 16
    FASTEST = 4096.0

    def __init__(self, speed: float) -> None:
        self._lock = threading.Lock()
        self._speed = speed
        self._paused = False
        self._mark: tuple[float, float] | None = None

    @property
    def speed(self) -> float:
        """Seconds of the recording in one real second."""
        return self._speed

    def begin(self, at: float) -> None:
        """The recording begins at ``at``, now."""
        with self._lock:
            self._mark = time.monotonic(), at

    def now(self) -> float:
        """The time of the recording."""
        with self._lock:
            return self._reading()

    def pause(self, paused: bool) -> None:
        """Stand still, or go on."""
        with self._lock:
            self._rebase()
            self._paused = paused

    def change(self, factor: float) -> None:
        """Go ``factor`` times as fast as so far."""
        with self._lock:
            self._rebase()
            self._speed = min(self.FASTEST, max(self.SLOWEST, self._speed * factor))

    def _reading(self) -> float:
        if self._mark is None:
            return 0.0
        real, at = self._mark
        return at if self._paused else at + (time.monotonic() - real) * self._speed

    def _rebase(self) -> None:
        if self._mark is not None:
            self._mark = time.monotonic(), self._reading()
