"""What reserved memory costs: asleep over the bare network, eager and compiled; awake over elastic grafts.

Asleep, the wrapped network and the bare one are the same modules over the same memory, as in test_dormant_overhead.py,
and promise 1 holds for it as for any dormant network. Awake, four rank-8 seeds stand on every Linear.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from bench.models import WORKLOADS, Workload, mlp, same_weights
from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record
from bench.test_dormant_overhead import LIMIT, ROUNDS, pace, stepped
from bench.test_grafts import RANK, grown

PROCESSES = 6


def asleep(workload: Workload, mode: str, number: int) -> dict[str, Callable[[], Any]]:
    """The contestants of process ``number``, each called once; compiled, both graphs are there."""
    bare, x = workload.make()
    found = {"bare": bare, "again": same_weights(bare)}
    model = esper.wrap(bare, preserve_original=False, reserve_rank=RANK)
    found["reserved"] = model
    if mode == "compiled":
        torch._dynamo.reset()
        found = {name: torch.compile(network, fullgraph=True) for name, network in found.items()}
        model.prepare(lambda: found["reserved"](x), repeats=1)
    names = list(found)
    random.Random(number).shuffle(names)
    for name in names:
        found[name](x)
    reserved = found.pop("reserved")
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda network=network: network(x)) for name, network in found.items()
    }
    return calls | {"reserved": stepped(model, reserved, x)}


def measure(name: str, mode: str, number: int) -> dict[str, Ratio]:
    """The ratios that process ``number`` finds."""
    torch.set_num_threads(1)
    calls = asleep(next(workload for workload in WORKLOADS if workload.name == name), mode, number)
    inner, turns = pace(calls["bare"])
    return compare(calls, baseline="bare", rounds=ROUNDS, inner=inner, turns=turns, seconds=None, seed=number)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_asleep(workload: Workload, mode: str, benchmark: Any) -> None:
    ratios = compare_in_processes(measure, workload.name, mode, processes=PROCESSES)
    benchmark.pedantic(asleep(workload, mode, 1)["reserved"], rounds=5, iterations=20)
    record(benchmark, f"reserved/asleep/{workload}/{mode}", ratios, limits={"reserved": LIMIT})


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize(("width", "batch"), [(64, 8), (256, 32), (1024, 64)])
def test_awake(width: int, batch: int, mode: str, benchmark: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        bare, x = mlp(width), torch.randn(batch, width)
        networks: dict[str, Any] = {
            "bare": bare,
            "elastic": grown(bare, width, tmp_path),
            "reserved": grown(bare, width, tmp_path, reserve_rank=RANK),
        }
        if mode == "compiled":
            torch._dynamo.reset()
            networks = {name: torch.compile(network, fullgraph=True) for name, network in networks.items()}
        calls = {name: (lambda network=network: network(x).sum().backward()) for name, network in networks.items()}
        ratios = compare(calls, baseline="bare")
        benchmark.pedantic(calls["reserved"], rounds=5, iterations=5)
    finally:
        torch.set_num_threads(before)
    record(benchmark, f"reserved/awake/mlp-{width}x{batch}/{mode}", ratios)
