"""What loads in the background cost the training they run beside.

A network of three Linear layers (d/2 -> d -> d -> 10, batch 256, one thread) trains; every 10 steps a kernel of 64
KiB is loaded. Ways to spend ten steps are timed in turn, on one and the same network, because two networks
differ by what their addresses do to the caches:

- ``asleep`` and ``fetched``: no kernel is loaded, against one that is fetched from an Urza on loopback, verified and
  let go of, without a seed being woken. What loading costs, and nothing else. ``again`` is ``asleep`` once more, and in
  ``served`` the registry gives the same answers to somebody else: what its work on the same machine costs the
  training, which it would not where the registry has a machine of its own.
- ``memory`` and ``urza``: a kernel is requested for a seed, committed by ``step()`` when it is there, trained with, and
  dropped after the tenth step. In ``memory`` it is there, so nothing is fetched; in ``urza`` neither memory nor disk
  has it. Both wake the same seed at the same step with the same kernel and differ by the fetch.

The promise is about loads, so its limit holds for both pairs. What the awake seed itself costs (``memory`` against
``asleep``) is a matter of grafts, measured in ``test_grafts.py``.

The registry is another process, which on a machine of two cores leaves one for the training and what it loads, and
shares caches, clock speed and, where cores are threads of one, arithmetic with it.

A load costs a fixed time of Python in other threads (see docs/fetching.md), during which the training thread may have
to wait for the interpreter's lock, so the ratio depends on how long ten steps take. So there are two widths, d = 512
and 1024; the time of a step is printed.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
#: Width -> rounds of ten steps for each way: a thousand and more, because fewer cannot tell 1 % from none.
WIDTHS = {512: 601, 1024: 121}
LIMIT = 1.01
LAYER = "2"
#: Artificial delay of every answer where it is shown that no step waits for one.
DELAY_S = 0.5
#: Ways that fetch: memory forgets the kernel first.
FETCHING = ("fetched", "urza")
#: Ways that load nothing.
IDLE = ("asleep", "again", "served")
#: What is timed in turn; the others over the first.
GROUPS = (("asleep", "again", "served", "fetched"), ("memory", "urza"))


def _ask(url: str, token: str, path: str, turn: Any) -> None:
    """Somebody else who asks for the same, with as little work as possible: another process."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port)) as connection, connection.makefile("rb") as answers:
        while turn.recv():
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            )
            assert b" 200 " in answers.readline(), path
            size = 0
            while line := answers.readline().strip():
                name, _, value = line.lower().partition(b":")
                size = int(value) if name == b"content-length" else size
            answers.read(size)


class Other:
    """Asks the registry for a kernel's bytes, as a load does, in a process of its own."""

    def __init__(self, url: str, token: str, artifact_id: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._turn, theirs = context.Pipe()
        path = f"/api/v1/kernels/{artifact_id}/blob"
        self._process = context.Process(target=_ask, args=(url, token, path, theirs))
        self._process.start()

    def ask(self) -> None:
        self._turn.send(True)

    def close(self) -> None:
        self._turn.send(False)
        self._process.join(30)
        assert self._process.exitcode == 0, "it got other answers than it should"


class Training:
    """A model and its loop; a call is ``PERIOD`` steps, spent in one of the ways."""

    def __init__(self, registry: Any, artifact_id: str, other: Other | None = None, width: int = 512) -> None:
        torch.manual_seed(0)
        self.other = other
        hidden = nn.Linear(width // 2, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        host = nn.Sequential(*hidden, nn.Linear(width, 10))
        self.model = esper.wrap(host, registry=registry, telemetry_enabled=False, preserve_original=False)
        self.layer = self.model.layer(LAYER)
        self.cache = KernelCache(registry=registry, use_disk=False)
        for layer in self.model.kasmina_layers.values():
            layer.kernel_cache = self.cache
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(256, width // 2), torch.randint(0, 10, (256,))
        self.artifact_id = artifact_id
        self.awake_steps: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)

    def step(self) -> float:
        """Seconds that one took."""
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.step()
        return time.perf_counter() - start

    def __call__(self, way: str) -> None:
        if way not in IDLE and self.state is SeedLifecycleState.DORMANT:
            if way in FETCHING:
                self.cache.clear_cache()
            if way == "fetched":
                background.submit(self.cache.load_kernel(self.artifact_id))
            else:
                self.model.request_kernel(LAYER, 0, self.artifact_id)
            self.loads[way] += 1
        if way == "served":
            assert self.other is not None
            self.other.ask()
        for _ in range(PERIOD):
            self.times[way].append(self.step())
            self.awake_steps[way] += self.awake
        if self.awake:
            self.layer.release(0, SeedLifecycleState.DORMANT)

    @property
    def state(self) -> SeedLifecycleState:
        return self.layer.state_layout.state_of(0)

    @property
    def awake(self) -> bool:
        return self.state is SeedLifecycleState.ACTIVE


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[tuple[Any, HttpRegistry]]:
    with running_urza(tmp_path, args=["--write-rate", "0"]) as server:
        yield server, HttpRegistry(server.url, server.admin_token)


def compile_into(registry: Any, width: int = 512) -> str:
    rank = 8192 // width
    artifact_id: str = esper.compile("lowrank", d_in=width, d_out=width, rank=rank, registry=registry)
    return artifact_id


def measure(server: Any, registry: HttpRegistry, width: int) -> tuple[dict[str, Ratio], Training]:
    artifact_id, rounds = compile_into(registry, width), WIDTHS[width]
    other = Other(server.url, server.admin_token, artifact_id)
    training = Training(registry, artifact_id, other, width)
    ratios: dict[str, Ratio] = {}
    for ways in GROUPS:
        calls = {way: partial(training, way) for way in ways}
        ratios |= compare(calls, ways[0], rounds=rounds, inner=1, seconds=None)
        if "served" in ways:
            calls = {way: partial(training, way) for way in ("served", "fetched")}
            found = compare(calls, "served", rounds=rounds, inner=1, seconds=None)
            ratios["fetched over served"] = found["fetched"]
    other.close()
    training.model.close()
    return ratios, training


def summary(training: Training) -> str:
    lines = []
    for way, times in training.times.items():
        middle, longest = statistics.median(times) * 1e3, max(times) * 1e3
        lines.append(
            f"\n{way:8} {len(times)} steps, {training.loads[way]} loads; step {middle:.2f} ms, "
            f"99 % within {statistics.quantiles(times, n=100)[98] * 1e3:.2f} ms, longest {longest:.2f} ms"
        )
    return "".join(lines)


@pytest.mark.timeout(1800)  # a thousand steps and more, each way
@pytest.mark.parametrize("width", WIDTHS)
def test_loads_beside_training(width: int, benchmark: Any, urza: tuple[Any, HttpRegistry]) -> None:
    torch.set_num_threads(1)
    found: list[tuple[dict[str, Ratio], Training]] = []
    benchmark.pedantic(lambda: found.append(measure(*urza, width)), rounds=1)
    ratios, training = found[0]
    fetches = training.cache.get_cache_stats()["fetches"]
    assert fetches == sum(training.loads[way] for way in FETCHING), "every load was a fetch, and no other was"
    # Both waited a step for the kernel, as a rule, so they trained with it equally long.
    held, fetched = training.awake_steps["memory"], training.awake_steps["urza"]
    assert abs(fetched - held) <= 0.1 * held
    print(summary(training), end="")
    for way, times in training.times.items():
        benchmark.extra_info[f"{way} step s"] = statistics.median(times)
        benchmark.extra_info[f"{way} longest step s"] = max(times)
    limits = dict.fromkeys(("fetched", "fetched over served", "urza"), LIMIT)
    record(benchmark, f"training with a load every 10 steps/d {width}", ratios, limits)


def test_no_step_waits_for_a_fetch(benchmark: Any, tmp_path: Path) -> None:
    """Every answer takes half a second, and no step as much as half of that."""
    torch.set_num_threads(1)
    with running_server() as server:
        artifact_id = compile_into(tmp_path / "registry")
        server.add(esper.artifacts.FileRegistry(tmp_path / "registry").blob_path(artifact_id).read_bytes())
        server.plan["blob"] = [with_(delay=DELAY_S)] * 1000
        training = Training(HttpRegistry(server.url), artifact_id)

        def train() -> None:
            while training.cache.get_cache_stats()["fetches"] < 3:
                training("urza")

        benchmark.pedantic(train, rounds=1)
        training.model.close()
    print(summary(training), end="")
    assert training.loads["urza"] >= 3
    assert max(training.times["urza"][1:]) < DELAY_S / 2
