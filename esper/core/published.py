"""The part of a wrapped model that others hear of: its telemetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from esper.contracts.bus import Bus
from esper.contracts.telemetry import EventKind
from esper.core.clock import Clock
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.monitor import Monitor
from esper.execution.state_layout import Lattice
from esper.execution.telemetry.options import TelemetryOptions
from esper.execution.telemetry.publisher import NO_TELEMETRY, Publisher

__all__ = ["Published"]


class Published:
    """A model that can be published to a bus (docs/telemetry.md)."""

    kasmina_layers: dict[str, KasminaLayer]
    lattice: Lattice
    monitor: Monitor
    _clock: Clock
    _closed: bool
    _publisher: Publisher | None
    _touch: Callable[[], None]

    def publish_to(self, bus: Bus, options: TelemetryOptions | None = None, *, owns_bus: bool = False) -> None:
        """Publish this model's health and what happens to its seeds.

        A background thread starts with the next ``step()``; steps themselves never wait for the bus.

        Args:
            bus: Where to.
            options: What can be set.
            owns_bus: Whether ``close()`` closes the bus.

        Raises:
            RuntimeError: it is published already, or closed.
            ValueError: a layer's name or ``ESPER_RUN_ID`` cannot be published, or commands are wanted of a bus that
                cannot be followed.
            EsperError: the key for commands is too short.
        """
        if self._publisher is not None or self._closed:
            raise RuntimeError("the model is closed" if self._closed else "the model is published already")
        self._publisher = Publisher(
            bus,
            self.lattice,
            self.monitor,
            list(self.kasmina_layers),
            options,
            on_command=self._touch,
            steps=lambda: self._clock.steps,
            owns_bus=owns_bus,
        )
        self._touch()

    def report_epoch(
        self, *, loss: float | None = None, accuracy: float | None = None, values: Mapping[str, float] | None = None
    ) -> None:
        """Tell whoever watches that an epoch is done; does nothing for a model that is not published.

        Args:
            loss: Mean over the epoch: a plain number (``loss.item()`` is up to you, because it waits for the device).
            accuracy: Share in [0, 1].
            values: Up to 32 further numbers by name.

        Raises:
            ValueError: something that is no number, or an accuracy outside [0, 1]. A loss that is not finite is
                reported in words.
        """
        if self._publisher is not None:
            self._publisher.end_epoch(loss=loss, accuracy=accuracy, values=values or {})

    def telemetry_stats(self) -> dict[str, Any]:
        """What became of this model's messages.

        Returns:
            ``produced`` = ``delivered`` + ``spooled`` + ``dropped`` + ``in_flight`` (0 after ``close()``), and more:
            see :meth:`esper.execution.telemetry.publisher.Publisher.stats`.
        """
        return dict(NO_TELEMETRY) if self._publisher is None else self._publisher.stats()

    def _on_lifecycle(
        self, kind: EventKind, layer_name: str, seed_idx: int, artifact_id: str | None, reason: str | None
    ) -> None:
        self._touch()  # the next step answers a request that came to nothing
        if self._publisher is not None:
            self._publisher.event(
                kind, layer_name=layer_name, seed_idx=seed_idx, artifact_id=artifact_id, reason=reason
            )
