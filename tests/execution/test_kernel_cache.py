"""The kernel cache: three tiers, one fetch an id, and a reason for everything that is not to be had."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import multiprocessing
import pickle
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

import esper
from esper.artifacts import Artifact, FileRegistry
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from esper.execution import background
from esper.execution.kernel_cache import KernelCache
from tests.artifacts.forks import in_forked_child
from tests.artifacts.samples import forged, sample, with_manifest

SAMPLES = {Artifact.open(data).artifact_id: data for data in map(sample, range(4))}
A, B, C, D = SAMPLES
MIB = 1 << 20


class Registry:
    """A registry in memory that counts, waits and fails as told."""

    url = "memory://test"

    def __init__(self, *failures: Exception) -> None:
        self.contents = dict(SAMPLES)
        self.failures = list(failures)
        self.fetched: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.gate: asyncio.Event | None = None

    async def fetch(self, artifact_id, *, max_bytes):
        self.fetched.append(artifact_id)
        self.loops.add(asyncio.get_running_loop())
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        if artifact_id not in self.contents:
            raise KernelNotFoundError(f"{artifact_id}: no such artifact")
        return self.contents[artifact_id]

    async def publish(self, data):
        raise NotImplementedError

    async def list(self, *, prefix=""):
        raise NotImplementedError

    async def describe(self, artifact_id):
        raise NotImplementedError


def load(cache: KernelCache, artifact_id: str):
    return asyncio.run(cache.load_kernel(artifact_id))


def make(tmp_path, registry, **options) -> KernelCache:
    return KernelCache(registry=registry, disk_dir=tmp_path / "cache", **{"backoff_s": 0.0, **options})


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def cache(tmp_path, registry):
    return make(tmp_path, registry)


def stats(cache: KernelCache, *keys: str) -> tuple:
    found = cache.get_cache_stats()
    return tuple(found[key] for key in keys)


# -- tiers


def test_what_is_loaded(cache):
    kernel, artifact = load(cache, A), Artifact.open(SAMPLES[A])
    assert (kernel.artifact_id, kernel.kernel_id, kernel.nbytes) == (A, artifact.kernel_id, artifact.nbytes)
    assert (kernel.d_in, kernel.d_out) == (6, 4)
    assert kernel.blueprint == artifact.blueprint
    assert kernel.family == artifact.family
    assert kernel.manifest == artifact.manifest
    for name, tensor in artifact.tensors().items():
        assert torch.equal(kernel.tensors[name], tensor)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kernel: pickle.loads(pickle.dumps(kernel))])
def test_a_kernel_can_be_copied(cache, copied):
    kernel = load(cache, A)
    other = copied(kernel)
    assert (other.artifact_id, other.blueprint, other.family) == (A, kernel.blueprint, kernel.family)
    for name, tensor in kernel.tensors.items():
        assert torch.equal(other.tensors[name], tensor)
        assert other.tensors[name].data_ptr() != tensor.data_ptr()


def test_memory_then_disk_then_registry(tmp_path, registry):
    cache = make(tmp_path, registry)
    first = load(cache, A)
    assert stats(cache, "hits", "misses", "disk_hits", "fetches", "entries") == (0, 1, 0, 1, 1)
    assert load(cache, A) is first
    assert stats(cache, "hits", "misses", "disk_hits", "fetches", "hit_rate") == (1, 1, 0, 1, 0.5)
    cache.clear_cache()
    assert stats(cache, "entries", "total_size_mb") == (0, 0.0)
    assert load(cache, A) is not first
    assert stats(cache, "disk_hits", "fetches") == (1, 1)
    assert load(make(tmp_path, registry), A).artifact_id == A
    assert registry.fetched == [A]


def test_without_a_disk_tier(tmp_path, registry):
    cache = make(tmp_path, registry, use_disk=False)
    load(cache, A)
    cache.clear_cache()
    load(cache, A)
    assert registry.fetched == [A, A]
    assert not (tmp_path / "cache").exists()


def test_the_disk_tier_goes_where_the_environment_says(tmp_path, registry, monkeypatch):
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "mine"))
    load(KernelCache(registry=registry), A)
    assert (tmp_path / "mine" / "kernels" / "kernels" / f"{A}.json").exists()


def test_it_is_the_public_name():
    assert esper.KernelCache is KernelCache


# -- what is not to be had, and what is bad


@pytest.mark.parametrize("artifact_id", ["", "test-kernel-123", "../../etc/passwd", None, 3])
def test_no_id(cache, registry, artifact_id):
    assert load(cache, artifact_id) is None
    assert "not an artifact id" in cache.last_error(artifact_id)
    assert registry.fetched == []


def test_unknown_id(cache, registry):
    del registry.contents[A]
    assert load(cache, A) is None
    assert cache.last_error(A) == "no such artifact"
    assert registry.fetched == [A], "what does not exist is not asked for again"
    registry.contents[A] = SAMPLES[A]
    assert load(cache, A) is not None
    assert cache.last_error(A) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SAMPLES[A][:-1], "SHA-256 is [0-9a-f]{64}: they are truncated"),
        (SAMPLES[A][:-1] + b"\x01", "altered"),
        (bytearray(SAMPLES[A] + b"\x01"), "altered"),
        (SAMPLES[B], "or another artifact's"),
        (b"", "truncated"),
        (bytes(MIB), "altered"),
    ],
)
def test_had_and_bad(cache, registry, data, message, tmp_path):
    registry.contents[A] = data
    with pytest.raises(ArtifactError, match=message):
        load(cache, A)
    assert cache.last_error(A)
    assert stats(cache, "failures", "entries", "in_flight") == (1, 0, 0)
    assert not list((tmp_path / "cache").rglob("*.json")), "nothing bad is kept on the disk"


def consistent(data: bytes) -> tuple[str, bytes]:
    """Forged bytes under an id that agrees with them, as a hostile registry would offer them."""
    digest = hashlib.sha256(data).hexdigest()
    return f"{A.rsplit('-', 1)[0]}-{digest[:8]}", data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"rubbish", "too few"),
        (SAMPLES[A][:-1], "outside the"),
        (forged(SAMPLES[A], "up.weight", torch.zeros(2, 4)), r"has shape \[2, 4\]; the blueprint needs \[4, 2\]"),
        (forged(SAMPLES[A], "up.weight", torch.full((4, 2), torch.nan)), "NaN or infinite"),
        (with_manifest(SAMPLES[A], lambda m: m.update(format=7)), "format version 7"),
        (with_manifest(SAMPLES[A], lambda m: m["blueprint"].update(schema=7)), "schema version 7"),
        (with_manifest(SAMPLES[A], lambda m: m.update(pipeline="slow")), "asked for .*-fast-.* was given .*-slow-"),
    ],
)
def test_an_id_that_agrees_with_bad_bytes_helps_nothing(cache, registry, data, message):
    artifact_id, registry.contents[artifact_id] = consistent(data)
    with pytest.raises(ArtifactError, match=message):
        load(cache, artifact_id)


def test_too_large(tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    registry.publish_sync(SAMPLES[A])
    limit = (len(SAMPLES[A]) - 1) / MIB
    small = make(tmp_path, registry, max_artifact_mb=limit)
    with pytest.raises(ArtifactError, match="more than the limit"):
        load(small, A)
    # A client that disregards the limit it is given changes nothing.
    with pytest.raises(ArtifactError, match="more than the limit"):
        load(make(tmp_path, Registry(), max_artifact_mb=limit), A)
    # What another process may load stays on the shared disk.
    load(make(tmp_path, registry), A)
    shutil.rmtree(registry.folder)
    assert load(small, A) is None
    assert stats(small, "quarantined") == (0,)
    assert load(make(tmp_path, registry), A) is not None


def test_a_client_with_a_bug_of_its_own(tmp_path):
    cache = make(tmp_path, Registry(ZeroDivisionError("oops")))
    assert load(cache, A) is None
    assert "ZeroDivisionError: oops" in cache.last_error(A)


def test_registry_removed_mid_run(tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    for data in SAMPLES.values():
        registry.publish_sync(data)
    cache = make(tmp_path, registry, retries=1)
    assert load(cache, A) is not None
    shutil.rmtree(registry.folder)
    assert load(cache, B) is None
    assert "does not exist" in cache.last_error(B)
    assert load(cache, A) is not None, "what memory holds is still there"
    cache.clear_cache()
    assert load(cache, A) is not None, "and what the disk holds"
    for data in SAMPLES.values():
        registry.publish_sync(data)
    assert load(cache, B) is not None, "a registry that came back serves again"


# -- retries and the circuit


@pytest.mark.parametrize("failure", [RegistryUnavailableError("down"), ConnectionResetError("reset"), TimeoutError()])
def test_passing_failures_are_tried_again(tmp_path, failure):
    registry = Registry(failure, failure)
    cache = make(tmp_path, registry, retries=2)
    assert load(cache, A) is not None
    assert registry.fetched == [A] * 3
    assert stats(cache, "retries", "failures", "circuit_open") == (2, 0, False)


def test_retries_end(tmp_path):
    registry = Registry(*[RegistryUnavailableError("down")] * 9)
    cache = make(tmp_path, registry, retries=2)
    assert load(cache, A) is None
    assert cache.last_error(A) == "registry memory://test does not answer: down"
    assert registry.fetched == [A] * 3


def test_an_attempt_that_hangs_is_given_up(tmp_path):
    registry = Registry()

    async def never():
        registry.gate = asyncio.Event()

    background.submit(never()).result(30)
    cache = make(tmp_path, registry, retries=1, timeout_s=0.01)
    assert load(cache, A) is None
    assert "no answer within 0.01 s" in cache.last_error(A)
    assert registry.fetched == [A, A]


def test_open_circuit_asks_no_more(tmp_path):
    registry = Registry(*[RegistryUnavailableError("down")] * 9)
    cache = make(tmp_path, registry, retries=5, breaker_threshold=2, breaker_cooldown_s=3600)
    assert load(cache, A) is None
    assert registry.fetched == [A, A], "it opens in the middle of the retries"
    assert stats(cache, "circuit_open") == (True,)
    assert load(cache, B) is None
    assert "not asked" in cache.last_error(B)
    assert registry.fetched == [A, A]


def test_circuit_closes_after_a_good_trial(tmp_path):
    registry = Registry(RegistryUnavailableError("down"))
    cache = make(tmp_path, registry, retries=0, breaker_threshold=1, breaker_cooldown_s=0)
    assert load(cache, A) is None
    assert stats(cache, "circuit_open") == (True,)
    assert load(cache, A) is not None
    assert stats(cache, "circuit_open") == (False,)


def test_retries_leave_the_users_random_numbers_alone(tmp_path):
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    load(make(tmp_path, Registry(RegistryUnavailableError("down"))), A)
    assert random.random() == expected


# -- one flight


def hold(registry: Registry) -> None:
    """Make fetches wait for :func:`release`."""

    async def make_gate():
        registry.gate = asyncio.Event()

    background.submit(make_gate()).result(30)


def release(registry: Registry) -> None:
    async def open_gate():
        registry.gate.set()

    background.submit(open_gate()).result(30)


def test_one_fetch_however_many_ask_from_wherever(cache, registry):
    hold(registry)
    arrived = threading.Barrier(9)

    def ask():
        async def several():
            asked = [asyncio.ensure_future(cache.load_kernel(A)) for _ in range(5)]
            await asyncio.sleep(0)
            await asyncio.to_thread(arrived.wait, 30)
            return await asyncio.gather(*asked)

        return asyncio.run(several())

    with ThreadPoolExecutor(9) as pool:
        results = [pool.submit(ask) for _ in range(8)]
        arrived.wait(30)
        from_the_background = background.submit(cache.load_kernel(A))
        assert stats(cache, "in_flight") == (1,)
        release(registry)
        kernels = {id(kernel) for result in results for kernel in result.result(30)}
        kernels.add(id(from_the_background.result(30)))
    assert len(kernels) == 1
    assert registry.fetched == [A]
    assert stats(cache, "in_flight", "misses") == (0, 41)


def test_clients_run_on_the_background_loop(cache, registry):
    load(cache, A)
    load(cache, B)
    here = background.submit(_running_loop()).result(30)
    assert registry.loops == {here}


async def _running_loop():
    return asyncio.get_running_loop()


def test_a_cancelled_asker_takes_nothing_from_the_others(cache, registry):
    hold(registry)

    async def main():
        first, second = (asyncio.ensure_future(cache.load_kernel(A)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        release(registry)
        return await second

    assert asyncio.run(main()).artifact_id == A


def test_all_who_asked_hear_of_a_bad_artifact(cache, registry):
    registry.contents[A] = b"rubbish"
    hold(registry)

    async def main():
        asked = [asyncio.ensure_future(cache.load_kernel(A)) for _ in range(3)]
        await asyncio.sleep(0)
        release(registry)
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(result) for result in asyncio.run(main())] == [ArtifactError] * 3
    assert registry.fetched == [A]


def test_preload(cache, registry):
    del registry.contents[B]
    registry.contents[C] = b"rubbish"
    found = asyncio.run(cache.preload_kernels([A, B, C, A, "no id"]))
    assert {key: kernel is not None for key, kernel in found.items()} == {A: True, B: False, C: False, "no id": False}
    assert all(cache.last_error(key) for key in (B, C, "no id"))
    assert stats(cache, "entries", "failures") == (1, 3)


# -- eviction


def test_least_recently_used_goes_first_by_entries(tmp_path, registry):
    cache = make(tmp_path, registry, max_entries=2)
    load(cache, A), load(cache, B), load(cache, A), load(cache, C)
    assert stats(cache, "entries", "evictions") == (2, 1)
    hits = cache.get_cache_stats()["hits"]
    load(cache, A), load(cache, C)
    assert cache.get_cache_stats()["hits"] == hits + 2
    load(cache, B)
    assert cache.get_cache_stats()["hits"] == hits + 2


def test_least_recently_used_goes_first_by_bytes(tmp_path, registry):
    size = len(SAMPLES[A])
    assert all(len(data) == size for data in SAMPLES.values())
    cache = make(tmp_path, registry, max_cache_size_mb=2 * size / MIB)
    for artifact_id in SAMPLES:
        load(cache, artifact_id)
    both = 2 * size / MIB
    assert stats(cache, "entries", "evictions", "total_size_mb", "max_size_mb") == (2, 2, both, both)


@pytest.mark.parametrize("options", [{"max_cache_size_mb": 0}, {"max_entries": 0}])
def test_what_does_not_fit_is_handed_out_but_not_kept(tmp_path, registry, options):
    cache = make(tmp_path, registry, **options)
    assert load(cache, A) is not None
    assert stats(cache, "entries", "total_size_mb", "evictions") == (0, 0.0, 0)


def test_remove(cache):
    load(cache, A)
    assert cache.remove_kernel(A) is True
    assert cache.remove_kernel(A) is False
    assert stats(cache, "entries", "total_size_mb") == (0, 0.0)


# -- the disk


def entry(tmp_path, artifact_id: str):
    return tmp_path / "cache" / "kernels" / f"{artifact_id}.json"


def blob(tmp_path, artifact_id: str):
    digest = Artifact.open(SAMPLES[artifact_id]).sha256
    return tmp_path / "cache" / "blobs" / "sha256" / digest[:2] / digest


@pytest.mark.parametrize("damage", ["blob altered", "blob cut", "blob empty", "entry cut", "entry empty"])
def test_damage_on_the_disk_is_set_aside_and_fetched_again(tmp_path, registry, damage):
    load(make(tmp_path, registry), A)
    path = (blob if damage.startswith("blob") else entry)(tmp_path, A)
    data = bytearray(path.read_bytes())
    if damage.endswith("altered"):
        data[-1] ^= 1
    path.write_bytes(data if damage.endswith("altered") else data[: len(data) // 2] if damage.endswith("cut") else b"")
    cache = make(tmp_path, registry)
    assert load(cache, A) is not None
    assert registry.fetched == [A, A]
    assert stats(cache, "quarantined", "fetches", "disk_hits") == (1, 1, 0)
    if damage.startswith("blob"):
        assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1
    again = make(tmp_path, registry)
    assert load(again, A) is not None
    assert stats(again, "disk_hits") == (1,), "the disk was repaired"


def test_missing_blob_on_the_disk_is_fetched_again(tmp_path, registry):
    load(make(tmp_path, registry), A)
    blob(tmp_path, A).unlink()
    assert load(make(tmp_path, registry), A) is not None
    assert blob(tmp_path, A).exists()


def test_a_disk_that_cannot_be_written_costs_no_kernel(tmp_path, registry):
    (tmp_path / "cache").write_text("a file, not a folder")
    cache = make(tmp_path, registry)
    assert load(cache, A) is not None
    assert stats(cache, "disk_errors") == (2,), "one for reading, one for writing"


def _load_all(folder: str, registry: str) -> None:
    cache = KernelCache(registry=registry, disk_dir=folder)
    for _ in range(3):
        for artifact_id, data in SAMPLES.items():
            cache.clear_cache()
            kernel = load(cache, artifact_id)
            assert kernel.kernel_id == Artifact.open(data).kernel_id
            cache._disk.set_aside(artifact_id, MIB)  # the other process finds it gone, at any moment


def test_two_processes_share_one_disk(tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    for data in SAMPLES.values():
        registry.publish_sync(data)
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "cache"), registry.url)
    workers = [context.Process(target=_load_all, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


# -- copies, forks, settings


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_empty_with_the_same_settings(tmp_path, copied):
    registry = FileRegistry(tmp_path / "registry")
    registry.publish_sync(SAMPLES[A])
    cache = make(tmp_path, registry, max_cache_size_mb=3, max_entries=7)
    load(cache, A)
    other = copied(cache)
    assert stats(other, "entries", "max_entries", "max_size_mb", "misses") == (0, 7, 3.0, 0)
    assert other.registry.url == registry.url
    assert load(other, A) is not load(cache, A)
    assert stats(other, "disk_hits") == (1,), "the same disk"


def test_a_forked_child_loads_even_what_its_parent_was_loading(tmp_path, registry):
    cache = make(tmp_path, registry, timeout_s=2.0)  # so long the child waits for what its parent fetches
    load(cache, B)
    hold(registry)
    flight = background.submit(cache.load_kernel(A))
    background.submit(asyncio.sleep(0)).result(30)
    assert stats(cache, "in_flight") == (1,)

    def check():
        registry.gate = None
        return load(cache, A) is not None and load(cache, B) is not None

    assert in_forked_child(check)
    release(registry)
    assert flight.result(30).artifact_id == A


@pytest.mark.parametrize(
    "options",
    [
        {"max_cache_size_mb": -1},
        {"max_cache_size_mb": float("nan")},
        {"max_entries": 1.5},
        {"max_entries": True},
        {"timeout_s": float("inf")},
        {"retries": -1},
        {"breaker_threshold": 0},
        {"max_artifact_mb": "1"},
    ],
)
def test_settings_out_of_range(tmp_path, registry, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(tmp_path, registry, **options)


def test_tensors_go_to_the_device(tmp_path, registry):
    kernel = load(make(tmp_path, registry, device="meta"), A)
    assert {tensor.device.type for tensor in kernel.tensors.values()} == {"meta"}


def test_layers_ask_for_their_own_device(tmp_path, registry):
    cache = KernelCache(registry=registry, disk_dir=tmp_path)
    here, there = torch.device("cpu"), torch.device("meta")

    async def both():
        return await asyncio.gather(*(cache.load_kernel(A, device=device) for device in (here, there, there)))

    found = asyncio.run(both())
    assert [{t.device for t in kernel.tensors.values()} for kernel in found] == [{here}, {there}, {there}]
    assert registry.fetched == [A] and cache.get_cache_stats()["entries"] == 2
    again = asyncio.run(both())
    assert all(one is other for one, other in zip(again, [found[0], found[1], found[1]], strict=True))
    assert cache.remove_kernel(A) and not cache.remove_kernel(A)
    assert cache.get_cache_stats()["entries"] == 0 == cache.get_cache_stats()["total_size_mb"]


@pytest.mark.parametrize("when", ["request", "load"])
def test_a_layer_on_a_device_gets_kernels_that_are_there(registry, when, monkeypatch):
    """So that tensors travel beside the training, and binaries for the GPU are there when the seed wakes."""
    model = esper.wrap(torch.nn.Linear(8, 8), registry=registry, telemetry_enabled=False)
    (name,) = model.get_layer_names()
    layer = model.layer(name)
    there = torch.device("meta")
    monkeypatch.setattr(layer.state_layout, "alpha_blend", torch.empty(4, device=there))
    given: list[torch.device] = []

    def commit(seed_idx, kernel, **_):
        given.extend(tensor.device for tensor in kernel.tensors.values())
        return True

    monkeypatch.setattr(layer, "commit", commit)
    if when == "load":
        assert asyncio.run(model.load_kernel(name, 0, A))
    else:
        done = model.request_kernel(name, 0, A)
        deadline = time.monotonic() + 30
        while not done.done() and time.monotonic() < deadline:
            model.step()
            time.sleep(0.01)
        assert done.result(0)
    assert set(given) == {there}


def test_reasons_kept_are_bounded(cache):
    for number in range(1100):
        cache._land(f"id {number}", cache.device, Future(), KernelNotFoundError("gone"))
    assert cache.last_error("id 0") is None
    assert cache.last_error("id 1099") == "gone"
