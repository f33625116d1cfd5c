"""The comparison: a growing network, the same host without growth, and a static network of the grown size.

All three of one seed see the same split and the same batches in the same order for the same number of epochs; the
growing network and the host start from the same weights. The test part is looked at once per network, after training.
Growth decisions see the validation part only.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from esper.contracts.bus import Bus
from esper.core.checkpoint import load as load_checkpoint
from esper.core.checkpoint import save as save_checkpoint
from esper.core.model_wrapper import MorphableModel, wrap
from esper.execution.telemetry.options import TelemetryOptions
from esper.grow import events
from esper.grow.catalogue import build_catalogue
from esper.grow.data import Split, Task, prepare
from esper.grow.errors import GrowError
from esper.grow.grower import Catalogue, Grower, SeedTrace
from esper.grow.model import build, count_parameters, host_width, width_for
from esper.grow.trainer import EpochRecord, Interrupted, Trainer, evaluate
from esper.optim import attach

__all__ = ["NETWORKS", "Experiment", "NetworkName", "NetworkResult", "Progress"]

NetworkName = Literal["host", "grown", "static"]

#: In the order they are trained: the static network's size is known once the grown one is done.
NETWORKS: tuple[NetworkName, ...] = ("host", "grown", "static")

#: Two seeds watch two hidden units each; more would watch one, of which health can tell little.
SEEDS_PER_LAYER = 2


class Progress(Protocol):
    """Shows how far the job is."""

    def network(self, name: NetworkName, seed: int) -> None:
        """Training of a network begins."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch has ended."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


@dataclass
class NetworkResult:
    """One trained network; accuracies are shares, losses mean cross-entropies in nats, over the test part.

    ``seeds_asked`` counts requests; ``levels`` the epochs after which the loss was level and no seed on trial.
    """

    network: NetworkName
    seed: int
    parameters: int
    history: list[EpochRecord]
    test_loss: float
    test_accuracy: float
    seconds: float
    traces: list[SeedTrace] = field(default_factory=list)
    seeds_kept: int = 0
    seeds_culled: int = 0
    seeds_asked: int = 0
    levels: int = 0
    checkpoint: str | None = None


@dataclass
class Experiment:
    """The whole job.

    Attributes:
        task: The data.
        seeds: One triple of networks is trained for each.
        epochs: Passes over the training part, for every network.
        device: Where to train.
        registry: URL of the registry that kernels come from.
        out: Folder for checkpoints.
        emit: Takes events.
        progress: Is told how far it is.
        bus: Where the growing networks publish their telemetry, each as a run of its own; None for nowhere.
        stop: Asked before every training step; True ends the job with :class:`esper.grow.trainer.Interrupted`.
        results: Filled as networks finish, interrupted or not.
        layer_rows: Labels of the lattice's rows, ``"<layer>#<seed index>"``.
    """

    task: Task
    seeds: list[int]
    epochs: int
    device: torch.device
    registry: str
    out: Path
    emit: Callable[[events.Event], None]
    progress: Progress
    bus: Bus | None = None
    stop: Callable[[], bool] = lambda: False
    results: list[NetworkResult] = field(default_factory=list)
    layer_rows: list[str] = field(default_factory=list)
    #: Tells runs apart that go to folders of one name.
    _token: str = field(default_factory=lambda: secrets.token_hex(2))

    def run(self) -> None:
        """Train everything.

        Raises:
            Interrupted: ``stop`` said so. What is finished, and the network that was being trained, is in ``results``.
        """
        # All kernels before any training: a registry that cannot be written to is found at once, and one that vanishes
        # later costs the seeds that were to come from it, not the run.
        catalogues = {
            seed: build_catalogue(self._host(seed), self.registry, seeds_per_layer=SEEDS_PER_LAYER, seed=seed)
            for seed in self.seeds
        }
        for seed in self.seeds:
            split = prepare(self.task, seed=seed, device=self.device)
            if seed == self.seeds[0]:
                self._started(split)
            self._train_plain("host", self._host(seed), split, seed)
            grown = self._train_grown(split, seed, catalogues[seed])
            width = width_for(split.features, self.task.classes, grown.parameters)
            static = build(split.features, self.task.classes, width=width, seed=seed).to(self.device)
            self._train_plain("static", static, split, seed)

    def _started(self, split: Split) -> None:
        self.emit(
            events.RunStarted(
                data=self.task.name,
                samples=split.sizes(),
                features=split.features,
                classes=self.task.classes,
                seeds=self.seeds,
                epochs=self.epochs,
                device=str(self.device),
            )
        )

    def _host(self, seed: int) -> nn.Sequential:
        classes = self.task.classes
        return build(self.task.features.shape[1], classes, width=host_width(classes), seed=seed).to(self.device)

    def _train_plain(self, network: NetworkName, model: nn.Module, split: Split, seed: int) -> NetworkResult:
        return self._train(network, model, Trainer(model, split, seed=seed), split, seed, None)

    def _train_grown(self, split: Split, seed: int, catalogue: Catalogue) -> NetworkResult:
        host = self._host(seed)
        model = wrap(
            host,
            seeds_per_layer=SEEDS_PER_LAYER,
            preserve_original=False,
            registry=self.registry,
            bus=self.bus,
            telemetry=TelemetryOptions(run_id=self._run_id(seed)),
        )
        try:
            self.layer_rows = [
                f"{name}#{i}" for name, layer in model.kasmina_layers.items() for i in range(layer.num_seeds)
            ]
            trainer = Trainer(model, split, seed=seed)
            attach(trainer.optimizer, model)
            grower = Grower(
                model,
                catalogue,
                steps_per_epoch=trainer.steps_per_epoch,
                last_epoch=self.epochs,
                emit=self._relay,
                seed=seed,
            )
            return self._train("grown", model, trainer, split, seed, grower)
        finally:
            model.close()

    def _run_id(self, seed: int) -> str:
        """The name under which a growing network publishes."""
        folder = re.sub(r"[^A-Za-z0-9._-]", "-", self.out.name)[:32]
        return f"grow-{folder}-{self._token}-seed{seed}"

    def _train(
        self,
        network: NetworkName,
        model: nn.Module,
        trainer: Trainer,
        split: Split,
        seed: int,
        grower: Grower | None,
    ) -> NetworkResult:
        self.progress.network(network, seed)
        self.emit(events.NetworkStarted(network, seed, count_parameters(model)))
        after_step = grower.after_step if grower is not None else None
        history: list[EpochRecord] = []
        interrupted = False
        start = time.monotonic()
        try:
            for _ in range(self.epochs):
                record = trainer.epoch(after_step, self.stop)
                history.append(record)
                self.emit(
                    events.EpochEnded(
                        network,
                        seed,
                        record.epoch,
                        record.train_loss,
                        record.validation_loss,
                        record.validation_accuracy,
                    )
                )
                if grower is not None:
                    grower.end_epoch(record)
                if isinstance(model, MorphableModel):
                    model.report_epoch(
                        loss=record.validation_loss,
                        accuracy=record.validation_accuracy,
                        values={"train_loss": record.train_loss} if math.isfinite(record.train_loss) else {},
                    )
                self.progress.epoch(record)
        except Interrupted:
            interrupted = True
        if grower is not None:
            grower.finish()
        seconds = time.monotonic() - start
        loss, accuracy = evaluate(model, split.test_x, split.test_y)
        result = NetworkResult(network, seed, count_parameters(model), history, loss, accuracy, seconds)
        if grower is not None and isinstance(model, MorphableModel):
            result.traces, result.seeds_kept, result.seeds_culled = grower.traces, grower.kept, grower.culled
            result.seeds_asked, result.levels = grower.asked, grower.levels
            result.checkpoint = self._save(model, split, seed, accuracy)
        self.emit(events.NetworkFinished(network, seed, result.parameters, loss, accuracy, seconds))
        self.results.append(result)
        if interrupted:
            raise Interrupted
        return result

    def _save(self, model: MorphableModel, split: Split, seed: int, accuracy: float) -> str:
        """Write the grown network, and make sure that the file gives the same network back."""
        path = self.out / f"grown-seed{seed}.safetensors"
        save_checkpoint(model, path)
        # It only answers, so it is no run and publishes nothing.
        restored = load_checkpoint(path, self._host(seed), bus=self.bus)
        try:
            _, again = evaluate(restored, split.test_x, split.test_y)
        finally:
            restored.close()
        if again != accuracy:
            raise GrowError(f"{path}: the saved network scores {again:.4f} on the test part, not {accuracy:.4f}")
        self.emit(events.CheckpointSaved(seed, path.name, path.stat().st_size))
        return path.name

    def _relay(self, event: events.Event) -> None:
        self.emit(event)
        if isinstance(event, events.SeedRequested):
            place = f"{event.layer}#{event.seed_idx}"
            self.progress.note(f"epoch {event.epoch}: levelled off, waking {place} with {event.blueprint}")
        elif isinstance(event, events.SeedJudged):
            change = f"validation loss {event.loss_before:.3f} -> {event.loss_after:.3f}"
            self.progress.note(f"epoch {event.epoch}: {event.verdict} {event.layer}#{event.seed_idx} ({change})")
        elif isinstance(event, events.SeedRefused):
            self.progress.note(f"epoch {event.epoch}: {event.layer}#{event.seed_idx} refused: {event.reason}")
