"""Counters for Prometheus. Routes are counted by their pattern, so that ids make no new series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esper.services.urza.lifecycle import JOB_STATUSES, KERNEL_STATUSES

__all__ = ["Metrics"]

_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The metrics of one process.

    Args:
        kernels: Asks the database how many kernels have each status; called when metrics are read.
        jobs: The same for jobs.
    """

    def __init__(self, kernels: Callable[[], Mapping[str, int]], jobs: Callable[[], Mapping[str, int]]) -> None:
        # When each series began is of no use, and as much text again.
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "urza_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "urza_request_seconds",
            "Time to the end of the answer",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._sent = Counter("urza_sent_bytes", "Bytes of bodies sent", registry=self._registry)
        self._received = Counter("urza_received_bytes", "Bytes of bodies received", registry=self._registry)
        self.uploads = Counter("urza_uploads", "Uploads by how they ended", ["result"], registry=self._registry)
        self.running = Gauge("urza_requests_running", "Requests being answered", registry=self._registry)
        self._registry.register(_Counts("urza_kernels", "Kernels by status", KERNEL_STATUSES, kernels))
        self._registry.register(_Counts("urza_jobs", "Compile jobs by status", JOB_STATUSES, jobs))

    def observe(self, method: str, route: str, status: int, seconds: float, *, sent: int, received: int = 0) -> None:
        """Count one request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if sent:
            self._sent.inc(sent)
        if received:
            self._received.inc(received)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format; blocking, because it asks the database."""
        return generate_latest(self._registry)


class _Counts(Collector):
    """A gauge by status, read from the database when it is scraped."""

    def __init__(
        self, name: str, help_text: str, statuses: tuple[str, ...], count: Callable[[], Mapping[str, int]]
    ) -> None:
        self._name = name
        self._help = help_text
        self._statuses = statuses
        self._count = count

    def describe(self) -> Iterator[Metric]:
        """Named without asking the database, so that registering needs none."""
        yield GaugeMetricFamily(self._name, self._help, labels=["status"])

    def collect(self) -> Iterator[Metric]:
        """Count now."""
        family = GaugeMetricFamily(self._name, self._help, labels=["status"])
        found = self._count()
        for status in self._statuses:
            family.add_metric([status], found.get(status, 0))
        yield family
