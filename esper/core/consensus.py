"""Several processes that train one network: what one of them learns by itself, all of them do at the same step.

Every rank gives the same commands at the same steps (it runs the same program). But fetches end when they end, a batch
with a NaN is one rank's batch, and samples and times are each rank's own. So what comes from outside the program goes
through a *round*: after step n the ranks start a sum over what each has to report, in the background; after step n + 1
it is there, the same on all of them, and is acted upon. Between the two lies a whole training step, so nobody waits.

A round is due after every step while a seed is awake or a request is open, and after every ``period`` steps otherwise:
which steps these are follows from what all ranks know alike.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from esper.contracts.errors import ArtifactError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.pacing import NEVER
from esper.execution.state_layout import Lattice

__all__ = ["Consensus", "Refusal", "Request", "several_ranks"]

#: Requests that take part in one round; more wait for their turn.
SLOTS = 32
#: Bytes of a reason that reach the other ranks.
_REASON_BYTES = 384
#: Every rank sends the digest of its requests, small enough for sums of squares to be exact in float64.
_DIGEST_BITS = 20
_HEADER = 3  # the requests' digest, its square, ranks with awake seeds
_PER_SLOT = 3  # ranks where it is ready, not to be had, bad
_PER_LAYER = 2  # latency: sum, count
_PER_ROW = 3  # faults, health: sum, count


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class Refusal:
    """Why a request comes to nothing on every rank.

    Attributes:
        reason: In words, with the rank it comes from.
        bad: Whether the artifact is bad, rather than not to be had.
    """

    reason: str
    bad: bool


class Request(Protocol):
    """The part of a model's request that the ranks have to agree on."""

    @property
    def layer(self) -> KasminaLayer:
        """Whose seed."""

    @property
    def seed_idx(self) -> int:
        """Which of its seeds."""

    @property
    def artifact_id(self) -> str:
        """What was asked for."""

    @property
    def fetch(self) -> Future[LoadedKernel | None]:
        """This rank's fetch."""

    @property
    def outcome(self) -> Future[bool]:
        """What the user waits for."""


@dataclass(eq=False)
class _Open:
    """A request that is not settled, and what this rank has to say to it."""

    request: Request
    ready: bool = False
    reason: str | None = None
    bad: bool = False

    def look(self) -> None:
        """See whether the fetch has ended; once said, it stays said."""
        outcome, fetch = self.request.outcome, self.request.fetch
        if self.ready or self.reason is not None:
            return
        if outcome.cancelled():
            self.reason = "the request was cancelled"
        elif fetch.done():
            # From here on it cannot be cancelled any more: other ranks rely on what is said now.
            if not outcome.set_running_or_notify_cancel():
                self.reason = "the request was cancelled"
                return
            self._end(fetch)

    def _end(self, fetch: Future[LoadedKernel | None]) -> None:
        layer, artifact_id = self.request.layer, self.request.artifact_id
        try:
            if fetch.result(timeout=0) is None:
                self.reason = layer.kernel_cache.last_error(artifact_id) or "not to be had"
            else:
                self.ready = True
        except ArtifactError as error:
            self.reason, self.bad = str(error), True
        except (Exception, CancelledError) as error:
            self.reason = f"{type(error).__name__}: {error}"


@dataclass(eq=False)
class _Round:
    """What is under way."""

    slots: list[_Open]
    facts: Tensor
    rows: Tensor
    failing: list[_Open]
    reasons: list[Tensor]
    works: list[Any] = field(default_factory=list)


class Consensus:
    """The agreement of the ranks that train one model; made by :func:`esper.distributed.attach`.

    Args:
        lattice: The model's.
        layers: The model's.
        settle: Called with a request and None, when all ranks are to commit it now, or with the refusal.
        group: The ranks that train together; every one of them makes a consensus at the same point of its program.
        period: Steps between two rounds while nothing is awake and no request is open.
        timeout_s: After how many seconds without an answer of the other ranks :meth:`round` raises.
    """

    def __init__(
        self,
        lattice: Lattice,
        layers: Sequence[KasminaLayer],
        settle: Callable[[Any, Refusal | None], None],
        *,
        group: dist.ProcessGroup | None = None,
        period: int = 32,
        timeout_s: float = 600.0,
    ) -> None:
        if period < 1:
            raise ValueError(f"period must be at least 1 step, got {period}")
        self.period = period
        self._lattice, self._layers, self._settle = lattice, list(layers), settle
        self._rows_group = group if group is not None else dist.group.WORLD
        ranks = dist.get_process_group_ranks(self._rows_group)
        self.world_size, self.rank = len(ranks), dist.get_rank(self._rows_group)
        self._group = _own_group(ranks, timeout_s)
        self._open: list[_Open] = []
        self._failing: list[_Open] = []
        self._under_way: _Round | None = None
        self._latency = torch.zeros(len(self._layers), _PER_LAYER, dtype=torch.float64)
        self._rows = torch.zeros(_PER_ROW, lattice.num_seeds, device=lattice.device)
        self._closed = False
        self._woken = lattice.has_active_seeds()
        for index, layer in enumerate(self._layers):
            layer.latency_sink = self._latency_of(index)

    # -- the training thread -----------------------------------------------------------------------

    def expect(self, request: Request) -> None:
        """Take part in a request that every rank makes now."""
        self._open.append(_Open(request))

    def round(self, step: int) -> int:
        """Act upon the last round and start the next; called between two training steps.

        Args:
            step: The training step, the same on all ranks.

        Returns:
            The step at which to call again; calling earlier changes nothing.

        Raises:
            RuntimeError: the other ranks did not answer in time.
        """
        if self._closed:
            return NEVER
        last, self._under_way = self._under_way, None
        if last is not None:
            for work in last.works:
                work.wait()
        self._collect()
        if last is not None:
            self._deliver(last.rows)
        self._lattice.expect_step(last is not None)
        if last is not None:
            self._act(last)
        if self._open or self._failing or self._awake() or step % self.period == 0:
            self._start()
            return step + 1
        return step + self.period - step % self.period

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; all have one shape and lie on the CPU. Waits for all ranks."""
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self._group)
        return found

    def close(self) -> None:
        """Take part in nothing any more; every rank does it at the same step. What is under way is waited for."""
        if self._closed:
            return
        self._closed = True
        for layer in self._layers:
            layer.latency_sink = None
        if self._under_way is not None:
            with contextlib.suppress(RuntimeError):  # a rank that is gone
                for work in self._under_way.works:
                    work.wait()
            self._under_way = None
        for entry in (*self._open, *self._failing):
            if not entry.request.outcome.done():
                self._settle(entry.request, Refusal("the ranks no longer agree: the consensus was closed", bad=False))
        self._open, self._failing = [], []

    def _awake(self) -> bool:
        # On a GPU the host learns late, and each rank at another time, that a seed has gone to sleep by itself.
        return self._lattice.has_active_seeds() if self._lattice.device.type == "cpu" else self._woken

    # -- what each rank has to report --------------------------------------------------------------

    def _latency_of(self, index: int) -> Callable[[int], None]:
        def note(microseconds: int) -> None:
            self._latency[index, 0] += microseconds
            self._latency[index, 1] += 1

        return note

    def _collect(self) -> None:
        """Take this rank's faults and samples out of the lattice before a step of it can count them."""
        lattice = self._lattice
        if self._rows.device != lattice.device:
            self._rows = self._rows.to(lattice.device)
        faults, total, count = self._rows.unbind()
        sample = lattice.health_sample
        present = ~torch.isnan(sample)
        torch.maximum(faults, lattice.fault_flags.to(faults.dtype), out=faults)
        total.add_(torch.where(present, sample, 0.0))
        count.add_(present)
        lattice.fault_flags.zero_()
        sample.fill_(torch.nan)

    def _start(self) -> None:
        slots = self._open[:SLOTS]
        facts = torch.zeros(_HEADER + _PER_SLOT * SLOTS + _PER_LAYER * len(self._layers), dtype=torch.float64)
        digest = _digest(slots)
        facts[0], facts[1] = digest, digest * digest
        facts[2] = self._lattice.has_active_seeds()
        for position, entry in enumerate(slots):
            entry.look()
            at = _HEADER + _PER_SLOT * position
            facts[at] = entry.ready
            facts[at + 1] = entry.reason is not None and not entry.bad
            facts[at + 2] = entry.reason is not None and entry.bad
        facts[_HEADER + _PER_SLOT * SLOTS :] = self._latency.reshape(-1)
        self._latency.zero_()
        rows, self._rows = self._rows, torch.zeros_like(self._rows)
        failing, self._failing = self._failing, []
        mine = torch.zeros(len(failing), _REASON_BYTES, dtype=torch.uint8)
        for line, entry in zip(mine, failing, strict=True):
            text = (entry.reason or "").encode()[:_REASON_BYTES]
            line[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
        reasons = [torch.empty_like(mine) for _ in range(self.world_size)] if failing else []
        # The lattice's rows go where its device can: gloo for a CPU, the training's own backend for a GPU.
        on_cpu = rows.device.type == "cpu"
        started = _Round(slots, facts, rows, failing, reasons)
        started.works = [
            dist.all_reduce(facts, group=self._group, async_op=True),
            dist.all_reduce(rows, group=self._group if on_cpu else self._rows_group, async_op=True),
        ]
        if failing:
            started.works.append(dist.all_gather(reasons, mine, group=self._group, async_op=True))
        self._under_way = started

    # -- what all of them do -----------------------------------------------------------------------

    def _deliver(self, rows: Tensor) -> None:
        """Put the ranks' faults and mean samples into the lattice; its next step counts them. Nothing is looked at."""
        faults, total, count = rows.unbind()
        lattice = self._lattice
        lattice.fault_flags.copy_(faults != 0)
        lattice.health_sample.copy_(torch.where(count > 0, total / count, torch.nan))

    def _act(self, last: _Round) -> None:
        self._record_latencies(last.facts[_HEADER + _PER_SLOT * SLOTS :].reshape(-1, _PER_LAYER))
        for position, entry in enumerate(last.failing):
            self._settle(entry.request, self._refusal(entry, [line[position] for line in last.reasons]))
        self._woken = bool(last.facts[2] > 0)
        digest = _digest(last.slots)
        if (last.facts[0].item(), last.facts[1].item()) != (self.world_size * digest, self.world_size * digest**2):
            for entry in last.slots:
                self._open.remove(entry)
                reason = "the ranks asked for different kernels, or in a different order; all must run the same program"
                self._settle(entry.request, Refusal(f"{entry.request.artifact_id}: {reason}", bad=False))
            return
        for position, entry in enumerate(last.slots):
            at = _HEADER + _PER_SLOT * position
            ready, missing, bad = (int(number) for number in last.facts[at : at + _PER_SLOT])
            if bad or missing:
                entry.bad = bad > 0
                self._open.remove(entry)
                self._failing.append(entry)
            elif ready == self.world_size:
                self._open.remove(entry)
                self._woken = True
                self._settle(entry.request, None)

    def _refusal(self, entry: _Open, reasons: Sequence[Tensor]) -> Refusal:
        texts = [bytes(line.tolist()).rstrip(b"\0").decode(errors="replace") for line in reasons]
        told = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
        return Refusal(f"{entry.request.artifact_id}: {told[0] if told else 'refused by a rank'}", entry.bad)

    def _record_latencies(self, latencies: Tensor) -> None:
        for layer, (total, count) in zip(self._layers, latencies.tolist(), strict=True):
            if count:
                for seed_idx in layer.grafts.bound:
                    layer.state_layout.update_telemetry(seed_idx, round(total / count), float("nan"))


#: (world, ranks, group): one for each set of ranks, kept, because a second one of the same ranks would find what the
#: first one has left in the store.
_GROUPS: list[tuple[Any, list[int], Any]] = []


def _own_group(ranks: list[int], timeout_s: float) -> Any:
    """A gloo group: rounds overlap with whatever the training sends, and gloo needs no GPU for what is the host's."""
    world = dist.group.WORLD
    for its_world, its_ranks, group in _GROUPS:
        if its_world is world and its_ranks == ranks:
            return group
    timeout = datetime.timedelta(seconds=timeout_s)
    group = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True, group_desc="esper.consensus")
    _GROUPS.append((world, ranks, group))
    return group


def _digest(entries: Sequence[_Open]) -> int:
    text = "\n".join(f"{e.request.layer.layer_name} {e.request.seed_idx} {e.request.artifact_id}" for e in entries)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> (32 - _DIGEST_BITS)
