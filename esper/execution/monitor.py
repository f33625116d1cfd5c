"""Watching dormant layers within a budget of the host's time.

A probe looks at a few rows of one layer's output, in one forward, and merges their statistics into the layer's window.
Between probes nothing of the monitor runs; :class:`ProbePacer` decides how many steps lie between two of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.execution.health import DEAD_EPS, ClosedWindow, LayerHealth, layer_health
from esper.execution.pacing import NEVER, GraphPacer, ProbePacer
from esper.ops.stats import CHUNK_FIELDS, FEATURE_FIELDS, HealthField, observe, seed_health

__all__ = ["LayoutSink", "Monitor", "ProbeTarget"]

_compiling = torch.compiler.is_compiling


class LayoutSink(Protocol):
    """What the monitor needs of a layer's state layout."""

    @property
    def device(self) -> torch.device:
        """Where the layer's rows are."""

    def submit_health(self, samples: Tensor) -> None:
        """Take one score per seed, ``[num_seeds]`` on the device of the layer's output; NaN means none. Never waits."""


class ProbeTarget(Protocol):
    """What the monitor needs of a layer."""

    layer_name: str
    num_seeds: int
    telemetry_enabled: bool

    @property
    def channel_dim(self) -> int:
        """Dimension of the output that holds the features: -1 or 1."""

    @property
    def features(self) -> int | None:
        """Features of the output; None while unknown."""

    @property
    def state_layout(self) -> LayoutSink:
        """The layer's rows of the lattice."""

    def arm_probe(self, observer: Callable[[Tensor], None]) -> None:
        """Let ``observer`` see the next forward's output, once, under ``no_grad``."""

    def disarm_probe(self) -> None:
        """Take an observer away that was not called."""


class Monitor:
    """Samples the layers in turn, so often as the budget allows.

    ``on_due`` belongs into the training loop; everything else is for whoever wants to know.

    Args:
        layers: What to watch.
        lattice: What the layers' rows belong to; kept for whoever has only the monitor. Samples go to each layer's
            ``state_layout``.
        budget: Share of the host's time that watching may cost, in [0, 1]; 0 switches it off.
        rows: Positions that one probe reads, about.
        window: Probes of a layer after which its health is derived and its window starts afresh.
        eps: Largest magnitude of a dead feature.
        fixed_ns_per_step: What the caller spends on each step to know whether something is due, nanoseconds.
        clock: Nanoseconds, monotonic.

    Raises:
        ValueError: a number out of range, or two layers of one name.
    """

    def __init__(
        self,
        layers: Sequence[ProbeTarget],
        lattice: object,
        *,
        budget: float = 0.005,
        rows: int = 32,
        window: int = 16,
        eps: float = DEAD_EPS,
        fixed_ns_per_step: float = 0.0,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        for name, number in (("rows", rows), ("window", window)):
            if number < 1:
                raise ValueError(f"Monitor: {name} is {number}; need at least 1")
        self.rows = rows
        self.window = window
        self.eps = eps
        self.lattice = lattice
        self.pacer = ProbePacer(budget, fixed_ns_per_step)
        self.graph_pacer = GraphPacer(budget)
        #: Called when somebody asked for samples, so that the caller comes back soon.
        self.on_request: Callable[[], None] | None = None
        self._clock = clock
        self._probes = [_Probe(self, layer, index) for index, layer in enumerate(layers)]
        self._by_name = {probe.layer.layer_name: probe for probe in self._probes}
        if len(self._by_name) != len(self._probes):
            raise ValueError("Monitor: two layers have the same name")
        self._closed_windows: dict[int, ClosedWindow] = {}
        self._turn = 0
        self._armed: _Probe | None = None
        self._requested = False
        self._probe_ns = 0
        self._skipped = 0
        self._last_skip = ""
        self._closed = False

    @property
    def budget(self) -> float:
        """Share of the host's time that watching may cost."""
        return self.pacer.budget

    # -- the training thread -----------------------------------------------------------------------

    def on_due(self, n: int, *, eager: bool = True) -> int:
        """Account for the last probe and arm the next; costs a few microseconds.

        Args:
            n: The training step.
            eager: Whether layers may be armed one by one. In a compiled graph each would be a graph of its own, so
                there all are armed together: a second graph, compiled once when the budget allows for it.

        Returns:
            The step at which to call again. Calling earlier is cheap and changes nothing.
        """
        pacer = self.pacer
        if n < pacer.due:
            return pacer.due
        if self._closed or not self._probes or not pacer.enabled:
            return NEVER
        start = self._clock()
        self._settle(eager)
        if not eager:
            self._graph_due(n, start)
        else:
            self.graph_pacer.restart()
            if pacer.ready(n, start):
                self._arm_next()
            pacer.finish(n, self._clock())
        return pacer.due

    def _settle(self, eager: bool) -> None:
        """Close the books on the last probe."""
        probe, self._armed = self._armed, None
        if self._requested:
            self._requested = False
            self.pacer.excuse(self._probe_ns)
            for other in self._probes:
                if other.waiting:
                    other.disarm()
                    if not eager:
                        other.count_traced()
        elif probe is not None and probe.waiting:
            # The layer did not run: nothing was measured, and an old probe must not fire among other work.
            probe.disarm()
        elif probe is not None:
            self.pacer.probed(self._probe_ns, warm_up=probe.starting)
        self._probe_ns = 0

    def _graph_due(self, n: int, now_ns: int) -> None:
        """The model runs inside a graph: sample all layers at once when the budget has earned it."""
        if self.graph_pacer.look(n, now_ns):
            self._arm_all()
            self._requested = True
            self.pacer.restart(n + 1)
        else:
            self.pacer.restart(n + self.graph_pacer.period)

    def _arm_all(self) -> None:
        for probe in self._probes:
            if probe.layer.telemetry_enabled:
                probe.prepare()
                probe.arm()

    def _arm_next(self) -> None:
        for _ in self._probes:
            probe = self._probes[self._turn]
            self._turn = (self._turn + 1) % len(self._probes)
            if probe.layer.telemetry_enabled:
                probe.arm()
                self._armed = probe
                return

    def sample_now(self) -> None:
        """Arm every layer for the next forward, whatever the budget; the cost is the caller's and is not charged.

        What has not fired by the next time :meth:`on_due` has work is disarmed. In a compiled graph the first time
        compiles a second one.
        """
        self._requested = True
        self.pacer.due = 0
        self._arm_all()
        if self.on_request is not None:
            self.on_request()

    # -- questions ---------------------------------------------------------------------------------

    def health(self, layer_name: str) -> LayerHealth:
        """Health of a layer's seeds: of the last full window, or of the running one before the first is full.

        Reading waits for the layer's device.

        Raises:
            ValueError: if there is no such layer.
        """
        return self._probe(layer_name).health()

    def statistics(self, layer_name: str) -> tuple[int, Tensor, Tensor] | None:
        """What :meth:`health` is derived from: probes, ``features [5, C]``, ``chunks [4, S]``; None before the first.

        The tensors are the monitor's own: read them, and do not keep them.

        Raises:
            ValueError: if there is no such layer.
        """
        return self._probe(layer_name).statistics()

    def _probe(self, layer_name: str) -> _Probe:
        probe = self._by_name.get(layer_name)
        if probe is None:
            known = ", ".join(map(repr, self._by_name)) or "no layer"
            raise ValueError(f"Layer {layer_name!r} not found; watched: {known}")
        return probe

    def take_closed(self) -> dict[int, ClosedWindow]:
        """The last full window of each layer that closed one since the last call, by number of the layer.

        Waits for nothing; for the training thread.
        """
        closed, self._closed_windows = self._closed_windows, {}
        return closed

    def stats(self) -> dict[str, Any]:
        """What watching cost so far.

        Returns:
            samples, skipped (and last_skip, the reason of the last), spent_ns, owed_ns (the part of spent_ns that is
            not earned yet, after a probe in which something was compiled), warm_up_ns (each layer's first probe and
            first closing of a window, not in spent_ns), elapsed_ns (the host's own time), share (spent over elapsed),
            period (steps between probes), budget.
        """
        pacer = self.pacer
        return {
            "samples": sum(probe.total for probe in self._probes),
            "skipped": self._skipped,
            "last_skip": self._last_skip,
            "spent_ns": int(pacer.spent_ns),
            "owed_ns": int(pacer.owed_ns),
            "warm_up_ns": int(pacer.warm_up_ns),
            "elapsed_ns": int(pacer.host_ns),
            "share": pacer.share,
            "period": pacer.period,
            "budget": pacer.budget,
        }

    def close(self) -> None:
        """Take every probe away; nothing is armed afterwards."""
        self._closed = True
        self._armed = None
        for probe in self._probes:
            if probe.waiting:
                probe.disarm()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the clock and what is armed: both belong to this process and this copy."""
        state = self.__dict__.copy()
        state["_clock"] = None
        state["_armed"] = None
        state["_requested"] = False
        state["on_request"] = None
        state["_closed_windows"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock = time.perf_counter_ns

    # -- for probes --------------------------------------------------------------------------------

    def _skip(self, reason: str) -> None:
        self._skipped += 1
        self._last_skip = reason


class _Probe:
    """One layer's windows; calling it is the observation."""

    __slots__ = (
        "chunks",
        "features",
        "index",
        "last_chunks",
        "last_features",
        "last_samples",
        "layer",
        "monitor",
        "phase",
        "runs",
        "samples",
        "starting",
        "total",
        "waiting",
        "windows",
    )

    def __init__(self, monitor: Monitor, layer: ProbeTarget, index: int) -> None:
        self.monitor = monitor
        self.layer = layer
        self.index = index
        self.features: Tensor | None = None
        self.chunks: Tensor | None = None
        self.last_features: Tensor | None = None
        self.last_chunks: Tensor | None = None
        self.samples = 0
        self.last_samples = 0
        self.total = 0
        self.phase = 0
        #: Observations that were tried, and windows that were closed.
        self.runs = 0
        self.windows = 0
        #: Whether the last observation was the layer's first, or the first to close a window.
        self.starting = False
        self.waiting = False

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.__slots__}
        state["waiting"] = False
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def arm(self) -> None:
        self.waiting = True
        self.layer.arm_probe(self)

    def disarm(self) -> None:
        self.waiting = False
        self.layer.disarm_probe()

    def __call__(self, y: Tensor) -> None:
        monitor = self.monitor
        if _compiling():
            self._observe_traced(y)
            return
        start = monitor._clock()
        self.waiting = False
        runs, windows = self.runs, self.windows
        try:
            self._observe(y)
        except Exception as error:
            self._skip(error)
        self.starting = runs == 0 or (windows == 0 and self.windows == 1)
        monitor._probe_ns += monitor._clock() - start

    def _skip(self, error: Exception) -> None:
        # Outputs without memory of their own (vmap, functional transforms), integers, scalars, a kernel that does not
        # compile: watching is not worth a run, whatever went wrong with it.
        self.monitor._skip(f"{self.layer.layer_name}: {type(error).__name__}: {error}")

    def _observe(self, y: Tensor) -> None:
        device = y.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.monitor._skip(f"{self.layer.layer_name}: its forward is being captured into a CUDA graph")
            return
        self.runs += 1
        channel_dim, features, chunks = self.layer.channel_dim, self.features, self.chunks
        if features is None or chunks is None or features.shape[1] != y.shape[channel_dim] or features.device != device:
            features, chunks = self._start_windows(y.shape[channel_dim], device)
        observe.resolve(device.type)(
            y, self.layer.num_seeds, channel_dim, self.monitor.rows, self.phase, features, chunks
        )
        self.phase += 1
        self._count(features, chunks)

    def _count(self, features: Tensor, chunks: Tensor) -> None:
        self.samples += 1
        self.total += 1
        if self.samples >= self.monitor.window:
            self._close_window(features, chunks)

    def _observe_traced(self, y: Tensor) -> None:
        """Inside a compiled graph: one op that mutates the window; counting there would recompile."""
        if self.features is not None and self.chunks is not None:
            observe(y, self.layer.num_seeds, self.layer.channel_dim, self.monitor.rows, 0, self.features, self.chunks)

    def count_traced(self) -> None:
        """The forward ran inside a graph, which did the merging but could not count."""
        if self.features is not None and self.chunks is not None:
            self._count(self.features, self.chunks)

    def prepare(self) -> None:
        """Make the windows before a graph is traced, where the layer's size is known."""
        if self.features is None and (channels := self.layer.features) is not None:
            try:
                self._start_windows(channels, self.layer.state_layout.device)
            except Exception as error:
                self._skip(error)

    def _start_windows(self, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        seeds = self.layer.num_seeds
        # Ordinary tensors, even when the forward runs in inference mode: they outlive it.
        with torch.inference_mode(False):
            self.features = torch.zeros((FEATURE_FIELDS, channels), dtype=torch.float64, device=device)
            self.last_features = torch.zeros_like(self.features)
            self.chunks = torch.zeros((CHUNK_FIELDS, seeds), dtype=torch.float64, device=device)
            self.last_chunks = torch.zeros_like(self.chunks)
            # Closing a window takes another kernel than observing. On a GPU it may have to be compiled: that belongs to
            # the start.
            seed_health(self.features, self.chunks, self.monitor.eps)
        self.samples = self.last_samples = 0
        return self.features, self.chunks

    def _close_window(self, features: Tensor, chunks: Tensor) -> None:
        """Derive the health on the device, hand it to the lattice, keep the window, and start the next.

        In place: a graph that was compiled or captured goes on writing to the same addresses.
        """
        table = seed_health(features, chunks, self.monitor.eps)
        self.layer.state_layout.submit_health(table[HealthField.SCORE])
        self.monitor._closed_windows[self.index] = ClosedWindow(self.samples, table)
        if self.last_features is not None and self.last_chunks is not None:
            self.last_features.copy_(features)
            self.last_chunks.copy_(chunks)
        features.zero_()
        chunks.zero_()
        self.windows += 1
        self.last_samples, self.samples = self.samples, 0

    def health(self) -> LayerHealth:
        window = self.statistics()
        if window is None:
            return LayerHealth.nothing(self.layer.layer_name, self.layer.num_seeds)
        return layer_health(self.layer.layer_name, *window, self.monitor.eps)

    def statistics(self) -> tuple[int, Tensor, Tensor] | None:
        if self.last_samples and self.last_features is not None and self.last_chunks is not None:
            return self.last_samples, self.last_features, self.last_chunks
        if self.features is not None and self.chunks is not None:
            return self.samples, self.features, self.chunks
        return None
