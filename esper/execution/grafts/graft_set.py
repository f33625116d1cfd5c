"""All awake seeds of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts.errors import ShapeMismatchError
from esper.execution.grafts import blend, compiled, fused
from esper.execution.grafts.bank import Bank, FastCall
from esper.execution.grafts.bank_kernel import bank_eligible
from esper.execution.grafts.bound import BoundSeeds, SeedState
from esper.execution.grafts.device_bank import DeviceBank, capturing, packable
from esper.execution.grafts.families import contributions, sample_tap
from esper.execution.grafts.fit import fitted, needs_images, odd_tensors, unfit_seeds
from esper.execution.grafts.reserved_bank import ReservedBank
from esper.execution.grafts.seed import BoundSeed, SeedWeights, bind_seed
from esper.execution.hosts import HostSpec
from esper.ops.graft import reference
from esper.ops.graft.autograd import traced_through
from esper.ops.graft.layout import BlendLayout

__all__ = ["GraftSet"]

_compiling: Callable[[], bool] = torch.compiler.is_compiling
_grad_enabled: Callable[[], bool] = torch.is_grad_enabled


class GraftSet(BoundSeeds):
    """The bound seeds of one layer, run together.

        residual mode:  y = h + sum_s alpha_s * k_s
        replace  mode:  y = (1 - A) * h + sum_s (alpha_s / max(1, A')) * k_s,   A' = sum of the replace seeds' alphas, A
        = min(1, A')

    Both may stand side by side. A chunk-scoped seed changes its own features only, so it counts in A' only there.
    Alphas are read from ``state_layout.alpha_blend`` on its own device. At alpha 0 the result is h bit for bit, at
    alpha 1 a replace seed stands alone, and the gradients are true in between; what a seed with coefficient 0 holds, or
    h behind a factor of 0, is never read, be it NaN.

    A result that is not finite because of a seed is contained: see :mod:`esper.execution.grafts.blend`. (Not under
    ``torch.func`` transforms, which allow no side effects: there the formula stands alone.) A call whose tensors a seed
    cannot run on gives h, and counts as a fault of that seed: :meth:`reason_of` says why.

    Low-rank seeds on the CPU take one native call (:mod:`esper.execution.grafts.bank`), seeds of one kind on a GPU one
    operation (:mod:`esper.execution.grafts.fused`); everything else runs on PyTorch operations with the same results to
    rounding.

    Args:
        spec: The host, from :func:`esper.execution.hosts.describe_host`.
        state_layout: The layer's rows of the lattice.
    """

    def __init__(self, spec: HostSpec, state_layout: SeedState) -> None:
        super().__init__(spec, state_layout)
        self._images: frozenset[int] = frozenset()
        self._seeds: dict[int, BoundSeed] = {}
        self._layout: BlendLayout | None = None
        self._plan: fused.Plan | None = None
        self._sheet: compiled.Sheet | None = None
        self._runs: fused.Runs = ()
        self._bank: Bank | ReservedBank | DeviceBank | None = None
        self._bank_tried = False
        self._fast: FastCall | None = None

    def _changed(self) -> None:
        self._layout = self._sheet = None
        self._forget_bank()
        if self.spec.is_resolved:
            self._settle()  # now rather than at the next forward, which may be traced by a compiler

    def _forget_bank(self) -> None:
        self._bank = self._fast = None
        self._bank_tried = False

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, h: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Blend the seeds into a host's output.

        Args:
            x: What the host read.
            h: What it gave: the features lie along ``spec.channel_dim``.
            alpha: float32 ``[num_seeds]`` on h's device, in place of the layer's own; read, not differentiated.

        Returns:
            y, of h's shape, dtype and device.
        """
        if alpha is None:
            y = self.as_operation(x, h)
            if y is not None:
                return y
            alpha = self.state_layout.alpha_blend
        # Asked in this order, a traced graph does not depend on whether an eager call has packed a bank.
        bank = None if _compiling() else self._bank
        if bank is not None:
            if self._fast is not None:
                y = self._fast.run(x, h, alpha)
                if y is not None:
                    return y
            tap = x if bank.reads_input else h
            try:
                usable = not h.is_nested and x.layout is torch.strided and bank.usable(tap, h)
            except IndexError:
                usable = False  # a single number has no last dimension
            if usable:
                if bank.whole():
                    y = bank.run(tap, h, alpha)
                    if y is not None:
                        return y
                elif not bank.swapped():
                    self._forget_bank()  # moved by `.data =` or the like; packed again at the next call
        return self._general(x, h, alpha)

    def as_operation(self, x: Tensor, h: Tensor) -> Tensor | None:
        """As :meth:`forward`, as one operation in a graph that is made for a CPU; None where it cannot be one.

        What a traced function looks at becomes a guard, and all guards are checked before each call of the graph. So
        this is asked before everything else, and looks at little.
        """
        if not compiled.serves(h) or fused.serves(h.device) or self._sheet is None:
            return None
        state = self.state_layout
        return compiled.run(self._sheet, x, h, state.alphas, state.faults, state.first_row)

    def with_host(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The product of a Linear host and the seeds as one operation, on a GPU; None where they cannot be one.

        A layer whose seeds were not packed yet, or moved, says None too: :meth:`forward` packs them.

        Args:
            x: What the host reads.
            weight: The host's.
            bias: The host's, or None.
        """
        bank = self._bank
        if not isinstance(bank, DeviceBank) or not bank.usable(x, x) or not bank.whole():
            return None
        return bank.run_with_host(x, weight, bias, self.state_layout.alpha_blend)

    def fast_call(self, x: Tensor) -> FastCall | None:
        """The seeds' calls in C, made now if they can be; None without.

        A forward takes the same way from its first call on: activation checkpointing counts what is saved.

        Args:
            x: What the host is about to read.
        """
        bank = self._bank
        if isinstance(bank, Bank) and not bank.whole() and not bank.swapped():
            self._forget_bank()
        plain = not self._bank_tried and not fused.serves(x.device) and not _observed(x) and not _differentiated()
        if plain and self._seeds and not self.misfits:
            self._try_bank(x.device)
        return self._fast

    @property
    def bank_of_seeds(self) -> tuple[int, str | None] | None:
        """Rows and activation of the bank that :meth:`with_host` would run; None without one."""
        plan = self._plan
        if not isinstance(plan, fused.BankPlan) or plan.gated or plan.seeds[0].family.norm is not None:
            return None
        return (sum(plan.ranks), plan.seeds[0].family.activation) if plan.seeds[0].reads_input else None

    def refuse(self, reason: str) -> None:
        """Count a call that no seed can run on: a fault of all of them, for the reason given."""
        self._count(dict.fromkeys(self._kernels, reason))

    def _count(self, reasons: Mapping[int, str]) -> None:
        flags = self._flags()
        for seed_idx, reason in reasons.items():
            self._refused[seed_idx] = reason
            flags[seed_idx] = 1

    def _general(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
        odd = odd_tensors(x, h)
        if odd is not None:
            self.refuse(odd)
            return h
        if self._layout is None:
            self.spec = self.spec.resolve(tuple(h.shape))
            self._settle()
        if self.misfits:
            flags = self._flags()
            for seed_idx in self.misfits:
                flags[seed_idx] = 1
        if not self._seeds:
            return self._tethered(h)
        unfit = unfit_seeds(self._seeds, self._images, self.spec, x, h, self._dim(h))
        if unfit:
            self._count(unfit)
            return self._tethered(h)
        if _compiling() or _observed(h):
            return self._traced(x, h, alpha)
        if _differentiated():
            return self._pure(x, h, alpha)
        if self._try_bank(h.device):
            return self.forward(x, h, alpha)
        if h.device.type != "cpu" or fused.serves(h.device):
            return self._traced(x, h, alpha)
        return self._eager(x, h, alpha)

    def _try_bank(self, device: torch.device) -> bool:
        """Pack the seeds, if that was not tried since they changed; whether they are packed now by this call."""
        if self._bank_tried:
            return False
        self._bank_tried = True
        # A captured graph holds the parameters' addresses, so from then on they stay where they are.
        if capturing(device):
            return False
        with torch.inference_mode(False):  # the buffer outlives this call, which may be in inference mode
            self._bank = self._pack()
            self._fast = self._bank.fast_call() if isinstance(self._bank, Bank) else None
        return self._bank is not None

    def _settle(self) -> None:
        """Settle what depends on the layer's shape: which seeds fit, and where their contributions go."""
        assert self.spec.d_out is not None
        fitting: dict[int, BoundSeed] = {}
        for seed_idx in sorted(self._kernels):
            try:
                fitting[seed_idx] = bind_seed(seed_idx, self._kernels[seed_idx], self.spec, self.state_layout.num_seeds)
            except ShapeMismatchError as error:
                self.misfits[seed_idx] = str(error)
        self._seeds = fitting
        self._images = frozenset(i for i, seed in fitting.items() if needs_images(seed))
        self._layout = BlendLayout([seed.place for seed in fitting.values()], self.spec.d_out)
        weights = [self._weights(i) for i in fitting]
        tensors = [w.tensors() for w in weights]
        self._plan = fused.plan_of(list(fitting.values()), tensors, self.spec.d_in, self.spec.d_out)
        self._sheet = None if self.misfits else self._sheet_of(weights)
        self._runs = fused.runs_of(list(fitting))
        self._upload()

    def _upload(self) -> None:
        """Put what the seeds' operation reads beside them where it is read, unless a graph is being made just now."""
        if self._plan is None or _compiling() or _traces():
            return
        device = next(t.device for i in self._seeds for t in self._weights(i).tensors().values())
        if fused.serves(device) and not capturing(device):
            fused.upload(self._plan, device)

    def _sheet_of(self, weights: list[SeedWeights]) -> compiled.Sheet | None:
        return compiled.sheet_of(list(self._seeds.values()), weights, self._like.dtype, self.spec.channel_dim)

    def _pack(self) -> Bank | ReservedBank | DeviceBank | None:
        seeds = list(self._seeds.values())
        weights = [self._weights(seed_idx) for seed_idx in self._seeds]
        parameters = [p for w in weights for p in w.parameters()]
        dtype = parameters[0].dtype if parameters else self._like.dtype
        named = sum(len(list(w.parameters())) for w in weights) == sum(len(w.tensors()) for w in weights)
        if self.misfits or not named:
            return None
        if parameters and fused.serves(parameters[0].device):
            if not isinstance(self._plan, fused.BankPlan) or not packable(parameters):
                return None
            return DeviceBank(
                self._plan, weights, lambda: self.state_layout.fault_flags, self._runs, self.spec.channel_dim
            )
        same = all(p.dtype is dtype and p.device.type == "cpu" and type(p) is nn.Parameter for p in parameters)
        if self.spec.channel_dim != -1 or not same or not bank_eligible(seeds, dtype, torch.device("cpu")):
            return None
        if any(p.is_shared() for p in parameters):
            return None  # other processes train them where they are, see `share_memory`
        d_tap = self.spec.d_in if seeds[0].reads_input else self.spec.d_out
        assert d_tap is not None and self.spec.d_out is not None
        return Bank(seeds, weights, d_tap, self.spec.d_out, dtype)

    def _run_seeds(self, x: Tensor, h: Tensor, which: list[int], tensors: list[dict[str, Tensor]]) -> list[Tensor]:
        seeds = [self._seeds[i] for i in which]
        sampled: dict[tuple[bool, tuple[int, int]], Tensor] = {}
        taps: list[Tensor] = []
        for seed in seeds:
            key = seed.reads_input, seed.strided
            if key not in sampled:
                sampled[key] = sample_tap(seed, x, h)
            taps.append(sampled[key])
        # Weights of another dtype than the activations (a model in halves with full weights) follow the activations.
        fitting = [
            {name: t.to(tap.dtype) for name, t in group.items()} for group, tap in zip(tensors, taps, strict=True)
        ]
        return contributions(seeds, fitting, taps, self._dim(h))

    def _trusted(self, x: Tensor, h: Tensor, which: list[int]) -> list[Tensor]:
        """Per seed where its tap is finite, shaped to broadcast against its contribution."""
        dim = self._dim(h)
        result = []
        for i in which:
            seed = self._seeds[i]
            tap = sample_tap(seed, x, h)
            # A depthwise node looks around, so there the whole image counts.
            dims = (dim,) if seed.pointwise else tuple(range(dim, tap.dim()))
            result.append(torch.isfinite(tap).all(dims[0], keepdim=True) if len(dims) == 1 else _all(tap, dims))
        return result

    def _eager(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
        assert self._layout is not None
        numbers: list[float] = alpha.tolist()
        order = list(self._seeds)
        live = [i for i in order if numbers[i] != 0.0]
        tensors = {i: self._weights(i).tensors() for i in order}
        tap_x, tap_h = x, h
        ks = dict(zip(live, self._run_seeds(tap_x, tap_h, live, [tensors[i] for i in live]), strict=True))
        ks = {i: fitted(k, h, self._seeds[i], self._dim(h)) for i, k in ks.items()}
        parts = [ks.get(i) for i in order]
        y = blend.blend_eager(self._layout, h, parts, numbers, self._dim(h))
        if live and not torch.isfinite(y).all():
            with torch.no_grad():
                trusted = dict(zip(live, self._trusted(x, h, live), strict=True))
                none = torch.zeros((), dtype=torch.bool)
                masks = [trusted.get(i, none) for i in order]
                blamed = reference.faults(self._layout, h, y, parts, masks, alpha, self._dim(h))
                guilty = [i for i, at_fault in zip(order, blamed.tolist(), strict=True) if at_fault]
            if guilty:
                self.state_layout.fault_flags[guilty] = 1
                for seed_idx in guilty:
                    self._refused.pop(seed_idx, None)  # what it is counted for now
                y, live = h, []
        if _grad_enabled():
            # Seeds that had no part still get gradients, of zero: a run that trains nothing else must be able to start
            # from alpha 0.
            idle = [t for i in order if i not in live for t in tensors[i].values() if t.requires_grad]
            if h.requires_grad and any(self._layout.numbers(numbers, s)[0] == 0.0 for s in self._layout.segments):
                idle.append(h)
            if idle:
                y = blend.tether(y, idle)
        return y

    def _tethered(self, h: Tensor) -> Tensor:
        """h, with gradients of zero for the seeds that had no part: a run that trains nothing else must go on."""
        if not _grad_enabled() or _differentiated():
            return h
        learning = [t for i in self._kernels for t in self._weights(i).tensors().values() if t.requires_grad]
        return blend.tether(h, learning) if learning else h

    def _pure(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
        """The formula alone, as ``torch.func`` wants it: a function without effects, so faults are not contained."""
        assert self._layout is not None
        order, dim = list(self._seeds), self._dim(h)
        parts = self._run_seeds(x, h, order, [self._weights(i).tensors() for i in order])
        return reference.blend(self._layout, h, parts, alpha, dim)

    def _traced(self, x: Tensor, h: Tensor, alpha: Tensor | None = None) -> Tensor:
        assert self._layout is not None
        alpha, flags = self._rows(alpha)
        order = list(self._seeds)
        dim = self._dim(h)
        named = [self._weights(i).tensors() for i in order]
        # The operations know nothing of tensors that are spread over a mesh of devices.
        if self._plan is not None and fused.serves(h.device) and not hasattr(h, "device_mesh"):
            tap = x if next(iter(self._seeds.values())).reads_input else h
            done = fused.run(self._plan, named, tap, h, alpha, dim)
            if done is not None:
                fused.raise_flags(flags, self._runs, done[1])
                return done[0]
        flat = [t for tensors in named for t in tensors.values()]
        # Only what is read: autograd would add the zeros of an unused output to the host's gradients.
        reads = {seed.reads_input for seed in self._seeds.values()}
        taps = [tap for tap, is_input in ((x, True), (h, False)) if is_input in reads]
        gated, signal = blend.gate([*taps, *flat])
        gated_x, gated_h = (gated[0] if True in reads else x), (gated[len(taps) - 1] if False in reads else h)
        rest = iter(gated[len(taps) :])
        # A seed that is off must not be read: zeros stand in for weights that may hold NaN.
        on = [alpha[i] != 0 for i in order]
        tensors = [
            {name: torch.where(counts, next(rest), 0.0) for name in group}
            for counts, group in zip(on, named, strict=True)
        ]
        parts = self._run_seeds(gated_x, gated_h, order, tensors)
        parts = [fitted(k, h, self._seeds[i], dim) for i, k in zip(order, parts, strict=True)]
        with torch.no_grad():
            trusted = self._trusted(x, h, order)
        if traced_through(h):
            # Plain operations: a compiler fuses them itself, and whoever else looks on sees each of them. The graph
            # must not hold the lattice's own memory, which the flags are written to.
            factors = alpha if _compiling() else alpha.clone()
            y = reference.blend(self._layout, h, parts, factors, dim)
            with torch.no_grad():
                still = [p.detach() for p in parts]
                blamed = reference.faults(self._layout, h.detach(), y.detach(), still, trusted, alpha, dim)
            y = blend.contain(y, h, signal, blamed.any())
        else:
            y, blamed = blend.blend_fused(self._layout, h, parts, trusted, alpha, signal, dim)
        fused.raise_flags(flags, self._runs, blamed.to(flags.dtype))
        return y

    def _rows(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """The alphas, unless others are given, and the fault flags."""
        state = self.state_layout
        if alpha is not None and alpha is not state.alpha_blend:
            return alpha, self._flags()
        if compiled.serves(state.faults):
            return state.alphas.narrow(0, state.first_row, state.num_seeds), self._flags()
        return state.alpha_blend, state.fault_flags

    def _flags(self) -> Tensor:
        """The layer's fault flags.

        In a graph for a CPU they are cut out of the whole lattice's, which the operations of other layers write to: a
        compiler refuses inputs that overlap.
        """
        state = self.state_layout
        if compiled.serves(state.faults):
            return state.faults.narrow(0, state.first_row, state.num_seeds)
        return state.fault_flags

    def _dim(self, h: Tensor) -> int:
        if self.spec.geometry is not None:
            return h.dim() - 3  # a convolution takes a single image [C, H, W] too
        return self.spec.channel_dim % h.dim()

    # -- whatever takes the parameters out of the bank ----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> GraftSet:
        self._forget_bank()
        super()._apply(fn, recurse)
        self._upload()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; the seeds must be bound."""
        self._forget_bank()
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_bank()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_bank": None, "_fast": None, "_bank_tried": False}


def _all(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    sound = torch.isfinite(t)
    for dim in dims:
        sound = sound.all(dim, keepdim=True)
    return sound


def _observed(h: Tensor) -> bool:
    """Whether something traces or fakes the operations, so that values must not be looked at."""
    return (_traces() or type(h) is not Tensor) and not _differentiated()


def _traces() -> bool:
    """Whether something looks on at every operation."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def _differentiated() -> bool:
    """Whether a transformation of ``torch.func`` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
