"""The low-rank, bottleneck or gated seeds of a layer as one bank on a GPU: one operation forward, one backward.

The counterpart of :mod:`esper.execution.grafts.bank`. The seeds' parameters stay the leaves that optimizers know; their
storage is one buffer (but for ``up.weight`` of a chunk, which is copied there), so that the operation finds the weights
side by side:

    down [R, d_in] | value [R, d_in] | up [R, d_out] | bias [R] | value_bias [R]

each beginning at a multiple of 256 bytes. ``up.weight`` is the transpose of its rows of ``up``. Joining the weights at
every call would take a launch a region forward, and backward one a seed, to bring the gradient of ``up`` into the
parameter's layout, and several nodes of the graph a seed; here it is no launch, and each parameter's gradient
is a view of what the operation gives. Every call checks that the parameters are still those that were packed, where
they were packed (a C++ loop).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.execution.grafts import fused
from esper.execution.grafts.fused import BankPlan, Runs
from esper.execution.grafts.seed import SeedWeights
from esper.execution.grafts.watched import Watched
from esper.ops.graft.autograd import blend_bank
from esper.ops.linear.autograd import Graft, linear

__all__ = ["DeviceBank", "capturing"]

#: Elements: regions begin where every load of a kernel is aligned, whatever the dtype.
_ALIGNMENT = 64

_wants_grad: Callable[[Any], bool] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
_jit: Callable[[], object] = torch._C._get_tracing_state
_forward_ad: Any = torch.autograd.forward_ad


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph, so that no parameter may move."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """The current stream's address; 0 where there are no streams."""
    return int(torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else 0


@dataclass(frozen=True)
class _Slice:
    """Where a parameter lies: rows and columns of a region, transposed for ``up.weight``."""

    region: int
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    transposed: bool = False

    def of(self, region: Tensor) -> Tensor:
        part = region[self.rows[0] : self.rows[1]]
        if self.columns is not None and self.columns != (0, region.shape[1]):
            part = part[:, self.columns[0] : self.columns[1]]
        return part.t() if self.transposed else part


class _Spread(torch.autograd.Function):
    """The regions as functions of the parameters. Nothing is saved, so one node serves any number of graphs."""

    @staticmethod
    def forward(
        ctx: Any, regions: Sequence[Tensor], slices: Sequence[_Slice], parameters: Sequence[Tensor], *edges: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.slices, ctx.parameters = slices, parameters
        ctx.set_materialize_grads(False)
        return tuple(_alias(region) for region in regions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for place, parameter in zip(ctx.slices, ctx.parameters, strict=True):
            grad = grads[place.region]
            # Frozen parameters have an edge too, since they may be thawed; they get nothing.
            found.append(place.of(grad) if grad is not None and parameter.requires_grad else None)
        return (None, None, None, *found)


def _alias(t: Tensor) -> Tensor:
    """The same memory as a tensor of its own: a view would tie its history to its base."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


class DeviceBank(Watched):
    """Packed seeds of one layer.

    Args:
        plan: The bank.
        weights: The seeds' parameters; their storage moves into the bank.
        flags: The layer's ``fault_flags``.
        runs: The bound seeds, see :func:`esper.execution.grafts.fused.runs_of`.
        dim: Dimension of the features, as the host has it: -1 or 1.
    """

    def __init__(
        self, plan: BankPlan, weights: Sequence[SeedWeights], flags: Callable[[], Tensor], runs: Runs, dim: int
    ) -> None:
        super().__init__()
        self.plan, self._flags, self._runs, self._dim = plan, flags, runs, dim
        self.reads_input = plan.seeds[0].reads_input
        self._activation = plan.seeds[0].family.activation
        self._slices: list[_Slice] = []
        rows, inner, up_at = sum(plan.ranks), len(plan.roles), len(plan.roles)
        shapes: list[tuple[int, ...]] = [*[(rows, plan.d_in)] * inner, (rows, plan.d_out)]
        shapes += [(rows,)] * inner if plan.biased else []
        row = 0
        for seed, module, rank in zip(plan.seeds, weights, plan.ranks, strict=True):
            here = row, row + rank
            for i, role in enumerate(plan.roles):
                self._place(module, seed.family.roles[role], "weight", _Slice(i, here, None))
                if role in seed.family.biases:
                    self._place(module, seed.family.roles[role], "bias", _Slice(up_at + 1 + i, here, None))
            own = seed.place.begin, seed.place.end
            self._place(module, seed.family.roles["up"], "weight", _Slice(up_at, here, own, transposed=True))
            row += rank
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        self._pack(shapes)
        self._weights: tuple[Tensor, ...] = self.regions
        #: The stream on which the weights were made functions of the parameters; None before that.
        self._attached: int | None = None
        self._watch()

    def _place(self, module: SeedWeights, node: str, kind: str, place: _Slice) -> None:
        self._add(module, node, kind)
        self._slices.append(place)

    def _pack(self, shapes: Sequence[tuple[int, ...]]) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        # Not inside inference mode, whose tensors no optimizer may write to later.
        with torch.inference_mode(False), torch.no_grad():
            # Zeros: what belongs to no parameter is a missing bias, or lies outside of a chunk.
            buffer = torch.zeros(starts[-1], dtype=self.dtype, device=self.device)
            self.regions = tuple(
                _alias(buffer[start : start + size].view(shape))
                for start, size, shape in zip(starts, sizes, shapes, strict=False)
            )
            for parameter, place in zip(self.parameters, self._slices, strict=True):
                self._house(parameter, place.of(self.regions[place.region]))

    def usable(self, x: Tensor, h: Tensor) -> bool:
        """Whether the fast way may be taken for these tensors now."""
        return (
            type(h) is Tensor
            and type(x) is Tensor
            and fused.serves(h.device)
            and h.device == self.device
            and h.is_floating_point()
            and x.dim() == h.dim()
            and not _functorch()
            and not _dispatch_modes()
            and _jit() is None
            and _forward_ad._current_level < 0
        )

    def run(self, x: Tensor, h: Tensor, alpha: Tensor) -> Tensor | None:
        """y, contained, with the flags of seeds at fault raised; None where these tensors need the traced way."""
        plan = self.plan
        dim = self._dim % h.dim()
        rows_x, rows = fused.rows_of(x, dim), fused.rows_of(h, dim)
        if rows_x is None or rows is None or rows_x.shape[:-1] != rows.shape[:-1]:
            return None
        if rows.shape[-1] != plan.d_out or rows_x.shape[-1] != plan.d_in:  # an activation lets any shape through
            return None
        down, value, up, bias, value_bias = self._current(h.dtype)
        y, faults = blend_bank(
            fused.prepared(plan, rows_x, h.dtype), rows, alpha, down, value, up, bias, value_bias, plan.seats,
            self._activation, self.versions,
        )  # fmt: skip
        fused.raise_flags(self._flags(), self._runs, faults)
        return y if rows is h else y.permute(0, 3, 1, 2)

    def run_with_host(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor) -> Tensor | None:
        """``x @ weight.T + bias`` with the seeds blended in, as :meth:`run` does, in one operation.

        Returns:
            y; None where the seeds are of a kind that has no such operation, or the tensors are not of one dtype.
        """
        plan = self.plan
        if plan.gated or plan.seeds[0].family.norm is not None or not self.reads_input or self._dim != -1:
            return None
        if x.dtype is not self.dtype or weight.dtype is not self.dtype or x.shape[-1] != plan.d_in:
            return None
        down, _, up, own_bias, _ = self._current(self.dtype)
        graft = Graft(alpha, down, up, own_bias, plan.seats, self._activation, self.versions)
        y, _, faults = linear(x, weight, bias, None, graft)
        fused.raise_flags(self._flags(), self._runs, faults)
        return y

    def _current(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """down, value, up, bias and value_bias as they are now; functions of the parameters where these learn."""
        self._refresh()
        learns = torch.is_grad_enabled() and any(map(_wants_grad, self.parameters))
        if learns and self._attached != (stream := _stream(self.device)):
            self._attach(stream)
        weights: Sequence[Tensor] = self._weights if learns else self.regions
        if dtype is not self.dtype:
            weights = [t.to(dtype) for t in weights]
        plan, regions = self.plan, iter(weights)
        down, value = next(regions), next(regions) if plan.gated else None
        up = next(regions)
        bias = next(regions) if plan.biased else None
        value_bias = next(regions) if plan.biased and plan.gated else None
        return down, value, up, bias, value_bias

    def _attach(self, stream: int) -> None:
        """Make the weights functions of the parameters; the frozen ones too, because they may be thawed later.

        A parameter's gradient is added up on the stream that was current when its node in the graph was made, and the
        nodes live as long as these functions. On another stream, as in a CUDA graph that is captured after eager
        steps, that would reach out of the capture; so there they are made anew.
        """
        self._weights = self.regions
        flags = list(map(_wants_grad, self.parameters))
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            self._weights = _Spread.apply(self.regions, self._slices, self.parameters, *self.parameters)
            for parameter, flag in zip(self.parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        self._attached = stream


def packable(parameters: Sequence[Tensor]) -> bool:
    """Whether these parameters may be moved into one buffer: plain, of one floating dtype, on one device."""
    first = parameters[0]
    return DeviceBank.available() and all(
        type(p) is nn.Parameter and p.dtype is first.dtype and p.device == first.device for p in parameters
    )
