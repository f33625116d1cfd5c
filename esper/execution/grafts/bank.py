"""The low-rank seeds of a layer as one bank on the CPU: one native call forward, one backward.

Which seeds, which memory, and when the fast way may be taken, is decided here; the arithmetic is in
``csrc/graft_bank.cpp``. Per seed ``down.weight`` [r, d_in] and ``up.weight`` [d_out, r] stay the leaf parameters that
optimizers know. Their storage is one buffer, seeds side by side:

    down [R, d_in] | up [R, d_out] | bias [R]       up.weight is the transpose of its rows of up

so that z = x @ down.T and y = h + (c * z) @ up need no gathering.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import interpret
from esper.execution.grafts.seed import BoundSeed, SeedWeights
from esper.ops import native

__all__ = ["Bank", "bank_eligible"]

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "tanh": 4, "sigmoid": 5, "silu": 6}
_DTYPES = {torch.float32: "GraftBankF32", torch.float64: "GraftBankF64"}

#: Above this many multiply-adds a product is left to the BLAS, which knows more about caches and uses every thread.
#: At batch 64, width 1024 and rank 32 (2^23 in all) the native kernel still wins by what a call costs.
NATIVE_LIMIT = 1 << 23

# C-level accessors: a Python loop over the parameters would cost as much as the product of a small layer.
_wants_grad: Callable[[Any], bool] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_slot = dict.__getitem__
_is = operator.is_
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
_jit: Callable[[], object] = torch._C._get_tracing_state
_forward_ad: Any = torch.autograd.forward_ad


def bank_eligible(seeds: Sequence[BoundSeed], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these seeds can run as one bank.

    They must be low-rank without a norm, read the same tap, and lie on the CPU in float32 or float64.
    """
    return (
        bool(seeds)
        and device.type == "cpu"
        and dtype in _DTYPES
        and hasattr(native.load(), "GraftGuard")  # neither missing nor older than this package
        and all(s.family.name in ("lowrank", "bottleneck") and s.family.norm is None for s in seeds)
        and len({s.reads_input for s in seeds}) == 1
        and all(s.strided == (1, 1) for s in seeds)
    )


@dataclass(frozen=True)
class _Slice:
    """Where one parameter lies in the buffer: ``buffer[offset:]`` seen with ``shape`` and ``stride``."""

    shape: tuple[int, int] | tuple[int]
    stride: tuple[int, int] | tuple[int]
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


class _Gather(torch.autograd.Function):
    """The buffer as a function of the parameters, so that one edge stands for all of them in every forward's graph."""

    @staticmethod
    def forward(
        ctx: Any, buffer: Tensor, slices: Sequence[_Slice], parameters: Sequence[Tensor], *edges: Tensor
    ) -> Tensor:
        ctx.slices, ctx.parameters = slices, parameters
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.slices, ctx.parameters, strict=True)
        return (None, None, None, *(s.of(grad) if p.requires_grad else None for s, p in pairs))


class _Run(torch.autograd.Function):
    """Attaches the gradient to a y that is computed already."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Tensor, Bank, bytes], x: Tensor, h: Tensor, buffer: Tensor) -> Tensor:
        y, bank, table = call
        ctx.save_for_backward(x)
        ctx.call = bank, table, bank.versions()
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        bank: Bank = ctx.call[0]
        table: bytes = ctx.call[1]
        if bank.versions() != ctx.call[2]:
            raise RuntimeError(
                "a seed's parameters were modified in place between forward and backward, so its gradient cannot be "
                "computed; "
                "call the optimizer after backward"
            )
        _, want_x, want_h, want_weights = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (None, *bank.differentiable_backward(x, gy, table, want_x, want_h, want_weights))
        return (None, *bank.backward(x, gy, table, want_x, want_h, want_weights))


# What Function.apply does beyond this is for functorch, and costs 1 to 2 us; `usable` has excluded functorch.
_run: Callable[..., Tensor] = super(torch.autograd.Function, _Run).apply


class Bank:
    """Packed seeds of one layer.

    Args:
        seeds: Seeds for which :func:`bank_eligible` holds.
        weights: Their parameters; their storage moves into the bank.
        d_in: Features of the tap.
        d_out: Features of the layer.
        dtype: float32 or float64.
    """

    def __init__(
        self, seeds: Sequence[BoundSeed], weights: Sequence[SeedWeights], d_in: int, d_out: int, dtype: torch.dtype
    ) -> None:
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        self.reads_input = seeds[0].reads_input
        self.seeds = tuple(seeds)
        self._dicts: list[dict[str, Tensor | None]] = []
        self._keys: list[str] = []
        self.parameters: list[Tensor] = []
        self._slices: list[_Slice] = []
        ranks = [self._weight(w, s, "down").shape[0] for s, w in zip(seeds, weights, strict=True)]
        self._ranks = ranks
        self.rows = sum(ranks)
        self.biased = any("down" in s.family.biases for s in seeds)
        self._up_at = self.rows * d_in
        self._bias_at = self._up_at + self.rows * d_out
        self.size = self._bias_at + (self.rows if self.biased else 0)
        table: list[tuple[int, int, int, int, int, bool, int]] = []
        row = 0
        for seed, module, rank in zip(seeds, weights, ranks, strict=True):
            place = seed.place
            self._add(module, seed.family.roles["down"], "weight", _Slice((rank, d_in), (d_in, 1), row * d_in))
            up = _Slice((place.end - place.begin, rank), (1, d_out), self._up_at + row * d_out + place.begin)
            self._add(module, seed.family.roles["up"], "weight", up)
            if "down" in seed.family.biases:
                self._add(module, seed.family.roles["down"], "bias", _Slice((rank,), (1,), self._bias_at + row))
            kind = _ACTIVATIONS[seed.family.activation]
            table.append((place.index, row, row + rank, place.begin, place.end, place.replace, kind))
            row += rank
        self._plain = not self.biased and all(entry[6] == 0 for entry in table)
        self._pack()
        module_ = native.load()
        assert module_ is not None
        start = self.buffer.data_ptr()
        width = self.buffer.element_size()
        up_address, bias_address = start + width * self._up_at, start + width * self._bias_at if self.biased else 0
        self._native = getattr(module_, _DTYPES[dtype])(table, d_in, d_out, self.rows, start, up_address, bias_address)
        self._finite = module_.graft_all_finite_f32 if dtype is torch.float32 else module_.graft_all_finite_f64
        self._products = self.rows * (d_in + d_out)
        self._one_group: bool = self._native.groups == 1
        self._forward = self._native.forward
        self.weights = self.buffer
        self._attached = False
        guard = module_.GraftGuard(self._dicts, self._keys, self.parameters)
        #: Whether every parameter is still the one that was packed, and still lies in the buffer.
        self.whole: Callable[[], bool] = guard.whole
        #: Changes when a parameter is written to.
        self.versions: Callable[[], bytes] = guard.versions

    @staticmethod
    def _weight(weights: SeedWeights, seed: BoundSeed, role: str) -> Tensor:
        tensor = weights.get_parameter(seed.family.tensor(role))
        return tensor

    def _add(self, module: SeedWeights, node: str, kind: str, place: _Slice) -> None:
        slots = module._modules[node]._parameters  # type: ignore[union-attr]
        parameter = slots[kind]
        assert parameter is not None
        self._dicts.append(slots)  # type: ignore[arg-type]
        self._keys.append(kind)
        self.parameters.append(parameter)
        self._slices.append(place)

    def _pack(self) -> None:
        # Not inside inference mode, whose tensors no optimizer may write to later.
        with torch.inference_mode(False), torch.no_grad():
            # Zeros, because a chunk-scoped seed leaves the rest of its rows of up empty.
            self.buffer = torch.zeros(self.size, dtype=self.dtype)
            for parameter, place in zip(self.parameters, self._slices, strict=True):
                view = place.of(self.buffer)
                view.copy_(parameter)
                parameter.data = view

    def swapped(self) -> bool:
        """Whether other tensors stand in the parameters' places, as under ``functional_call``."""
        return not all(map(_is, map(_slot, self._dicts, self._keys), self.parameters))

    def usable(self, x: Tensor, h: Tensor) -> bool:
        """Whether the fast way may be taken for these tensors now."""
        return (
            h.dtype is self.dtype
            and x.dtype is self.dtype
            and type(h) is Tensor
            and type(x) is Tensor
            and h.is_contiguous()
            and x.is_contiguous()
            and h.is_cpu
            and h.size(-1) == self.d_out  # an activation lets any shape through
            and not _functorch()
            and not _dispatch_modes()
            and _jit() is None
            and _forward_ad._current_level < 0
        )

    def run(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor | None:
        """y, or None when it is not finite and the fault has to be looked into. x is the tap."""
        n = h.numel() // self.d_out
        if n * self._products <= NATIVE_LIMIT:
            y = torch.empty_like(h)
            table = self._forward(x.data_ptr(), h.data_ptr(), y.data_ptr(), n, alpha.data_ptr())
            if table is None:
                return None
        else:
            with torch.no_grad():
                table = self._native.coefficients(alpha.data_ptr())
                y = self._large_forward(x, h, alpha, table, n)
            if not self._finite(y.data_ptr(), y.numel()):
                return None
        if not torch.is_grad_enabled():
            return y
        if not self._attached and any(map(_wants_grad, self.parameters)):
            self._attach()
        return _run((y, self, table), x, h, self.weights)

    def _attach(self) -> None:
        """Make ``weights`` a function of the parameters.

        Nothing is saved in that node, so one serves any number of forwards and backwards. All parameters get an edge,
        the frozen ones too, because a user may thaw them later; its backward gives a frozen one nothing.
        """
        flags = list(map(_wants_grad, self.parameters))
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            self.weights = _Gather.apply(self.buffer.detach(), self._slices, self.parameters, *self.parameters)
            for parameter, flag in zip(self.parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        self._attached = True

    # -- large products -----------------------------------------------------------------------------------------------

    def _views(self) -> tuple[Tensor, Tensor]:
        down = self.buffer[: self._up_at].view(self.rows, self.d_in)
        return down, self.buffer[self._up_at : self._bias_at].view(self.rows, self.d_out)

    def _inner(self, x: Tensor, table: bytes, n: int) -> tuple[Tensor, Tensor]:
        """(x @ down.T, its activation times the coefficient), [n, R] each."""
        down, _ = self._views()
        before = torch.mm(x.reshape(n, self.d_in), down.t())
        after = before if self._plain else torch.empty_like(before)
        self._native.activate(table, before.data_ptr(), after.data_ptr(), n)
        return before, after

    def _large_forward(self, x: Tensor, h: Tensor, alpha: Tensor, table: bytes, n: int) -> Tensor:
        if not self._one_group:
            # Segments of unlike coefficients: many narrow products, which the native kernel does in one pass.
            y = torch.empty_like(h)
            self._forward(x.data_ptr(), h.data_ptr(), y.data_ptr(), n, alpha.data_ptr())
            return y
        _, z = self._inner(x, table, n)
        _, up = self._views()
        runs, host = self._native.plan(table)
        y = h.reshape(n, self.d_out)
        beta = host
        for begin, end in runs:  # rows of seeds that are switched off are not read: they may hold NaN
            y = torch.addmm(y, z[:, begin:end], up[begin:end], beta=beta)
            beta = 1.0
        return y.view(h.shape) if runs else h.clone(memory_format=torch.contiguous_format)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def backward(
        self, x: Tensor, gy: Tensor, table: bytes, want_x: bool, want_h: bool, want_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for the tap, h and the buffer; None where not wanted."""
        n = gy.numel() // self.d_out
        runs, host = self._native.plan(table)
        if not runs:  # every alpha is 0: the host's gradients must be what they are without us, bit for bit
            return None, gy, gy.new_zeros(self.size) if want_weights else None
        gy = gy.contiguous()
        gx = torch.empty_like(x) if want_x else None
        same_h = self._one_group and host == 1.0
        gh = torch.empty_like(gy) if want_h and not same_h else None
        flat = gy.new_empty(self.size) if want_weights else None
        if self._one_group and n * self._products > NATIVE_LIMIT:
            self._large_backward(x, gy, table, n, runs, gx, flat)
            if gh is not None:
                torch.mul(gy, host, out=gh)
        else:
            start = 0 if flat is None else flat.data_ptr()
            width = gy.element_size()
            self._native.backward(
                table,
                x.data_ptr(),
                gy.data_ptr(),
                n,
                0 if gx is None else gx.data_ptr(),
                0 if gh is None else gh.data_ptr(),
                start,
                0 if flat is None else start + width * self._up_at,
                start + width * self._bias_at if flat is not None and self.biased else 0,
            )
        return gx, gy if want_h and same_h else gh, flat

    def _large_backward(
        self,
        x: Tensor,
        gy: Tensor,
        table: bytes,
        n: int,
        runs: Sequence[tuple[int, int]],
        gx: Tensor | None,
        flat: Tensor | None,
    ) -> None:
        down, up = self._views()
        rows_x, rows_g = x.reshape(n, self.d_in), gy.reshape(n, self.d_out)
        before, after = self._inner(x, table, n)
        gz = torch.mm(rows_g, up.t())
        self._native.activate_backward(table, gz.data_ptr(), 0 if self._plain else before.data_ptr(), n)
        if gx is not None:
            out = gx.view(n, self.d_in)
            beta = 0.0
            for begin, end in runs:
                torch.addmm(out, gz[:, begin:end], down[begin:end], beta=beta, out=out)
                beta = 1.0
        if flat is not None:
            torch.mm(gz.t(), rows_x, out=flat[: self._up_at].view(self.rows, self.d_in))
            torch.mm(after.t(), rows_g, out=flat[self._up_at : self._bias_at].view(self.rows, self.d_out))
            if self.biased:
                torch.sum(gz, 0, out=flat[self._bias_at :])

    def differentiable_backward(
        self, x: Tensor, gy: Tensor, table: bytes, want_x: bool, want_h: bool, want_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same from differentiable operations, for gradients of gradients (``create_graph=True``)."""
        flat = self.weights
        n = gy.numel() // self.d_out
        rows_x, rows_g = x.reshape(n, self.d_in), gy.reshape(n, self.d_out)
        down = flat[: self._up_at].view(self.rows, self.d_in)
        up = flat[self._up_at : self._bias_at].view(self.rows, self.d_out)
        seed_c, host_c = self._columns(table)
        live = (seed_c != 0).any(1, keepdim=True)
        if not live.any():  # every alpha is 0, as in `backward`
            return None, gy, gy.new_zeros(self.size) if want_weights else None
        down = torch.where(live, down, 0.0)  # a seed that is switched off is not read: it may hold NaN
        weighted = torch.where(live, up, 0.0) * seed_c
        pre = torch.mm(rows_x, down.t())
        if self.biased:
            pre = pre + flat[self._bias_at :]
        active, slope = self._activate(pre)
        gz = torch.mm(rows_g, weighted.t()) * slope
        gx = torch.mm(gz, down).view(x.shape) if want_x else None
        gh = (rows_g * host_c).view(gy.shape) if want_h else None
        if not want_weights:
            return gx, gh, None
        pieces = [torch.mm(gz.t(), rows_x).reshape(-1), (torch.mm(active.t(), rows_g) * seed_c).reshape(-1)]
        if self.biased:
            pieces.append(gz.sum(0))
        return gx, gh, torch.cat(pieces)

    def _columns(self, table: bytes) -> tuple[Tensor, Tensor]:
        """Coefficients spread over the bank: [R, d_out] for the seeds, [d_out] for the host."""
        values = torch.frombuffer(bytearray(table), dtype=self.dtype).view(-1, len(self.seeds) + 1)
        spans: list[tuple[int, int]] = self._native.spans
        seed_c = values.new_zeros(self.rows, self.d_out)
        host_c = values.new_zeros(self.d_out)
        owners = torch.tensor(self._native.owners)
        for line, (begin, end) in zip(values, spans, strict=True):
            seed_c[:, begin:end] = line[:-1][owners][:, None]
            host_c[begin:end] = line[-1]
        return seed_c, host_c

    def _activate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """act(pre) and act'(pre), both differentiable in pre."""
        if not pre.requires_grad:
            pre = pre.detach().requires_grad_()
        actives, slopes = [], []
        row = 0
        for seed, rank in zip(self.seeds, self._ranks, strict=True):
            z = pre[:, row : row + rank]
            row += rank
            if seed.family.activation is None:
                actives.append(z)
                slopes.append(torch.ones_like(z))
                continue
            active = interpret.activate(seed.family.activation, z)
            (slope,) = torch.autograd.grad(active, z, torch.ones_like(active), create_graph=True)
            actives.append(active)
            slopes.append(slope)
        return torch.cat(actives, 1), torch.cat(slopes, 1)
