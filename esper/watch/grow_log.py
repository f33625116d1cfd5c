"""From the lines of ``events.jsonl``, which ``esper grow`` writes, to facts.

The job trains several networks one after the other; each is a run of its own here, named ``<network>-seed<N>``,
and ``job`` is the whole. The file tells the state of seeds once an epoch (``seeds_observed``) and in between what
happened to single ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, TypeGuard

import numpy as np

from esper.contracts import payload
from esper.contracts.payload import MAX_COUNT
from esper.watch.facts import (
    STATES,
    Fact,
    LayerWindow,
    Level,
    RunReport,
    RunStatus,
    SeedChange,
    Unreadable,
    clean,
)

__all__ = ["GrowLog"]

_STATE: Final = {name: number for number, name in enumerate(STATES)}
_MAX_SEEDS: Final = 16_384
#: The run that stands for the whole job.
JOB: Final = "job"


class GrowLog:
    """Reads one log, line after line; remembers the network that is being trained."""

    def __init__(self) -> None:
        self._run = JOB

    def read(self, line: Mapping[str, Any]) -> Fact | Unreadable:
        """What a line says; :class:`Unreadable` for an event of a kind that is unknown here.

        Raises:
            ValueError: the line is not what it says it is; the message names the field.
        """
        kind = _text(line, "event")
        reader = _READERS.get(kind)
        if reader is None:
            return Unreadable(f"the event {clean(kind, 40)!r} is unknown here")
        if "network" in line or "seed" in line:
            # Events without a network are the grown one's.
            network = clean(line.get("network", "grown"), 40)
            run = f"{network}-seed{_whole(line, 'seed')}"
            # A log is a file that anybody may have written, and exporters name folders after runs.
            payload.run_id("network", run)
            self._run = run
        epoch = _whole(line, "epoch") if line.get("epoch") is not None else None
        run = JOB if kind in ("run_started", "run_finished") else self._run
        return reader(line, {"run": run, "at": _time(line), "epoch": epoch})


Common = Mapping[str, Any]


def _run_started(line: Mapping[str, Any], common: Common) -> Fact:
    text = f"job started: {clean(_text(line, 'data'), 60)}, {_whole(line, 'epochs')} epochs"
    return RunReport(**common, text=text, status=RunStatus.RUNNING)


def _network_started(line: Mapping[str, Any], common: Common) -> Fact:
    text = f"{clean(_text(line, 'network'), 40)} network started, {_whole(line, 'parameters')} parameters"
    return RunReport(**common, text=text, status=RunStatus.RUNNING)


def _epoch_ended(line: Mapping[str, Any], common: Common) -> Fact:
    return RunReport(**common, metrics=_numbers(line, "train_loss", "validation_loss", "validation_accuracy"))


def _levelled_off(line: Mapping[str, Any], common: Common) -> Fact:
    return RunReport(**common, text=f"levelled off at validation loss {_number(line, 'validation_loss'):.3f}")


def _seed_requested(line: Mapping[str, Any], common: Common) -> Fact:
    text = f"loading {clean(_text(line, 'blueprint'), 60)} {clean(_text(line, 'artifact_id'), 160)}"
    return SeedChange(**common, **_seed(line), kind="requested", state=_STATE["loading"], text=text)


def _seed_bound(line: Mapping[str, Any], common: Common) -> Fact:
    text = f"woken, {_whole(line, 'parameters')} parameters"
    return SeedChange(**common, **_seed(line), kind="bound", state=_STATE["grafting"], text=text)


def _seed_refused(line: Mapping[str, Any], common: Common) -> Fact:
    text = f"refused: {clean(_text(line, 'reason'))}"
    return SeedChange(
        **common,
        **_seed(line),
        kind="refused",
        state=_STATE["dormant"],
        values={"alpha": 0.0},
        text=text,
        level=Level.BAD,
    )


def _seed_judged(line: Mapping[str, Any], common: Common) -> Fact:
    verdict = _text(line, "verdict")
    if verdict not in ("fossilized", "culled"):
        raise ValueError(f"verdict is {verdict!r:.40}; need 'fossilized' or 'culled'")
    change = f"validation loss {_number(line, 'loss_before'):.3f} -> {_number(line, 'loss_after'):.3f}"
    return SeedChange(
        **common,
        **_seed(line),
        kind=verdict,
        state=_STATE[verdict],
        values={"alpha": 0.0} if verdict == "culled" else {},
        text=f"{verdict}: {change}",
        level=Level.GOOD if verdict == "fossilized" else Level.INFO,
    )


def _seeds_observed(line: Mapping[str, Any], common: Common) -> Fact:
    states = _list(line, "lifecycle")
    if not all(type(state) is int and 0 <= state < len(STATES) for state in states):
        raise ValueError(f"lifecycle is {states!r:.60}; need numbers of states, 0 to {len(STATES) - 1}")
    columns = {}
    for name, column in (("alpha", "alpha"), ("health", "health_score")):
        values = [np.nan if value is None else value for value in _list(line, name)]
        if len(values) != len(states) or not all(map(_is_number, values)):
            raise ValueError(f"{name} is {values!r:.60}; need {len(states)} numbers, one a seed")
        columns[column] = np.array(values, np.float32)
    return LayerWindow(
        **common, layer=_layer(line), states=np.array(states, np.uint8), columns=columns, num_seeds=len(states)
    )


def _network_finished(line: Mapping[str, Any], common: Common) -> Fact:
    metrics = _numbers(line, "test_loss", "test_accuracy")
    text = f"{clean(_text(line, 'network'), 40)} network finished after {_number(line, 'seconds'):.1f} s"
    return RunReport(**common, metrics=metrics, text=text, status=RunStatus.FINISHED)


def _checkpoint_saved(line: Mapping[str, Any], common: Common) -> Fact:
    return RunReport(**common, text=f"saved {clean(_text(line, 'path'), 120)}, {_whole(line, 'bytes')} bytes")


def _run_finished(line: Mapping[str, Any], common: Common) -> Fact:
    interrupted = bool(line.get("interrupted"))
    status = RunStatus.INTERRUPTED if interrupted else RunStatus.FINISHED
    word = "interrupted" if interrupted else "finished"
    return RunReport(**common, text=f"job {word} after {_number(line, 'seconds'):.1f} s", status=status)


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], Common], Fact]]] = {
    "run_started": _run_started,
    "network_started": _network_started,
    "epoch_ended": _epoch_ended,
    "levelled_off": _levelled_off,
    "seed_requested": _seed_requested,
    "seed_bound": _seed_bound,
    "seed_refused": _seed_refused,
    "seed_judged": _seed_judged,
    "seeds_observed": _seeds_observed,
    "network_finished": _network_finished,
    "checkpoint_saved": _checkpoint_saved,
    "run_finished": _run_finished,
}


# -- single values --


def _seed(line: Mapping[str, Any]) -> dict[str, Any]:
    seed_idx = _whole(line, "seed_idx")
    if seed_idx >= _MAX_SEEDS:
        raise ValueError(f"seed_idx is {seed_idx}; need less than {_MAX_SEEDS}")
    return {"layer": _layer(line), "seed_idx": seed_idx}


def _layer(line: Mapping[str, Any]) -> str:
    return clean(_text(line, "layer"))


def _time(line: Mapping[str, Any]) -> float:
    text = _text(line, "time")
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"time is {text!r:.40}; need a date and time as ISO 8601 has them") from None


def _text(line: Mapping[str, Any], name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}; need text")
    return value


def _whole(line: Mapping[str, Any], name: str) -> int:
    value: Any = line.get(name)
    payload.integer(name, value)
    return int(value)


def _number(line: Mapping[str, Any], name: str) -> float:
    """A number; null, which stands for one that was not finite, is NaN."""
    value = line.get(name)
    if value is None and name in line:
        return float("nan")
    if not _is_number(value):
        raise ValueError(f"{name} is {value!r:.40}; need a number")
    return float(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that a float can hold; an integer in JSON may have any length."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= MAX_COUNT
    return isinstance(value, float)


def _numbers(line: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: _number(line, name) for name in names}


def _list(line: Mapping[str, Any], name: str) -> list[Any]:
    value = line.get(name)
    if not isinstance(value, list) or len(value) > _MAX_SEEDS:
        raise ValueError(f"{name} is {value!r:.40}; need a list")
    return value
