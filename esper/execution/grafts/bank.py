"""The low-rank seeds of a layer as one bank on the CPU, in memory that grows.

Per seed ``down.weight`` [r, d_in] and ``up.weight`` [d_out, r] stay the leaf parameters that optimizers know. Their
storage moves into one buffer, the one of :mod:`~esper.execution.grafts.bank_kernel`; ``up.weight`` is the transpose of
its rows of ``up``. Where it is a part of those rows, because the seed serves a chunk, it is copied there at every call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from esper.execution.grafts import bank_kernel
from esper.execution.grafts.bank_kernel import BankKernel, batched
from esper.execution.grafts.seed import BoundSeed, SeedWeights
from esper.ops import native

__all__ = ["Bank"]

# A C-level accessor: a Python loop over the parameters would cost as much as the product of a small layer.
_wants_grad: Callable[[Any], bool] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


# A stretch of the buffer as parameters see it: its shape, stride and offset; how many lines each parameter has, and
# along which dimension; the position of the first parameter.
_Block = tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], int, int]


def _cut(flat: Tensor, block: _Block) -> Sequence[Tensor]:
    shape, stride, offset, sizes, dim, _ = block
    return flat.as_strided(shape, stride, flat.storage_offset() + offset).split_with_sizes(sizes, dim)


class _Gather(torch.autograd.Function):
    """The buffer as a function of the parameters, so that one edge stands for all of them in every forward's graph."""

    @staticmethod
    def forward(
        ctx: Any, buffer: Tensor, blocks: tuple[_Block, ...], parameters: tuple[Tensor, ...], *edges: Tensor
    ) -> Tensor:
        ctx.blocks, ctx.parameters = blocks, parameters
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        views = itertools.chain.from_iterable(_cut(grad, block) for block in ctx.blocks)
        return (None, None, None, *(v if p.requires_grad else None for v, p in zip(views, ctx.parameters, strict=True)))


#: What a call leaves for its backward: its bank, the coefficients, the versions of the parameters, and the native call
#: that made the result, if one did: its backward is native too.
_Made = tuple["Bank", bytes, bytes, object]


def _gradients(
    made: _Made, x: Tensor, gy: Tensor, want_x: bool, want_h: bool, want_weights: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """For x, h and the buffer, as far as the seeds go."""
    bank, table, versions, _ = made
    if bank.versions() != versions:
        raise RuntimeError(
            "a seed's parameters were modified in place between forward and backward, so its gradient cannot be "
            "computed; call the optimizer after backward"
        )
    if torch.is_grad_enabled():
        return bank.differentiable_backward(bank.weights, x, gy, table, want_x, want_h, want_weights)
    if batched(gy):
        return bank.differentiable_backward(bank.buffer, x, gy, table, want_x, want_h, want_weights)
    return bank.backward(bank.buffer, x, gy, table, want_x, want_h, want_weights)


class _Run(torch.autograd.Function):
    """Attaches the gradient to a y that is computed already."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Tensor, Bank, bytes, bytes, object], x: Tensor, h: Tensor, buffer: Tensor
    ) -> Tensor:
        ctx.call = call[1:]
        ctx.save_for_backward(x)
        return call[0]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (None, *_gradients(ctx.call, x, gy, *ctx.needs_input_grad[1:]))


class _RunHost(torch.autograd.Function):
    """As :class:`_Run`, for the host's product and its seeds: y = F.linear(x, weight, bias) with the seeds in it.

    ``forward(ctx, call, x, weight, bias, buffer)`` is native (``csrc/graft_host.cpp``), and so is the backward in the
    plain case. The weight is saved only where x has a gradient.
    """

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, want_x, want_weight, want_bias, want_seeds = ctx.needs_input_grad
        want_h = want_x or want_weight or want_bias
        gx, gh, flat = _gradients(ctx.call, x, gy, want_x, want_h, want_seeds)
        gweight = gbias = None
        if want_x:
            assert gh is not None
            gx = gh @ weight if gx is None else gh @ weight + gx
        if want_weight or want_bias:
            assert gh is not None
            rows = gh.reshape(-1, gh.shape[-1])
            gweight = rows.t() @ x.reshape(-1, x.shape[-1]) if want_weight else None
            gbias = rows.sum(0) if want_bias else None
        return None, gx, gweight, gbias, flat


# What Function.apply does beyond this is for functorch, and costs 1 to 2 us; `usable` has excluded functorch.
_run: Callable[..., Tensor] = super(torch.autograd.Function, _Run).apply
_run_host: Callable[..., Tensor] = super(torch.autograd.Function, _RunHost).apply


def _torchs_functions() -> dict[str, Callable[..., Any] | None]:
    """What the calls in C ask torch, and have it do."""
    return {
        "functorch": torch._C._are_functorch_transforms_active,
        "jit": torch._C._get_tracing_state,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "function_modes": torch._C._len_torch_function_stack,
        "any_autocast": torch._C._is_any_autocast_enabled,
        "autocast": torch.is_autocast_enabled,
        "profiling": torch._C._autograd._profiler_enabled,
        "empty_like": torch.empty_like,
        "new_empty": torch.Tensor.new_empty,
        "as_strided": torch.Tensor.as_strided,
        "split": torch.Tensor.split_with_sizes,
        "reshape": torch.Tensor.reshape,
        "transposed": torch.Tensor.t,
        "linear": torch._C._nn.linear,
        "mm": torch.mm,
        "matmul": torch.matmul,
        "sum": torch.sum,
        "executes": getattr(torch._C, "_will_engine_execute_node", None),
    }


@functools.cache
def _bank_call() -> Callable[..., Any] | None:
    """The extension's ``BankCall``, told about torch."""
    module = native.load()
    if not hasattr(module, "bank_host_setup"):  # neither missing nor older than this package
        return None
    assert module is not None
    try:
        functions = _torchs_functions()
    except AttributeError:  # another torch, in which some of them have other names
        return None
    about = torch.Tensor, nn.Parameter, vars(torch.autograd.forward_ad), vars(nn.functional)
    if not module.bank_call_setup(native.torch_library(), *about, functions):
        return None
    # The engine asks a node for `apply`. These take the plain case, and hand the rest to the method that is there.
    nodes = _Run._backward_cls, _RunHost._backward_cls, _Gather._backward_cls
    module.bank_grad_setup(*nodes, BackwardCFunction.apply)
    module.bank_host_setup(native.torch_library(), _RunHost)
    call: Callable[..., Any] = module.BankCall
    return call


@dataclass(frozen=True, slots=True)
class FastCall:
    """A bank's calls in C.

    Attributes:
        run: ``run(x, h, alpha)``: y, or None. x is what the host read, whatever the seeds read.
        run_host: ``run_host(x, host, alpha, timed)``: y of a Linear host with the seeds in it, or None.
        elapsed: Microseconds that the seeds of the last timed ``run_host`` took.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    run_host: Callable[[Tensor, nn.Module, Tensor, bool], Tensor | None]
    elapsed: Callable[[], int]


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
        names = [(w, s.family) for w, s in zip(weights, seeds, strict=True)]
        for module, family in names:
            self._add(module, family.roles["down"], "weight")
        for module, family in names:
            self._add(module, family.roles["up"], "weight")
        biases = [i for i, seed in enumerate(seeds) if "down" in seed.family.biases]
        for i in biases:
            self._add(names[i][0], names[i][1].roles["down"], "bias")
        self._blocks = self._divided(biases)
        self._pack()
        #: The buffer; once :attr:`attached`, as a function of the parameters.
        self.weights = self.buffer
        self.attached = False
        self._watch()

    def _divided(self, biases: Sequence[int]) -> tuple[_Block, ...]:
        """Where the parameters lie: those of all seeds together where that leaves no gaps, for few views in a backward.

        Args:
            biases: The seeds that have one.
        """
        ranks, d_in, d_out = self.ranks, self.d_in, self.d_out
        rows = list(itertools.accumulate(ranks, initial=0))
        blocks: list[_Block] = [((self.rows, d_in), (d_in, 1), 0, ranks, 0, 0)]
        places = [seed.place for seed in self.seeds]
        if all(place.end - place.begin == d_out for place in places):
            blocks.append(((d_out, self.rows), (1, d_out), self.up_at, ranks, 1, len(ranks)))
        else:
            for i, (place, rank) in enumerate(zip(places, ranks, strict=True)):
                at = self.up_at + rows[i] * d_out + place.begin
                shape = place.end - place.begin, rank
                blocks.append((shape, (1, d_out), at, (rank,), 1, len(ranks) + i))
        for position, i in enumerate(biases, start=2 * len(ranks)):
            blocks.append(((ranks[i],), (1,), self.bias_at + rows[i], (ranks[i],), 0, position))
        return tuple(blocks)

    def _pack(self) -> None:
        # Not inside inference mode, whose tensors no optimizer may write to later.
        with torch.inference_mode(False), torch.no_grad():
            # Zeros, because a chunk-scoped seed leaves the rest of its rows of up empty.
            self.buffer = torch.zeros(self.size, dtype=self.dtype)
            views = itertools.chain.from_iterable(_cut(self.buffer, block) for block in self._blocks)
            for parameter, view in zip(self.parameters, views, strict=True):
                self._house(parameter, view)

    def fast_call(self) -> FastCall | None:
        """What :meth:`usable`, ``whole`` and :meth:`run` do in the plain case, without Python.

        It gives None wherever one of them would say no. None where the extension or torch is too old for it.
        """
        make = _bank_call()
        if make is None:
            return None
        bits = 8 * self.buffer.element_size()
        call = make(
            self._native, self._native.address, self, _run, _run_host, tuple(self._dicts), tuple(self._keys),
            tuple(self.parameters), self.buffer, bank_kernel.NATIVE_LIMIT, bits, self.biased,
            self.reads_input,
        )  # fmt: skip
        if not self._copied:
            return FastCall(call.run, call.run_host, call.elapsed)

        def refreshed(method: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
            def run(*arguments: Any) -> Tensor | None:
                self._refresh()
                return method(*arguments)

            return run

        return FastCall(refreshed(call.run), refreshed(call.run_host), call.elapsed)

    def run(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor | None:
        """y, or None when it is not finite and the fault has to be looked into. x is the tap."""
        self._refresh()
        done = self.blend(self.buffer, x, h, alpha)
        if done is None:
            return None
        y, table = done
        if not torch.is_grad_enabled():
            return y
        if not self.attached and any(map(_wants_grad, self.parameters)):
            self.attach()
        return _run((y, self, table, self.versions(), None), x, h, self.weights)

    def attach(self) -> None:
        """Make ``weights`` a function of the parameters.

        Nothing is saved in that node, so one serves any number of forwards and backwards. All parameters get an edge,
        the frozen ones too, because a user may thaw them later; its backward gives a frozen one nothing.
        """
        flags = list(map(_wants_grad, self.parameters))
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            self.weights = _Gather.apply(self.buffer.detach(), self._blocks, tuple(self.parameters), *self.parameters)
            for parameter, flag in zip(self.parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        self.attached = True
