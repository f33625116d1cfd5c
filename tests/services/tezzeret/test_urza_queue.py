"""Jobs kept by a real Urza: claimed by polling, leased, finished."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from esper.artifacts import open_registry
from esper.cli.main import main as esper
from esper.services.tezzeret.forge import build
from esper.services.tezzeret.job import CompileResult, JobError, JobStatus
from esper.services.tezzeret.queue import QueueUnavailableError
from esper.services.tezzeret.urza_queue import UrzaQueue
from tests.services.tezzeret.processes import job, worker_process
from tests.services.urza.server import UrzaProcess, running_urza


@pytest.fixture(scope="module")
def urza(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UrzaProcess]:
    with running_urza(tmp_path_factory.mktemp("urza"), args=["--write-rate", "0"]) as running:
        yield running


@pytest.fixture
def address(urza: UrzaProcess) -> str:
    return urza.url.replace("://", f"://:{urza.admin_token}@")


def run(address: str, scenario, **options):
    async def main():
        queue = UrzaQueue(address, name="me", **options)
        try:
            return await asyncio.wait_for(scenario(queue), 60)
        finally:
            await queue.close()

    return asyncio.run(main())


def test_submitted_claimed_finished(address):
    wanted = job(seed=100, tags=("small",))

    async def scenario(queue):
        job_id = await queue.submit(wanted)
        assert await queue.submit(wanted) == job_id
        claim = await queue.claim(0)
        assert claim.job == job(seed=100, tags=("small",), job_id=job_id)
        assert claim.attempt == 1
        assert await queue.claim(0) is None
        assert await queue.renew(claim)
        assert await queue.result(job_id, timeout_s=0.1) is None
        artifact_id = await open_registry(address).publish(build("lowrank", d_in=6, d_out=4, seed=100))
        end = CompileResult(job_id=job_id, status=JobStatus.COMPILED, artifact_id=artifact_id, log="fine")
        assert await queue.finish(claim, end)
        assert not await queue.finish(claim, end)
        assert not await queue.renew(claim)
        return artifact_id, await queue.result(job_id, timeout_s=10)

    artifact_id, result = run(address, scenario)
    assert (result.status, result.artifact_id, result.log) == (JobStatus.COMPILED, artifact_id, "fine")
    assert len(result.blueprint_hash) == 64


def test_a_lease_that_runs_out_and_attempts_that_run_out(address):
    async def scenario(queue):
        job_id = await queue.submit(job(seed=101))
        first = await queue.claim(0)
        await asyncio.sleep(1.1)
        second = await queue.claim(0)
        assert (second.job.job_id, second.attempt) == (job_id, 2)
        assert not await queue.renew(first)
        assert not await queue.finish(first, CompileResult(job_id=job_id, status=JobStatus.INVALID))
        await queue.retry(second, "it crashed", 0.01)
        third = await queue.claim(0)
        assert third.attempt == 3
        # Handed back it is no attempt, and this is the third again.
        await queue.hand_back(third)
        third = await queue.claim(0)
        assert third.attempt == 3
        await queue.retry(third, "it crashed again", 0.01)
        return await queue.result(job_id, timeout_s=10)

    result = run(address, scenario, lease_s=1)
    assert (result.status, result.attempts) == (JobStatus.INVALID, 3)
    assert result.log == "it crashed again"


def test_what_is_handed_back_for_a_while_goes_to_others(address):
    async def scenario(queue):
        other = UrzaQueue(address, name="other")
        first, second = await queue.submit(job(seed=110)), await queue.submit(job(seed=111))
        claim = await queue.claim(0)
        assert (claim.job.job_id, claim.attempt) == (first, 1)
        await queue.hand_back(claim, "left to others", 60.0)
        mine = await queue.claim(0)
        assert mine.job.job_id == second
        assert await queue.claim(0) is None
        theirs = await other.claim(0)
        assert (theirs.job.job_id, theirs.attempt) == (first, 1)
        for each in (mine, theirs):
            await queue.finish(each, CompileResult(job_id=each.job.job_id, status=JobStatus.INVALID))
        await other.close()

    run(address, scenario)


def test_a_worker_that_cannot_leaves_the_job_to_one_that_can(urza, address, monkeypatch):
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", urza.admin_token)

    async def submitted(queue):
        return await queue.submit(job(seed=112))

    async def seen(queue):
        _, found = await queue._link.ask("GET", f"/jobs/{job_id}")
        return found["status"], found["attempts"], found["log"]

    async def ended(queue):
        return await queue.result(job_id, timeout_s=60)

    job_id = run(address, submitted)
    reason = "this worker does not run pipeline 'fast'"
    with worker_process("--urza", urza.url, "--pipeline", "standard") as unable:
        unable.wait_for(f"job {job_id} left to other workers: {reason}")
        # By then it would have had the job three times.
        time.sleep(4)
        status, attempts, log = run(address, seen)
        # At the moment of a look it is claimed.
        assert (status, attempts) in (("QUEUED", 0), ("RUNNING", 1))
        assert log == f"left to others: {reason}"
        with worker_process("--urza", urza.url, "--pipeline", "fast"):
            result = run(address, ended)
    assert (result.status, result.attempts) == (JobStatus.COMPILED, 1)
    assert unable.said.count(job_id) == 1


def old(asked: list[tuple], jobs: list[dict]):
    """An Urza of the time before jobs could be handed back uncounted."""

    async def ask(method, path, body=None, expected=()):
        asked.append((path.rpartition("/")[2], body))
        status = 200
        if "aside" in body or body.get("status") == "release":
            status = 422
        assert status == 200 or status in expected
        return (204, {}) if path == "/jobs/claim" and not jobs else (status, dict(jobs[0]) if jobs else {})

    return ask


def test_an_urza_that_is_older_counts_what_is_handed_back():
    found = {**job(job_id="0" * 32).to_payload(), "attempts": 1, "lease": "l"}

    async def scenario(queue):
        asked, jobs = [], [found]
        queue._link.ask = old(asked, jobs)
        claim = await queue.claim(0)
        await queue.hand_back(claim, "left to others", 0.4)
        ends = [(verb, body["status"], body["log"]) for verb, body in asked[1:]]
        assert ends == [("finish", "release", "left to others"), ("finish", "retry", "left to others")]
        # For a while it does not ask, so that others can have the job; then it does not mention what it left.
        assert await queue.claim(0.05) is None
        assert len(asked) == 3
        assert (await queue.claim(1.0)).job == claim.job
        assert asked[-1] == ("claim", {"worker": "me", "lease_s": 60.0})
        # Asking at once it is told that again, and hands out what comes first.
        await queue.hand_back(claim, "left to others", 60.0)
        assert (await queue.claim(0)).job == claim.job
        assert [sorted(body) for _, body in asked[-2:]] == [["aside", "lease_s", "worker"], ["lease_s", "worker"]]

    run("http://127.0.0.1:1", scenario)


def test_jobs_that_were_left_are_named_when_asking():
    async def scenario(queue):
        asked = []

        async def ask(method, path, body=None, expected=()):
            asked.append(body)
            return 204, {}

        queue._link.ask = ask
        queue._aside.put("0" * 32, 60.0)
        queue._aside.put("1" * 32, 1e-9)
        assert await queue.claim(0) is None
        assert asked == [{"worker": "me", "lease_s": 60.0, "aside": ["0" * 32]}]
        # More than Urza takes: nothing is asked for until some of them come back.
        for number in range(5000):
            queue._aside.put(f"{number:032}", 60.0)
        assert await queue.claim(0) is None
        assert len(asked) == 1

    run("http://127.0.0.1:1", scenario)


def test_an_artifact_that_is_elsewhere(address):
    async def scenario(queue):
        job_id = await queue.submit(job(seed=102))
        claim = await queue.claim(0)
        end = CompileResult(job_id=job_id, status=JobStatus.COMPILED, artifact_id=f"{'0' * 16}-any-fast-{'0' * 8}")
        with pytest.raises(JobError, match="upload it"):
            await queue.finish(claim, end)
        assert await queue.finish(claim, CompileResult(job_id=job_id, status=JobStatus.INVALID, log="a\0b"))

    run(address, scenario)


def test_what_urza_refuses(address):
    async def scenario(queue):
        for bad in (job(d_in=0), job(blueprint={"nodes": 3}), job(dtype="int8")):
            with pytest.raises(JobError, match="refuses it: "):
                await queue.submit(bad)

    run(address, scenario)


def test_polling_gets_rarer(address):
    async def scenario(queue):
        asked = []
        ask = queue._link.ask

        async def counted(*arguments):
            asked.append(arguments)
            return await ask(*arguments)

        queue._link.ask = counted
        for _ in range(40):
            assert await queue.claim(0.05) is None
        # Two seconds, with pauses of 1/8 to 1/4, 1/4 to 1/2, 1/2 to 1, ... of a second.
        assert 3 <= len(asked) <= 8
        assert await queue.claim(0) is None
        assert asked[-1][1] == "/jobs/claim"

    run(address, scenario)


def test_tokens_and_what_is_said_of_them(urza, address, monkeypatch):
    async def claim(queue):
        await queue.claim(0)

    with pytest.raises(QueueUnavailableError, match="status 401"):
        run(urza.url, claim)
    with pytest.raises(QueueUnavailableError) as caught:
        run(urza.url.replace("://", "://:wrong-token@"), claim)
    assert "wrong-token" not in str(caught.value)
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", urza.admin_token)
    run(urza.url + "/api/v1/", claim)


def test_nobody_there_and_somebody_else():
    async def claim(queue):
        await queue.claim(0)

    with pytest.raises(QueueUnavailableError, match=r"http://\*\*\*@127.0.0.1:1 does not answer"):
        run("http://:secret@127.0.0.1:1", claim)
    with answering((200, b"<html>")) as address, pytest.raises(QueueUnavailableError, match="answers what is no JSON"):
        run(address, claim)


EVIL = "\x1b]0;pwned\x07\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}evil"


@contextlib.contextmanager
def answering(*replies: tuple[int, dict | bytes]) -> Iterator[str]:
    """Somebody who gives these answers, one after another; the address."""
    waiting = list(replies)

    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = waiting.pop(0)
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.do_POST()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([(403, {"error": {"code": "x", "message": EVIL}})], "answers with status 403: ?]0;pwned??[2J?evil"),
        ([(422, {"error": {"code": "x", "message": EVIL}})], "refuses it: ?]0;pwned??[2J?evil"),
        ([(200, {"job_id": "\x1b[2Jx"})], "took the blueprint, but made no job of it"),
        ([(200, {"job_id": "../../x"})], "took the blueprint, but made no job of it"),
        ([(200, {"job_id": "0" * 32}), (200, {"status": "INVALID", "log": EVIL})], "?]0;pwned??[2J?evil\n"),
        ([(200, {"job_id": "0" * 32}), (200, {"status": "INVALID", "attempts": [1]})], "result.attempts is [1]"),
    ],
)
def test_whoever_answers_sends_nothing_to_the_terminal(replies, said, capsys):
    with answering(*replies) as address:
        arguments = ["tezzeret", "submit", "lowrank", "--d-in", "6", "--d-out", "4", "--rank", "2"]
        assert esper([*arguments, "--urza", address, "--wait", "5"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert all(letter.isprintable() or letter == "\n" for letter in printed.err)


@pytest.mark.parametrize("url", ["redis://:secret@host", "http://", "localhost:8470"])
def test_not_an_address(url):
    with pytest.raises(ValueError, match="is not the address of an Urza") as caught:
        UrzaQueue(url)
    assert "secret" not in str(caught.value)


def test_a_worker_that_polls(urza, address, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", urza.admin_token)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("ESPER_REGISTRY", urza.url)
    with worker_process("--urza", urza.url) as worker:
        assert esper(["tezzeret", "submit", "gated", "--d-in", "6", "--d-out", "4", "--wait", "60"]) == 0
        artifact_id = capsys.readouterr().out.strip()
        assert worker.stop() == 0
    assert urza.admin_token not in worker.said
    data = asyncio.run(open_registry(urza.url).fetch(artifact_id, max_bytes=1 << 20))
    assert bytes(data) == build("gated", d_in=6, d_out=4)
