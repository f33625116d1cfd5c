"""Training one wrapped network with several processes.

    model = esper.wrap(network, reserve_rank=8)
    ddp = DistributedDataParallel(model)          # or fully_shard(model)
    esper.distributed.attach(ddp)

Every rank runs the same program: the same requests, culls and alphas at the same steps. What is each rank's own, how
long a fetch takes, a batch that holds a NaN, is agreed upon (:mod:`esper.core.consensus`), so that seeds wake on all
ranks at the same step, and parameters and lattice stay the same on all of them. docs/reserved.md tells more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.core.consensus import Consensus
from esper.core.morphable import MorphableModel
from esper.execution.health import LayerHealth, layer_health
from esper.ops.stats import CHUNK_FIELDS, FEATURE_FIELDS, stats_merge

__all__ = ["Consensus", "attach", "health"]


def attach(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    period: int = 32,
    timeout_s: float = 600.0,
) -> Consensus:
    """Let the ranks that train ``model`` agree on what its seeds do; every rank calls it at the same point.

    Attaching again returns the first consensus and changes nothing.

    Args:
        model: The ``DistributedDataParallel`` around a wrapped model, or the wrapped model.
        process_group: The ranks that train together; by default all.
        period: Training steps between two exchanges while all seeds sleep and no request is open.
        timeout_s: After how many seconds without an answer of another rank ``model.step()`` raises.

    Returns:
        The consensus; ``model.close()`` ends it.

    Raises:
        TypeError: there is no wrapped model in ``model``.
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: ``period`` is less than 1.
    """
    wrapped = _wrapped(model)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    static = isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph
    return wrapped.join_ranks(process_group, period=period, timeout_s=timeout_s, static=static)


def health(model: nn.Module, layer_name: str) -> LayerHealth:
    """Health of a layer's seeds over what all ranks have seen; every rank calls it at the same point, and waits.

    The ranks' windows are merged by Chan's formula, in the order of ranks, so the result is the same on all of them.

    Args:
        model: As for :func:`attach`, which must have been called.
        layer_name: The layer's dotted name.

    Raises:
        TypeError: there is no wrapped model in ``model``.
        RuntimeError: the model is not attached.
        ValueError: there is no such layer, or the ranks have seen it with different numbers of features.
    """
    wrapped = _wrapped(model)
    consensus = wrapped.consensus
    if consensus is None:
        raise RuntimeError("call esper.distributed.attach(model) first")
    window = wrapped.monitor.statistics(layer_name)
    probes, features, chunks = window if window is not None else (0, torch.zeros(FEATURE_FIELDS, 0), None)
    sizes = consensus.gather(torch.tensor([probes, features.shape[1]]))
    widths = {int(width) for _, width in sizes} - {0}
    seeds = wrapped.lattice.seeds_per_layer
    if not widths:
        return LayerHealth.nothing(layer_name, seeds)
    if len(widths) > 1:
        raise ValueError(f"the ranks have seen layer '{layer_name}' with {sorted(widths)} features")
    width = widths.pop()
    mine = torch.zeros(FEATURE_FIELDS * width + CHUNK_FIELDS * seeds, dtype=torch.float64)
    if chunks is not None:
        mine.copy_(torch.cat([features.reshape(-1), chunks.reshape(-1)]))
    found = [_split(flat, width) for flat in consensus.gather(mine)]
    total = (
        torch.zeros(FEATURE_FIELDS, width, dtype=torch.float64),
        torch.zeros(CHUNK_FIELDS, seeds, dtype=torch.float64),
    )
    for theirs in found:
        stats_merge(*total, *theirs)
    return layer_health(layer_name, sum(int(count) for count, _ in sizes), *total, wrapped.monitor.eps)


def _split(flat: Tensor, width: int) -> tuple[Tensor, Tensor]:
    border = FEATURE_FIELDS * width
    return flat[:border].reshape(FEATURE_FIELDS, width), flat[border:].reshape(CHUNK_FIELDS, -1)


def _wrapped(model: nn.Module) -> MorphableModel:
    wrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(wrapped, MorphableModel):
        raise TypeError(f"needs a model that esper.wrap gave, or DDP around one; got {type(model).__name__}")
    return wrapped
