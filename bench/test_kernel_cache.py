"""What fetching a kernel costs: a hit in memory, a hit on the local disk, a first fetch from a registry in a folder.

The artifact has about 64 KiB: a lowrank blueprint of rank 64 for 128 -> 128 features in float32. Targets (median):
10 us from memory, 1 ms from the disk. Each call is awaited on a running loop, as a training service would; the disk and
registry calls cross to the background loop and its worker threads and back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.artifacts import FileRegistry
from esper.execution.kernel_cache import KernelCache

MEMORY_LIMIT_S = 10e-6
DISK_LIMIT_S = 1e-3


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def artifact_id(tmp_path: Path) -> str:
    registry = FileRegistry(tmp_path / "registry")
    artifact_id: str = esper.compile("lowrank", d_in=128, d_out=128, rank=64, registry=registry)
    return artifact_id


def report(benchmark: Any, name: str, calls: int, limit_s: float | None = None) -> None:
    """Print the median time of one call beside its target."""
    median = benchmark.stats.stats.median / calls
    benchmark.extra_info["microseconds_per_call"] = median * 1e6
    target = "" if limit_s is None else f"  target {limit_s * 1e6:.0f} us: {'kept' if median <= limit_s else 'missed'}"
    print(f"\n{name:24} {median * 1e6:9.2f} us{target}", end="")


def test_memory_hit(benchmark: Any, tmp_path: Path, artifact_id: str, loop: asyncio.AbstractEventLoop) -> None:
    cache = KernelCache(registry=tmp_path / "registry", disk_dir=tmp_path / "cache")
    loop.run_until_complete(cache.load_kernel(artifact_id))
    calls = 1000

    async def load() -> None:
        for _ in range(calls):
            await cache.load_kernel(artifact_id)

    benchmark.pedantic(lambda: loop.run_until_complete(load()), rounds=20, warmup_rounds=2)
    report(benchmark, "memory hit", calls, MEMORY_LIMIT_S)


def test_disk_hit(benchmark: Any, tmp_path: Path, artifact_id: str, loop: asyncio.AbstractEventLoop) -> None:
    cache = KernelCache(registry=tmp_path / "registry", disk_dir=tmp_path / "cache")
    loop.run_until_complete(cache.load_kernel(artifact_id))
    before = cache.get_cache_stats()["disk_hits"]

    async def load() -> None:
        cache.clear_cache()
        await cache.load_kernel(artifact_id)

    benchmark.pedantic(lambda: loop.run_until_complete(load()), rounds=300, warmup_rounds=5)
    assert cache.get_cache_stats()["disk_hits"] == before + 305
    report(benchmark, "disk hit", 1, DISK_LIMIT_S)


def test_registry_fetch(benchmark: Any, tmp_path: Path, artifact_id: str, loop: asyncio.AbstractEventLoop) -> None:
    cache = KernelCache(registry=tmp_path / "registry", use_disk=False)

    async def load() -> None:
        cache.clear_cache()
        await cache.load_kernel(artifact_id)

    benchmark.pedantic(lambda: loop.run_until_complete(load()), rounds=300, warmup_rounds=5)
    assert cache.get_cache_stats()["fetches"] == 305
    report(benchmark, "file registry fetch", 1)
