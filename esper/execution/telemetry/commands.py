"""Commands from the bus: who may give them, and carrying them out between two steps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from esper.contracts.bus import Delivery
from esper.contracts.commands import ANY_RUN, CommandAction, CommandOutcome, KasminaCommand
from esper.contracts.messages import MessageError, TopicNames
from esper.contracts.telemetry import printable
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.telemetry.identity import Identity

__all__ = ["Accepted", "Answer", "CommandSource", "CommandTarget", "Inbox", "carry_out"]

#: Commands fetched in one question.
_BATCH: Final = 64
#: Refusals of what is not signed that are answered in one question: whoever floods the stream gets no flood back.
_ANSWERED: Final = 16
#: More nonces than anybody with the key sends in the time that they are remembered.
_MAX_NONCES: Final = 100_000
#: Of refusals that belong to no message.
_NO_TRACE: Final = "kasmina-commands"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A command that may be carried out, and the trace that its outcome belongs to."""

    command: KasminaCommand
    trace_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one command.

    Attributes:
        command_id: Its nonce; empty where none could be read.
        reason: Why it was refused; None when it was done.
        trace_id: Of the message that brought it.
    """

    command_id: str
    reason: str | None
    trace_id: str

    def outcome(self, identity: Identity, step: int) -> CommandOutcome:
        """As it is published."""
        status = "done" if self.reason is None else "refused"
        reason = None if self.reason is None else printable(self.reason) or "refused"
        return CommandOutcome(
            command_id=self.command_id,
            status=status,
            reason=reason,
            run_id=identity.run_id,
            rank=identity.rank,
            step=step,
            answered_at=time.time(),
        )


class CommandReader(Protocol):
    """A place in a stream."""

    def read(self, count: int = 100, block: int = 1000) -> list[Delivery]:
        """Up to ``count`` messages behind the last one read; ``block`` milliseconds to wait for the first."""


@runtime_checkable
class CommandSource(Protocol):
    """What a bus needs beside publishing, for commands: every process reads all of them, and leaves nothing behind."""

    def follow(self, streams: Sequence[str], since: float | str | None = None) -> CommandReader:
        """Read streams as they grow, from a time (seconds since 1970, by the bus's clock)."""

    def counters(self) -> Mapping[str, int]:
        """What happened so far; ``skipped`` counts entries that are no messages."""


class Inbox:
    """Reads ``control.kasmina.commands`` for one process, and lets through what is signed, new and for it.

    Args:
        bus: Where commands come from.
        identity: Of this process.
        key: Shared with whoever may command.
        max_age_s: Older commands are refused, and such as are from further in the future.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        bus: CommandSource,
        identity: Identity,
        key: bytes,
        *,
        max_age_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._identity = identity
        self._key = key
        self._max_age_s = max_age_s
        self._clock = clock
        self._began = clock()
        #: Nonce -> when it was issued, in the order of coming.
        self._nonces: OrderedDict[str, float] = OrderedDict()
        self._reader: CommandReader | None = None
        self._skipped: int | None = None
        #: Commands from before this run, or for another: none of its business.
        self.ignored = 0
        self.refused = 0

    def poll(self) -> tuple[list[Accepted], list[Answer]]:
        """What came since the last call: commands to carry out, and refusals to report.

        Raises:
            BusError: the bus did not answer.
        """
        if self._reader is None:
            # The bus's clock may be behind ours by as much as a command may be old.
            since = max(0.0, self._began - self._max_age_s)
            self._reader = self._bus.follow([TopicNames.CONTROL_KASMINA_COMMANDS], since)
        if self._skipped is None:
            self._skipped = self._bus.counters().get("skipped", 0)
        deliveries = self._reader.read(count=_BATCH, block=0)
        accepted: list[Accepted] = []
        answers: list[Answer] = []
        for delivery in deliveries:
            result = self._judge(delivery)
            if isinstance(result, Accepted):
                accepted.append(result)
            elif result is None:
                self.ignored += 1
            else:
                self.refused += 1
                if len(answers) < _ANSWERED:
                    answers.append(result)
        skipped, before = self._bus.counters().get("skipped", 0), self._skipped
        if skipped > before:
            self._skipped = skipped
            self.refused += skipped - before
            answers.append(Answer("", f"{skipped - before} entries of the command stream are no messages", _NO_TRACE))
        self._forget_old()
        return accepted, answers

    def _judge(self, delivery: Delivery) -> Accepted | Answer | None:
        """A command to carry out, a refusal to report, or None for what is not for this run."""
        message = delivery.message
        trace_id = message.trace_id
        try:
            command = KasminaCommand.from_payload(message.payload)
        except MessageError as error:
            return self._refusal_of_malformed(delivery, str(error))
        if command.run_id not in (ANY_RUN, self._identity.run_id):
            return None
        if not command.verify(self._key):
            if delivery.published_at < self._began:
                # Of another run, with another key. By the bus's clock: what an unsigned command says of itself is no
                # evidence.
                return None
            return Answer(command.command_id, "the signature does not fit the command and this run's key", trace_id)
        if command.nonce in self._nonces:
            return Answer(command.command_id, "a command with this nonce came before: replayed", trace_id)
        now = self._clock()
        if command.issued_at < self._began:
            if command.run_id == ANY_RUN and delivery.published_at < self._began:
                return None
            return Answer(command.command_id, "stale: issued before this run began", trace_id)
        if abs(now - command.issued_at) > self._max_age_s:
            age = f"issued {now - command.issued_at:.0f} s ago by this machine's clock; allowed are {self._max_age_s:g}"
            return Answer(command.command_id, f"stale: {age}", trace_id)
        self._nonces[command.nonce] = command.issued_at
        if len(self._nonces) > _MAX_NONCES:
            del self._nonces[command.nonce]
            return Answer(command.command_id, "too many commands in too short a time", trace_id)
        return Accepted(command, trace_id)

    def _refusal_of_malformed(self, delivery: Delivery, reason: str) -> Answer | None:
        run_id = delivery.message.payload.get("run_id")
        if isinstance(run_id, str) and run_id not in (ANY_RUN, self._identity.run_id):
            return None
        if delivery.published_at < self._began:
            return None
        nonce = delivery.message.payload.get("nonce")
        good = isinstance(nonce, str) and len(nonce) == 32 and set(nonce) <= set("0123456789abcdef")
        return Answer(str(nonce) if good else "", reason, delivery.message.trace_id)

    def _forget_old(self) -> None:
        # What is older than max_age is refused for that; a clock that was set back is allowed as much again.
        horizon = self._clock() - 3 * self._max_age_s
        while self._nonces and next(iter(self._nonces.values())) < horizon:
            self._nonces.popitem(last=False)


class CommandTarget(Protocol):
    """What carrying out a command needs of a model."""

    def request_kernel(
        self, layer_name: str, seed_idx: int, artifact_id: str, *, alpha: float, ramp_steps: int
    ) -> Future[bool]:
        """Start a load."""

    def layer(self, layer_name: str) -> Any:
        """The :class:`~esper.execution.kasmina_layer.KasminaLayer` of that name, or ``ValueError``."""

    def cull(self, layer_name: str, seed_idx: int) -> None:
        """Remove a seed."""

    def fossilize(self, layer_name: str, seed_idx: int) -> None:
        """Keep a seed."""


def carry_out(target: CommandTarget, accepted: Accepted, world_size: int, report: Callable[[Answer], None]) -> None:
    """Do what a command says, on the training thread; ``report`` is told what came of it, for a load later.

    Args:
        target: The model.
        accepted: The command.
        world_size: Ranks that train together. Between ranks nothing makes a command act at the same step, and networks
            that differ between ranks for a step are no longer the same network: so there every command is refused.
        report: Takes the outcome.
    """
    command, trace_id = accepted.command, accepted.trace_id

    def answer(reason: str | None) -> None:
        report(Answer(command.command_id, reason, trace_id))

    if world_size > 1:
        answer(f"{world_size} ranks train together, and would not change at the same step")
        return
    try:
        pending = _start(target, command)
    except Exception as error:
        answer(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        return
    if pending is None:
        answer(None)
        return
    layer = target.layer(command.layer_name)

    def loaded(future: Future[bool]) -> None:
        if future.cancelled():
            answer("the model was closed before the kernel was there")
        elif future.result():
            answer(None)
        else:
            answer(layer.failure_of(command.seed_idx) or "the load came to nothing")

    pending.add_done_callback(loaded)


def _start(target: CommandTarget, command: KasminaCommand) -> Future[bool] | None:
    """Carry a command out, or begin to; ``ValueError`` (its words are for the outcome) if it cannot be."""
    name, seed_idx = command.layer_name, command.seed_idx
    layer = target.layer(name)
    layer.check_seed(seed_idx)
    match command.action:
        case CommandAction.LOAD:
            assert command.artifact_id is not None and command.alpha is not None and command.ramp_steps is not None
            return target.request_kernel(
                name, seed_idx, command.artifact_id, alpha=command.alpha, ramp_steps=command.ramp_steps
            )
        case CommandAction.UNLOAD:
            if layer.state_layout.state_of(seed_idx) is SeedLifecycleState.DORMANT:
                raise ValueError(f"layer '{name}', seed {seed_idx} is dormant already")
            layer.release(seed_idx, SeedLifecycleState.DORMANT)
        case CommandAction.SET_ALPHA | CommandAction.RAMP:
            if seed_idx not in layer.grafts.bound:
                state = layer.state_layout.state_of(seed_idx).name
                raise ValueError(f"layer '{name}', seed {seed_idx} is {state}: only an awake seed has an alpha to set")
            layer.state_layout.set_alpha(seed_idx, command.alpha, command.ramp_steps or 0)
        case CommandAction.CULL:
            target.cull(name, seed_idx)
        case CommandAction.FOSSILIZE:
            target.fossilize(name, seed_idx)
    return None
