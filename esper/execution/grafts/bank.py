"""The low-rank seeds of a layer as one bank on the CPU, in memory that grows.

Per seed ``down.weight`` [r, d_in] and ``up.weight`` [d_out, r] stay the leaf parameters that optimizers know. Their
storage moves into one buffer, the one of :mod:`~esper.execution.grafts.bank_kernel`; ``up.weight`` is the transpose of
its rows of ``up``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.execution.grafts import bank_kernel
from esper.execution.grafts.bank_kernel import BankKernel
from esper.execution.grafts.seed import BoundSeed, SeedWeights
from esper.ops import native

__all__ = ["Bank"]

# A C-level accessor: a Python loop over the parameters would cost as much as the product of a small layer.
_wants_grad: Callable[[Any], bool] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


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
    def forward(ctx: Any, call: tuple[Tensor, Bank, bytes, bytes], x: Tensor, h: Tensor, buffer: Tensor) -> Tensor:
        y, *ctx.call = call
        ctx.save_for_backward(x)
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
            return (None, *bank.differentiable_backward(bank.weights, x, gy, table, want_x, want_h, want_weights))
        return (None, *bank.backward(bank.buffer, x, gy, table, want_x, want_h, want_weights))


# What Function.apply does beyond this is for functorch, and costs 1 to 2 us; `usable` has excluded functorch.
_run: Callable[..., Tensor] = super(torch.autograd.Function, _Run).apply


@functools.cache
def _bank_call() -> Callable[..., Any] | None:
    """The extension's ``BankCall``, told about torch."""
    module = native.load()
    if not hasattr(module, "BankCall"):
        return None
    assert module is not None
    ready = module.bank_call_setup(
        torch.Tensor,
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._get_tracing_state,
        vars(torch.autograd.forward_ad),
        torch.is_grad_enabled,
        torch.empty_like,
    )
    return module.BankCall if ready else None


class Bank(BankKernel):
    """Packed seeds of one layer.

    Args:
        seeds: Seeds for which :func:`~esper.execution.grafts.bank_kernel.bank_eligible` holds.
        weights: Their parameters; their storage moves into the bank.
        d_in: Features of the tap.
        d_out: Features of the layer.
        dtype: float32 or float64.
    """

    def __init__(
        self, seeds: Sequence[BoundSeed], weights: Sequence[SeedWeights], d_in: int, d_out: int, dtype: torch.dtype
    ) -> None:
        downs = [w.get_parameter(s.family.tensor("down")) for w, s in zip(weights, seeds, strict=True)]
        super().__init__(seeds, [down.shape[0] for down in downs], d_in, d_out, dtype)
        self._slices: list[_Slice] = []
        row = 0
        for seed, module, rank in zip(seeds, weights, self.ranks, strict=True):
            place = seed.place
            self._place(module, seed.family.roles["down"], "weight", _Slice((rank, d_in), (d_in, 1), row * d_in))
            up = _Slice((place.end - place.begin, rank), (1, d_out), self.up_at + row * d_out + place.begin)
            self._place(module, seed.family.roles["up"], "weight", up)
            if "down" in seed.family.biases:
                self._place(module, seed.family.roles["down"], "bias", _Slice((rank,), (1,), self.bias_at + row))
            row += rank
        self._pack()
        #: The buffer; once :attr:`attached`, as a function of the parameters.
        self.weights = self.buffer
        self.attached = False
        self._watch()

    def _place(self, module: SeedWeights, node: str, kind: str, place: _Slice) -> None:
        self._add(module, node, kind)
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

    def fast_call(self) -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
        """``call(x, h, alpha)``: what :meth:`usable`, ``whole`` and :meth:`run` do in the plain case, without Python.

        It gives None wherever one of them would say no. None where the extension or torch is too old for it. x is what
        the host read, whatever the seeds read.
        """
        make = _bank_call()
        if make is None:
            return None
        bits = 8 * self.buffer.element_size()
        call = make(
            self._native, self._native.address, self, _run, tuple(self._dicts), tuple(self._keys),
            tuple(self.parameters), self.buffer.data_ptr(), bank_kernel.NATIVE_LIMIT, bits, self.biased,
            self.reads_input,
        )  # fmt: skip
        run: Callable[[Tensor, Tensor, Tensor], Tensor | None] = call.run
        return run

    def run(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor | None:
        """y, or None when it is not finite and the fault has to be looked into. x is the tap."""
        done = self.blend(self.buffer, x, h, alpha)
        if done is None:
            return None
        y, table = done
        if not torch.is_grad_enabled():
            return y
        if not self.attached and any(map(_wants_grad, self.parameters)):
            self._attach()
        return _run((y, self, table, self.versions()), x, h, self.weights)

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
        self.attached = True
