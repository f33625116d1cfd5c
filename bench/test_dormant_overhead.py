"""What a dormant model costs: wrapped over bare, monitoring on.

Each workload is timed for the bare network, the network wrapped by Esper (``step()`` after every forward), a bare
forward hook on every Linear, and PEFT with its adapters disabled. All candidates alternate within every round.

Wrapping in place leaves a network as it was, so the bare network and the wrapped one are the same modules over the same
memory, called by themselves and through Esper: what distinguishes two instances (addresses, compiled copies) cancels.
"again" is another instance that Esper never touched: it tells whether wrapping changed the host itself, and its scatter
is what two instances of one network differ by.

Some differences last as long as a process does. So every row is measured in several fresh processes, in each of which
the candidates are made and compiled in another order; the result is the mean over the processes (see paired.py).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from bench.models import WORKLOADS, Workload, same_weights
from bench.paired import Ratio, compare, compare_in_processes
from bench.results import record

#: Promise 1: wrapped / bare.
LIMIT = 1.005

#: More of them narrow the interval: six leave half a percent on small networks, as much as the limit allows.
PROCESSES = int(os.environ.get("ESPER_BENCH_PROCESSES", "6"))
#: Length of one candidate's turn, and of all its turns in a round: a round holds its share of the probes, which lie
#: some 50 ms apart. Where a forward takes long a turn is two of them, and there are fewer turns.
BLOCK_SECONDS = 0.0125
ROUND_SECONDS = 0.1
ROUNDS = 25
#: What the limit is compared with for orientation is measured in the first process alone.
CONTEXT = ("hook", "peft disabled")


def candidates(workload: Workload, mode: str, number: int) -> dict[str, Callable[[], Any]]:
    """The contestants of process ``number``, each called once."""
    bare, x = workload.make()
    found = {"bare": bare, "again": same_weights(bare)}
    if number == 0:
        found["hook"] = _hooked(same_weights(bare))
        if mode == "eager" and (peft := _disabled_adapters(same_weights(bare))) is not None:
            found["peft disabled"] = peft
    model = esper.wrap(bare, preserve_original=False)
    found["wrapped"] = model
    if mode == "compiled":
        torch._dynamo.reset()
        found = {name: torch.compile(network, fullgraph=True) for name, network in found.items()}
    names = list(found)
    random.Random(number).shuffle(names)
    for name in names:
        found[name](x)
    wrapped = found.pop("wrapped")

    calls: dict[str, Callable[[], Any]] = {
        name: (lambda network=network: network(x)) for name, network in found.items()
    }
    return calls | {"wrapped": stepped(model, wrapped, x)}


def measure(name: str, mode: str, threads: int, number: int) -> dict[str, Ratio]:
    """The ratios that process ``number`` finds."""
    torch.set_num_threads(threads)
    workload = next(workload for workload in WORKLOADS if workload.name == name)
    calls = candidates(workload, mode, number)
    inner, turns = pace(calls["bare"])
    options: dict[str, Any] = {"baseline": "bare", "inner": inner, "turns": turns, "seconds": None, "seed": number}
    judged = {name: call for name, call in calls.items() if name not in CONTEXT}
    ratios = compare(judged, rounds=ROUNDS, **options)
    context = {name: call for name, call in calls.items() if name == "bare" or name in CONTEXT}
    return ratios | (compare(context, rounds=ROUNDS, **options) if len(context) > 1 else {})


class OwnTime:
    """A clock in nanoseconds that stands still between ``pause`` and ``resume``."""

    def __init__(self) -> None:
        self.behind = 0
        self.paused_at: int | None = None

    def __call__(self) -> int:
        return time.perf_counter_ns() - self.behind

    def pause(self) -> None:
        self.paused_at = time.perf_counter_ns()

    def resume(self) -> None:
        if self.paused_at is not None:
            self.behind += time.perf_counter_ns() - self.paused_at
            self.paused_at = None


def stepped(model: Any, call: Callable[..., object], *arguments: object) -> Callable[[], None]:
    """The call and the model's step after it, by a clock of its own.

    The budget is a share of the time of the loop that trains: the others' turns must not count as its own.
    """

    def step() -> None:
        call(*arguments)
        model.step()

    own = OwnTime()
    model.monitor._clock = own
    step.resume, step.pause = own.resume, own.pause  # type: ignore[attr-defined]
    return step


def pace(call: Callable[[], Any]) -> tuple[int, int]:
    """Calls in a turn, and turns in a round."""
    start = time.perf_counter()
    for _ in range(10):
        call()
    seconds = (time.perf_counter() - start) / 10
    inner = max(2, round(BLOCK_SECONDS / seconds))
    return inner, max(2, round(ROUND_SECONDS / (inner * seconds)))


@pytest.mark.timeout(200 * PROCESSES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_dormant_overhead(workload: Workload, mode: str, threads: int, benchmark: Any) -> None:
    ratios = compare_in_processes(measure, workload.name, mode, threads, processes=PROCESSES)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        benchmark.pedantic(candidates(workload, mode, 1)["wrapped"], rounds=5, iterations=20)
    finally:
        torch.set_num_threads(before)
    record(benchmark, f"dormant/{workload}/{mode}/threads-{threads}", ratios, limits={"wrapped": LIMIT})


def _hooked(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda module, args, output: None)
    return network


def _disabled_adapters(network: nn.Module) -> nn.Module | None:
    try:
        import peft
    except ImportError:
        return None
    # out_proj is read, not called, by the attention around it; PEFT cannot adapt it there.
    targets = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith("out_proj")
    ]
    model = peft.get_peft_model(network, peft.LoraConfig(r=8, target_modules=targets))
    model.base_model.disable_adapter_layers()
    return model
