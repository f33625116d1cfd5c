"""The awake seeds of a layer with reserved memory as one bank on the CPU.

Reserved parameters stay where they are, each in memory of its own: FSDP2 and DDP hold on to them. So every forward
copies the rows that kernels occupy into the buffer of :mod:`~esper.execution.grafts.bank_kernel`, and every backward
copies the buffer's gradient back; one native call each. The copy also keeps the backward right where an optimizer, or
FSDP2, has changed the parameters by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.execution.grafts.bank_kernel import BankKernel, batched
from esper.execution.grafts.reservation import ReservedWeights
from esper.execution.grafts.seed import BoundSeed

__all__ = ["ReservedBank"]


class _Run(torch.autograd.Function):
    """Attaches the gradient to a y that is computed already."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Tensor, ReservedBank, bytes, Tensor], x: Tensor, h: Tensor, *parameters: Tensor
    ) -> Tensor:
        y, bank, table, weights = call
        ctx.save_for_backward(x, weights)
        ctx.call = bank, table, parameters
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        bank: ReservedBank = ctx.call[0]
        table: bytes = ctx.call[1]
        parameters: tuple[Tensor, ...] = ctx.call[2]
        _, want_x, want_h, *wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            flat = bank.joined(parameters)
            if not torch.equal(flat.detach(), weights):
                raise RuntimeError(
                    "a seed's parameters were modified in place between forward and backward, so the gradient of its "
                    "gradient cannot be computed; call the optimizer after backward"
                )
            gx, gh, grad = bank.differentiable_backward(flat, x, gy, table, want_x, want_h, any(wanted))
            found: Sequence[Tensor | None] = [None] * len(wanted) if grad is None else bank.parted(grad, wanted)
        elif batched(gy):
            gx, gh, grad = bank.differentiable_backward(weights, x, gy, table, want_x, want_h, any(wanted))
            found = [None] * len(wanted) if grad is None else bank.parted(grad, wanted)
        else:
            gx, gh, grad = bank.backward(weights, x, gy, table, want_x, want_h, any(wanted))
            found = [None] * len(wanted) if grad is None else bank.scattered(grad, parameters, wanted)
        return None, gx, gh, *found


# What Function.apply does beyond this is for functorch, and costs 1 to 2 us; `usable` has excluded functorch.
_run: Callable[..., Tensor] = super(torch.autograd.Function, _Run).apply


class ReservedBank(BankKernel):
    """The occupied part of a layer's reserved memory.

    Args:
        seeds: The awake seeds; :func:`~esper.execution.grafts.bank_kernel.bank_eligible` holds for them.
        ranks: Of their kernels.
        memory: Theirs, with parameters for which :func:`readable` holds.
        d_in: Features of the tap.
        d_out: Features of the layer.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        seeds: Sequence[BoundSeed],
        ranks: Sequence[int],
        memory: Sequence[ReservedWeights],
        d_in: int,
        d_out: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(seeds, ranks, d_in, d_out, dtype)
        #: Per seed, whether its kernel has a bias: if not, the bias in its memory has no part in anything.
        self._biases = ["down" in seed.family.biases for seed in seeds]
        sources: list[tuple[int, int, int]] = []
        for module, has_bias in zip(memory, self._biases, strict=True):
            down, bias, up = module.whole()
            sources.append((down.data_ptr(), up.data_ptr(), bias.data_ptr() if has_bias else 0))
            self._reserved = down.shape[0]
            for node, kind in (("down", "weight"), ("up", "weight"), *([("down", "bias")] if has_bias else [])):
                self._add(module, node, kind)
        self._native.reserve(self._reserved, sources)
        self._watch()

    def run(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor | None:
        """y, or None when it is not finite and the fault has to be looked into. x is the tap."""
        weights = torch.empty(self.size, dtype=self.dtype)
        self._native.gather(weights.data_ptr())
        done = self.blend(weights, x, h, alpha)
        if done is None:
            return None
        y, table = done
        if not torch.is_grad_enabled():
            return y
        return _run((y, self, table, weights), x, h, *self.parameters)

    def scattered(self, flat: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        """The buffer's gradient as the parameters' own: 0 in what the kernels leave of the memory."""
        grads = [torch.empty_like(p) if want else None for p, want in zip(parameters, wanted, strict=True)]
        addresses = iter([0 if g is None else g.data_ptr() for g in grads])
        targets = [(next(addresses), next(addresses), next(addresses) if biased else 0) for biased in self._biases]
        self._native.scatter(flat.data_ptr(), targets)
        return grads

    # -- from differentiable operations, for gradients of gradients ---------------------------------------------------

    def joined(self, parameters: Sequence[Tensor]) -> Tensor:
        """The buffer as a function of the parameters."""
        given = iter(parameters)
        downs, ups, biases = [], [], []
        for seed, rank, biased in zip(self.seeds, self.ranks, self._biases, strict=True):
            begin, end = seed.place.begin, seed.place.end
            downs.append(next(given)[:rank].reshape(-1))
            ups.append(F.pad(next(given)[begin:end, :rank].t(), (begin, self.d_out - end)).reshape(-1))
            if biased:
                biases.append(next(given)[:rank])
            elif self.biased:
                biases.append(downs[0].new_zeros(rank))
        return torch.cat([*downs, *ups, *biases])

    def parted(self, flat: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """What :meth:`scattered` gives, differentiable in ``flat``."""
        down = flat.narrow(0, 0, self.up_at).view(self.rows, self.d_in)
        up = flat.narrow(0, self.up_at, self.rows * self.d_out).view(self.rows, self.d_out)
        found: list[Tensor | None] = []
        row = 0
        for seed, rank, biased in zip(self.seeds, self.ranks, self._biases, strict=True):
            begin, end = seed.place.begin, seed.place.end
            rest = self._reserved - rank
            # Not by indexing, which knows no batched gradients where a slice takes everything.
            own = up.narrow(0, row, rank).narrow(1, begin, end - begin).t()
            found.append(F.pad(down.narrow(0, row, rank), (0, 0, 0, rest)))
            found.append(F.pad(own, (0, rest, begin, self.d_out - end)))
            if biased:
                found.append(F.pad(flat.narrow(0, self.bias_at + row, rank), (0, rest)))
            row += rank
        return [grad if want else None for grad, want in zip(found, wanted, strict=True)]


def readable(memory: Sequence[ReservedWeights], dtype: torch.dtype) -> bool:
    """Whether native code can read these parameters: plain ones, contiguous, on the CPU, of this dtype."""
    return all(
        type(p) is nn.Parameter and p.dtype is dtype and p.device.type == "cpu" and p.is_contiguous()
        for module in memory
        for p in module.whole()
    )
