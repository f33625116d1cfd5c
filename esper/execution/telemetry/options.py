"""What can be set about a run's telemetry."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from esper.contracts import payload
from esper.contracts.messages import MessageError

__all__ = ["TelemetryOptions"]

#: Below, dropping by whole segments would leave nothing.
_LEAST_SPOOL_MB = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryOptions:
    """How a run publishes.

    Attributes:
        run_id: Name of the run, 1 to 64 letters, digits, dots, underscores and hyphens. None: ``ESPER_RUN_ID``, else
            torchrun's run id, else one made of time and chance.
        every_steps: Training steps from one window to the next. None: as ``interval_s`` and ``sender_share`` allow.
        interval_s: Least seconds from one window to the next, where ``every_steps`` does not say.
        sender_share: Share of the training thread's processor time that the sender's may take, where ``every_steps``
            does not say: with many layers, windows come less often. Python runs one thread at a time, so this is the
            training's time; what it costs unseen (handing over the interpreter, caches) may be as much again.
        queue_mb: Memory for windows that wait for the sender, in MiB; beyond it the oldest goes, and is counted.
        spool_dir: Where messages wait while the bus is away. None: below ``ESPER_CACHE_DIR``.
        spool_mb: Disk space for them, in MiB, for each process; beyond it the oldest go, and are counted. 0: no spool.
        control_key: Key of those who may command, at least 16 bytes. None: ``ESPER_CONTROL_KEY``; where that is not set
            either, no commands are read. Not part of the ``repr``.
        command_interval_s: Seconds from one look for commands to the next.
        command_age_s: Older commands are refused.

    Raises:
        ValueError: a value that is not as described.
    """

    run_id: str | None = None
    every_steps: int | None = None
    interval_s: float = 0.5
    sender_share: float = 0.0025
    queue_mb: float = 64.0
    spool_dir: Path | str | None = None
    spool_mb: float = 256.0
    control_key: str | bytes | None = field(default=None, repr=False)
    command_interval_s: float = 0.25
    command_age_s: float = 60.0

    def __post_init__(self) -> None:
        if self.run_id is not None:
            try:
                payload.run_id("run_id", self.run_id)
            except MessageError as error:
                raise ValueError(f"TelemetryOptions: {error}") from None
        if self.every_steps is not None and (type(self.every_steps) is not int or self.every_steps < 1):
            raise ValueError(f"TelemetryOptions: every_steps is {self.every_steps!r}; need a number of steps, from 1")
        for name, low in (
            ("interval_s", 0.001),
            ("sender_share", 1e-6),
            ("queue_mb", 0.001),
            ("spool_mb", 0.0),
            ("command_interval_s", 0.001),
            ("command_age_s", 0.001),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < low:
                raise ValueError(f"TelemetryOptions: {name} is {value!r}; need a finite number of at least {low:g}")
        if self.spool_mb and self.spool_mb < _LEAST_SPOOL_MB:
            raise ValueError(f"TelemetryOptions: spool_mb is {self.spool_mb:g}; need {_LEAST_SPOOL_MB} or more, or 0")
