"""The worker against a queue in memory, with real sandboxes; and as a process, against a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from esper.artifacts import Artifact, FileRegistry
from esper.artifacts.keys import SigningKey
from esper.cli.main import main as esper
from esper.contracts.errors import ArtifactError, RegistryUnavailableError
from esper.services.tezzeret.forge import build
from esper.services.tezzeret.job import CompileResult, JobStatus
from esper.services.tezzeret.limits import Limits
from esper.services.tezzeret.queue import Claim, QueueUnavailableError
from esper.services.tezzeret.redis_queue import RedisQueue
from esper.services.tezzeret.runner import Outcome
from esper.services.tezzeret.worker import Worker, WorkerSettings
from tests.servers import RedisServer, redis_server, wait_until
from tests.services.tezzeret.processes import blueprint, job, worker_process

MIB = 1 << 20


class Queue:
    """A queue in memory; ``down`` is how many calls it does not answer yet."""

    url = "memory://queue"

    def __init__(self, *jobs) -> None:
        self.waiting = [(each, 1) for each in jobs]
        self.results: dict[str, CompileResult] = {}
        self.retried: list[str] = []
        self.handed_back: list[str] = []
        self.aside: list[tuple[float, tuple]] = []
        self.renewed = 0
        self.ours = True
        self.down = 0

    def answer(self) -> None:
        if self.down:
            self.down -= 1
            raise QueueUnavailableError("memory://queue does not answer")

    async def claim(self, wait_s):
        self.answer()
        now = time.monotonic()
        self.waiting += [each for until, each in self.aside if until <= now]
        self.aside = [(until, each) for until, each in self.aside if until > now]
        if not self.waiting:
            await asyncio.sleep(min(wait_s, 0.05))
            return None
        each, attempt = self.waiting.pop(0)
        return Claim(each, attempt, each.job_id, "trace")

    async def renew(self, claim):
        self.answer()
        self.renewed += 1
        return self.ours

    async def finish(self, claim, result):
        self.answer()
        self.results[result.job_id] = result
        return True

    async def retry(self, claim, log, delay_s):
        self.answer()
        self.retried.append(log)
        self.waiting.append((claim.job, claim.attempt + 1))

    async def hand_back(self, claim, log="", aside_s=0.0):
        self.handed_back.append(claim.job.job_id)
        if aside_s:
            self.aside.append((time.monotonic() + aside_s, (claim.job, claim.attempt)))

    async def close(self):
        pass


class Registry:
    url = "memory://registry"

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.stored: list[bytes] = []

    async def publish(self, data):
        if self.failures:
            raise self.failures.pop(0)
        self.stored.append(data)
        return Artifact.open(data).artifact_id

    async def fetch(self, artifact_id, *, max_bytes):
        raise NotImplementedError

    async def list(self, *, prefix=""):
        raise NotImplementedError

    async def describe(self, artifact_id):
        raise NotImplementedError


def once(queue: Queue, registry=None, **settings) -> list[str]:
    lines: list[str] = []
    signer = settings.pop("signer", None)
    worker = Worker(queue, registry or Registry(), WorkerSettings(**settings), signer=signer, say=lines.append)
    asyncio.run(asyncio.wait_for(worker.run(once=True), 120))
    return lines


def test_compiles_publishes_announces_and_skips_what_is_bad():
    good, bad = job(seed=5), job(blueprint={"nodes": "none"})
    queue, registry = Queue(good, bad), Registry()
    lines = once(queue, registry)
    assert registry.stored == [build("lowrank", d_in=6, d_out=4, seed=5)]
    artifact = Artifact.open(registry.stored[0])
    assert queue.results[good.job_id] == CompileResult(
        job_id=good.job_id,
        status=JobStatus.COMPILED,
        artifact_id=artifact.artifact_id,
        blueprint_hash=artifact.manifest.blueprint_hash,
    )
    refused = queue.results[bad.job_id]
    assert (refused.status, refused.attempts) == (JobStatus.INVALID, 1)
    assert "BlueprintError" in refused.log
    assert queue.retried == []
    assert f"job {good.job_id} compiling" in lines


def test_signed_by_the_worker():
    key = SigningKey.generate()
    from esper.artifacts.signing import sign

    queue, registry = Queue(job()), Registry()
    once(queue, registry, signer=lambda data: sign(data, key))
    artifact = Artifact.open(registry.stored[0], trusted_keys=[key.public], policy="strict")
    assert artifact.tensors()


def test_what_takes_too_much_is_tried_again_and_then_invalid():
    greedy = job(blueprint=blueprint("dense"), d_in=8192, d_out=8192)
    queue = Queue(greedy)
    limits = Limits(memory_bytes=384 * MIB, artifact_bytes=1024 * MIB)
    once(queue, limits=limits, max_attempts=2, retry_s=0.01)
    assert len(queue.retried) == 1
    result = queue.results[greedy.job_id]
    assert (result.status, result.attempts) == (JobStatus.INVALID, 2)
    assert "out of memory: this worker gives a job 384 MiB" in result.log


def test_a_job_that_ends_its_workers_is_not_handed_out_for_ever():
    deadly = job()
    queue = Queue()
    queue.waiting.append((deadly, 4))
    once(queue, max_attempts=3)
    result = queue.results[deadly.job_id]
    assert (result.status, result.attempts) == (JobStatus.INVALID, 3)
    assert result.log == "given up: handed out 3 times, and its workers died or hung"


@pytest.fixture
def long_pauses(monkeypatch):
    """However slow the machine is, nothing comes by twice."""
    monkeypatch.setattr("esper.services.tezzeret.elsewhere._FIRST_PAUSE_S", 600.0)


def test_other_pipelines_are_left_to_others(long_pauses):
    theirs, ours = job(pipeline="aggressive"), job()
    queue = Queue(theirs, ours)
    lines = once(queue, pipelines=frozenset({"fast"}))
    assert list(queue.results) == [ours.job_id]
    # No attempt, and free for others at once.
    assert (queue.retried, queue.handed_back) == ([], [theirs.job_id])
    assert f"job {theirs.job_id} left to other workers: this worker does not run pipeline 'aggressive'" in lines
    assert not any(theirs.job_id in line and "claimed" in line for line in lines)


def test_a_pipeline_that_there_is_not_is_the_jobs_fault():
    wrong = job(pipeline="standrd")
    queue = Queue(wrong)
    once(queue, pipelines=frozenset({"fast"}))
    result = queue.results[wrong.job_id]
    assert (result.status, result.attempts) == (JobStatus.INVALID, 1)
    assert "unknown pipeline 'standrd'; known: fast, standard, aggressive" in result.log


def test_without_a_gpu_tuning_is_left_to_others(monkeypatch, long_pauses):
    # Of which the sandbox hears; on a machine with a GPU it is then as on one without.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first, second = job(pipeline="aggressive"), job(pipeline="aggressive", seed=1)
    queue = Queue(first, second)
    lines = once(queue, concurrency=1)
    assert (queue.results, queue.retried) == ({}, [])
    assert queue.handed_back == [first.job_id, second.job_id]
    left = f"job {first.job_id} left to other workers: pipeline 'aggressive': needs a GPU"
    assert any(left in line for line in lines)
    # Known after the first: no process is started to find it out again.
    assert [line for line in lines if "compiling" in line] == [f"job {first.job_id} compiling"]


def test_what_nobody_takes_is_invalid_after_a_very_long_time(monkeypatch):
    monkeypatch.setattr("esper.services.tezzeret.elsewhere._LONGEST_PAUSE_S", 0.05)
    alone = job(pipeline="aggressive")
    queue, lines = Queue(alone), []
    settings = WorkerSettings(pipelines=frozenset({"fast", "standard"}), abandon_s=0.5)

    async def main() -> None:
        worker = Worker(queue, Registry(), settings, say=lines.append)
        running = asyncio.create_task(worker.run())
        while not queue.results:
            await asyncio.sleep(0.02)
        worker.stop()
        await running

    begun = time.monotonic()
    asyncio.run(asyncio.wait_for(main(), 60))
    assert time.monotonic() - begun >= 0.5
    result = queue.results[alone.job_id]
    assert (result.status, result.attempts) == (JobStatus.INVALID, 0)
    assert result.log == (
        "no worker that runs pipeline 'aggressive' took it within 0.5 s; "
        "here: this worker does not run pipeline 'aggressive'"
    )
    assert len(queue.handed_back) > 3
    assert len([line for line in lines if "left to other workers" in line]) == 1


def test_jobs_run_at_once_as_many_as_allowed_and_no_more(monkeypatch):
    """Each waits for another to be under way: one at a time they would wait for ever."""
    from esper.services.tezzeret import worker as module

    met, inside, most = asyncio.Barrier(2), 0, 0

    async def compile_together(wanted, limits, folder):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.wait_for(met.wait(), 30)
        inside -= 1
        return Outcome(build("lowrank", d_in=6, d_out=4, seed=wanted.seed), None, "", False)

    monkeypatch.setattr(module, "compile_in_sandbox", compile_together)
    queue = Queue(*(job(seed=seed) for seed in range(6)))
    once(queue, concurrency=2)
    assert [result.status for result in queue.results.values()] == [JobStatus.COMPILED] * 6
    assert most == 2


def test_an_outage_loses_nothing():
    registry = Registry(RegistryUnavailableError("the registry does not answer"))
    queue = Queue(job())
    lines: list[str] = []

    async def main() -> None:
        # One at a time, so that the second outage meets the result and not the next claim.
        worker = Worker(queue, registry, WorkerSettings(concurrency=1), say=lines.append)
        queue.down = 2
        running = asyncio.create_task(worker.run())
        while not any("compiling" in line for line in lines):
            await asyncio.sleep(0.02)
        queue.down = 1
        while not queue.results:
            await asyncio.sleep(0.02)
        worker.stop()
        await running

    asyncio.run(asyncio.wait_for(main(), 60))
    assert [result.status for result in queue.results.values()] == [JobStatus.COMPILED]
    # Said once each, not at every attempt.
    assert lines.count("memory://queue does not answer; trying again until it does") == 2
    assert lines.count("memory://queue answers again") == 1
    assert lines.count("the registry does not answer; trying again until it does") == 1


def test_what_the_registry_refuses_is_invalid():
    queue = Queue(job())
    once(queue, Registry(ArtifactError("413: too large")))
    ((result),) = queue.results.values()
    assert result.status is JobStatus.INVALID
    assert result.log == "the artifact was refused: 413: too large"


def test_an_artifact_that_is_not_what_was_asked_for(monkeypatch):
    from esper.services.tezzeret import worker as module

    async def other(wanted, limits, folder):
        return Outcome(build("lowrank", d_in=6, d_out=4, seed=9), None, "", False)

    monkeypatch.setattr(module, "compile_in_sandbox", other)
    queue, registry = Queue(job()), Registry()
    once(queue, registry)
    ((result),) = queue.results.values()
    assert "is for (d_in, d_out, seed, pipeline) (6, 4, 9, 'fast'), not (6, 4, 0, 'fast')" in result.log
    assert registry.stored == []


def test_a_lost_lease_ends_the_work():
    queue, registry = Queue(job()), Registry()
    queue.ours = False
    lines = once(queue, registry, lease_s=0.3)
    assert any("has gone to another worker" in line for line in lines)
    assert (registry.stored, queue.results, queue.handed_back) == ([], {}, [])


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_stopping(grace_s):
    first, second = job(), job(seed=1)
    queue, registry = Queue(first, second), Registry()

    async def main() -> None:
        lines: list[str] = []
        worker = Worker(queue, registry, WorkerSettings(concurrency=1, grace_s=grace_s), say=lines.append)
        running = asyncio.create_task(worker.run())
        while not any("compiling" in line for line in lines):
            await asyncio.sleep(0.01)
        worker.stop()
        await running

    asyncio.run(asyncio.wait_for(main(), 60))
    if grace_s:
        assert ([*queue.results], queue.handed_back) == ([first.job_id], [])
    else:
        assert ([*queue.results], queue.handed_back) == ([], [first.job_id])
    assert [each for each, _ in queue.waiting] == [second]


def test_without_a_queue_once_is_an_error():
    queue = Queue()
    queue.down = 1
    with pytest.raises(QueueUnavailableError):
        once(queue)


@pytest.mark.parametrize(
    "bad",
    [
        {"concurrency": 0},
        {"max_attempts": True},
        {"lease_s": -1},
        {"lease_s": 0},
        {"grace_s": float("nan")},
        {"abandon_s": float("inf")},
        {"pipelines": frozenset()},
    ],
)
def test_settings_that_are_none(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        WorkerSettings(**bad)


def test_a_pipeline_is_one_of_those_there_are():
    with pytest.raises(ValueError, match="pipeline 'standrd' is unknown; known: fast, standard, aggressive"):
        WorkerSettings(pipelines=frozenset({"fast", "standrd"}))


# -- as a process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def submitted(server: RedisServer, *jobs) -> str:
    async def main() -> str:
        queue = RedisQueue(server.url)
        places = [await queue.submit(each) for each in jobs]
        await queue.close()
        return places[0]

    return asyncio.run(main())


def result_of(server: RedisServer, wanted, since: str) -> CompileResult:
    async def main() -> CompileResult | None:
        queue = RedisQueue(server.url)
        try:
            return await queue.result(wanted.job_id, since=since, timeout_s=60)
        finally:
            await queue.close()

    result = asyncio.run(main())
    assert result is not None
    return result


def test_a_killed_workers_job_is_done_by_another(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    server.client().flushall()
    wanted = job(seed=77)
    since = submitted(server, wanted)
    arguments = ("--redis", server.url, "--registry", str(tmp_path / "registry"), "--lease", "1")
    with worker_process(*arguments, "--name", "first") as first:
        first.wait_for("compiling")
        (sandbox,) = wait_until(first.sandboxes, "a sandbox")
        first.kill()
        wait_until(lambda: not alive(sandbox), "the sandbox dies with its worker", 20)
    (left,) = (tmp_path / "tmp").iterdir()
    with worker_process(*arguments, "--name", "second") as second:
        result = result_of(server, wanted, since)
        assert (result.status, result.attempts) == (JobStatus.COMPILED, 2)
        second.wait_for("COMPILED")
        assert second.stop() == 0
        assert not left.exists()
    assert Artifact.open(FileRegistry(tmp_path / "registry").blob_path(result.artifact_id)).manifest.seed == 77
    assert list((tmp_path / "tmp").iterdir()) == []


def test_two_sandboxes_run_at_once(server, tmp_path):
    """The first is stopped in its tracks, so it cannot have ended before the second one begins."""
    server.client().flushall()
    first, second = job(seed=78), job(seed=79)
    since = submitted(server, first, second)
    # However slow the machine is, the one that is stopped is not ended for its time.
    arguments = ("--redis", server.url, "--registry", str(tmp_path), "--concurrency", "2", "--timeout", "600")
    with worker_process(*arguments) as worker:
        begun = wait_until(worker.sandboxes, "a sandbox", 200)
        os.kill(begun[0], signal.SIGSTOP)
        try:
            wait_until(lambda: len(worker.sandboxes()) == 2, "two sandboxes", 200)
        finally:
            os.kill(begun[0], signal.SIGCONT)
        for each in (first, second):
            assert result_of(server, each, since).status is JobStatus.COMPILED


def test_a_worker_that_cannot_leaves_the_job_to_one_that_can(server, tmp_path):
    server.client().flushall()
    wanted, other = job(seed=80), job(seed=81, pipeline="nonsense")
    since = submitted(server, wanted, other)
    arguments = ("--redis", server.url, "--registry", str(tmp_path / "registry"))
    with worker_process(*arguments, "--pipeline", "standard", "--lease", "600") as unable:
        # What comes behind it is done meanwhile.
        assert result_of(server, other, since).status is JobStatus.INVALID
        # By then it would have had the job three times.
        time.sleep(4)
        assert f"job {wanted.job_id} left to other workers: this worker does not run pipeline 'fast'" in unable.said
        with worker_process(*arguments, "--pipeline", "fast", "--lease", "900"):
            result = result_of(server, wanted, since)
    assert (result.status, result.attempts) == (JobStatus.COMPILED, 1)
    assert unable.said.count(wanted.job_id) == 1


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # A zombie that nobody has fetched yet is dead.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_commands(server, tmp_path, capsys, monkeypatch):
    server.client().flushall()
    monkeypatch.setenv("REDIS_URL", server.url)
    registry = str(tmp_path / "registry")
    with worker_process("--registry", registry, "--concurrency", "2") as worker:
        arguments = ["tezzeret", "submit", "bottleneck", "--d-in", "6", "--d-out", "4", "--rank", "2"]
        assert esper([*arguments, "--wait", "60"]) == 0
        artifact_id = capsys.readouterr().out.strip()
        assert FileRegistry(registry).blob_path(artifact_id).exists()
        misfit = ["tezzeret", "submit", "elementwise", "--d-in", "6", "--d-out", "4"]
        assert esper([*misfit, "--wait", "60"]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "gives 6 features, but d_out is 4" in said.err
        assert "is INVALID after 1 attempts" in said.err
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(20) == 0
    assert "stopped" in worker.said
    # Nobody works any more.
    assert esper(misfit) == 0
    assert len(capsys.readouterr().out.strip()) == 32
    assert esper([*misfit, "--wait", "0.2"]) == 1
    assert "no result within 0.2 s; is a worker running" in capsys.readouterr().err
    assert esper(["tezzeret", "worker", "--registry", registry, "--once"]) == 0
    assert server.client().xpending("compilation.blueprint.submitted", "tezzeret")["pending"] == 0


def test_where_the_jobs_are_must_be_said(capsys, monkeypatch):
    for name in ("REDIS_URL", "ESPER_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    assert esper(["tezzeret", "worker"]) == 1
    assert "give --redis URL or --urza URL" in capsys.readouterr().err
