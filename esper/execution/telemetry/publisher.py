"""A model's telemetry as its training thread sees it: windows, events, and commands that wait for a step.

:meth:`Publisher.on_due` is called from the model's ``step()`` when it is due and takes what is due then. Nothing of it
waits, opens a connection or touches a file; all of that is the sender's, a thread that is started with the first step
and, in a forked child, anew with the child's first.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from esper.contracts import payload
from esper.contracts.bus import Bus
from esper.contracts.commands import control_key
from esper.contracts.paths import cache_dir
from esper.contracts.telemetry import MAX_LAYER_NAME, EventKind, RunEvent, printable
from esper.execution.lattice import Lattice
from esper.execution.pacing import NEVER
from esper.execution.telemetry.capture import Capture, Capturer, HealthSource
from esper.execution.telemetry.commands import Accepted, Answer, CommandSource, CommandTarget, Inbox, carry_out
from esper.execution.telemetry.counts import Counts
from esper.execution.telemetry.identity import in_child, renewed, this_process
from esper.execution.telemetry.options import TelemetryOptions
from esper.execution.telemetry.packing import Packer, parts_of
from esper.execution.telemetry.sender import Report, Sender
from esper.execution.telemetry.windows import WindowPacer

__all__ = ["NO_TELEMETRY", "Publisher"]

#: Events that may wait for the sender; a run makes a few a second at most.
_MAX_REPORTS: Final = 10_000
#: Windows that may wait, however small.
_MAX_CAPTURES: Final = 4096
#: What processes that never closed their models get at exit, all models together.
_EXIT_S: Final = 3.0
_MIB: Final = 1 << 20

#: What :meth:`Publisher.stats` would say of a model without a bus.
NO_TELEMETRY: Final[Mapping[str, Any]] = {
    "enabled": False,
    "run_id": "",
    "bus": "",
    "produced": 0,
    "delivered": 0,
    "spooled": 0,
    "dropped": 0,
    "in_flight": 0,
    "recovered": 0,
    "recovered_dropped": 0,
    "queued_windows": 0,
    "window_steps": 0,
    "lag_s": 0.0,
    "away_s": 0.0,
    "spool_bytes": 0,
    "commands_refused": 0,
    "commands_ignored": 0,
    "last_error": "",
}


class Publisher:
    """Publishes one model's telemetry to a bus.

    Args:
        bus: Where to.
        lattice: The model's seeds.
        monitor: The model's monitor.
        layer_names: In the order of the lattice.
        options: What can be set.
        steps: Training steps done so far.
        on_command: Called from the sender's thread when a command waits, so that the next step is due.
        owns_bus: Whether :meth:`close` closes the bus.

    Raises:
        ValueError: a layer's name or ``ESPER_RUN_ID`` cannot be published, or there is a key and the bus cannot be
            followed.
        EsperError: the key for commands is too short.
    """

    def __init__(
        self,
        bus: Bus,
        lattice: Lattice,
        monitor: HealthSource,
        layer_names: Sequence[str],
        options: TelemetryOptions | None = None,
        *,
        on_command: Callable[[], None],
        steps: Callable[[], int],
        owns_bus: bool = False,
    ) -> None:
        for name in layer_names:
            payload.text("a layer's name", name, MAX_LAYER_NAME)
        self.options = options or TelemetryOptions()
        self.identity = this_process(self.options.run_id)
        self.epoch = 0
        self._bus = bus
        self._owns_bus = owns_bus
        self._lattice = lattice
        self._layer_names = list(layer_names)
        self._key = control_key(self.options.control_key)
        if self._key is not None and not isinstance(bus, CommandSource):
            raise ValueError(f"{type(bus).__name__} has no follow(), so no commands can come from it")
        self._on_command = on_command
        self._capturer = Capturer(lattice, monitor)
        self._messages_per_window = len(self._layer_names) * parts_of(lattice.seeds_per_layer)
        self._queue_bytes = int(self.options.queue_mb * _MIB)
        self._closed = False
        self._steps = steps
        self._fault = ""
        #: Events from before the first step, when nothing is started yet.
        self._early: list[tuple[EventKind, dict[str, Any]]] = []
        self._begin()
        _publishers.add(self)

    def _begin(self) -> None:
        """What belongs to one process."""
        self._counts = Counts(len(self._layer_names))
        self._pacer = WindowPacer(self.options.every_steps, self.options.interval_s, self.options.sender_share)
        self._sequence = 0
        self._queued_bytes = 0
        self._window_due = 0
        self._window_step = -1
        self._windows_wanted = True
        self._event_numbers = itertools.count()
        self._commands: deque[Accepted] = deque()
        self._answers: deque[Answer] = deque()
        self._inbox: Inbox | None = None
        self._sender: Sender | None = None

    def _make_sender(self) -> Sender:
        if self._key is not None and isinstance(self._bus, CommandSource):
            self._inbox = Inbox(self._bus, self.identity, self._key, max_age_s=self.options.command_age_s)
        own = weakref.ref(self)

        def take_commands(accepted: list[Accepted], answers: list[Answer]) -> None:
            # The thread must not keep the model alive.
            if (publisher := own()) is not None:
                publisher._take_commands(accepted, answers)

        sender = Sender(
            self._bus,
            Packer(self.identity, self._layer_names, self._lattice.seeds_per_layer),
            self._counts,
            spool_root=_spool_root(self.options, self._bus.url) if self.options.spool_mb else None,
            spool_bytes=int(self.options.spool_mb * _MIB),
            inbox=self._inbox,
            command_interval_s=self.options.command_interval_s,
            on_commands=take_commands,
        )
        # A model that is let go of without being closed: what it has is sent, and the thread ends.
        self._finalizer = weakref.finalize(self, sender.stop, _EXIT_S)
        self._finalizer.atexit = False
        _senders.add(sender)
        return sender

    # -- the training thread -----------------------------------------------------------------------

    def on_due(self, steps: int, target: CommandTarget, *, windows: bool = True) -> int:
        """Carry out the commands that came, and take a window if it is time.

        Never waits, and never raises: what goes wrong is in :meth:`stats`.

        Args:
            steps: Training steps done.
            target: The model.
            windows: Whether the model is monitored; without, only events and commands are handled.

        Returns:
            The step at which to call again.
        """
        self._windows_wanted = windows
        if self._closed:
            return NEVER
        try:
            sender = self._sender or self._start()
            acted = bool(self._commands)
            while self._commands:
                carry_out(target, self._commands.popleft(), self.identity.world_size, self._answer)
            while self._answers:
                self._answer(self._answers.popleft())
            if windows and steps >= self._window_due:
                self._window_due = self._capture(steps, sender)
            if acted:
                return steps + 1  # what was changed shows in the lattice from the next step on
            return self._window_due if windows else NEVER
        except Exception as error:
            self._fault = f"{type(error).__name__}: {error}"
            self._window_due = max(self._window_due, steps + 1)
        return self._window_due

    @property
    def wanted_now(self) -> bool:
        """Whether something came that the next step should see to."""
        return bool(self._commands or self._answers)

    def _start(self) -> Sender:
        # The ranks may have been told who they are since the model was wrapped.
        self.identity = renewed(self.identity)
        self._sender = sender = self._make_sender()
        sender.start()
        seeds, layers = self._lattice.num_seeds, self._lattice.num_layers
        self.event(EventKind.RUN_STARTED, values={"seeds": seeds, "layers": layers})
        early, self._early = self._early, []
        for kind, fields in early:
            self.event(kind, **fields)
        return sender

    def _capture(self, steps: int, sender: Sender) -> int:
        capture = self._capturer.take(self._sequence, steps, self.epoch)
        self._sequence += 1
        self._window_step = steps
        self._counts.produced_windows += self._messages_per_window
        self._offer(capture, sender)
        return self._pacer.next_due(steps, capture.captured_ns, time.thread_time_ns(), sender.window_cpu_s)

    def _offer(self, capture: Capture, sender: Sender) -> None:
        """Into the queue; what is oldest there goes when it is full."""
        if not sender.alive:
            self._drop_early(capture)
            return
        size = capture.nbytes
        captures = sender.captures
        while captures and (
            len(captures) >= _MAX_CAPTURES or self._queued_bytes + size - sender.packed_bytes > self._queue_bytes
        ):
            try:
                oldest = captures.popleft()
            except IndexError:
                break  # the sender was faster
            self._queued_bytes -= oldest.nbytes
            capture.absorb(oldest)
            self._drop_early(oldest)
        self._queued_bytes += capture.nbytes
        captures.append(capture)
        sender.wake.set()

    def _drop_early(self, capture: Capture) -> None:
        self._counts.dropped_early += self._messages_per_window
        self._counts.windows_dropped_early += 1

    # -- events ------------------------------------------------------------------------------------

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Report that something happened.

        Args:
            kind: What.
            fields: Of :class:`~esper.contracts.telemetry.RunEvent`: ``layer_name``, ``seed_idx``, ``artifact_id``,
                ``reason`` (any text), ``loss``, ``accuracy``, ``values``.

        Raises:
            MessageError: a field that an event cannot have.
        """
        if self._sender is None:
            if len(self._early) < _MAX_REPORTS:
                self._early.append((kind, fields))
            return
        for name, longest in (("reason", 1000), ("artifact_id", 512)):
            if fields.get(name) is not None:
                fields[name] = printable(str(fields[name]), longest)
        event = RunEvent(
            kind=kind,
            run_id=self.identity.run_id,
            rank=self.identity.rank,
            world_size=self.identity.world_size,
            sequence=next(self._event_numbers),
            step=self._steps(),
            epoch=self.epoch,
            occurred_at=time.time(),
            dropped_events=self._counts.events_dropped,
            **fields,
        )
        self._report(Report(event, None, time.monotonic_ns()))

    def end_epoch(self, *, loss: float | None, accuracy: float | None, values: Mapping[str, float]) -> None:
        """An epoch is done. A loss that is not finite is a fact of training: it goes into the reason.

        Raises:
            MessageError: something that is no number, or an accuracy outside [0, 1].
        """
        reason = None
        if isinstance(loss, float) and not math.isfinite(loss):
            loss, reason = None, f"the loss is {loss}"
        self.epoch += 1
        try:
            self.event(EventKind.EPOCH_ENDED, loss=loss, accuracy=accuracy, reason=reason, values=dict(values))
        except ValueError:
            self.epoch -= 1
            raise

    def _answer(self, answer: Answer) -> None:
        outcome = answer.outcome(self.identity, self._steps())
        self._report(Report(outcome, answer.trace_id, time.monotonic_ns()))

    def _report(self, report: Report) -> None:
        sender = self._sender
        if self._closed or sender is None:
            return
        self._counts.produced_events += 1
        if len(sender.reports) >= _MAX_REPORTS or not sender.alive:
            self._counts.dropped_early += 1
            self._counts.events_dropped_early += 1
            return
        sender.reports.append(report)
        sender.wake.set()

    # -- the sender's thread -----------------------------------------------------------------------

    def _take_commands(self, accepted: list[Accepted], answers: list[Answer]) -> None:
        self._commands.extend(accepted)
        self._answers.extend(answers)
        self._on_command()

    # -- questions and the end ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What became of the messages, and how the sender is.

        Returns:
            ``produced`` = ``delivered`` + ``spooled`` + ``dropped`` + ``in_flight``, in messages of this process;
            ``recovered`` and ``recovered_dropped``, messages that an earlier process had left in the spool;
            ``queued_windows``; ``window_steps``, steps between two windows; ``lag_s``, from capture to the bus's
            answer, of the last batch; ``away_s``, since the bus was last there; ``spool_bytes``;
            ``commands_refused``, ``commands_ignored``; ``last_error``; ``enabled``, ``run_id``, ``bus``.
        """
        sender, inbox = self._sender, self._inbox
        return {
            "enabled": not self._closed,
            "run_id": self.identity.run_id,
            "bus": self._bus.url,
            **self._counts.snapshot(),
            "queued_windows": len(sender.captures) if sender is not None else 0,
            "window_steps": self._pacer.period,
            "lag_s": sender.lag_s if sender is not None else 0.0,
            "away_s": sender.away_s if sender is not None else 0.0,
            "spool_bytes": sender.spool_bytes if sender is not None else 0,
            "commands_refused": inbox.refused if inbox is not None else 0,
            "commands_ignored": inbox.ignored if inbox is not None else 0,
            "last_error": self._fault or (sender.last_error if sender is not None else ""),
        }

    def close(self, timeout_s: float = 10.0) -> None:
        """Send what there is, and end the thread; closing again does nothing.

        Args:
            timeout_s: Longest wait. What could not be sent stays in the spool, and what could not be put there counts
                as dropped: nothing is in flight afterwards.
        """
        if self._closed:
            return
        sender = self._sender
        if sender is not None:
            self._take_last_window(sender)
            self.event(EventKind.RUN_ENDED)
        self._closed = True
        if sender is not None:
            # The other half is for a call to the bus that is under way when the first half is over.
            sender.stop(timeout_s / 2)
            if not sender.join(timeout_s):
                self._fault = f"the telemetry thread did not end within {timeout_s:g} s"
            self._finalizer.detach()
        if self._owns_bus:
            self._bus.close()

    def _take_last_window(self, sender: Sender) -> None:
        """How the run ended, which in a short one is most of what there is to see."""
        steps = self._steps()
        if self._windows_wanted and steps > self._window_step:
            try:
                self._capture(steps, sender)
            except Exception as error:
                self._fault = f"{type(error).__name__}: {error}"

    def _forget(self) -> None:
        """In a forked child: the parent's thread, queue and spool are not here."""
        if self._sender is not None:
            self._sender.forget()
            self._finalizer.detach()
        self.identity = in_child(self.identity)
        self._begin()


def _spool_root(options: TelemetryOptions, url: str) -> Path:
    """A folder for each bus: what was meant for one goes to no other."""
    root = Path(options.spool_dir) if options.spool_dir is not None else cache_dir() / "telemetry"
    return root / hashlib.sha256(url.encode()).hexdigest()[:16]


_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()
_senders: weakref.WeakSet[Sender] = weakref.WeakSet()


def _forget_in_child() -> None:
    _senders.clear()
    for publisher in tuple(_publishers):
        publisher._forget()


def _send_at_exit() -> None:
    """Models that nobody closed: what they have is sent or spooled while there is still an interpreter."""
    senders = [sender for sender in tuple(_senders) if sender.alive]
    for sender in senders:
        sender.stop(_EXIT_S / 2)
    deadline = time.monotonic() + _EXIT_S
    for sender in senders:
        sender.join(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_send_at_exit)
