"""The picture as metrics that Prometheus scrapes; computed when they are asked for.

Runs and ranks are labels. Layers are labels too, of as many layers as :attr:`PrometheusExporter.max_layers` allows:
each label is a time series that a server keeps, so a model of thousands of layers is told as totals, and
``esper_layers_left_out`` says for how many layers that is so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esper.contracts.errors import EsperError
from esper.watch.facts import AWAKE
from esper.watch.state import JobState, RunState

__all__ = ["METRICS", "PrometheusExporter", "Served", "serve"]

_RUN: Final = ("run", "rank")
_LAYER: Final = ("run", "rank", "layer")

#: Name -> kind, help, labels. Names of counters end in ``_total`` when they are scraped.
METRICS: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "esper_messages": ("counter", "Messages heard", ()),
    "esper_messages_twice": ("counter", "Messages that came again", ()),
    "esper_messages_unreadable": ("counter", "Messages that were none, or of an unknown kind", ()),
    "esper_runs": ("gauge", "Processes of runs that are known", ()),
    "esper_run_running": ("gauge", "1 while the run has not said that it ended", _RUN),
    "esper_run_silent_seconds": ("gauge", "Seconds since the process was last heard", _RUN),
    "esper_step": ("gauge", "Training steps done", _RUN),
    "esper_epoch": ("gauge", "Epochs done", _RUN),
    "esper_metric": ("gauge", "What the run reports of itself, by name", (*_RUN, "name")),
    "esper_seeds": ("gauge", "Seeds by lifecycle state", (*_RUN, "state")),
    "esper_layers": ("gauge", "Layers that are known", _RUN),
    "esper_layers_left_out": ("gauge", "Layers without series of their own", _RUN),
    "esper_health_mean": ("gauge", "Mean health of all seeds that were watched", _RUN),
    "esper_health_min": ("gauge", "Lowest health of any seed", _RUN),
    "esper_alpha_mean": ("gauge", "Mean blend factor of awake seeds", _RUN),
    "esper_seeds_failing": ("gauge", "Seeds with faults in their latest executions", _RUN),
    "esper_nonfinite": ("gauge", "NaN and infinite activations in the latest windows", _RUN),
    "esper_lag_seconds": ("gauge", "Median time from capture to arrival of the latest windows", _RUN),
    "esper_windows": ("counter", "Windows of health heard", _RUN),
    "esper_windows_missing": ("counter", "Windows that never came, by their numbers", _RUN),
    "esper_windows_late": ("counter", "Windows that came after a later one of their layer", _RUN),
    "esper_dropped": ("counter", "Windows and events that the sender gave up", _RUN),
    "esper_faults": ("counter", "Faults of kernels since watching began", _RUN),
    "esper_loads": ("counter", "Loads of kernels by outcome", (*_RUN, "outcome")),
    "esper_layer_health_mean": ("gauge", "Mean health of the layer's seeds", _LAYER),
    "esper_layer_health_min": ("gauge", "Lowest health of the layer's seeds", _LAYER),
    "esper_layer_alpha_mean": ("gauge", "Mean blend factor of the layer's awake seeds", _LAYER),
    "esper_layer_awake": ("gauge", "Awake seeds of the layer", _LAYER),
    "esper_layer_faults": ("counter", "Faults of the layer's kernels since watching began", _LAYER),
}

Looking = Callable[[], AbstractContextManager[JobState]]


class PrometheusExporter(Collector):
    """Collects the metrics of a state.

    Args:
        looking: Gives the state, which does not change while it is held.
        now: Seconds since 1970.
        max_layers: Layers of a run that get series of their own, the first ones.
    """

    def __init__(self, looking: Looking, now: Callable[[], float] = time.time, max_layers: int = 500) -> None:
        self._looking = looking
        self._now = now
        self.max_layers = max_layers

    def describe(self) -> Iterator[Metric]:
        """All metrics, without values."""
        return iter(_families().values())

    def collect(self) -> Iterator[Metric]:
        """All metrics, now."""
        families = _families()
        with self._looking() as state:
            now = self._now()
            for name, value in (
                ("esper_messages", state.messages.total),
                ("esper_messages_twice", state.duplicates),
                ("esper_messages_unreadable", state.unreadable),
                ("esper_runs", len(state.runs)),
            ):
                families[name].add_metric([], value)
            for run in state.runs.values():
                self._run(families, run, now)
        yield from families.values()

    def _run(self, families: dict[str, Family], run: RunState, now: float) -> None:
        who = [run.run, str(run.rank)]

        def add(name: str, value: float | None, *more: str) -> None:
            if value is not None and value == value:
                families[name].add_metric([*who, *more], value)

        totals = run.refresh()
        add("esper_run_running", float(run.status.value == "running"))
        add("esper_run_silent_seconds", max(0.0, now - run.heard_at))
        add("esper_step", run.step)
        add("esper_epoch", run.epoch)
        for metric, value in run.metrics.items():
            add("esper_metric", value, metric)
        for state, count in totals.by_state().items():
            add("esper_seeds", count, state)
        shown = min(len(run.layers), self.max_layers)
        add("esper_layers", len(run.layers))
        add("esper_layers_left_out", len(run.layers) - shown)
        add("esper_health_mean", _ratio(totals.health_sum.sum(), totals.health_number.sum()))
        add("esper_health_min", _finite(totals.health_min.min(initial=float("inf"))))
        add("esper_alpha_mean", _ratio(totals.alpha_sum.sum(), totals.awake_number.sum()))
        add("esper_seeds_failing", int(totals.failing.sum()))
        add("esper_nonfinite", float(totals.nonfinite.sum()))
        if run.lags:
            add("esper_lag_seconds", sorted(run.lags)[len(run.lags) // 2])
        for name, value in (
            ("esper_windows", run.windows.total),
            ("esper_windows_missing", run.missing),
            ("esper_windows_late", run.late),
            ("esper_dropped", run.dropped),
            ("esper_faults", run.faults),
        ):
            add(name, value)
        for outcome, count in (
            ("asked", run.loads_asked),
            ("done", run.loads_done),
            ("refused", run.loads_refused),
        ):
            add("esper_loads", count, outcome)
        for row, layer in zip(range(shown), run.layers.values(), strict=False):
            add("esper_layer_health_mean", _ratio(totals.health_sum[row], totals.health_number[row]), layer.name)
            add("esper_layer_health_min", _finite(totals.health_min[row]), layer.name)
            add("esper_layer_alpha_mean", _ratio(totals.alpha_sum[row], totals.awake_number[row]), layer.name)
            add("esper_layer_awake", int(totals.counts[row, list(AWAKE)].sum()), layer.name)
            add("esper_layer_faults", layer.faults, layer.name)


Family = CounterMetricFamily | GaugeMetricFamily


def _families() -> dict[str, Family]:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    return {name: kinds[kind](name, text, labels=labels) for name, (kind, text, labels) in METRICS.items()}


def _ratio(total: float, number: float) -> float | None:
    return float(total) / float(number) if number else None


def _finite(value: float) -> float | None:
    return float(value) if value < float("inf") else None


@dataclass(frozen=True, slots=True)
class Served:
    """Metrics being served.

    Attributes:
        url: Where.
        close: Ends it.
    """

    url: str
    close: Callable[[], None]


def serve(exporter: PrometheusExporter, host: str, port: int) -> Served:
    """Serve the metrics over HTTP, at any path, from threads of their own.

    Args:
        exporter: What to serve.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.

    Raises:
        EsperError: the address cannot be listened at.
    """
    registry = CollectorRegistry()
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise EsperError(f"metrics cannot be served at {host}:{port}: {error.strerror or error}") from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    shown = f"[{host}]" if ":" in host else host
    return Served(f"http://{shown}:{server.server_port}/metrics", close)
