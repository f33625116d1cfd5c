"""Compiling beside the training what a layer's seeds will launch on a GPU.

Triton compiles a kernel when it is first launched, which takes the better part of a second, and a seed's first forward
and backward launch half a dozen. So whoever loads a seed's kernel runs the layer's seeds once on made-up numbers, in
his own thread and on a stream of his own; after that the training thread finds everything compiled. What is on Triton's
disk cache by then, or came as a trusted binary, costs little.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from esper.execution.grafts import fused
from esper.execution.grafts.graft_set import GraftSet
from esper.execution.grafts.seed import bind_seed
from esper.execution.kernel_executor import LoadedKernel
from esper.ops.captures import beside_captures
from esper.ops.graft import graft_bank, graft_bank_backward, graft_elementwise, graft_elementwise_backward

__all__ = ["warm_up"]

_log = logging.getLogger(__name__)

#: Numbers of rows for which other variants are compiled.
_ROWS: Final = (1, 1025)
#: What ran already, by device, dtype and plan: it is compiled.
_done: set[tuple[object, ...]] = set()
_KEPT: Final = 4096


def warm_up(grafts: GraftSet, seed_idx: int, kernel: LoadedKernel) -> bool:
    """Have everything compiled that the layer launches once this kernel is in place. Blocks; for a worker's thread.

    Args:
        grafts: The layer's seeds as they are now; they are only read.
        seed_idx: Which one gets the kernel.
        kernel: On the layer's device.

    Returns:
        Whether anything ran. What goes wrong is logged and otherwise let be: then the first step compiles.
    """
    device = grafts.state_layout.alpha_blend.device
    if not fused.serves(device) or not grafts.spec.is_resolved or grafts.spec.channel_dim != -1:
        return False
    try:
        with torch.no_grad(), beside_captures() if device.type == "cuda" else nullcontext(), _stream(device):
            kernel.wait_on_current_stream()
            return _run({**grafts.kernels, seed_idx: kernel}, grafts, device)
    except Exception as error:
        _log.warning("could not compile beforehand for %s: %s: %s", kernel.artifact_id, type(error).__name__, error)
        return False


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream of this thread's own, on the device."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _run(kernels: Mapping[int, LoadedKernel], grafts: GraftSet, device: torch.device) -> bool:
    dtype, spec = grafts.dtype, grafts.spec
    assert spec.d_out is not None
    bound = [bind_seed(i, kernels[i], spec, grafts.state_layout.num_seeds) for i in sorted(kernels)]
    tensors = [{name: t.to(dtype) for name, t in kernels[i].tensors.items()} for i in sorted(kernels)]
    plan = fused.plan_of(bound, tensors, spec.d_in, spec.d_out)
    if plan is None:
        return False
    key = (device, dtype, plan.d_out, plan.seeds[0].family.activation, *_layout(plan))
    if key in _done:
        return False
    alpha = torch.full((grafts.state_layout.num_seeds,), 0.5, device=device)
    for rows in _ROWS:
        h = torch.zeros(rows, plan.d_out, dtype=dtype, device=device)
        # Not through autograd, whose one thread a GPU is the training's too.
        if isinstance(plan, fused.BankPlan):
            _bank(plan, tensors, torch.zeros(rows, plan.d_in, dtype=dtype, device=device), h, alpha)
        else:
            _elementwise(plan, tensors, h, alpha)
    if len(_done) >= _KEPT:
        _done.clear()
    _done.add(key)
    return True


def _layout(plan: fused.Plan) -> tuple[object, ...]:
    if isinstance(plan, fused.BankPlan):
        return "bank", plan.seats, plan.gated, plan.biased, plan.d_in
    return "elementwise", plan.places, plan.shifted


def _bank(plan: fused.BankPlan, tensors: Sequence[Mapping[str, Tensor]], x: Tensor, h: Tensor, alpha: Tensor) -> None:
    rest = (*fused.bank_weights(plan, tensors, h.dtype), plan.seats, plan.seeds[0].family.activation)
    _, faults = graft_bank(x, h, alpha, *rest)
    # The first layer of a network needs no gradient of its input, and has a variant without.
    for want_x in (False, True):
        graft_bank_backward(h, x, alpha, faults, *rest, want_x, any(plan.seats[3::6]), True)


def _elementwise(
    plan: fused.ElementwisePlan, tensors: Sequence[Mapping[str, Tensor]], h: Tensor, alpha: Tensor
) -> None:
    rest = (*fused.elementwise_weights(plan, tensors, h.dtype), plan.places, plan.seeds[0].family.activation, 1)
    _, faults = graft_elementwise(h, h, alpha, *rest)
    for want_x in (False, True):
        graft_elementwise_backward(h, h, alpha, faults, *rest, want_x, any(plan.places[3::4]), True)
