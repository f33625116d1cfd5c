"""The arithmetic of a layer's low-rank seeds on the CPU.

Their weights stand side by side in one buffer,

    down [R, d_in] | up [R, d_out] | bias [R]

so that z = x @ down.T and y = h + (c * z) @ up need no gathering. Small products are one call of
``csrc/graft_bank.cpp``, large ones are left to the BLAS. How the weights get into the buffer is up to
:class:`~esper.execution.grafts.bank.Bank` and :class:`~esper.execution.grafts.reserved_bank.ReservedBank`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esper.blueprints import interpret
from esper.execution.grafts.seed import BoundSeed
from esper.execution.grafts.watched import Watched
from esper.ops import native

__all__ = ["BankKernel", "bank_eligible", "batched"]

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "tanh": 4, "sigmoid": 5, "silu": 6}
_DTYPES = {torch.float32: "GraftBankF32", torch.float64: "GraftBankF64"}

#: Above this many multiply-adds a product is left to the BLAS, which knows more about caches and uses every thread.
#: At batch 64, width 1024 and rank 32 (2^23 in all) the native kernel still wins by what a call costs.
NATIVE_LIMIT = 1 << 23
#: The same for a forward where PyTorch has one thread: there the native kernel wins at every size, because it crosses h
#: and y once.
NATIVE_LIMIT_ALONE = 1 << 62

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
_jit: Callable[[], object] = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
_is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def batched(t: Tensor) -> bool:
    """Whether ``t`` stands for many tensors, as gradients do in ``jacobian(vectorize=True)``; it has no memory then."""
    return _is_batched(t) or _is_legacy_batched(t)


def bank_eligible(seeds: Sequence[BoundSeed], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these seeds can run as one bank.

    They must be low-rank without a norm, read the same tap, and lie on the CPU in float32 or float64.
    """
    return (
        bool(seeds)
        and device.type == "cpu"
        and dtype in _DTYPES
        and Watched.available()
        and all(s.family.name in ("lowrank", "bottleneck") and s.family.norm is None for s in seeds)
        and len({s.reads_input for s in seeds}) == 1
        and all(s.strided == (1, 1) for s in seeds)
    )


class BankKernel(Watched):
    """Forward and backward of one layer's seeds.

    Args:
        seeds: Seeds for which :func:`bank_eligible` holds.
        ranks: Of each.
        d_in: Features of the tap.
        d_out: Features of the layer.
        dtype: float32 or float64.
    """

    def __init__(
        self, seeds: Sequence[BoundSeed], ranks: Sequence[int], d_in: int, d_out: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.seeds, self.ranks = tuple(seeds), tuple(ranks)
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        self.reads_input = seeds[0].reads_input
        self.rows = sum(ranks)
        self.biased = any("down" in s.family.biases for s in seeds)
        self.up_at = self.rows * d_in
        self.bias_at = self.up_at + self.rows * d_out
        #: Elements of the buffer.
        self.size = self.bias_at + (self.rows if self.biased else 0)
        ends = itertools.accumulate(ranks)
        table = [
            (
                s.place.index,
                end - rank,
                end,
                s.place.begin,
                s.place.end,
                s.place.replace,
                _ACTIVATIONS[s.family.activation],
            )
            for s, rank, end in zip(seeds, ranks, ends, strict=True)
        ]
        self._plain = not self.biased and all(entry[6] == 0 for entry in table)
        module = native.load()
        assert module is not None
        self._native = getattr(module, _DTYPES[dtype])(table, d_in, d_out, self.rows, self.biased)
        self._finite = module.graft_all_finite_f32 if dtype is torch.float32 else module.graft_all_finite_f64
        self._products = self.rows * (d_in + d_out)
        self._one_group: bool = self._native.groups == 1
        self._forward = self._native.forward

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

    def blend(self, weights: Tensor, x: Tensor, h: Tensor, alpha: Tensor) -> tuple[Tensor, bytes] | None:
        """The forward, without a place in autograd's graph.

        Args:
            weights: The buffer, ``[size]``.
            x: The tap.
            h: The host's output.
            alpha: The layer's alphas.

        Returns:
            y and the coefficients for :meth:`backward`; None where y is not finite and the fault has to be looked into.
        """
        n = h.numel() // self.d_out
        if n * self._products <= (NATIVE_LIMIT_ALONE if torch.get_num_threads() == 1 else NATIVE_LIMIT):
            y = torch.empty_like(h)
            table = self._forward(weights.data_ptr(), x.data_ptr(), h.data_ptr(), y.data_ptr(), n, alpha.data_ptr())
            return None if table is None else (y, table)
        with torch.no_grad():
            table = self._native.coefficients(alpha.data_ptr())
            y = self._large_forward(weights, x, h, alpha, table, n)
        return (y, table) if self._finite(y.data_ptr(), y.numel()) else None

    # -- large products -----------------------------------------------------------------------------------------------

    def _views(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        down = weights[: self.up_at].view(self.rows, self.d_in)
        return down, weights[self.up_at : self.bias_at].view(self.rows, self.d_out)

    def _inner(self, weights: Tensor, x: Tensor, table: bytes, n: int) -> tuple[Tensor, Tensor]:
        """(x @ down.T, its activation times the coefficient), [n, R] each."""
        down, _ = self._views(weights)
        before = torch.mm(x.reshape(n, self.d_in), down.t())
        after = before if self._plain else torch.empty_like(before)
        self._native.activate(weights.data_ptr(), table, before.data_ptr(), after.data_ptr(), n)
        return before, after

    def _large_forward(self, weights: Tensor, x: Tensor, h: Tensor, alpha: Tensor, table: bytes, n: int) -> Tensor:
        if not self._one_group:
            # Segments of unlike coefficients: many narrow products, which the native kernel does in one pass.
            y = torch.empty_like(h)
            self._forward(weights.data_ptr(), x.data_ptr(), h.data_ptr(), y.data_ptr(), n, alpha.data_ptr())
            return y
        _, z = self._inner(weights, x, table, n)
        _, up = self._views(weights)
        runs, host = self._native.plan(table)
        y = h.reshape(n, self.d_out)
        beta = host
        for begin, end in runs:  # rows of seeds that are switched off are not read: they may hold NaN
            y = torch.addmm(y, z[:, begin:end], up[begin:end], beta=beta)
            beta = 1.0
        return y.view(h.shape) if runs else h.clone(memory_format=torch.contiguous_format)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def backward(
        self, weights: Tensor, x: Tensor, gy: Tensor, table: bytes, want_x: bool, want_h: bool, want_weights: bool
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
            self._large_backward(weights, x, gy, table, n, runs, gx, flat)
            if gh is not None:
                torch.mul(gy, host, out=gh)
        else:
            self._native.backward(
                weights.data_ptr(),
                table,
                x.data_ptr(),
                gy.data_ptr(),
                n,
                0 if gx is None else gx.data_ptr(),
                0 if gh is None else gh.data_ptr(),
                0 if flat is None else flat.data_ptr(),
            )
        return gx, gy if want_h and same_h else gh, flat

    def _large_backward(
        self,
        weights: Tensor,
        x: Tensor,
        gy: Tensor,
        table: bytes,
        n: int,
        runs: Sequence[tuple[int, int]],
        gx: Tensor | None,
        flat: Tensor | None,
    ) -> None:
        down, up = self._views(weights)
        rows_x, rows_g = x.reshape(n, self.d_in), gy.reshape(n, self.d_out)
        before, after = self._inner(weights, x, table, n)
        gz = torch.mm(rows_g, up.t())
        self._native.activate_backward(
            weights.data_ptr(), table, gz.data_ptr(), 0 if self._plain else before.data_ptr(), n
        )
        if gx is not None:
            out = gx.view(n, self.d_in)
            beta = 0.0
            for begin, end in runs:
                torch.addmm(out, gz[:, begin:end], down[begin:end], beta=beta, out=out)
                beta = 1.0
        if flat is not None:
            torch.mm(gz.t(), rows_x, out=flat[: self.up_at].view(self.rows, self.d_in))
            torch.mm(after.t(), rows_g, out=flat[self.up_at : self.bias_at].view(self.rows, self.d_out))
            if self.biased:
                torch.sum(gz, 0, out=flat[self.bias_at :])

    def differentiable_backward(
        self, flat: Tensor, x: Tensor, gy: Tensor, table: bytes, want_x: bool, want_h: bool, want_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same from PyTorch's operations, for gradients of gradients (``create_graph=True``) and batches of them.

        ``flat`` is the buffer as a function of what it was made of.
        """
        n = gy.numel() // self.d_out
        rows_x, rows_g = x.reshape(n, self.d_in), gy.reshape(n, self.d_out)
        down = flat[: self.up_at].view(self.rows, self.d_in)
        up = flat[self.up_at : self.bias_at].view(self.rows, self.d_out)
        seed_c, host_c = self._columns(table)
        live = (seed_c != 0).any(1, keepdim=True)
        if not live.any():  # every alpha is 0, as in `backward`
            return None, gy, gy.new_zeros(self.size) if want_weights else None
        down = torch.where(live, down, 0.0)  # a seed that is switched off is not read: it may hold NaN
        weighted = torch.where(live, up, 0.0) * seed_c
        pre = torch.mm(rows_x, down.t())
        if self.biased:
            pre = pre + flat[self.bias_at :]
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
        actives, slopes = [], []
        row = 0
        for seed, rank in zip(self.seeds, self.ranks, strict=True):
            z = pre[:, row : row + rank]
            row += rank
            if seed.family.activation is None:
                actives.append(z)
                slopes.append(torch.ones_like(z))
                continue
            # Not autograd.grad, which under functorch's transforms cannot be asked for.
            activate = functools.partial(interpret.activate, seed.family.activation)
            active, pull, *_ = torch.func.vjp(activate, z)
            actives.append(active)
            slopes.append(pull(torch.ones_like(active))[0])
        return torch.cat(actives, 1), torch.cat(slopes, 1)
