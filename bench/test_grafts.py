"""What awake seeds cost: four rank-8 seeds on every Linear of 6 x [Linear(d), GELU] over the bare network's forward.

The grown network is built as a user builds it: wrapped, kernels compiled into a registry and loaded, containment on.
PEFT with four active LoRA adapters of the same rank stands beside it. One thread, eager; "grad" builds the graph for a
backward through every parameter, "no_grad" does not; "step" is forward and backward. All candidates alternate within
every round (see paired.py), in several processes, whose spread is the error; "again" is the bare network a second
time. ``test_compare.py`` has the same networks beside four others in one process: what six networks and two compilers
leave in the caches costs each of them a few percent more there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from bench.models import mlp, same_weights
from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record

SEEDS = 4
RANK = 8
#: Independent processes; their spread is the error that counts.
PROCESSES = int(os.environ.get("ESPER_BENCH_PROCESSES", "5"))
#: (width, batch) -> grown / bare of a forward.
LIMITS = {(64, 8): 1.6, (256, 32): 1.3, (1024, 64): 1.1}


def grown(
    bare: nn.Module, width: int, registry: Path, *, seeds: int = SEEDS, rank: int = RANK, reserve_rank: int = 0
) -> Any:
    """The network with awake seeds on every Linear, all alphas 0.5."""
    model = esper.wrap(
        same_weights(bare), [nn.Linear], seeds_per_layer=seeds, preserve_original=False, telemetry_enabled=False,
        registry=registry.as_uri(), reserve_rank=reserve_rank,
    )  # fmt: skip
    artifacts = [
        esper.compile("lowrank", d_in=width, d_out=width, registry=registry.as_uri(), seed=seed, rank=rank)
        for seed in range(seeds)
    ]

    async def load() -> None:
        for name in model.get_layer_names():
            for seed_idx, artifact in enumerate(artifacts):
                assert await model.load_kernel(name, seed_idx, artifact, alpha=0.5), model.get_layer_stats(name)

    asyncio.run(load())
    return model


def adapted(bare: nn.Module, *, seeds: int = SEEDS, rank: int = RANK) -> nn.Module | None:
    """The same network under PEFT with an active LoRA adapter for each seed, all trainable; None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    network = same_weights(bare)
    targets = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=rank, target_modules=targets)
    model = peft.get_peft_model(network, config, adapter_name="a0")
    for i in range(1, seeds):
        model.add_adapter(f"a{i}", config)
    model.base_model.set_adapter([f"a{i}" for i in range(seeds)])
    model.requires_grad_(True)
    return model


def _run(network: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "no_grad":

        def forward() -> Tensor:
            with torch.no_grad():
                return network(x)

        return forward
    if mode == "grad":
        return lambda: network(x)
    return lambda: network(x).sum().backward()


def candidates(width: int, batch: int, mode: str, registry: Path, number: int) -> dict[str, Callable[[], object]]:
    """What process ``number`` times: each has other weights, at other addresses."""
    torch.manual_seed(number)
    bare, x = mlp(width), torch.randn(batch, width)
    networks = {"bare": bare, "again": same_weights(bare), "grown": grown(bare, width, registry)}
    peft_model = adapted(bare)
    if peft_model is not None:
        networks["peft"] = peft_model
    return {name: _run(network, x, mode) for name, network in networks.items()}


def measure(width: int, batch: int, mode: str, registry: Path, number: int) -> dict[str, Ratio]:
    """The ratios that process ``number`` finds."""
    torch.set_num_threads(1)
    return compare(candidates(width, batch, mode, registry, number), baseline="bare", seconds=6.0)


@pytest.mark.timeout(200 * PROCESSES)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "step"])
@pytest.mark.parametrize(("width", "batch"), LIMITS)
def test_four_seeds_a_layer(width: int, batch: int, mode: str, benchmark: Any, tmp_path: Path) -> None:
    ratios = compare_in_processes(measure, width, batch, mode, tmp_path, processes=PROCESSES)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(candidates(width, batch, mode, tmp_path, 0)["grown"], rounds=5, iterations=20)
    finally:
        torch.set_num_threads(before)
    limits = {"grown": LIMITS[width, batch]} if mode != "step" else {}
    record(benchmark, f"grafts/mlp-{width}x{batch}/{mode}", ratios, limits=limits)
