"""The seeds of a layer whose memory was reserved from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.execution.grafts import compiled, fused
from esper.execution.grafts.bank_kernel import bank_eligible
from esper.execution.grafts.bound import SeedState
from esper.execution.grafts.device_bank import capturing
from esper.execution.grafts.families import sample_strided
from esper.execution.grafts.graft_set import GraftSet
from esper.execution.grafts.reservation import Reservation, ReservedWeights
from esper.execution.grafts.reserved_bank import ReservedBank, readable
from esper.execution.grafts.reserved_blend import reserved_blend
from esper.execution.grafts.seed import SeedWeights, bind_seed
from esper.execution.hosts import HostSpec
from esper.ops.graft.seeds import ACTIVATIONS, Plan, blend_seeds, compiled_here
from esper.ops.graft.variants import SEATS

if TYPE_CHECKING:
    from esper.execution.kernel_executor import LoadedKernel

__all__ = ["ReservedGraftSet"]

_compiling = torch.compiler.is_compiling


class ReservedGraftSet(GraftSet):
    """A :class:`GraftSet` whose parameters, shapes and addresses never change.

    Waking a seed copies weights in place and writes one line of the *plan*, a small tensor on the device. A compiled or
    captured graph reads the plan and the alphas, so nothing it depends on changes; see
    :mod:`esper.execution.grafts.reserved_blend`. Eager calls run what is awake only: on the CPU as one bank
    (:mod:`esper.execution.grafts.reserved_bank`), on a GPU as one operation where the seeds allow it.

    Args:
        spec: The host; its sizes are known.
        state_layout: The layer's rows of the lattice.
        reservation: How much memory each seed has.
        device: Where it lies.
    """

    def __init__(
        self, spec: HostSpec, state_layout: SeedState, reservation: Reservation, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(spec, state_layout)
        self.reservation = reservation
        #: Called before parameters are written to: FSDP2 may have other tensors in their place.
        self.before_write: Callable[[], None] | None = None
        device = torch.device(device)
        for seed_idx in range(state_layout.num_seeds):
            setattr(self, f"seed{seed_idx}", ReservedWeights(reservation, self._like.dtype, device))
        # For compiled graphs on a CPU; beyond so many seeds it could not say whose a fault is.
        self._operation = compiled_here() and state_layout.num_seeds <= SEATS
        device = device if device.type != "meta" else torch.device("cpu")  # as the lattice: its numbers are meant
        with torch.inference_mode(False):
            self.plan = torch.zeros(state_layout.num_seeds, len(Plan), dtype=torch.int32, device=device)
            self.plan[:, Plan.ROW] = torch.arange(state_layout.num_seeds, dtype=torch.int32, device=device)

    def keep_addresses(self) -> None:
        """Tell graphs that are recorded from compiled code that the tensors they read and write stay where they are."""
        for tensor in (self.plan, self.state_layout.alpha_blend, self.state_layout.fault_flags):
            torch._dynamo.mark_static_address(tensor, guard=False)

    # -- waking -------------------------------------------------------------------------------------------------------

    def check(self, seed_idx: int, kernel: LoadedKernel) -> None:
        """Raise what :meth:`bind` raises, and ReservationError for a kernel that the memory does not hold."""
        super().check(seed_idx, kernel)
        self.reservation.check(kernel)

    def _hold(
        self, seed_idx: int, kernel: LoadedKernel, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        # dtype and device are the reservation's: the parameters are there already.
        seed = bind_seed(seed_idx, kernel, self.spec, self.state_layout.num_seeds)
        self._announce_write()
        self._memory(seed_idx).fill(seed, kernel.tensors)
        line = [0] * Plan.ROW  # which stays as it is
        line[Plan.CODE] = 1 + ACTIVATIONS.index(seed.family.activation)
        line[Plan.RANK] = kernel.tensors[seed.family.tensor("down")].shape[0]
        line[Plan.BEGIN], line[Plan.END] = seed.place.begin, seed.place.end
        line[Plan.REPLACE] = int(seed.place.replace)
        line[Plan.BIASED] = int("down" in seed.family.biases)
        self._write(seed_idx, line)

    def _drop(self, seed_idx: int) -> None:
        self._write(seed_idx, [0] * Plan.ROW)
        self._announce_write()
        self._memory(seed_idx).empty()

    def _announce_write(self) -> None:
        if self.before_write is not None:
            self.before_write()

    def _write(self, seed_idx: int, line: list[int]) -> None:
        with torch.inference_mode(False):
            self.plan[seed_idx, : Plan.ROW].copy_(
                torch.tensor(line, dtype=torch.int32, device="cpu"), non_blocking=True
            )

    def _memory(self, seed_idx: int) -> ReservedWeights:
        weights = self._modules[f"seed{seed_idx}"]
        assert isinstance(weights, ReservedWeights)
        return weights

    def seed_parameters(self, seed_idx: int) -> dict[str, Any]:
        """The parameters of an awake seed, the same objects from the start; empty for a seed that sleeps.

        ``down.weight`` ``[R, d_tap]``, ``up.weight`` ``[d_out, R]`` and, if its kernel has a bias, ``down.bias``
        ``[R]``.
        """
        return dict(self._memory(seed_idx).occupied()) if seed_idx in self._kernels else {}

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, h: Tensor, alpha: Tensor | None = None) -> Tensor:
        """As :meth:`GraftSet.forward`; with no seed awake an eager call gives h itself."""
        if not _compiling() and not self._kernels and not capturing(h.device):
            return h
        return super().forward(x, h, alpha)

    def _sheet_of(self, weights: list[SeedWeights]) -> None:
        """None: which seeds are bound must not be looked at; :meth:`_traced` reads the plan that changes in place."""

    def _traced(self, x: Tensor, h: Tensor, alpha: Tensor | None = None) -> Tensor:
        if h.numel() == 0:
            return h
        known = not _compiling() and not capturing(h.device)
        if known and self._plan is not None and fused.serves(h.device):
            return super()._traced(x, h, alpha)  # one operation for what is awake now
        kinds = {seed.family.activation for seed in self._seeds.values()} if known else ACTIVATIONS
        geometry = self.spec.geometry
        reads_input = self.reservation.tap == "input"
        tap = x if reads_input else h
        if reads_input and geometry is not None:
            tap = sample_strided(tap, geometry.stride)
        memory = [self._memory(i).whole() for i in range(self.state_layout.num_seeds)]
        downs, biases, ups = zip(*memory, strict=True)
        state, dim = self.state_layout, self._dim(h)
        plain = compiled.fits(tap, h, dim) and all(type(t) is nn.Parameter and t.dtype is h.dtype for t in downs)
        if self._operation and plain and compiled.serves(h) and (alpha is None or alpha is state.alpha_blend):
            every = [*downs, *ups, *biases]
            return blend_seeds(tap, h, state.alphas, state.faults, self.plan, every, state.first_row, replaces=True)
        weights = torch.cat(downs), torch.cat(biases), torch.cat(ups, 1)
        alpha, flags = self._rows(alpha)
        y, blamed = reserved_blend(tap, h, weights, self.plan, alpha, dim, kinds)
        with torch.no_grad():
            flags.copy_(torch.maximum(flags, blamed.to(flags.dtype)))
        return y

    def _general(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
        # A graph must not depend on which seeds are awake, so nothing of theirs is looked at here.
        return self._traced(x, h, alpha) if _compiling() or capturing(h.device) else super()._general(x, h, alpha)

    def _pack(self) -> ReservedBank | None:
        # A bank of the elastic kind moves parameters into memory of its own; these stay where they are.
        seeds = list(self._seeds.values())
        memory = [self._memory(seed_idx) for seed_idx in self._seeds]
        dtype = self._like.dtype
        if self.misfits or self.spec.channel_dim != -1 or not readable(memory, dtype):
            return None
        if not bank_eligible(seeds, dtype, torch.device("cpu")):
            return None
        assert self.spec.d_out is not None
        return ReservedBank(seeds, [m.rank for m in memory], memory, self.reservation.d_tap, self.spec.d_out, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "before_write": None}

    def _apply(self, fn: Any, recurse: bool = True) -> ReservedGraftSet:
        super()._apply(fn, recurse)
        # It follows the device, but not to the meta device, and keeps its type.
        device = fn(torch.empty(0, device=self.plan.device)).device
        if device.type != "meta":
            self.plan = self.plan.to(device)
        return self
