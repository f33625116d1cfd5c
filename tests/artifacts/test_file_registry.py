"""The registry in a folder: content-addressed, atomic, idempotent, and honest about what is wrong."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.artifacts import Artifact, FileRegistry
from esper.artifacts.folder import ArtifactFolder
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.registry import RegistryClient
from tests.artifacts.samples import sample

LIMIT = 1 << 20


@pytest.fixture
def registry(tmp_path):
    return FileRegistry(tmp_path / "registry")


def publish(registry: FileRegistry, data: bytes) -> str:
    return asyncio.run(registry.publish(data))


def fetch(registry: FileRegistry, artifact_id: str, max_bytes: int = LIMIT) -> bytes:
    return bytes(asyncio.run(registry.fetch(artifact_id, max_bytes=max_bytes)))


def files(registry: FileRegistry) -> list[str]:
    return sorted(str(path.relative_to(registry.folder)) for path in registry.folder.rglob("*") if path.is_file())


def test_it_is_a_registry_client(registry):
    assert isinstance(registry, RegistryClient)
    assert registry.url == registry.folder.as_uri()


def test_publish_and_fetch(registry):
    data = sample()
    artifact = Artifact.open(data)
    assert publish(registry, data) == artifact.artifact_id
    assert fetch(registry, artifact.artifact_id) == data
    digest = artifact.sha256
    assert files(registry) == [f"blobs/sha256/{digest[:2]}/{digest}", f"kernels/{artifact.artifact_id}.json"]
    assert registry.blob_path(artifact.artifact_id).read_bytes() == data


def test_publishing_again_changes_nothing(registry):
    data = sample()
    artifact_id = publish(registry, data)
    before = {name: (registry.folder / name).stat().st_mtime_ns for name in files(registry)}
    assert publish(registry, data) == artifact_id
    assert {name: (registry.folder / name).stat().st_mtime_ns for name in files(registry)} == before


def test_publishing_repairs_what_is_damaged(registry):
    data = sample()
    artifact_id = publish(registry, data)
    registry.blob_path(artifact_id).write_bytes(b"rubbish")
    publish(registry, data)
    assert fetch(registry, artifact_id) == data
    (registry.folder / "kernels" / f"{artifact_id}.json").write_text("{")
    publish(registry, data)
    assert fetch(registry, artifact_id) == data


def test_what_is_no_artifact_is_not_published(registry):
    with pytest.raises(ArtifactError):
        publish(registry, sample()[:-1])
    assert not registry.folder.exists()


def test_list_and_describe(registry):
    artifacts = [Artifact.open(sample(seed)) for seed in range(3)]
    for seed in range(3):
        publish(registry, sample(seed))
    listed = asyncio.run(registry.list())
    assert [line.artifact_id for line in listed] == sorted(artifact.artifact_id for artifact in artifacts)
    one = artifacts[0]
    line = asyncio.run(registry.describe(one.artifact_id))
    assert line in listed
    assert (line.sha256, line.size) == (one.sha256, one.nbytes)
    assert line.info == {
        "name": "bottleneck",
        "family": "bottleneck",
        "d_in": 6,
        "d_out": 4,
        "dtype": "float32",
        "parameters": one.resolved.parameter_count,
        "seed": 0,
    }
    assert asyncio.run(registry.list(prefix=one.artifact_id)) == [line]
    assert asyncio.run(registry.list(prefix="zz")) == []


def test_list_names_what_it_leaves_out(registry):
    artifact_id = publish(registry, sample())
    (registry.folder / "kernels" / f"{artifact_id}.json").write_text("[]")
    (registry.folder / "kernels" / "notes.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match=f"{artifact_id}: its index entry is damaged"):
        assert asyncio.run(registry.list()) == []


@pytest.mark.parametrize("artifact_id", ["", "../../etc/passwd", "kernels", "a\0b", "x" * 5000, "test-kernel-123"])
def test_ids_that_are_none_reach_no_file(registry, artifact_id, monkeypatch):
    publish(registry, sample())
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(KernelNotFoundError, match="not an artifact id"):
        fetch(registry, artifact_id)


def test_an_unknown_id(registry):
    publish(registry, sample())
    with pytest.raises(KernelNotFoundError, match="no such artifact"):
        fetch(registry, Artifact.open(sample(9)).artifact_id)


def test_size_limit_comes_before_reading(registry):
    artifact_id = publish(registry, sample())
    blob = registry.blob_path(artifact_id)
    size = blob.stat().st_size
    with pytest.raises(ArtifactError, match=f"{size} bytes, more than the limit of 10"):
        fetch(registry, artifact_id, max_bytes=10)
    os.truncate(blob, 1 << 40)  # a blob that grew behind the index's back: never read
    with pytest.raises(ArtifactError, match="the index says"):
        fetch(registry, artifact_id)


def test_altered_blob(registry):
    artifact_id = publish(registry, sample())
    blob = registry.blob_path(artifact_id)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ArtifactError, match="the file was altered"):
        fetch(registry, artifact_id)


def test_missing_blob(registry):
    artifact_id = publish(registry, sample())
    registry.blob_path(artifact_id).unlink()
    with pytest.raises(KernelNotFoundError, match="its blob is missing"):
        fetch(registry, artifact_id)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"sha256": "../../x"},
        {"sha256": "00" * 32},
        {"size": -1},
        {"size": True},
        {"info": []},
        {"artifact_id": "0123456789abcdef-any-fast-89abcdef"},
    ],
)
def test_damaged_entry(registry, change):
    artifact_id = publish(registry, sample())
    path = registry.folder / "kernels" / f"{artifact_id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match="its index entry is damaged"):
        fetch(registry, artifact_id)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00" * 10, "[" * 60_000, "1" * 70_000])
def test_entry_that_is_none(registry, text):
    artifact_id = publish(registry, sample())
    (registry.folder / "kernels" / f"{artifact_id}.json").write_text(text)
    with pytest.raises(ArtifactError, match="its index entry is damaged"):
        fetch(registry, artifact_id)


def test_vanished_folder_is_unavailable_not_missing(registry):
    artifact_id = publish(registry, sample())
    shutil.rmtree(registry.folder)
    for call in (registry.fetch(artifact_id), registry.describe(artifact_id), registry.list()):
        with pytest.raises(RegistryUnavailableError, match="does not exist"):
            asyncio.run(call)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "registry").write_text("")
    registry = FileRegistry(tmp_path / "registry")
    with pytest.raises(RegistryUnavailableError):
        publish(registry, sample())
    with pytest.raises(RegistryUnavailableError):
        fetch(registry, Artifact.open(sample()).artifact_id)


def test_full_disk_leaves_nothing_behind(registry, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryUnavailableError, match="No space left"):
        publish(registry, sample())
    assert files(registry) == []


def test_two_artifacts_with_one_id_are_told_apart(registry, monkeypatch):
    publish(registry, sample(0))
    other = Artifact.open(sample(1))
    taken = Artifact.open(sample(0)).artifact_id
    summary = asyncio.run(registry.describe(taken))
    clash = type(summary)(taken, other.sha256, other.nbytes, summary.info)
    with pytest.raises(ArtifactError, match="taken by other bytes"):
        ArtifactFolder(registry.folder, durable=False).store(sample(1), clash)


def test_many_threads_publish_at_once(registry):
    samples = [sample(seed) for seed in range(3)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(registry.publish_sync, samples * 8))
    assert len(set(ids)) == 3
    assert len(files(registry)) == 6
    for artifact_id, data in zip(ids, samples, strict=False):
        assert fetch(registry, artifact_id) == data


def _publish_often(folder: str) -> None:
    registry = FileRegistry(folder)
    for seed in (0, 1, 0, 1):
        publish(registry, sample(seed))
        fetch(registry, Artifact.open(sample(seed)).artifact_id)


def test_two_processes_publish_at_once(registry):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish_often, args=(str(registry.folder),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(files(registry)) == 4


def test_it_travels_by_pickle(registry):
    artifact_id = publish(registry, sample())
    assert fetch(pickle.loads(pickle.dumps(registry)), artifact_id) == sample()
