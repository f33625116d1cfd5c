"""Growth of one network: a small state machine that the training loop drives once per epoch.

    watching --level--> waiting --kernel bound--> on trial --judged--> watching
                           |
                           +--kernel refused--> watching

The kernel is fetched in the background; training goes on meanwhile. Nothing here runs inside an epoch except the
model's own ``step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from torch import nn

from esper.core.model_wrapper import MorphableModel
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout
from esper.grow import events
from esper.grow.policy import Candidate, LevelOff, Proposal, WorstHealthFirst
from esper.grow.trainer import EpochRecord

__all__ = ["Catalogue", "Grower", "SeedTrace"]

#: Artifact ids by layer name, blueprint name and seed index.
Catalogue = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class SeedTrace:
    """Alpha and health of every seed of a network after one epoch, ``values[row]`` in the lattice's order."""

    epoch: int
    alpha: list[float]
    health: list[float]


@dataclass
class _Trial:
    proposal: Proposal
    outcome: Future[bool]
    loss_before: float
    ends_after: int = 0


class Grower:
    """Wakes, judges, keeps and culls the seeds of one model.

    Args:
        model: The wrapped model.
        catalogue: What can be woken where.
        steps_per_epoch: Training steps in an epoch; the ramp is counted in steps.
        last_epoch: No seed is woken whose trial would end after this epoch.
        emit: Takes events.
        seed: Number of the run, for events.
    """

    RAMP_EPOCHS = 2
    SETTLE_EPOCHS = 8
    PROBE_EVERY = 4
    #: Validation losses are noisy; before and after are means over this many epochs.
    JUDGED_EPOCHS = 3

    def __init__(
        self,
        model: MorphableModel,
        catalogue: Catalogue,
        *,
        steps_per_epoch: int,
        last_epoch: int,
        emit: Callable[[events.Event], None],
        seed: int,
    ) -> None:
        """See the class."""
        self.model = model
        self.catalogue = catalogue
        self.level_off = LevelOff()
        self.policy = WorstHealthFirst(tuple(next(iter(catalogue.values()))))
        self.traces: list[SeedTrace] = []
        self.kept = 0
        self.culled = 0
        #: Times the loss was level, and seeds that were asked for then.
        self.levels = 0
        self.asked = 0
        self._steps_per_epoch = steps_per_epoch
        self._last_epoch = last_epoch
        self._emit = emit
        self._seed = seed
        self._epoch = 0
        self._steps = 0
        self._recent: list[float] = []
        self._bound: list[events.Event] = []
        self._trial: _Trial | None = None
        self._stop_following = model.on_growth(self._on_growth)

    def after_step(self) -> None:
        """What is due after each optimizer step: the model's own step, and now and then a look at all activations.

        The monitor's budget of half a percent would leave a network of some microseconds a forward unobserved for
        most of so short a run; a probe asked for is not charged to it.
        """
        self.model.step()
        self._steps += 1
        if self._steps % self.PROBE_EVERY == 0:
            self.model.monitor.sample_now()

    def end_epoch(self, record: EpochRecord) -> None:
        """Take one epoch's outcome and act on it."""
        self._epoch = record.epoch
        self._flush()
        self._recent = [*self._recent[-(self.JUDGED_EPOCHS - 1) :], record.validation_loss]
        trial = self._trial
        if trial is None:
            if self.level_off.add(record.validation_loss):
                self.levels += 1
                self._emit(events.LevelledOff(self._seed, record.epoch, record.validation_loss))
                self._wake()
        elif not trial.outcome.done():
            pass
        elif not trial.outcome.result():
            self._refuse(trial)
        elif not trial.ends_after:
            trial.ends_after = record.epoch + self.RAMP_EPOCHS + self.SETTLE_EPOCHS
        elif record.epoch >= trial.ends_after:
            self._judge(trial)
        trace = self._trace(record.epoch)
        self.traces.append(trace)
        self._observe(trace)

    def finish(self) -> None:
        """End of training: a seed still on trial has not shown that it helps, and goes."""
        self._flush()
        trial = self._trial
        if trial is not None and not trial.outcome.done():
            self._refuse(trial, "training ended before the kernel was there")
        elif trial is not None and trial.outcome.result():
            self._judge(trial, keep=False)
        elif trial is not None:
            self._refuse(trial)
        self._stop_following()

    def _wake(self) -> None:
        if self._epoch + self.RAMP_EPOCHS + self.SETTLE_EPOCHS + 2 > self._last_epoch:
            return
        proposal = self.policy.choose(self._candidates())
        if proposal is None:
            return
        layer, seed_idx = proposal.candidate.layer, proposal.candidate.seed_idx
        artifact_id = self.catalogue[layer][proposal.blueprint][seed_idx]
        ramp = self.RAMP_EPOCHS * self._steps_per_epoch
        outcome = self.model.request_kernel(layer, seed_idx, artifact_id, alpha=1.0, ramp_steps=ramp)
        self.asked += 1
        self._trial = _Trial(proposal, outcome, self._mean_recent())
        self._emit(
            events.SeedRequested(
                self._seed, self._epoch, layer, seed_idx, proposal.blueprint, artifact_id, proposal.candidate.health
            )
        )

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(name, seed_idx, health)
            for name, layer in self.model.kasmina_layers.items()
            for seed_idx, health in enumerate(_health_of(layer.state_layout))
            if layer.state_layout.state_of(seed_idx) is SeedLifecycleState.DORMANT and name in self.catalogue
        ]

    def _judge(self, trial: _Trial, keep: bool | None = None) -> None:
        layer, seed_idx = trial.proposal.candidate.layer, trial.proposal.candidate.seed_idx
        after = self._mean_recent()
        awake = seed_idx in self.model.layer(layer).grafts.bound
        kept = awake and (self.policy.keep(trial.loss_before, after) if keep is None else keep)
        if kept:
            self.model.fossilize(layer, seed_idx)
            self.kept += 1
        elif awake:
            self.model.cull(layer, seed_idx, cooldown_steps=1)
            self.culled += 1
            self.policy.failed(trial.proposal.candidate)
        else:
            self._refuse(trial)
            return
        verdict: Literal["fossilized", "culled"] = "fossilized" if kept else "culled"
        self._emit(events.SeedJudged(self._seed, self._epoch, layer, seed_idx, verdict, trial.loss_before, after))
        self._back_to_watching()

    def _refuse(self, trial: _Trial, reason: str | None = None) -> None:
        layer, seed_idx = trial.proposal.candidate.layer, trial.proposal.candidate.seed_idx
        self.policy.failed(trial.proposal.candidate)
        if reason is None:
            reason = str(self.model.get_layer_stats(layer)["errors"].get(seed_idx, "no reason on record"))
        self._emit(events.SeedRefused(self._seed, self._epoch, layer, seed_idx, reason))
        self._back_to_watching()

    def _back_to_watching(self) -> None:
        self._trial = None
        self.level_off.restart()

    def _on_growth(self, event: str, layer: str, seed_idx: int, parameters: dict[str, nn.Parameter]) -> None:
        # This runs inside the model's step(): the event is kept for the end of the epoch, so that nothing is written
        # here.
        if event == "bound":
            count = sum(p.numel() for p in parameters.values())
            self._bound.append(events.SeedBound(self._seed, self._epoch + 1, layer, seed_idx, count))

    def _flush(self) -> None:
        for event in self._bound:
            self._emit(event)
        self._bound.clear()

    def _mean_recent(self) -> float:
        return sum(self._recent) / len(self._recent)

    def _observe(self, trace: SeedTrace) -> None:
        lattice = self.model.lattice
        states = lattice.lifecycle_states.tolist()
        health = [value if math.isfinite(value) else None for value in trace.health]
        for index, name in enumerate(self.model.kasmina_layers):
            rows = slice(index * lattice.seeds_per_layer, (index + 1) * lattice.seeds_per_layer)
            self._emit(
                events.SeedsObserved(self._seed, self._epoch, name, states[rows], trace.alpha[rows], health[rows])
            )

    def _trace(self, epoch: int) -> SeedTrace:
        lattice = self.model.lattice
        return SeedTrace(epoch, lattice.alpha_blend.tolist(), lattice.health_accumulator.tolist())


def _health_of(layout: KasminaStateLayout) -> list[float]:
    return [float(value) for value in layout.health_accumulator.tolist()]
