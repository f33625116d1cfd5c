"""What loads in the background cost the training they run beside.

A network of three Linear layers (256 -> 512 -> 512 -> 10, batch 256, one thread) trains; every 10 steps a kernel of 64
KiB is loaded. Two pairs of loops are timed in turn, ten steps and one load at a time:

- ``asleep`` and ``fetched``: no kernel is ever loaded, against one that is fetched from an Urza on loopback, verified
  and let go of, without a seed being woken. What loading costs, and nothing else.
- ``memory`` and ``urza``: a kernel is requested for a seed, committed by ``step()`` when it is there, trained with, and
  dropped after the tenth step. In ``memory`` it is there, so nothing is fetched; in ``urza`` neither memory nor disk
  has it. Both wake the same seed at the same step with the same kernel and differ by the fetch.

The promise is about loads, so its limit holds for both pairs. What the awake seed itself costs (``memory`` against
``asleep``) is a matter of grafts, measured in ``test_grafts.py``.

The registry is another process, which on a machine of two cores leaves one for the training and what it loads.

A load costs a fixed time of Python in other threads (see docs/fetching.md), during which the training thread may have
to wait for the interpreter's lock, so the ratio depends on how long ten steps take. Here they take some tens of
milliseconds each; the time of a step is printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from bench.paired import Ratio, compare
from bench.results import record
from esper.artifacts.http_registry import HttpRegistry
from esper.execution import background
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import SeedLifecycleState
from tests.artifacts.http_server import running_server, with_
from tests.services.urza.server import running_urza

PERIOD = 10
#: Rounds of ten steps for each loop: about a thousand steps.
ROUNDS = 101
LIMIT = 1.01
LAYER = "2"
#: Artificial delay of every answer where it is shown that no step waits for one.
DELAY_S = 0.5


class Training:
    """One model and its loop; a call is ``PERIOD`` steps."""

    def __init__(self, registry: Any, artifact_id: str | None, *, fetch: bool = False, wake: bool = True) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
        self.model = esper.wrap(host, registry=registry, telemetry_enabled=False, preserve_original=False)
        self.layer = self.model.layer(LAYER)
        self.cache = KernelCache(registry=registry, use_disk=False)
        for layer in self.model.kasmina_layers.values():
            layer.kernel_cache = self.cache
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(256, 256), torch.randint(0, 10, (256,))
        self.artifact_id = artifact_id
        self.fetch, self.wake = fetch, wake
        self.awake_steps = 0
        self.loads = 0
        self.times: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.step()
        self.times.append(time.perf_counter() - start)

    def __call__(self) -> None:
        if self.artifact_id is not None and self.state is SeedLifecycleState.DORMANT:
            if self.fetch:
                self.cache.clear_cache()
            if self.wake:
                self.model.request_kernel(LAYER, 0, self.artifact_id)
            else:
                background.submit(self.cache.load_kernel(self.artifact_id))
            self.loads += 1
        for _ in range(PERIOD):
            self.step()
            self.awake_steps += self.awake
        if self.awake:
            self.layer.release(0, SeedLifecycleState.DORMANT)

    @property
    def state(self) -> SeedLifecycleState:
        return self.layer.state_layout.state_of(0)

    @property
    def awake(self) -> bool:
        return self.state is SeedLifecycleState.ACTIVE


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[HttpRegistry]:
    with running_urza(tmp_path, args=["--write-rate", "0"]) as server:
        yield HttpRegistry(server.url, server.admin_token)


def compile_into(registry: Any) -> str:
    artifact_id: str = esper.compile("lowrank", d_in=512, d_out=512, rank=16, registry=registry)
    return artifact_id


def measure(registry: HttpRegistry, rounds: int) -> tuple[dict[str, Ratio], dict[str, Training]]:
    artifact_id = compile_into(registry)
    loops = {
        "asleep": Training(registry, None),
        "fetched": Training(registry, artifact_id, fetch=True, wake=False),
        "memory": Training(registry, artifact_id),
        "urza": Training(registry, artifact_id, fetch=True),
    }
    ratios: dict[str, Ratio] = {}
    for with_loads, without in (("fetched", "asleep"), ("urza", "memory")):
        pair = {name: loops[name] for name in (without, with_loads)}
        ratios |= compare(pair, without, rounds=rounds, inner=1, seconds=None)
    for loop in loops.values():
        loop.model.close()
    return ratios, loops


def summary(loops: dict[str, Training]) -> str:
    lines = []
    for name, loop in loops.items():
        middle, longest = statistics.median(loop.times) * 1e3, max(loop.times) * 1e3
        lines.append(
            f"\n{name:8} {len(loop.times)} steps, {loop.loads} loads; step {middle:.2f} ms, "
            f"99 % within {statistics.quantiles(loop.times, n=100)[98] * 1e3:.2f} ms, longest {longest:.2f} ms"
        )
    return "".join(lines)


def test_loads_beside_training(benchmark: Any, urza: HttpRegistry) -> None:
    torch.set_num_threads(1)
    found: list[tuple[dict[str, Ratio], dict[str, Training]]] = []
    benchmark.pedantic(lambda: found.append(measure(urza, ROUNDS)), rounds=1)
    ratios, loops = found[0]
    fetched, held = loops["urza"], loops["memory"]
    for name in ("fetched", "urza"):
        assert loops[name].cache.get_cache_stats()["fetches"] == loops[name].loads, "every load was a fetch"
    assert held.cache.get_cache_stats()["fetches"] == 1
    # Both waited a step for the kernel, as a rule, so they trained with it equally long.
    assert abs(fetched.awake_steps - held.awake_steps) <= 0.1 * held.awake_steps
    print(summary(loops), end="")
    for name, loop in loops.items():
        benchmark.extra_info[f"{name} step s"] = statistics.median(loop.times)
        benchmark.extra_info[f"{name} longest step s"] = max(loop.times)
    record(benchmark, "training with a load every 10 steps", ratios, {"fetched": LIMIT, "urza": LIMIT})


def test_no_step_waits_for_a_fetch(benchmark: Any, tmp_path: Path) -> None:
    """Every answer takes half a second, and no step as much as half of that."""
    torch.set_num_threads(1)
    with running_server() as server:
        artifact_id = compile_into(tmp_path / "registry")
        server.add(esper.artifacts.FileRegistry(tmp_path / "registry").blob_path(artifact_id).read_bytes())
        for kind in ("metadata", "blob"):
            server.plan[kind] = [with_(delay=DELAY_S)] * 1000
        loop = Training(HttpRegistry(server.url), artifact_id, fetch=True)

        def train() -> None:
            while loop.cache.get_cache_stats()["fetches"] < 3:
                loop()

        benchmark.pedantic(train, rounds=1)
        loop.model.close()
    print(summary({"slow": loop}), end="")
    assert loop.loads >= 3
    assert max(loop.times[1:]) < DELAY_S / 2
