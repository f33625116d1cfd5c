"""The picture over time as TensorBoard reads it: one folder of event files for each run and rank."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from esper.contracts.errors import EsperError
from esper.watch.facts import RunStatus
from esper.watch.state import JobState, RunKey, RunState

__all__ = ["TensorBoardExporter"]

#: A run of millions of steps would fill a disk with points that nobody can tell apart.
_APART_S: Final = 2.0
_NOWHERE: Final = (-1, -1, float("-inf"))


class TensorBoardExporter:
    """Writes scalars and a histogram of health, whenever a run has come further.

    Args:
        folder: Where; made if missing. Each run gets ``<run>.rank<N>`` in it.
        every_s: Least seconds of a run's own time between two points.

    Raises:
        EsperError: the package ``tensorboard`` is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path, every_s: float = _APART_S) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise EsperError(
                "--tensorboard needs the package tensorboard; in Esper's folder: pip install '.[tensorboard]'"
            ) from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EsperError(f"--tensorboard {folder}: cannot be made: {error.strerror or error}") from None
        self._make: Any = SummaryWriter
        self._folder = folder
        self._every_s = every_s
        self._writers: dict[RunKey, Any] = {}
        self._written: dict[RunKey, tuple[int | None, int | None, float]] = {}
        self._state: JobState | None = None

    def update(self, state: JobState, now: float) -> None:
        """Write a point for each run that has come further."""
        self._state = state
        for run in state.runs.values():
            step, epoch, at = self._written.get(run.key, _NOWHERE)
            ended = run.status is not RunStatus.RUNNING
            if _place(run) != (step, epoch) and (run.last_at - at >= self._every_s or ended or run.epoch != epoch):
                self._write(run)

    def _write(self, run: RunState) -> None:
        writer = self._writers.get(run.key)
        if writer is None:
            writer = self._writers[run.key] = self._make(str(self._folder / f"{run.run}.rank{run.rank}"))
        # Runs that count no steps, as those of a file of events, are drawn over epochs.
        step = run.step if run.step is not None else run.epoch or 0
        totals = run.refresh()
        scalars = {f"seeds/{name}": float(count) for name, count in totals.by_state().items()}
        scalars |= {f"run/{name}": value for name, value in run.metrics.items()}
        scalars |= {
            "telemetry/dropped": run.dropped,
            "telemetry/missing": run.missing,
            "telemetry/late": run.late,
            "kernels/faults": run.faults,
            "kernels/loaded": run.loads_done,
            "kernels/refused": run.loads_refused,
        }
        if watched := float(totals.health_number.sum()):
            scalars["health/mean"] = float(totals.health_sum.sum()) / watched
            scalars["health/min"] = float(totals.health_min.min())
            health = np.concatenate([layer.column("health_score") for layer in run.layers.values()])
            writer.add_histogram("health/seeds", health[np.isfinite(health)], step, walltime=run.last_at)
        if awake := float(totals.awake_number.sum()):
            scalars["alpha/mean"] = float(totals.alpha_sum.sum()) / awake
        for name, value in scalars.items():
            writer.add_scalar(name, value, step, walltime=run.last_at)
        self._written[run.key] = (*_place(run), run.last_at)

    def close(self) -> None:
        """Write what is left, and close the files."""
        for run in [] if self._state is None else self._state.runs.values():
            if self._written.get(run.key, _NOWHERE)[:2] != _place(run):
                self._write(run)
        self._state = None
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> TensorBoardExporter:
        """The exporter itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()


def _place(run: RunState) -> tuple[int | None, int | None]:
    return run.step, run.epoch
