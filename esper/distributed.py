"""Training one wrapped network with several processes.

    model = esper.wrap(network, reserve_rank=8)
    ddp = DistributedDataParallel(model)          # or fully_shard(model)
    esper.distributed.attach(model)

Every rank runs the same program: the same requests, culls and alphas at the same steps. What is each rank's own, how
long a fetch takes, a batch that holds a NaN, is agreed upon (:mod:`esper.core.consensus`), so that seeds wake on all
ranks at the same step, and parameters and lattice stay the same on all of them. docs/reserved.md tells more.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from esper.core.consensus import Consensus
from esper.core.morphable import MorphableModel

__all__ = ["Consensus", "attach"]


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
    wrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(wrapped, MorphableModel):
        raise TypeError(f"attach needs a model that esper.wrap gave, or DDP around one; got {type(model).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    static = isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph
    return wrapped.join_ranks(process_group, period=period, timeout_s=timeout_s, static=static)
