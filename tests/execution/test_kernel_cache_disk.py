"""The disk tier: its bound, its locks, and processes that share it."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from esper.artifacts import Artifact, FileRegistry, SigningKey, pack
from esper.blueprints import get, initialise
from esper.contracts.errors import ArtifactError, KernelNotFoundError
from esper.contracts.registry import ArtifactSummary
from esper.execution.disk_cache import DiskCache
from esper.execution.kernel_cache import KernelCache
from tests.artifacts.http_server import running_server, with_
from tests.artifacts.samples import sample

SAMPLES = [sample(seed) for seed in range(6)]
IDS = [Artifact.open(data).artifact_id for data in SAMPLES]
SIZE = len(SAMPLES[0])
MIB = 1 << 20


def summary(data: bytes) -> ArtifactSummary:
    artifact = Artifact.open(data)
    return ArtifactSummary(artifact.artifact_id, artifact.sha256, artifact.nbytes, {})


def store(disk: DiskCache, number: int) -> None:
    disk.store(SAMPLES[number], summary(SAMPLES[number]))
    # Later than the one before, on file systems with a coarse clock too.
    blob = disk._files.blob_path(Artifact.open(SAMPLES[number]).sha256)
    os.utime(blob, (100 + number, 100 + number))


def held(disk: DiskCache) -> list[int]:
    found = []
    for number, artifact_id in enumerate(IDS):
        try:
            data, sha256 = disk.read(artifact_id, MIB)
        except KernelNotFoundError:
            continue
        assert data == SAMPLES[number] and sha256 == hashlib.sha256(data).hexdigest()
        found.append(number)
    return found


def files(root: Path, folder: str) -> list[Path]:
    return sorted(path for path in (root / folder).rglob("*") if path.is_file())


# -- the bound


def test_the_least_recently_used_go_first(tmp_path):
    disk = DiskCache(tmp_path, 3 * SIZE)
    for number in range(3):
        store(disk, number)
    disk.read(IDS[0], MIB)  # used now, so number 1 is the oldest
    disk.store(SAMPLES[3], summary(SAMPLES[3]))
    # Room is made until a tenth is free.
    assert held(DiskCache(tmp_path, 3 * SIZE)) == [0, 3]
    assert disk.evictions == 2
    assert disk.nbytes == 2 * SIZE
    assert len(files(tmp_path, "kernels")) == len(files(tmp_path, "blobs")) == 2


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path):
    disk = DiskCache(tmp_path, SIZE - 1)
    disk.store(SAMPLES[0], summary(SAMPLES[0]))
    assert not files(tmp_path, ".")


def test_what_other_processes_store_counts(tmp_path):
    mine, other = DiskCache(tmp_path, 4 * SIZE), DiskCache(tmp_path, 4 * SIZE)
    store(mine, 0)
    for number in (1, 2, 3):
        store(other, number)
    store(mine, 4)
    assert len(held(DiskCache(tmp_path, 4 * SIZE))) <= 4


def test_quarantine_and_strangers_are_under_the_bound_too(tmp_path):
    disk = DiskCache(tmp_path, 4 * SIZE)
    (tmp_path / "quarantine").mkdir()
    for number in range(3):
        path = tmp_path / "quarantine" / f"old{number}"
        path.write_bytes(bytes(SIZE))
        os.utime(path, (1, 1))
    store(disk, 0)
    store(disk, 1)
    disk.make_room()
    assert held(disk) == [0, 1]
    assert len(files(tmp_path, "quarantine")) == 1


def test_what_killed_processes_left_is_removed_in_time(tmp_path):
    disk = DiskCache(tmp_path, MIB)
    store(disk, 0)
    for name in ("tmp/half", "locks/x.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "tmp" / "fresh").write_text("")
    disk.make_room()
    assert [path.name for path in files(tmp_path, "tmp") + files(tmp_path, "locks")] == ["fresh"]


def test_one_makes_room_at_a_time(tmp_path):
    import fcntl

    disk = DiskCache(tmp_path, 2 * SIZE)
    store(disk, 0)
    with open(tmp_path / "evict.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for number in range(1, 4):
            store(disk, number)
        assert len(held(disk)) == 4, "another process is at it"
    disk.make_room()
    assert len(held(disk)) == 1


def test_an_artifact_that_is_evicted_while_it_is_read_is_whole_or_not_there(tmp_path):
    disk = DiskCache(tmp_path, 1 << 40)
    ended = threading.Event()
    seen: list[str] = []

    def read() -> None:
        reader = DiskCache(tmp_path, 1 << 40)
        while not ended.is_set():
            try:
                data, _ = reader.read(IDS[0], MIB)
            except KernelNotFoundError:
                seen.append("gone")
            else:
                assert data == SAMPLES[0]
                seen.append("whole")

    thread = threading.Thread(target=read)
    store(disk, 0)
    thread.start()
    deadline = time.monotonic() + 20
    while not {"gone", "whole"} <= set(seen) and thread.is_alive() and time.monotonic() < deadline:
        store(disk, 0)
        disk._evict(disk._blobs(), 1)
    ended.set()
    thread.join(20)
    assert {"gone", "whole"} == set(seen)


def _churn(folder: str, registry: str, seed: int) -> None:
    cache = KernelCache(registry=registry, disk_dir=folder, max_disk_mb=3 * SIZE / MIB, max_entries=0)
    for turn in range(12):
        artifact_id = IDS[(seed + turn) % len(IDS)]
        kernel = asyncio.run(cache.load_kernel(artifact_id))
        assert kernel is not None and kernel.artifact_id == artifact_id
    assert cache.get_cache_stats()["quarantined"] == 0


def test_processes_that_evict_each_others_artifacts(tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    for data in SAMPLES:
        registry.publish_sync(data)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_churn, args=(str(tmp_path / "c"), registry.url, n)) for n in (0, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


# -- one fetch among several processes


def test_claims(tmp_path):
    disk, other = DiskCache(tmp_path, MIB), DiskCache(tmp_path, MIB)
    claim = disk.claim(IDS[0])
    assert claim is not None
    assert other.claim(IDS[0]) is None
    assert other.claim(IDS[1]) is not None
    claim.release()
    claim.release()
    again = other.claim(IDS[0])
    assert again is not None
    again.release()
    assert not (tmp_path / "locks" / f"{IDS[0]}.lock").exists()


def test_where_files_cannot_be_locked_everybody_may_fetch(tmp_path):
    (tmp_path / "file").write_text("")
    disk = DiskCache(tmp_path / "file", MIB)
    first, second = disk.claim(IDS[0]), disk.claim(IDS[0])
    assert first is not None and second is not None
    first.release()


def _load_one(folder: str, registry: str, queue) -> None:
    cache = KernelCache(registry=registry, disk_dir=folder)
    kernel = asyncio.run(cache.load_kernel(IDS[0]))
    stats = cache.get_cache_stats()
    queue.put((kernel is not None, stats["fetches"], stats["shared_fetches"]))


def test_a_disk_whose_name_is_too_long_costs_no_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / ("x" * 300)))
    FileRegistry(tmp_path / "registry").publish_sync(SAMPLES[0])
    cache = KernelCache(registry=tmp_path / "registry")
    assert asyncio.run(cache.load_kernel(IDS[0])) is not None
    assert cache.last_error(IDS[0]) is None
    assert cache.get_cache_stats()["disk_errors"] > 0


def test_two_processes_that_lack_the_same_artifact_fetch_it_once(tmp_path):
    with running_server() as server:
        server.add(SAMPLES[0])
        server.plan["blob"] = [with_(delay=1.0)]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        workers = [context.Process(target=_load_one, args=(str(tmp_path / "c"), server.url, queue)) for _ in range(2)]
        workers[0].start()
        while "blob" not in server.kinds():
            time.sleep(0.01)
        workers[1].start()
        results = sorted(queue.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join(60)
        # The second took longer to start than the first to fetch, or waited for it: either way nothing is fetched
        # twice.
        assert server.kinds() == ["blob"]
    assert [result[0] for result in results] == [True, True]
    assert sum(result[1] for result in results) == 1


def test_one_that_waits_takes_what_the_other_stores(tmp_path):
    with running_server() as server:
        server.add(SAMPLES[0])
        server.plan["blob"] = [with_(delay=0.5)]
        first, second = (KernelCache(registry=server.url, disk_dir=tmp_path / "c") for _ in range(2))

        async def both():
            return await asyncio.gather(first.load_kernel(IDS[0]), second.load_kernel(IDS[0]))

        kernels = asyncio.run(both())
        assert server.kinds() == ["blob"]
    assert {kernel.artifact_id for kernel in kernels} == {IDS[0]}
    assert first.get_cache_stats()["shared_fetches"] + second.get_cache_stats()["shared_fetches"] == 1


def test_one_that_waits_in_vain_fetches_for_itself(tmp_path):
    with running_server() as server:
        server.add(SAMPLES[0])
        cache = KernelCache(registry=server.url, disk_dir=tmp_path / "c", timeout_s=0.3)
        claim = DiskCache(tmp_path / "c", MIB).claim(IDS[0])
        assert asyncio.run(cache.load_kernel(IDS[0])) is not None
        assert claim is not None
        claim.release()


def test_a_claim_ends_when_its_load_fails(tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    cache = KernelCache(registry=registry, disk_dir=tmp_path / "c", retries=0)
    assert asyncio.run(cache.load_kernel(IDS[0])) is None
    claim = DiskCache(tmp_path / "c", MIB).claim(IDS[0])
    assert claim is not None
    claim.release()


# -- trust


def signed(key: SigningKey) -> bytes:
    blueprint = get("bottleneck", rank=2)
    weights = initialise(blueprint, 6, 4, 0)
    return pack(blueprint, weights, d_in=6, d_out=4, seed=0, sign_with=key)


def test_policy_and_keys_are_the_caches(tmp_path):
    key = SigningKey.generate()
    registry = FileRegistry(tmp_path / "registry")
    good, plain = registry.publish_sync(signed(key)), registry.publish_sync(SAMPLES[0])
    strict = KernelCache(
        registry=registry, disk_dir=tmp_path / "c", trusted_keys=[key.public], policy="strict", max_entries=0
    )
    assert asyncio.run(strict.load_kernel(good)) is not None
    with pytest.raises(ArtifactError, match="refused by policy strict"):
        asyncio.run(strict.load_kernel(plain))
    # Another cache may keep it in the folder that both share, where the strict one refuses it and leaves it.
    assert asyncio.run(KernelCache(registry=registry, disk_dir=tmp_path / "c").load_kernel(plain)) is not None
    with pytest.raises(ArtifactError, match="refused by policy strict"):
        asyncio.run(strict.load_kernel(plain))
    assert strict.get_cache_stats()["quarantined"] == 0
    assert DiskCache(tmp_path / "c", MIB).holds(plain)


@pytest.mark.parametrize("options", [{"policy": "lax"}, {"trusted_keys": "no such file"}, {"max_disk_mb": -1}])
def test_settings_that_are_none(tmp_path, options):
    with pytest.raises(ValueError, match=r"lax|no such file|max_disk_mb"):
        KernelCache(registry=tmp_path, **options)
