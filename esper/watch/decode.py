"""From messages of the bus to facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from esper.contracts.commands import CommandOutcome, KasminaCommand
from esper.contracts.messages import MessageError, OonaMessage, TopicNames
from esper.contracts.telemetry import EventKind, HealthWindow, RunEvent, read_payload
from esper.watch.facts import STATES, Fact, LayerWindow, Level, RunReport, RunStatus, SeedChange, Unreadable, clean

__all__ = ["TOPICS", "decode"]

#: What a watcher listens to.
TOPICS: Final = (
    TopicNames.TELEMETRY_SEED_HEALTH,
    TopicNames.SYSTEM_EVENTS_EPOCH,
    TopicNames.INNOVATION_FIELD_REPORTS,
)

_STATE: Final = {name: number for number, name in enumerate(STATES)}

#: Event about a seed -> kind of the change, the state it leads to, how much it matters.
_CHANGES: Final[Mapping[EventKind, tuple[str, str, Level]]] = {
    EventKind.SEED_LOADING: ("requested", "loading", Level.INFO),
    EventKind.SEED_WOKEN: ("bound", "grafting", Level.INFO),
    EventKind.SEED_REFUSED: ("refused", "dormant", Level.BAD),
    EventKind.SEED_UNLOADED: ("unloaded", "dormant", Level.INFO),
    EventKind.SEED_CULLED: ("culled", "culled", Level.INFO),
    EventKind.SEED_FOSSILIZED: ("fossilized", "fossilized", Level.GOOD),
    EventKind.SEED_FAULT: ("fault", "error_recovery", Level.BAD),
}


def decode(message: OonaMessage) -> Fact | Unreadable:
    """What ``message`` says; :class:`Unreadable` if it says nothing that is understood here."""
    try:
        found = read_payload(message)
    except MessageError as error:
        return Unreadable(clean(error))
    match found:
        case HealthWindow():
            return _window(message, found)
        case RunEvent():
            return _event(message, found)
        case CommandOutcome():
            return _outcome(message, found)
        case KasminaCommand():
            # What is asked is the trainer's to judge; what came of it is told by an outcome.
            return Unreadable(f"a command on {message.topic.value} is not for watchers")


def _window(message: OonaMessage, window: HealthWindow) -> LayerWindow:
    columns = dict(window.columns)
    states = columns.pop("lifecycle_state")
    return LayerWindow(
        run=window.run_id,
        rank=window.rank,
        world_size=window.world_size,
        at=window.captured_at,
        event_id=message.event_id,
        step=window.step,
        epoch=window.epoch,
        layer=window.layer_name,
        sequence=window.sequence,
        dropped=window.dropped_windows,
        states=states,
        columns=columns,
        seed_offset=window.seed_offset,
        num_seeds=window.num_seeds,
    )


def _event(message: OonaMessage, event: RunEvent) -> Fact:
    reason = "" if event.reason is None else clean(event.reason)
    change = _CHANGES.get(event.kind)
    if change is not None and event.layer_name is not None and event.seed_idx is not None:
        kind, state, level = change
        word = {"bound": "woken", "requested": "loading"}.get(kind, kind)
        return SeedChange(
            run=event.run_id,
            rank=event.rank,
            world_size=event.world_size,
            at=event.occurred_at,
            event_id=message.event_id,
            step=event.step,
            epoch=event.epoch,
            layer=event.layer_name,
            seed_idx=event.seed_idx,
            kind=kind,
            state=_STATE[state],
            # A kernel that is off the path has no part in the output.
            values={"alpha": 0.0} if state in ("dormant", "culled", "error_recovery") else {},
            text=_sentence(f"{word} {event.artifact_id or ''}".strip(), reason),
            level=level,
        )
    # What a run begins with is a matter of the story; it would stand among the numbers for ever.
    metrics = {} if event.kind is EventKind.RUN_STARTED else dict(event.values)
    if event.loss is not None:
        metrics["loss"] = event.loss
    if event.accuracy is not None:
        metrics["accuracy"] = event.accuracy
    text, level, status = _RUN_EVENTS[event.kind](event)
    return RunReport(
        run=event.run_id,
        rank=event.rank,
        world_size=event.world_size,
        at=event.occurred_at,
        event_id=message.event_id,
        step=event.step,
        epoch=event.epoch,
        metrics={clean(name, 40): float(value) for name, value in metrics.items()},
        dropped=event.dropped_events,
        text=_sentence(text, reason),
        level=level,
        status=status,
    )


def _beginning(event: RunEvent) -> str:
    facts = ", ".join(f"{clean(name, 40)} {value:g}" for name, value in event.values.items())
    return f"run started: {facts}" if facts else "run started"


def _sentence(text: str, reason: str) -> str:
    return ": ".join(part for part in (text, reason) if part)


_RUN_EVENTS: Final[Mapping[EventKind, Callable[[RunEvent], tuple[str, Level, RunStatus | None]]]] = {
    EventKind.RUN_STARTED: lambda event: (_beginning(event), Level.INFO, RunStatus.RUNNING),
    EventKind.RUN_ENDED: lambda _: ("run ended", Level.INFO, RunStatus.FINISHED),
    # Each epoch a line would push everything else off the screen; its numbers are shown above.
    EventKind.EPOCH_ENDED: lambda _: ("", Level.INFO, None),
}


def _outcome(message: OonaMessage, outcome: CommandOutcome) -> RunReport:
    name = f"command {outcome.command_id[:8]}" if outcome.command_id else "a command"
    return RunReport(
        run=outcome.run_id,
        rank=outcome.rank,
        at=outcome.answered_at,
        event_id=message.event_id,
        step=outcome.step,
        text=f"{name} {outcome.status}" + (f": {clean(outcome.reason)}" if outcome.reason else ""),
        level=Level.GOOD if outcome.done else Level.BAD,
    )
