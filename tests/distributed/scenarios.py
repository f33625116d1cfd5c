"""What the ranks run: a small network trained on data of each rank's own."""

from __future__ import annotations

import asyncio
import copy
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.artifacts.file_registry import FileRegistry
from esper.contracts.registry import ArtifactSummary
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.telemetry.options import TelemetryOptions
from tests.distributed.ranks import WORLD, digest
from tests.nn.cases import kernel as ready_kernel

WIDTH = 8


class Instrumented:
    """A folder of artifacts that answers late, or with an error."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self._inner = FileRegistry(Path(os.environ["ESPER_REGISTRY"]))
        self._seconds = seconds
        self._error = error
        self.url = self._inner.url

    async def fetch(self, artifact_id: str, *, max_bytes: int) -> bytes | bytearray:
        await asyncio.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return await self._inner.fetch(artifact_id, max_bytes=max_bytes)

    async def publish(self, data: bytes) -> str:
        return await self._inner.publish(data)

    async def list(self, *, prefix: str = "") -> Sequence[ArtifactSummary]:
        return await self._inner.list(prefix=prefix)

    async def describe(self, artifact_id: str) -> ArtifactSummary:
        return await self._inner.describe(artifact_id)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))


def kernel(seed: int = 0, **params: Any) -> str:
    """One that fits the first two Linears. Every rank compiles it: the same bytes under the same id."""
    return esper.compile("bottleneck", d_in=WIDTH, d_out=WIDTH, registry=None, seed=seed, rank=2, **params)


class Run:
    """A model in training on one rank of several."""

    def __init__(
        self,
        rank: int,
        kind: str = "ddp",
        registry: Any = None,
        *,
        telemetry: bool = False,
        compiled: str | None = None,
        publishing: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.rank = rank
        self.model = esper.wrap(
            network(),
            reserve_rank=4,
            registry=registry,
            telemetry_enabled=telemetry,
            preserve_original=False,
            **(publishing or {}),
        )
        self.trained: Any = self.model
        if kind == "ddp":
            self.trained = DistributedDataParallel(self.model, **options)
        elif kind == "fsdp":
            # On gloo and the CPU, as everything here: without a mesh it takes the machine's GPU.
            fully_shard(self.model, mesh=init_device_mesh("cpu", (WORLD,)), **options)
        self.consensus = esper.distributed.attach(self.trained)
        if compiled is not None:
            self.trained = torch.compile(self.trained, backend=compiled)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        esper.optim.attach(self.optimizer, self.model)
        self.data = torch.Generator().manual_seed(100 + rank)
        self.states: list[str] = []

    def batch(self) -> Tensor:
        return torch.randn(4, WIDTH, generator=self.data)

    def step(self, x: Tensor | None = None) -> None:
        x = self.batch() if x is None else x
        self.optimizer.zero_grad()
        (self.trained(x) - x.sum(1, keepdim=True)).square().mean().backward()
        self.optimizer.step()
        self.model.step()

    def watch(self, layer: str = "0", seed_idx: int = 1) -> None:
        """One step, and where a seed stands after it."""
        self.step()
        self.states.append(self.model.layer(layer).state_layout.state_of(seed_idx).name)

    def report(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        self.model._reshard()
        return {
            "parameters": digest(dict(self.model.named_parameters())),
            "crc": self.model.lattice.crc(),
            "states": self.states,
            "plans": [layer.grafts.plan.tolist() for layer in self.model.kasmina_layers.values()],  # type: ignore[attr-defined]
        }

    def close(self) -> None:
        self.model.close()


def wakes_together(rank: int, kind: str, options: dict[str, Any], compiled: str | None) -> dict[str, Any]:
    """Rank 1's registry is slow. Two seeds of different layers are asked for; later one is culled."""
    slow = Instrumented(seconds=0.4 * rank)
    run = Run(rank, kind, slow, compiled=compiled, **options)
    kernels = [kernel(0), kernel(1, activation="sigmoid")]
    dist.barrier()
    for _ in range(3):
        run.watch()
    futures = [
        run.model.request_kernel("0", 1, kernels[0], alpha=0.5, ramp_steps=4),
        run.model.request_kernel("2", 0, kernels[1], alpha=0.3),
    ]
    asked, own = time.perf_counter(), None
    for _ in range(40):
        run.watch()
        if own is None and all(item.fetch.done() for item in run.model._requested):
            own = len(run.states)
        time.sleep(0.02)
    seconds = time.perf_counter() - asked
    grown = run.report()
    consensus = run.model._consensus
    assert consensus is not None and consensus._woken
    run.model.cull("0", 1)
    for _ in range(3):
        run.watch()
    run.step()
    found = {
        "grown": grown,
        "end": run.report(),
        "done": [future.result(timeout=0) for future in futures],
        "own": own,
        "seconds": seconds,
        "awake": [tensor.full_tensor().norm().item() if hasattr(tensor, "full_tensor") else tensor.norm().item()
                  for tensor in run.model.graft_parameters().values()],
    }  # fmt: skip
    # With nothing awake any more the ranks have nothing to agree on after every step.
    run.model.cull("2", 0)
    for _ in range(consensus.period + 2):
        run.watch()
    found["still_awake"] = consensus._woken
    run.close()
    return found


def trains(rank: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two seeds wake after the second step, on the dot."""
    run = Run(rank, kind, **options)
    futures = [run.model.request_kernel(layer, 1, kernel(seed)) for layer, seed in (("0", 0), ("2", 1))]
    while not all(item.fetch.done() for item in run.model._requested):
        time.sleep(0.01)
    dist.barrier()
    for _ in range(12):
        run.watch()
    run.model._reshard()
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().tolist()
        for name, p in run.model.named_parameters()
    }
    found = {"states": run.states, "weights": weights, "done": [future.result(timeout=0) for future in futures]}
    run.close()
    return found


def gathers_under_checkpoints(rank: int, together: bool) -> dict[str, Any]:
    """One layer under the older FSDP, whose repeated forwards find the gathered weight under another name.

    Host and seeds as one call, or each by itself.
    """
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    layer = KasminaLayer.from_host(block[0], num_seeds=1, register_host=False)
    assert layer.commit(0, ready_kernel("lowrank", WIDTH, WIDTH, rank=2), alpha=0.5)
    if not together:
        layer._binding.product = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        model = FullyShardedDataParallel(wrapped, use_orig_params=True, device_id=torch.device("cpu"))
    torch.manual_seed(1 + rank)
    x = torch.randn(5, WIDTH, requires_grad=True)
    model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.numel()}
    seeds = {name: p.grad for name, p in layer.grafts.named_parameters()}
    return {name: t.tolist() for name, t in {"x": x.grad, **gradients, **seeds}.items() if t is not None}


def sleeps(rank: int, options: dict[str, Any], compiled: str | None) -> dict[str, Any]:
    """Nothing wakes: the network must train as it does without Esper."""
    run = Run(rank, "ddp", compiled=compiled, **options)
    for _ in range(6):
        run.watch()
    bare = DistributedDataParallel(network(), **options)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(100 + rank)
    for _ in range(6):
        x = torch.randn(4, WIDTH, generator=data)
        optimizer.zero_grad()
        (bare(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    host = {name: p for name, p in run.model.named_parameters() if not name.startswith("esper.")}
    found = {"ours": digest(host), "bare": digest(dict(bare.module.named_parameters()))}
    run.close()
    return found


def one_rank_fails(rank: int, bad: bool) -> dict[str, Any]:
    """Rank 1 cannot have the artifact, or has one that is bad."""
    error: Exception = esper.ArtifactError("its hash is wrong") if bad else esper.KernelNotFoundError("gone")
    run = Run(rank, "ddp", Instrumented(error=error if rank == 1 else None))
    future = run.model.request_kernel("0", 1, kernel(2))
    for _ in range(8):
        run.watch()
        time.sleep(0.02)
    found = run.report() | {
        "done": future.result(timeout=0),
        "error": run.model.get_layer_stats("0")["errors"].get(1),
    }
    run.close()
    return found


def one_rank_overflows(rank: int) -> dict[str, Any]:
    """A seed's product overflows, but not on rank 0, whose batches are zero."""
    run = Run(rank, "ddp")
    kernel_id = kernel(3, activation="relu", bias=False)
    future = run.model.request_kernel("0", 1, kernel_id, alpha=1.0)
    while not future.done():
        run.watch()
        time.sleep(0.01)
    with torch.no_grad():
        for tensor in run.model.layer("0").grafts.seed_tensors(1).values():
            tensor.fill_(1e20)
    faults = []
    for _ in range(8):
        x = run.batch().abs()
        run.step(x if rank == 1 else torch.zeros_like(x))
        run.states.append(run.model.layer("0").state_layout.state_of(1).name)
        faults.append(int(run.model.layer("0").state_layout.error_count[1]))
    found = run.report() | {"faults": faults}
    run.close()
    return found


def different_programs(rank: int) -> dict[str, Any]:
    """The ranks ask for different artifacts."""
    run = Run(rank, "ddp")
    future = run.model.request_kernel("0", 1, kernel(10 + rank))
    for _ in range(4):
        run.watch()
        time.sleep(0.02)
    found = run.report() | {
        "done": future.result(timeout=0),
        "error": run.model.get_layer_stats("0")["errors"].get(1),
    }
    run.close()
    return found


def cancelled_on_one_rank(rank: int) -> dict[str, Any]:
    run = Run(rank, "ddp", Instrumented(seconds=0.2))
    future = run.model.request_kernel("0", 1, kernel(4))
    if rank == 0:
        assert future.cancel()
    for _ in range(20):
        run.watch()
        time.sleep(0.02)
    found = run.report() | {"error": run.model.get_layer_stats("0")["errors"].get(1)}
    run.close()
    return found


def commands_while_loading(rank: int) -> dict[str, Any]:
    """An awake seed is fossilized, and a sleeping one unloaded and asked again, while rank 1 still fetches."""
    run = Run(rank, "ddp", Instrumented(seconds=0.3 * rank))
    model = run.model
    woken = model.request_kernel("0", 1, kernel(0))
    while not woken.done():
        run.watch()
        time.sleep(0.02)
    futures = [model.request_kernel("0", 1, kernel(1)), model.request_kernel("2", 0, kernel(2))]
    run.watch()
    model.fossilize("0", 1)
    asyncio.run(model.unload_kernel("2", 0))
    futures.append(model.request_kernel("2", 0, kernel(3)))
    for _ in range(40):
        run.watch()
        time.sleep(0.02)
    found = run.report() | {
        "done": [future.result(timeout=0) for future in futures],
        "artifacts": [model.get_layer_stats(layer)["artifacts"] for layer in ("0", "2")],
        "wanted": [{1: kernel(0)}, {0: kernel(3)}],
        "error": model.get_layer_stats("0")["errors"].get(1),
    }
    run.close()
    return found


def watched(rank: int) -> dict[str, Any]:
    """The monitor samples on each rank by its own clock; what reaches the lattice is the same on all."""
    run = Run(rank, "ddp", telemetry=True)
    for layer in run.model.kasmina_layers.values():
        layer.telemetry_enabled = True
    run.model.monitor.window = 2
    future = run.model.request_kernel("0", 1, kernel(5))
    for step in range(100):
        if step % 7 == 3 * rank:
            run.model.monitor.sample_now()
        run.watch()
        time.sleep(0.002 * rank)
    found = run.report() | {
        "done": future.result(timeout=0),
        "samples": run.model.monitor.stats()["samples"],
        "health": run.model.lattice.health_accumulator.tolist(),
    }
    run.close()
    return found


def publishes(rank: int, url: str, spool: str) -> dict[str, Any]:
    """Both ranks publish one run; a seed wakes in it."""
    options = TelemetryOptions(run_id="together", every_steps=1, spool_dir=f"{spool}/{rank}")
    run = Run(rank, telemetry=True, publishing={"bus": url, "telemetry": options})
    artifact = kernel(0)
    dist.barrier()
    run.watch()
    future = run.model.request_kernel("0", 1, artifact, alpha=0.5)
    for _ in range(20):
        run.watch()
        time.sleep(0.02)
    state = run.model.layer("0").state_layout.state_of(1)
    run.close()
    return {"stats": run.model.telemetry_stats(), "state": int(state), "done": future.result(timeout=0)}


def merged_health(rank: int) -> dict[str, Any]:
    """Both ranks see other rows of one layer; rank 1 alone sees the second."""
    run = Run(rank, "ddp", telemetry=True)
    x = run.batch()
    run.model.monitor.sample_now()
    run.model(x)
    with torch.no_grad():
        y = run.model.wrapped_model[0](x)  # type: ignore[index]
    found = {"y": y.tolist(), "health": _plain(esper.distributed.health(run.trained, "0"))}
    fresh = esper.wrap(network(), reserve_rank=2)
    esper.distributed.attach(fresh)
    found["nothing"] = _plain(esper.distributed.health(fresh, "0"))
    if rank == 1:
        fresh.monitor.sample_now()
        fresh(x)
    found["one"] = _plain(esper.distributed.health(fresh, "0"))
    fresh.close()
    run.close()
    return found


def _plain(health: Any) -> dict[str, Any]:
    return {
        "probes": health.window_samples,
        "samples": health.samples.tolist(),
        "mean": health.activation_mean.tolist(),
        "variance": health.activation_variance.tolist(),
        "dead": health.dead_neuron_ratio.tolist(),
    }


def refusals(rank: int) -> list[str]:
    """What is not done with several ranks, in words."""
    model = esper.wrap(network(), reserve_rank=2, telemetry_enabled=False)
    told = []
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.request_kernel("0", 0, "none").cancel()
        model.request_kernel("0", 1, "none").cancel()
    told += [str(warning.message) for warning in caught if "attach" in str(warning.message)]
    consensus = esper.distributed.attach(model)
    assert esper.distributed.attach(model) is consensus
    for call in (
        lambda: asyncio.run(model.load_kernel("0", 2, "none")),
        lambda: esper.distributed.attach(network()),
        lambda: esper.distributed.attach(copy.deepcopy(model), period=0),
    ):
        try:
            call()
        except (RuntimeError, TypeError, ValueError) as error:
            told.append(str(error))
    model.close()
    model.step()
    return told
