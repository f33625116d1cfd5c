"""The cache in front of a registry over HTTP: retries, pauses, the circuit, being offline."""

from __future__ import annotations

import asyncio
import logging

import pytest

from esper.artifacts import Artifact
from esper.contracts.errors import ArtifactError
from esper.execution.circuit_breaker import CircuitBreaker
from esper.execution.fetching import Fetcher
from esper.execution.kernel_cache import KernelCache
from tests.artifacts.http_server import error, running_server, with_
from tests.artifacts.samples import sample

DATA = sample(d_in=64, d_out=64, rank=64)
A = Artifact.open(DATA).artifact_id
B = Artifact.open(sample(1)).artifact_id


@pytest.fixture
def server():
    with running_server() as server:
        server.add(DATA)
        server.add(sample(1))
        yield server


def make(server, tmp_path, **options) -> KernelCache:
    return KernelCache(registry=server.url, disk_dir=tmp_path / "cache", **{"backoff_s": 0.0, **options})


def load(cache, artifact_id=A):
    return asyncio.run(cache.load_kernel(artifact_id))


def test_load(server, tmp_path):
    cache = make(server, tmp_path)
    assert load(cache).artifact_id == A
    cache.clear_cache()
    assert load(cache).artifact_id == A
    assert server.kinds() == ["blob"]
    stats = cache.get_cache_stats()
    assert (stats["fetches"], stats["disk_hits"], stats["offline"], stats["last_error"]) == (1, 1, False, None)


@pytest.mark.parametrize("kind", ["metadata", "blob"])
def test_what_may_pass_is_tried_again(server, tmp_path, kind):
    server.elsewhere = kind == "metadata"
    server.plan[kind] = [error(503), error(500), error(429, retry_after="0")]
    cache = make(server, tmp_path)
    assert load(cache) is not None
    assert cache.get_cache_stats()["retries"] == 3


def test_what_will_not_pass_is_not(server, tmp_path):
    server.plan["blob"] = [error(401)]
    cache = make(server, tmp_path)
    assert load(cache) is None
    assert "ESPER_REGISTRY_TOKEN" in cache.last_error(A)
    assert server.kinds() == ["blob"]
    stats = cache.get_cache_stats()
    assert (stats["retries"], stats["circuit_open"], stats["offline"]) == (0, False, False)


def test_a_download_that_breaks_off_costs_no_retry(server, tmp_path):
    server.plan["blob"] = [with_(cut=10_000), with_(cut=1)]
    cache = make(server, tmp_path)
    assert load(cache) is not None
    assert cache.get_cache_stats()["retries"] == 0


def test_bytes_that_were_altered_on_the_way(server, tmp_path):
    server.plan["blob"] = [with_(body=b"x" * len(DATA))]
    cache = make(server, tmp_path)
    with pytest.raises(ArtifactError, match="it was altered"):
        load(cache)
    assert load(cache) is not None, "nothing of it was kept"


def test_too_large(server, tmp_path):
    server.plan["blob"] = [with_(drip=(1, 3600.0))]
    with pytest.raises(ArtifactError, match="more than the limit"):
        load(make(server, tmp_path, max_artifact_mb=0.01))


def test_a_registry_that_asks_for_too_long_a_pause_is_left_alone(server, tmp_path):
    server.plan["blob"] = [error(503, retry_after="3600")]
    cache = make(server, tmp_path)
    assert load(cache) is None
    assert server.kinds() == ["blob"]
    assert "answered 503" in cache.last_error(A)


def test_a_pause_that_is_asked_for_is_kept(monkeypatch):
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def remember(seconds: float) -> None:
        if seconds >= 1:  # others sleep for less
            pauses.append(seconds)
        await sleep(min(seconds, 0.1))

    monkeypatch.setattr("esper.execution.fetching.asyncio.sleep", remember)
    with running_server() as server:
        server.add(DATA)
        server.plan["blob"] = [error(503, retry_after="7"), error(429, retry_after="2")]
        cache = KernelCache(registry=server.url, use_disk=False, backoff_s=0.0)
        assert load(cache) is not None
    assert pauses == [7.0, 2.0]


def test_offline_with_a_warm_disk(server, tmp_path, caplog):
    assert load(make(server, tmp_path)) is not None
    server.plan["blob"] = [error(503)] * 9
    cache = make(server, tmp_path, retries=0)
    with caplog.at_level(logging.INFO, "esper.execution.fetching"):
        assert load(cache) is not None, "the disk has it"
        assert not cache.get_cache_stats()["offline"], "nobody was asked"
        for _ in range(3):
            assert load(cache, B) is None
        stats = cache.get_cache_stats()
        assert stats["offline"] and "answered 503" in stats["last_error"]
        cache.clear_cache()
        assert load(cache) is not None, "the disk still has it"
        assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
        assert "disk cache" in caplog.text
        server.plan["blob"].clear()
        assert load(cache, B) is not None
    assert not cache.get_cache_stats()["offline"]
    assert "answers again" in caplog.text


def test_the_circuit_opens_for_all_ids(server, tmp_path):
    server.plan["blob"] = [error(500)] * 9
    cache = make(server, tmp_path, retries=5, breaker_threshold=2, breaker_cooldown_s=3600)
    assert load(cache) is None and load(cache, B) is None
    assert server.kinds() == ["blob"] * 2
    assert cache.get_cache_stats()["circuit_open"]
    assert "not asked" in cache.last_error(B)


def test_many_at_once(server, tmp_path):
    ids = [server.add(sample(seed)) for seed in range(20)]
    cache = make(server, tmp_path)
    found = asyncio.run(cache.preload_kernels(ids))
    assert all(found.values())
    assert server.connections <= 16


def test_a_refusal_without_a_retry_is_no_reason_to_open_the_circuit():
    class Refusing:
        url = "memory://refusing"
        asked = 0

        async def fetch(self, artifact_id, *, max_bytes):
            self.asked += 1
            raise ConnectionError("down")

    breaker, registry = CircuitBreaker(2, 3600.0), Refusing()
    fetcher = Fetcher(
        registry, max_bytes=1, timeout_s=1.0, retries=0, backoff_s=0.0, breaker=breaker, on_retry=lambda: None
    )
    assert fetcher.error is None
    for _ in range(4):
        with pytest.raises(ConnectionError):
            asyncio.run(fetcher.fetch(A))
    assert registry.asked == 2
    assert fetcher.error == "down"
