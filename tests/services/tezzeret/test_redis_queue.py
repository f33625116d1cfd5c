"""Jobs in a real Redis: shared, leased, retried, never lost."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator

import pytest

from esper.contracts.errors import BusURLError
from esper.contracts.messages import OonaMessage, TopicNames
from esper.services.tezzeret.job import CompileJob, CompileResult, JobStatus
from esper.services.tezzeret.queue import Backoff, QueueUnavailableError
from esper.services.tezzeret.redis_queue import DEAD_LETTERS, GROUP, JOBS, RESULTS, RedisQueue
from tests.servers import RedisServer, redis_server

SOON = 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def redis(server: RedisServer):
    client = server.client()
    client.flushall()
    yield client
    client.close()


def run(server: RedisServer, scenario, workers: int = 1, lease_s: float = 60.0):
    """Run ``scenario(queue, ...)`` with so many queues on one event loop."""

    async def main():
        queues = [RedisQueue(server.url, lease_s=lease_s, name=f"w{index}") for index in range(workers)]
        try:
            return await asyncio.wait_for(scenario(*queues), 60)
        finally:
            for queue in queues:
                await queue.close()

    return asyncio.run(main())


def job(number: int = 0) -> CompileJob:
    return CompileJob(blueprint={"number": number}, d_in=6, d_out=4, job_id=f"job{number}")


def done(claim) -> CompileResult:
    return CompileResult(job_id=claim.job.job_id, status=JobStatus.COMPILED, artifact_id="a", attempts=claim.attempt)


def pending(redis) -> int:
    return redis.xpending(JOBS, GROUP)["pending"]


def test_submitted_claimed_finished_announced(server, redis):
    async def scenario(queue):
        # Submitted before there is a group.
        since = await queue.submit(job(), sender_id="me")
        claim = await queue.claim(SOON)
        assert (claim.job, claim.attempt) == (job(), 1)
        assert await queue.claim(0) is None
        assert await queue.renew(claim)
        assert pending(redis) == 1
        assert await queue.finish(claim, done(claim))
        assert not await queue.finish(claim, done(claim))
        assert not await queue.renew(claim)
        return await queue.result("job0", since=since, timeout_s=5)

    assert run(server, scenario) == CompileResult(job_id="job0", status="COMPILED", artifact_id="a")
    assert pending(redis) == 0
    ((_, entry),) = redis.xrange(RESULTS)
    announced = OonaMessage.from_json(entry["message"])
    assert announced.topic is TopicNames.COMPILATION_KERNEL_READY
    assert (announced.sender_id, announced.trace_id) == ("w0", "job0")
    # A worker that left nothing undone leaves no trace in the group.
    assert redis.xinfo_consumers(JOBS, GROUP) == []


def test_each_job_goes_to_one_worker(server, redis):
    async def scenario(one, two, three):
        for number in range(12):
            await one.submit(job(number))

        async def work(queue):
            found = []
            while claim := await queue.claim(0):
                found.append(claim.job.job_id)
                await queue.finish(claim, done(claim))
            return found

        shares = await asyncio.gather(work(one), work(two), work(three))
        assert sorted(itertools.chain(*shares)) == sorted(f"job{number}" for number in range(12))

    run(server, scenario, workers=3)
    assert redis.xlen(RESULTS) == 12


def test_a_dead_workers_job_is_claimed_by_another(server, redis):
    async def scenario(dead, alive):
        await dead.submit(job())
        lost = await dead.claim(SOON)
        assert await alive.claim(0) is None
        await asyncio.sleep(0.5)
        claim = await alive.claim(0)
        assert (claim.job, claim.attempt) == (job(), 2)
        # The first was only slow: it hears that the job is gone.
        assert not await dead.renew(lost)
        await dead.retry(lost, "", 0)
        await dead.hand_back(lost)
        assert await alive.renew(claim)
        assert await alive.finish(claim, done(claim))

    run(server, scenario, workers=2, lease_s=0.4)


def test_the_first_result_counts(server, redis):
    async def scenario(slow, other):
        await slow.submit(job())
        first = await slow.claim(SOON)
        await asyncio.sleep(0.3)
        second = await other.claim(0)
        # Whoever was robbed of it and has finished all the same saves the other the work.
        assert await slow.finish(first, done(first))
        assert not await other.renew(second)
        assert not await other.finish(second, done(second))

    run(server, scenario, workers=2, lease_s=0.2)
    assert redis.xlen(RESULTS) == 1


def test_renewing_keeps_it(server, redis):
    async def scenario(mine, other):
        await mine.submit(job())
        claim = await mine.claim(SOON)
        for _ in range(6):
            await asyncio.sleep(0.15)
            assert await mine.renew(claim)
            assert await other.claim(0) is None
        return redis.xpending_range(JOBS, GROUP, "-", "+", 1)[0]["times_delivered"]

    assert run(server, scenario, workers=2, lease_s=0.5) == 1


def test_retry_counts_and_waits_and_handing_back_does_not(server, redis):
    async def scenario(queue, other):
        await queue.submit(job())
        claim = await queue.claim(SOON)
        await queue.retry(claim, "it crashed", 0.3)
        assert await other.claim(0) is None
        await asyncio.sleep(0.35)
        claim = await other.claim(0)
        assert claim.attempt == 2
        await other.hand_back(claim)
        claim = await queue.claim(0)
        assert claim.attempt == 2
        await queue.finish(claim, done(claim))

    run(server, scenario, workers=2)


def test_what_is_handed_back_for_a_while_goes_to_others_at_once(server, redis):
    async def scenario(unable, able):
        # Others may go by longer leases.
        able._lease_ms = 3_600_000
        for number in range(100):
            await unable.submit(job(number))
        for claim in [await unable.claim(0) for _ in range(100)]:
            await unable.hand_back(claim, "left to others", 0.0 if claim.job == job(70) else 60.0)
        # Only the one comes back, though it is behind others.
        claim = await unable.claim(0)
        assert (claim.job, claim.attempt) == (job(70), 1)
        assert await unable.claim(0) is None
        await unable.hand_back(claim, aside_s=0.05)
        assert await unable.claim(0) is None
        claims = [await able.claim(0) for _ in range(100)]
        assert [(each.job.job_id, each.attempt) for each in claims] == [(f"job{number}", 1) for number in range(100)]
        await able.hand_back(claims[70])
        await asyncio.sleep(0.06)
        assert (await unable.claim(0)).job == job(70)

    run(server, scenario, workers=2)


def test_a_late_renewal_does_not_run_a_job_twice(server, redis):
    async def scenario(queue):
        await queue.submit(job())
        claim = await queue.claim(SOON)
        await asyncio.sleep(0.3)
        assert await queue.claim(0) is None
        assert await queue.renew(claim)

    run(server, scenario, lease_s=0.2)


def envelope(payload, topic=TopicNames.COMPILATION_BLUEPRINT_SUBMITTED) -> str:
    return OonaMessage("x", "t", topic, payload).to_json()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"other": "x"}, "no field 'message'"),
        ({"message": "{"}, "not valid JSON"),
        ({"message": b"\xff\xfe"}, "not UTF-8"),
        ({"message": json.dumps({"version": 9})}, "version 9 is unknown"),
        ({"message": envelope({})}, "the job lacks blueprint"),
        ({"message": envelope({**job().to_payload(), "d_in": "x"})}, "job.d_in is 'x'"),
        ({"message": envelope(job().to_payload(), TopicNames.SYSTEM_EVENTS_EPOCH)}, "is not this stream's"),
    ],
)
def test_what_is_no_job_is_set_aside_with_the_reason(server, redis, fields, reason):
    async def scenario(queue):
        redis.xadd(JOBS, fields)
        await queue.submit(job())
        assert await queue.claim(0) is None
        assert (await queue.claim(0)).job == job()

    run(server, scenario)
    ((_, letter),) = redis.xrange(DEAD_LETTERS)
    assert reason in letter["reason"]
    assert letter["entry"] == redis.xrange(JOBS)[0][0]
    assert pending(redis) == 1  # the sound one


def test_an_entry_deleted_under_a_worker(server, redis):
    async def scenario(dead, alive):
        await dead.submit(job())
        await dead.claim(SOON)
        redis.xdel(JOBS, redis.xrange(JOBS)[0][0])
        await asyncio.sleep(0.2)
        assert await alive.claim(0) is None
        assert pending(redis) == 0

    run(server, scenario, workers=2, lease_s=0.1)


def test_finished_jobs_are_trimmed_and_others_never(server, redis, monkeypatch):
    monkeypatch.setattr("esper.services.tezzeret.redis_queue._JOBS_KEPT", 10)

    async def scenario(queue):
        await queue.submit(job(1000))
        kept = await queue.claim(SOON)
        for number in range(300):
            await queue.submit(job(number))
        for _ in range(200):
            claim = await queue.claim(0)
            await queue.finish(claim, done(claim))
        assert redis.xlen(JOBS) == 301
        await queue.finish(kept, done(kept))
        for _ in range(90):
            claim = await queue.claim(0)
            await queue.finish(claim, done(claim))
        assert 10 <= redis.xlen(JOBS) < 301
        return [(await queue.claim(0)).job.job_id for _ in range(10)]

    assert run(server, scenario) == [f"job{number}" for number in range(290, 300)]


def test_no_result_in_time(server, redis):
    async def scenario(queue):
        return await queue.result("nothing", since="0-0", timeout_s=0.2)

    assert run(server, scenario) is None


def test_no_server_and_no_credentials_in_what_is_said():
    async def main():
        queue = RedisQueue("redis://user:secret@127.0.0.1:1/0")
        for call in (lambda: queue.claim(0), lambda: queue.submit(job())):
            with pytest.raises(QueueUnavailableError) as caught:
                await call()
            assert "redis://***@127.0.0.1:1/0 does not answer" in str(caught.value)
            assert "secret" not in str(caught.value)
        await queue.close()

    asyncio.run(main())


def test_not_a_redis_url():
    with pytest.raises(ValueError, match=r"http://\*\*\*@host is not a Redis URL"):
        RedisQueue("http://user:secret@host")


@pytest.mark.parametrize("url", ["redis://:%s/ss@host", "redis://:%s#ss@host", "redis://u:%s?ss@host", "redis://:%s"])
def test_no_piece_of_a_password_that_is_not_encoded_is_shown(url):
    with pytest.raises(ValueError, match=r"is not a Redis URL.*percent-encoded") as caught:
        RedisQueue(url % "hunter")
    assert "hunter" not in str(caught.value)
    assert "ss" not in str(caught.value).replace("rediss", "").replace("password", "")


@pytest.mark.parametrize("url", ["redis://:12/hunter@host", "redis://:12#hunter@host"])
def test_nor_where_a_piece_of_it_would_pass_for_the_port(url):
    with pytest.raises(ValueError, match=r"is not a Redis URL.*percent-encoded") as caught:
        RedisQueue(url)
    assert "hunter" not in str(caught.value)


def test_nor_in_the_name_of_a_queue():
    assert "hunter" not in RedisQueue("redis://h?db=1&password=hunter").url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        # These were database 0, or an error of redis-py's at the first connection.
        ("redis://h/abc", "the database is a number, 0 or more"),
        ("redis://h?db=x", "the database is a number, 0 or more"),
        ("redis://h/0?db=3", "names two databases"),
        ("redis://h/0?foo=x", "has options that are unknown here: 'foo'"),
        ("redis://h/0?socket_timeout=x", "has options that are unknown here: 'socket_timeout'"),
        ("rediss://h/0?ssl_cert_reqs=hunter", "ssl_cert_reqs has another value"),
        ("rediss://h/0?ssl_ca_certs=/nope/ca.pem", "the file of ssl_ca_certs cannot be read: '/nope/ca.pem'"),
        ("redis+sentinel://h/primary", "a queue is in one Redis: need redis://, rediss:// or unix://, not a sentinel"),
        ("memory://", "a queue is in one Redis"),
    ],
)
def test_what_the_bus_does_not_read_the_queue_does_not(url, reason):
    with pytest.raises(BusURLError, match="is not a Redis URL") as caught:
        RedisQueue(url)
    assert reason in str(caught.value)
    assert "hunter" not in str(caught.value)


def test_blanks_around_a_url_do_not_count():
    assert RedisQueue(" redis://h:1/2\n").url == "redis://h:1/2"


def test_in_a_socket_and_in_another_database(tmp_path):
    with redis_server(tmp_path, unixsocket=tmp_path / "s", requirepass="a/b") as server:

        async def scenario(url):
            queue = RedisQueue(url)
            try:
                await queue.submit(job())
                return (await queue.claim(SOON)).job
            finally:
                await queue.close()

        for url in (f"unix://{tmp_path}/s?db=3&password=a%2Fb", f"redis://:a%2Fb@127.0.0.1:{server.port}/4"):
            assert asyncio.run(scenario(url)) == job()
        with server.client() as client:
            assert sorted(client.info("keyspace")) == ["db3", "db4"]


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 129])
def test_not_a_name(name):
    with pytest.raises(ValueError, match="the worker's name is"):
        RedisQueue("redis://127.0.0.1:1", name=name)


def test_a_killed_server_comes_back(tmp_path):
    with redis_server(tmp_path) as server:

        async def scenario(queue):
            await queue.submit(job(0))
            await queue.submit(job(1))
            claim = await queue.claim(SOON)
            server.kill()
            for call in (queue.claim(0), queue.renew(claim), queue.finish(claim, done(claim))):
                with pytest.raises(QueueUnavailableError):
                    await call
            server.start()
            # Its disk had everything: the job is still ours, and the other still waits.
            assert await queue.renew(claim)
            assert await queue.finish(claim, done(claim))
            assert (await queue.claim(SOON)).job == job(1)
            # A server without memory: the group is made anew.
            server.client().flushall()
            with pytest.raises(QueueUnavailableError, match="NOGROUP"):
                await queue.claim(SOON)
            await queue.submit(job(2))
            assert (await queue.claim(SOON)).job == job(2)

        run(server, scenario)


def test_backoff():
    backoff = Backoff(1.0, 4.0)
    pauses = [backoff.next() for _ in range(40)]
    for pause, longest in zip(pauses, [1, 2, 4, 4], strict=False):
        assert longest / 2 <= pause <= longest
    assert all(2 <= pause <= 4 for pause in pauses[2:])
    assert len(set(pauses)) > 30
    backoff.reset()
    assert backoff.next() <= 1
