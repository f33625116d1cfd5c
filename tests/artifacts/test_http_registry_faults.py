"""Downloads that go wrong: broken off, altered, too long, too slow, silent."""

from __future__ import annotations

import asyncio
import time

import pytest

from esper.artifacts import Artifact
from esper.artifacts.http_registry import HttpRegistry, HttpTimes
from esper.contracts.backoff import Backoff, parse_retry_after
from esper.contracts.errors import ArtifactError, RegistryUnavailableError
from tests.artifacts.http_server import error, running_server, with_
from tests.artifacts.samples import sample

LIMIT = 1 << 20
DATA = sample(d_in=64, d_out=64, rank=64)
A = Artifact.open(DATA).artifact_id


@pytest.fixture(params=[False, True], ids=["at once", "elsewhere"])
def server(request):
    """A registry that sends bytes itself, and one whose metadata says where they are."""
    with running_server() as server:
        server.add(DATA)
        server.elsewhere = request.param
        yield server


def fetch(server, **options) -> bytes:
    registry = HttpRegistry(server.url, backoff_s=0.0, **options)
    return bytes(asyncio.run(registry.fetch(A, max_bytes=LIMIT)))


def ranges(server) -> list[str | None]:
    return [request.headers.get("range") for request in server.requests if request.kind == "blob"]


# -- broken off


def test_a_download_that_breaks_off_is_taken_up(server):
    server.plan["blob"] = [with_(cut=10_000), with_(cut=5_000)]
    assert fetch(server) == DATA
    assert ranges(server) == [None, "bytes=10000-", "bytes=15000-"]
    assert server.kinds().count("metadata") == server.elsewhere
    etag = f'"{Artifact.open(DATA).sha256}"'
    asked = [request.headers.get("if-range") for request in server.requests if request.kind == "blob"]
    assert asked == [None, etag, etag]


def test_one_that_breaks_off_without_a_length(server):
    server.elsewhere = True  # without a length the registry itself is asked for the metadata
    server.plan["blob"] = [with_(cut=10_000, unsized=True)]
    assert fetch(server) == DATA
    assert ranges(server) == [None, "bytes=10000-"]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_etag_the_hash_decides(server, etag):
    server.plan["blob"] = [with_(cut=10_000, headers={"ETag": etag} if etag else {})]
    assert fetch(server) == DATA
    assert "if-range" not in server.requests[-1].headers


def test_a_server_without_ranges_sends_all_of_it_again(server):
    server.plan["blob"] = [with_(cut=10_000), with_(status=200, body=DATA, headers={})]
    assert fetch(server) == DATA


@pytest.mark.parametrize(
    "answer",
    [
        with_(headers={"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}),
        with_(headers={"Content-Range": "rubbish"}),
        with_(headers={}),
        error(416),
    ],
)
def test_another_range_than_asked_for_starts_over(server, answer):
    server.plan["blob"] = [with_(cut=10_000), answer]
    registry = HttpRegistry(server.url, backoff_s=0.0)

    async def until_it_holds():
        try:
            return await registry.fetch(A, max_bytes=LIMIT)
        except RegistryUnavailableError as first:
            assert "starting over" in str(first)
            return await registry.fetch(A, max_bytes=LIMIT)

    assert asyncio.run(until_it_holds()) == DATA


def test_refused_in_the_middle_goes_on_later(server):
    server.plan["blob"] = [with_(cut=10_000), error(503), error(503, retry_after="0")]
    assert fetch(server) == DATA
    assert ranges(server) == [None, "bytes=10000-", "bytes=10000-", "bytes=10000-"]


def test_resuming_ends(server):
    server.plan["blob"] = [with_(cut=100)] * 50
    with pytest.raises(RegistryUnavailableError) as caught:
        fetch(server)
    assert caught.value.retryable
    assert len(ranges(server)) == 6


def test_a_server_that_was_restarted_in_between(server):
    server.plan["blob"] = [with_(cut=10_000)]
    registry = HttpRegistry(server.url, backoff_s=0.5)

    async def restart():
        task = asyncio.ensure_future(registry.fetch(A, max_bytes=LIMIT))
        while "blob" not in server.kinds():
            await asyncio.sleep(0.005)
        contents, port = server.contents, server.port
        await asyncio.to_thread(server.stop)
        server.__init__()
        server.contents, server.port = contents, port
        await asyncio.to_thread(server.start)
        return await task

    assert asyncio.run(restart()) == DATA
    assert ranges(server) == ["bytes=10000-"]


# -- wrong bytes


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (with_(body=DATA[:-1] + b"\x01"), "it was altered"),
        (with_(body=DATA[:-1]), "are announced"),
        (with_(body=DATA + b"x"), "are announced"),
        (with_(body=DATA + b"x", unsized=True), "goes on after"),
        (with_(body=b"x" * len(DATA)), "it was altered"),
    ],
)
def test_bytes_that_were_not_announced(server, answer, message):
    server.plan["blob"] = [answer] * 2
    # An answer that is its own announcement is as long as it says, or says nothing: the hash, or the metadata, decides.
    sized = server.elsewhere or message != "are announced"
    with pytest.raises(ArtifactError, match=message if sized else "it was altered"):
        fetch(server)


def test_a_length_that_does_not_fit_is_found_before_a_byte_is_read(server):
    server.plan["blob"] = [with_(headers={"Content-Length": str(1 << 50)}, drip=(1, 3600.0))] * 2
    with pytest.raises(ArtifactError, match="are announced"):
        fetch(server)


def test_bytes_altered_after_a_resume(server):
    server.plan["blob"] = [with_(cut=10_000), lambda reply: with_(body=b"x" * len(reply.body))(reply)]
    with pytest.raises(ArtifactError, match="it was altered"):
        fetch(server)


def test_compressed_though_plain_bytes_were_asked_for(server):
    server.plan["blob"] = [with_(headers={"Content-Encoding": "gzip"})] * 2
    with pytest.raises(RegistryUnavailableError, match="sent as 'gzip'"):
        fetch(server)
    assert server.requests[-1].headers["accept-encoding"] == "identity"


# -- slow and silent


def test_a_body_that_drips_is_given_up(server):
    server.plan["blob"] = [with_(drip=(1, 0.02))]
    times = HttpTimes(slowest_bytes_per_s=10_000, grace_s=0.2)
    with pytest.raises(RegistryUnavailableError, match="less than 10000 a second") as caught:
        fetch(server, times=times)
    assert caught.value.retryable
    assert ranges(server) == [None], "what is slow is not taken up at once"


def test_a_slow_body_that_is_fast_enough_arrives(server):
    server.plan["blob"] = [with_(drip=(4096, 0.01))]
    assert fetch(server, times=HttpTimes(slowest_bytes_per_s=1000, grace_s=0.01)) == DATA


@pytest.mark.parametrize("kind", ["metadata", "blob"])
def test_silence(server, kind):
    server.elsewhere |= kind == "metadata"
    server.plan[kind] = [with_(delay=3600.0)]
    with pytest.raises(RegistryUnavailableError, match=r"silent for 0.1 s"):
        fetch(server, times=HttpTimes(silence_s=0.1))


def test_all_of_it_has_a_deadline(server):
    server.plan["blob"] = [with_(drip=(1, 0.02))]
    begun = time.monotonic()
    with pytest.raises(RegistryUnavailableError, match=r"did not arrive .* within 0.3 s"):
        fetch(server, times=HttpTimes(fetch_s=0.3))
    assert time.monotonic() - begun < 30


def test_cancelling_lets_go_of_the_connection(server):
    server.plan["blob"] = [with_(delay=3600.0)]
    registry = HttpRegistry(server.url)

    async def cancelled():
        task = asyncio.ensure_future(registry.fetch(A, max_bytes=LIMIT))
        while "blob" not in server.kinds():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await registry.fetch(A, max_bytes=LIMIT)

    assert asyncio.run(cancelled()) == DATA


@pytest.mark.parametrize("value", [-1, float("nan"), True, "1", 1e12])
def test_times_out_of_range(value):
    with pytest.raises(ValueError, match="silence_s"):
        HttpTimes(silence_s=value)


# -- pauses


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7),
        (" 7 ", 7),
        ("x", None),
        ("-3", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("9" * 400, 1e12),
    ],
)
def test_retry_after(text, seconds):
    assert parse_retry_after(text) == pytest.approx(seconds)


def test_pauses_are_random_below_a_bound_that_doubles_and_ends():
    backoff = Backoff(0.1, 30.0)
    for attempt, bound in ((0, 0.1), (1, 0.2), (3, 0.8), (50, 5.0), (5000, 5.0)):
        pauses = [backoff.pause_s(attempt) for _ in range(200)]
        assert 0.5 * bound < max(pauses) <= bound
        assert len(set(pauses)) > 100


def test_a_server_may_ask_for_a_pause_up_to_a_limit():
    backoff = Backoff(0.1, 30.0)
    assert 30.0 <= backoff.pause_s(0, 30.0) <= 30.1
    assert backoff.pause_s(0, 31.0) is None
