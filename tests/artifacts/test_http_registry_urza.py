"""The client against the service it was made for."""

from __future__ import annotations

import asyncio

import pytest

import esper
from esper.artifacts import Artifact
from esper.artifacts.http_registry import HttpRegistry
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from tests.artifacts.samples import sample
from tests.services.urza.server import running_urza

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def urza(tmp_path_factory):
    with running_urza(tmp_path_factory.mktemp("urza")) as server:
        yield server


@pytest.fixture
def registry(urza):
    return HttpRegistry(urza.url, urza.admin_token)


def test_publish_describe_list_fetch(registry):
    ids = [asyncio.run(registry.publish(sample(seed))) for seed in range(3)]
    assert ids == [Artifact.open(sample(seed)).artifact_id for seed in range(3)]
    assert asyncio.run(registry.publish(sample(0))) == ids[0], "again changes nothing"
    for seed, artifact_id in enumerate(ids):
        assert asyncio.run(registry.fetch(artifact_id, max_bytes=LIMIT)) == sample(seed)
    listed = asyncio.run(registry.list())
    assert [line.artifact_id for line in listed] == sorted(ids)
    for line in listed:
        assert asyncio.run(registry.describe(line.artifact_id)) == line
    assert [line.artifact_id for line in asyncio.run(registry.list(prefix=ids[1]))] == [ids[1]]


def test_what_is_not_there(registry):
    with pytest.raises(KernelNotFoundError, match="no such artifact"):
        asyncio.run(registry.fetch(Artifact.open(sample(99)).artifact_id, max_bytes=LIMIT))


def test_too_large(registry):
    artifact_id = asyncio.run(registry.publish(sample(4)))
    with pytest.raises(ArtifactError, match="more than the limit of 10"):
        asyncio.run(registry.fetch(artifact_id, max_bytes=10))


@pytest.mark.parametrize("token", [None, "urza_wrong"])
def test_without_a_good_token(urza, token, monkeypatch):
    monkeypatch.delenv("ESPER_REGISTRY_TOKEN", raising=False)
    with pytest.raises(RegistryUnavailableError, match="ESPER_REGISTRY_TOKEN") as caught:
        asyncio.run(HttpRegistry(urza.url, token).fetch(Artifact.open(sample()).artifact_id, max_bytes=LIMIT))
    assert not caught.value.retryable
    assert "urza_wrong" not in str(caught.value)


def test_by_url_from_the_package_itself(urza, tmp_path):
    url = urza.url.replace("://", f"://:{urza.admin_token}@")
    artifact_id = esper.compile("lowrank", d_in=8, d_out=8, rank=2, registry=url)
    cache = esper.KernelCache(registry=url, disk_dir=tmp_path)
    assert asyncio.run(cache.load_kernel(artifact_id)).artifact_id == artifact_id
    assert urza.admin_token not in repr(cache)
    assert cache.registry.url == urza.url


def test_a_server_that_is_killed_and_started_again(urza, tmp_path):
    registry = HttpRegistry(urza.url, urza.admin_token)
    artifact_id = asyncio.run(registry.publish(sample(5)))
    cache = esper.KernelCache(registry=registry, use_disk=False, retries=1, backoff_s=0.01)
    assert asyncio.run(cache.load_kernel(artifact_id)) is not None
    cache.clear_cache()
    urza.kill()
    assert asyncio.run(cache.load_kernel(artifact_id)) is None
    assert cache.get_cache_stats()["offline"]
    urza.start()
    assert asyncio.run(cache.load_kernel(artifact_id)) is not None, "over connections made anew"
    assert not cache.get_cache_stats()["offline"]
