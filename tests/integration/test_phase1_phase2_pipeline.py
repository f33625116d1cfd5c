"""The whole path with real parts, and then with each of them failing.

Urza, Redis, S3 (moto), Tezzeret's workers and training runs are processes that talk over loopback. Every wait has a
deadline, so what hangs fails.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from esper.artifacts import Artifact, FileRegistry, open_registry
from esper.artifacts.folder import ArtifactFolder
from esper.blueprints import blueprint_hash, get
from esper.cli.main import main as esper
from esper.contracts.errors import ArtifactError, RegistryUnavailableError
from esper.contracts.messages import OonaMessage
from esper.services.tezzeret.forge import build
from esper.services.tezzeret.job import CompileResult, JobStatus
from esper.services.tezzeret.redis_queue import DEAD_LETTERS, GROUP, JOBS, RESULTS, RedisQueue
from esper.services.tezzeret.worker import Worker, WorkerSettings
from tests.integration.training_process import ALPHA_STEPS, D_IN, D_OUT, Training, report_of, start
from tests.proxy import FaultProxy, fault_proxy
from tests.servers import RedisServer, S3Server, free_port, redis_server, s3_server, wait_until
from tests.services.tezzeret.processes import WorkerProcess, job, worker_process
from tests.services.urza.server import UrzaProcess, running_urza

MIB = 1 << 20
NO_RATE = ["--write-rate", "0"]


class Parts:
    """What runs for all tests of this file."""

    def __init__(self, redis: RedisServer, s3: S3Server, s3_proxy: FaultProxy, urza: UrzaProcess) -> None:
        self.redis, self.s3, self.s3_proxy, self.urza = redis, s3, s3_proxy, urza
        self.registry = with_token(urza, urza.url)


def with_token(urza: UrzaProcess, url: str) -> str:
    return url.replace("://", f"://:{urza.admin_token}@")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """Redis, S3 behind a proxy, and an Urza that keeps its blobs there and sends clients there."""
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        s3_server() as s3,
        fault_proxy(s3.port) as proxy,
    ):
        s3.make_bucket("kernels")
        arguments = ["--blobs", "s3://kernels/blobs", "--s3-endpoint", proxy.url, *NO_RATE]
        with running_urza(tmp_path_factory.mktemp("urza"), args=arguments, env=s3.environment) as urza:
            yield Parts(redis, s3, proxy, urza)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UrzaProcess]:
    """An Urza that keeps its blobs in a folder and hands them out itself."""
    with running_urza(tmp_path_factory.mktemp("plain"), args=NO_RATE) as urza:
        yield urza


@pytest.fixture(autouse=True)
def behave(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    if "parts" in request.fixturenames:
        found: Parts = request.getfixturevalue("parts")
        found.s3_proxy.reset()


def worker(parts: Parts, *arguments: str) -> Any:
    options = ("--redis", parts.redis.url, "--registry", parts.urza.url, *arguments)
    return worker_process(*options, environment={"ESPER_REGISTRY_TOKEN": parts.urza.admin_token})


def ask(urza: UrzaProcess, path: str, body: Any = None) -> Any:
    """One call of Urza's API."""
    headers = {"Authorization": f"Bearer {urza.admin_token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{urza.url}/api/v1{path}", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


_seeds = itertools.count(1000)


def kernel(rank: int = 8) -> bytes:
    """An artifact that no other test has."""
    return build("bottleneck", d_in=D_IN, d_out=D_OUT, rank=rank, seed=next(_seeds))


def published(registry: str, data: bytes | None = None) -> str:
    return asyncio.run(open_registry(registry).publish(kernel() if data is None else data))


def compiled(queue_url: str, wanted: Any, timeout_s: float = 90.0) -> CompileResult:
    """Submit a job over Redis and wait for its result."""

    async def main() -> CompileResult | None:
        queue = RedisQueue(queue_url)
        try:
            since = await queue.submit(wanted)
            return await queue.result(wanted.job_id, since=since, timeout_s=timeout_s)
        finally:
            await queue.close()

    result = asyncio.run(main())
    assert result is not None, "no result in time"
    return result


def nothing_half_written(folder: Path) -> None:
    """Every file that has a kernel's name has the whole kernel in it, and nothing was left behind."""
    disk = ArtifactFolder(folder, durable=False)
    for blob in (folder / "blobs").rglob("*"):
        if blob.is_file():
            assert Artifact.open(blob).sha256 == blob.name
    for entry in (folder / "kernels").glob("*.json"):
        disk.read(entry.stem, MIB * 100)
    assert [path for path in (folder / "tmp").glob("*")] == []


def run_on(run: Training) -> None:
    """Whatever happened, training goes on."""
    before = run.steps
    run.step(5)
    assert run.steps == before + 5


# -- the path


def test_submit_compile_publish_query_load_train_fossilize(parts, tmp_path, capsys):
    with worker(parts) as forge:
        submit = ["tezzeret", "submit", "bottleneck", "--d-in", str(D_IN), "--d-out", str(D_OUT), "--rank", "8"]
        assert esper([*submit, "--tag", "nonlinear", "--redis", parts.redis.url, "--wait", "90"]) == 0
        artifact_id = capsys.readouterr().out.strip()
        forge.wait_for("COMPILED")
        assert forge.stop() == 0
    assert parts.urza.admin_token not in forge.said

    # Announced on the bus, with nothing left undone.
    ((_, entry),) = parts.redis.client().xrevrange(RESULTS, count=1)
    announced = CompileResult.from_payload(OonaMessage.from_json(entry["message"]).payload)
    assert (announced.status, announced.artifact_id, announced.attempts) == (JobStatus.COMPILED, artifact_id, 1)
    assert parts.redis.client().xpending(JOBS, GROUP)["pending"] == 0
    assert parts.redis.client().xlen(DEAD_LETTERS) == 0

    # The blueprint is on Urza's record, though its job went through Redis.
    on_record = ask(parts.urza, f"/blueprints/{announced.blueprint_hash}")
    assert (on_record["status"], on_record["kernels"]) == ("COMPILED", [artifact_id])
    assert [line["to"] for line in on_record["history"]] == ["UNVALIDATED", "COMPILING", "COMPILED"]

    # In Urza, its bytes in S3.
    detail = ask(parts.urza, f"/kernels/{artifact_id}")
    assert (detail["status"], detail["manifest"]["d_in"]) == ("PENDING_BENCHMARKING", D_IN)
    assert detail["manifest"]["blueprint_hash"] == announced.blueprint_hash
    assert detail["kernel_binary_ref"].startswith(parts.s3_proxy.url)
    assert detail["sha256"].encode() in parts.s3.get("/kernels")

    # Characterised, and then found by what a controller would ask for.
    metrics = {"latency_us": 40.0, "memory_bytes": detail["size"]}
    ask(parts.urza, f"/kernels/{artifact_id}/status", {"status": "VALIDATED", "reason": "test", "metrics": metrics})
    wanted = {"d_in": D_IN, "d_out": D_OUT, "family": "bottleneck", "max_latency_us": 50, "statuses": ["VALIDATED"]}
    wanted["tags_required"] = ["nonlinear"]
    assert [match["artifact_id"] for match in ask(parts.urza, "/kernels/query", wanted)["items"]] == [artifact_id]
    assert ask(parts.urza, "/kernels/query", {**wanted, "max_latency_us": 10})["items"] == []

    # Loaded while another process trains, and kept.
    parts.s3_proxy.rate = detail["size"] / 1.5
    report = report_of(start(parts.registry, artifact_id, tmp_path / "cache"))
    assert report["loaded"], json.dumps(report)
    # The fetch took seconds, and no step waited for it.
    assert report["steps_while_loading"] > 50
    assert report["longest_step_s"] < 0.7
    assert report["alpha"] == 1.0
    assert report["loss_after"] < 0.8 * report["loss_before"]
    assert (report["state"], report["reason"]) == ("FOSSILIZED", "")
    assert report["cache"]["fetches"] == 1
    nothing_half_written(tmp_path / "cache")


def test_what_is_no_blueprint_is_on_record(parts, capsys):
    with worker(parts):
        result = compiled(parts.redis.url, job(blueprint={"schema": 1, "name": "x", "nodes": []}))
    assert (result.status, result.artifact_id, result.attempts) == (JobStatus.INVALID, None, 1)
    assert "BlueprintError" in result.log


def test_what_does_not_fit_is_on_record_at_urza_too(parts):
    """A blueprint that is one, at sizes it cannot have."""
    alien = get("elementwise")
    with worker(parts):
        result = compiled(parts.redis.url, job(blueprint=alien.to_dict(), d_in=3, d_out=5))
    assert (result.status, result.attempts) == (JobStatus.INVALID, 1)
    found = ask(parts.urza, f"/blueprints/{blueprint_hash(alien)}")
    assert found["status"] == "INVALID"
    assert result.log.splitlines()[-1] in found["history"][-1]["reason"]


# -- faults


def test_urza_killed_and_restarted_mid_download(plain, tmp_path):
    # Large enough not to fit into the buffers on the way.
    data = build("dense", d_in=1024, d_out=4096, seed=next(_seeds))
    artifact_id = published(with_token(plain, plain.url), data)
    with fault_proxy(int(plain.url.rpartition(":")[2])) as proxy:
        proxy.rate = 4e6
        registry = with_token(plain, proxy.url)
        run = Training(registry, tmp_path / "cache", retries=40, backoff_s=0.5, breaker_threshold=1000)
        from esper.execution import background

        fetch: Future[Any] = background.submit(run.cache.load_kernel(artifact_id))
        wait_until(lambda: proxy.passed > MIB, "a part of the download", 30)
        plain.kill()
        proxy.cut()
        time.sleep(0.5)
        run_on(run)
        assert not fetch.done()
        nothing_half_written(tmp_path / "cache")
        plain.start()
        proxy.rate = None
        deadline = time.monotonic() + 60
        while not fetch.done() and time.monotonic() < deadline:
            run.step()
            time.sleep(0.01)
        loaded = fetch.result(0)
    assert loaded is not None, run.cache.last_error(artifact_id)
    assert loaded.artifact_id == artifact_id
    nothing_half_written(tmp_path / "cache")
    run.model.close()


def test_urza_gone(plain, tmp_path):
    artifact_id = published(with_token(plain, plain.url))
    run = Training(f"http://127.0.0.1:{free_port()}", tmp_path / "cache", retries=1)
    assert run.load(artifact_id) is False
    assert run.state == "DORMANT"
    assert "does not answer" in run.reason
    run_on(run)
    run.model.close()


def test_s3_answers_503(parts, tmp_path):
    artifact_id = published(parts.registry)
    run = Training(parts.registry, tmp_path / "cache")
    parts.s3_proxy.failing = 2
    assert run.load(artifact_id) is True, run.reason
    assert parts.s3_proxy.failing == 0
    assert run.cache.get_cache_stats()["fetches"] == 1
    run.model.close()

    parts.s3_proxy.failing = -1
    run = Training(parts.registry, tmp_path / "other", retries=1)
    assert run.load(artifact_id) is False
    assert run.state == "DORMANT"
    assert "503" in run.reason
    run_on(run)
    nothing_half_written(tmp_path / "other")
    # It recovers, and so does the next request.
    parts.s3_proxy.failing = 0
    assert run.load(artifact_id) is True, run.reason
    run.model.close()


def test_s3_slow_bodies(parts, tmp_path):
    artifact_id = published(parts.registry)
    run = Training(parts.registry, tmp_path / "cache", timeout_s=1.0, retries=0)
    parts.s3_proxy.rate = 200
    begun = time.monotonic()
    assert run.load(artifact_id) is False
    assert time.monotonic() - begun < 20
    assert run.state == "DORMANT"
    assert "1 s" in run.reason
    # The training thread waited for nothing of it.
    assert run.longest_step_s < 0.9
    run_on(run)
    nothing_half_written(tmp_path / "cache")
    parts.s3_proxy.rate = None
    assert run.load(artifact_id) is True, run.reason
    run.model.close()


def test_s3_refuses_an_upload(parts, tmp_path):
    data = kernel()
    parts.s3_proxy.failing = -1
    begun = time.monotonic()
    with pytest.raises(RegistryUnavailableError):
        published(parts.registry, data)
    assert time.monotonic() - begun < 60
    artifact_id = Artifact.open(data).artifact_id
    # What broke off left nothing behind, and can be done again.
    assert all(item["artifact_id"] != artifact_id for item in ask(parts.urza, "/kernels")["items"])
    parts.s3_proxy.failing = 0
    assert published(parts.registry, data) == artifact_id


def test_worker_killed_mid_job(parts):
    wanted = job(seed=next(_seeds))
    with worker(parts, "--lease", "1") as first, worker(parts, "--lease", "1") as second:
        for each in (first, second):
            each.wait_for("jobs from")
        submitted = Future[CompileResult]()

        import threading

        def wait() -> None:
            submitted.set_result(compiled(parts.redis.url, wanted))

        thread = threading.Thread(target=wait)
        thread.start()

        def compiling() -> list[WorkerProcess]:
            return [each for each in (first, second) if "compiling" in each.said]

        (unlucky,) = wait_until(compiling, "a worker compiles")
        unlucky.kill()
        result = submitted.result(90)
        thread.join(10)
    assert (result.status, result.attempts) == (JobStatus.COMPILED, 2)
    assert ask(parts.urza, f"/kernels/{result.artifact_id}")["manifest"]["seed"] == wanted.seed
    assert parts.redis.client().xpending(JOBS, GROUP)["pending"] == 0


def test_redis_killed_mid_job(parts):
    wanted = job(seed=next(_seeds))
    with worker(parts) as forge:
        forge.wait_for("jobs from")

        async def submit() -> str:
            queue = RedisQueue(parts.redis.url)
            try:
                return await queue.submit(wanted)
            finally:
                await queue.close()

        since = asyncio.run(submit())
        forge.wait_for("compiling")
        parts.redis.kill()
        forge.wait_for("does not answer")
        parts.redis.start()

        async def result() -> CompileResult | None:
            queue = RedisQueue(parts.redis.url)
            try:
                return await queue.result(wanted.job_id, since=since, timeout_s=60)
            finally:
                await queue.close()

        found = asyncio.run(result())
    assert found is not None
    assert (found.status, found.attempts) == (JobStatus.COMPILED, 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_blob_altered_on_disk(plain, tmp_path):
    data = kernel()
    registry = with_token(plain, plain.url)
    artifact_id, sha256 = published(registry, data), Artifact.open(data).sha256
    (blob,) = [path for path in (plain.folder / "urza").rglob(f"*{sha256}*") if path.is_file()]
    flip(blob)
    run = Training(registry, tmp_path / "cache", retries=0)
    assert run.load(artifact_id) is False
    assert run.state == "ERROR_RECOVERY"
    assert artifact_id in run.reason
    assert "altered" in run.reason
    run_on(run)
    nothing_half_written(tmp_path / "cache")
    run.model.close()


def test_the_cache_altered_on_disk(plain, tmp_path):
    registry = with_token(plain, plain.url)
    artifact_id = published(registry)
    run = Training(registry, tmp_path / "cache")
    assert run.load(artifact_id) is True
    (blob,) = [path for path in (tmp_path / "cache" / "blobs").rglob("*") if path.is_file()]
    flip(blob)
    # Found, set aside, fetched again.
    again = Training(registry, tmp_path / "cache")
    assert again.load(artifact_id) is True
    stats = again.cache.get_cache_stats()
    assert (stats["quarantined"], stats["fetches"], stats["disk_hits"]) == (1, 1, 0)
    nothing_half_written(tmp_path / "cache")
    for each in (run, again):
        each.model.close()


def test_the_clock_jumps(parts, tmp_path, monkeypatch):
    """Every deadline, lease and pause of ours goes by a clock that does not jump."""
    real, jumps = time.time, itertools.count()

    def jumping() -> float:
        # Hours ahead, and hours back, at every look.
        return real() + 36_000.0 * (-1) ** next(jumps)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    wanted = job(blueprint=job().blueprint, d_in=D_IN, d_out=D_OUT, seed=next(_seeds))
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", parts.urza.admin_token)

    async def work() -> CompileResult | None:
        queue = RedisQueue(parts.redis.url, lease_s=5)
        try:
            since = await queue.submit(wanted)
            settings = WorkerSettings(lease_s=5, concurrency=1)
            await Worker(queue, open_registry(parts.urza.url), settings).run(once=True)
            return await queue.result(wanted.job_id, since=since, timeout_s=10)
        finally:
            await queue.close()

    result = asyncio.run(asyncio.wait_for(work(), 60))
    assert result is not None
    assert (result.status, result.attempts) == (JobStatus.COMPILED, 1)
    parts.s3_proxy.failing = 1
    parts.s3_proxy.rate = 8000
    run = Training(parts.registry, tmp_path / "cache")
    assert run.load(str(result.artifact_id)) is True, run.reason
    run.step(ALPHA_STEPS)
    assert run.layer.state_layout.alpha_of(0) == 1.0
    # A circuit that opened closes again after its pause, not after ten hours.
    gone = Training(parts.registry, tmp_path / "other", retries=0, breaker_threshold=1, breaker_cooldown_s=0.2)
    other = published(parts.registry)
    parts.s3_proxy.reset()
    parts.s3_proxy.failing = -1
    assert gone.load(other) is False
    parts.s3_proxy.failing = 0
    time.sleep(0.3)
    assert gone.load(other) is True, gone.reason
    for each in (run, gone):
        each.model.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount the small file system that this test fills")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def test_a_full_disk_under_the_cache(plain, tmp_path, small_disk):
    registry = with_token(plain, plain.url)
    (small_disk / "filler").write_bytes(bytes(252 * 1024))
    artifact_id = published(registry)
    run = Training(registry, small_disk / "cache")
    # The kernel arrives all the same; that it could not be kept is counted.
    assert run.load(artifact_id) is True, run.reason
    assert run.cache.get_cache_stats()["disk_errors"] >= 1
    nothing_half_written(small_disk / "cache")
    run_on(run)
    # With room again it is kept.
    (small_disk / "filler").unlink()
    again = Training(registry, small_disk / "cache")
    assert again.load(artifact_id) is True
    third = Training(registry, small_disk / "cache")
    assert third.load(artifact_id) is True
    assert third.cache.get_cache_stats()["disk_hits"] == 1
    for each in (run, again, third):
        each.model.close()


def test_a_full_disk_under_the_registry(tmp_path, small_disk):
    large = build("dense", d_in=256, d_out=300, seed=next(_seeds))
    with running_urza(tmp_path, args=["--blobs", str(small_disk / "blobs"), *NO_RATE]) as urza:
        registry = with_token(urza, urza.url)
        with pytest.raises((RegistryUnavailableError, ArtifactError)):
            published(registry, large)
        assert ask(urza, "/kernels")["items"] == []
        left = sum(path.stat().st_size for path in (small_disk / "blobs").rglob("*") if path.is_file())
        assert left == 0
        small = kernel()
        artifact_id = published(registry, small)
        assert bytes(asyncio.run(open_registry(registry).fetch(artifact_id, max_bytes=MIB))) == small
    # The embedded registry, a folder, does the same.
    folder = FileRegistry(small_disk / "folder")
    with pytest.raises(RegistryUnavailableError, match="cannot write"):
        folder.publish_sync(large)
    nothing_half_written(small_disk / "folder")


def test_two_trainers_share_a_cache(parts, tmp_path):
    artifact_id = published(parts.registry)
    parts.s3_proxy.rate = 16_000
    cache = tmp_path / "cache"
    processes = [start(parts.registry, artifact_id, cache) for _ in range(2)]
    reports = [report_of(process) for process in processes]
    for report in reports:
        assert report["loaded"], json.dumps(report)
        assert report["state"] == "FOSSILIZED"
        assert report["loss_after"] < 0.8 * report["loss_before"]
    # Together they fetched once, and the other took what that one stored.
    counts = sorted((report["cache"]["fetches"], report["cache"]["disk_hits"]) for report in reports)
    assert counts == [(0, 1), (1, 0)]
    nothing_half_written(cache)
    # And the registry may be gone for whoever comes later.
    offline = Training(f"http://127.0.0.1:{free_port()}", cache, retries=0)
    assert offline.load(artifact_id) is True, offline.reason
    assert offline.cache.get_cache_stats()["disk_hits"] == 1
    offline.model.close()
