"""Waking seeds: what a wrapped model is asked for, fetches, and commits between two training steps."""

from __future__ import annotations

import warnings
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from esper.contracts.errors import ArtifactError
from esper.core.clock import Clock
from esper.core.consensus import Consensus, Refusal, several_ranks
from esper.execution import background
from esper.execution.kasmina_layer import KasminaLayer, Load
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.state_layout import Lattice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Fetched", "KernelRequests"]


@dataclass(frozen=True, eq=False)
class Fetched:
    """What the background loop hands to the training thread."""

    layer: KasminaLayer
    seed_idx: int
    artifact_id: str
    alpha: float
    ramp_steps: int
    load: Load
    fetch: Future[LoadedKernel | None]
    outcome: Future[bool]


class KernelRequests(nn.Module):
    """The part of a wrapped model that loads kernels."""

    kasmina_layers: dict[str, KasminaLayer]
    lattice: Lattice
    wrapped_model: nn.Module
    _clock: Clock
    _closed: bool
    _consensus: Consensus | None
    _fetched: deque[Fetched]
    _requested: set[Fetched]
    _warned: bool

    def layer(self, layer_name: str) -> KasminaLayer:
        """The layer of that name."""
        raise NotImplementedError("a wrapped model knows its layers")

    def tie_reserved(self, *, zeros: bool = False) -> None:
        """See :meth:`esper.core.morphable.MorphableModel.tie_reserved`."""
        raise NotImplementedError("a wrapped model knows its outputs")

    async def load_kernel(
        self, layer_name: str, seed_idx: int, artifact_id: str, *, alpha: float = 0.3, ramp_steps: int = 0
    ) -> bool:
        """Fetch a kernel and wake a seed with it, between two forwards of the calling thread.

        Args:
            layer_name: The layer's dotted name.
            seed_idx: Which of its seeds.
            artifact_id: What to load.
            alpha: Blend factor to reach, clamped to [0, 1].
            ramp_steps: Training steps over which alpha rises from 0; 0 sets it at once.

        Returns:
            Whether the seed is awake with the new kernel; if not, :meth:`get_layer_stats` holds the reason under
            "errors".

        Raises:
            ValueError: unknown layer, bad seed index, alpha is NaN, or ``ramp_steps`` is no whole number of at least 0;
                or the network no longer has the module that the layer was wrapped around.
            TypeError: ``artifact_id`` is no text, or ``alpha`` no number.
            LifecycleError: the seed is fossilized, culled, or already loading.
            RuntimeError: the model is trained by several ranks.
        """
        layer = self.hosted_layer(layer_name)
        if self._consensus is not None:
            raise RuntimeError("load_kernel() would wake the seed on this rank alone; use request_kernel() and step()")
        try:
            return await layer.load_kernel(seed_idx, artifact_id, alpha=alpha, ramp_steps=ramp_steps)
        finally:
            self._clock.due = 0

    def request_kernel(
        self, layer_name: str, seed_idx: int, artifact_id: str, *, alpha: float = 0.3, ramp_steps: int = 0
    ) -> Future[bool]:
        """Start the work of :meth:`load_kernel` in the background; :attr:`step` commits it when it is ready.

        On several ranks (:func:`esper.distributed.attach`) every rank makes the request between the same two steps; the
        seed wakes on all of them at the same step, or on none.

        Returns:
            A future with the result of :meth:`load_kernel`; it is done after the :attr:`step` that committed. A seed
            that is unloaded, culled or fossilized meanwhile stays so: the future is then False, after the next
            :attr:`step` (on several ranks when all of them have their fetch behind them). Do not wait for it in the
            thread that trains.

        Raises:
            As :meth:`load_kernel`, at once.
        """
        if self._closed:
            raise RuntimeError("the model is closed")
        layer = self.hosted_layer(layer_name)
        load = layer.begin_load(seed_idx, alpha, artifact_id, ramp_steps=ramp_steps)
        outcome: Future[bool] = Future()
        fetch = background.submit(layer.fetch(seed_idx, artifact_id))
        item = Fetched(layer, seed_idx, artifact_id, alpha, ramp_steps, load, fetch, outcome)
        self._requested.add(item)
        if self._consensus is not None:
            self._consensus.expect(item)
            self._clock.due = 0  # every rank's next round is after this step, whenever its own fetch ends
        elif several_ranks() and not self._warned:
            self._warned = True
            warnings.warn(
                "several ranks run, but esper.distributed.attach(model) was not called: on each of them the seed will "
                "wake when its own fetch is done",
                stacklevel=2,
            )

        def hand_over(_: object) -> None:
            self._fetched.append(item)
            self._clock.due = 0

        fetch.add_done_callback(hand_over)
        return outcome

    def hosted_layer(self, layer_name: str) -> KasminaLayer:
        """The layer of that name; ValueError when its host is no part of the network any more."""
        layer = self.layer(layer_name)
        host, network = layer.default_transform, self.wrapped_model
        try:
            found = network.get_submodule(layer.layer_name)
        except AttributeError:
            found = None
        # A module that was put around the host still calls it.
        if found is not host and not any(module is host for module in network.modules()):
            now = "nothing" if found is None else f"another module ({type(found).__name__})"
            raise ValueError(
                f"Layer '{layer_name}' was replaced after wrap: the network has {now} in place of the "
                f"{type(host).__name__} that has these seeds, so a kernel would have no effect. Replace layers before "
                "esper.wrap, or go on with esper.wrap(esper.export(model))."
            )
        return layer

    def _commit_ready(self) -> None:
        """Settle what a command has overtaken, and what has been fetched."""
        for item in [item for item in self._requested if item.load.ended]:
            self._commit(item)
        while self._fetched:
            self._commit(self._fetched.popleft())

    def _commit(self, item: Fetched, refusal: Refusal | None = None) -> None:
        if item not in self._requested:
            return  # close() has cancelled it and put its seed back to sleep, or a command has overtaken it
        self._requested.discard(item)
        layer, seed_idx, load = item.layer, item.seed_idx, item.load
        if refusal is not None:
            item.fetch.cancel()
            done = layer.refuse(seed_idx, refusal.reason, bad=refusal.bad, load=load)
            if not item.outcome.done():
                item.outcome.set_result(done)
            return
        # It runs already where the ranks have agreed on it.
        if not item.outcome.running() and not item.outcome.set_running_or_notify_cancel():
            layer.refuse(seed_idx, f"{item.artifact_id}: the request was cancelled", bad=False, load=load)
            return
        if load.ended:
            item.fetch.cancel()
            item.outcome.set_result(False)
            return
        try:
            kernel = item.fetch.result(timeout=0)
            if kernel is None:
                reason = layer.kernel_cache.last_error(item.artifact_id) or "not to be had"
                done = layer.refuse(seed_idx, f"{item.artifact_id}: {reason}", bad=False, load=load)
            else:
                done = layer.commit(seed_idx, kernel, alpha=item.alpha, ramp_steps=item.ramp_steps, load=load)
        except ArtifactError as error:
            done = layer.refuse(seed_idx, f"{item.artifact_id}: {error}", bad=True, load=load)
        except (Exception, CancelledError) as error:
            done = layer.refuse(seed_idx, f"{item.artifact_id}: {type(error).__name__}: {error}", bad=False, load=load)
        item.outcome.set_result(done)

    @property
    def consensus(self) -> Consensus | None:
        """What the ranks that train this model agree by; None without :func:`esper.distributed.attach`."""
        return self._consensus

    def join_ranks(self, group: ProcessGroup | None, *, period: int, timeout_s: float, static: bool) -> Consensus:
        """See :func:`esper.distributed.attach`."""
        if self._consensus is None:
            layers = list(self.kasmina_layers.values())
            self._consensus = Consensus(
                self.lattice, layers, self._commit, group=group, period=period, timeout_s=timeout_s
            )
            self.tie_reserved(zeros=static)
            self._clock.due = 0
        return self._consensus
