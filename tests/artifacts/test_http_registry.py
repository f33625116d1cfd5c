"""The client of a registry over HTTP, against a real server on a real socket."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import warnings

import pytest

from esper.artifacts import Artifact
from esper.artifacts.http_registry import HttpRegistry, HttpTimes
from esper.contracts.errors import ArtifactError, KernelNotFoundError, RegistryUnavailableError
from tests.artifacts.http_server import error, running_server, with_
from tests.artifacts.samples import sample

LIMIT = 1 << 20
DATA = sample()
A = Artifact.open(DATA).artifact_id
TOKEN = "a-secret-token"


@pytest.fixture
def server():
    with running_server() as server:
        server.add(DATA)
        yield server


@pytest.fixture
def split(server):
    """One that keeps its blobs elsewhere."""
    server.elsewhere = True
    return server


def fetch(registry: HttpRegistry, artifact_id: str = A, max_bytes: int = LIMIT) -> bytes:
    return bytes(asyncio.run(registry.fetch(artifact_id, max_bytes=max_bytes)))


def make(server, token=None, **options) -> HttpRegistry:
    return HttpRegistry(server.url, token, backoff_s=0.0, **options)


# -- what it does


def test_a_fetch_is_one_request(server):
    registry = make(server)
    assert fetch(registry) == fetch(registry) == DATA
    assert server.kinds() == ["blob"] * 2


def test_where_blobs_are_elsewhere_the_metadata_says_where(split):
    registry = make(split)

    async def twice():
        return [await registry.fetch(A, max_bytes=LIMIT) for _ in range(2)]

    assert asyncio.run(twice()) == [DATA] * 2
    assert split.kinds() == ["way", "metadata", "blob", "metadata", "blob"], "found out once"
    assert split.connections == 2, "one let go of with what led elsewhere, one kept alive"


@pytest.mark.parametrize(
    "answer",
    [
        with_(headers={}),
        with_(headers={"ETag": 'W/"weak"'}),
        with_(headers={"ETag": '"something-else"'}),
        with_(headers={"ETag": f'"{"0" * 63}"'}),
        with_(unsized=True),
    ],
)
def test_an_answer_that_does_not_say_what_it_is_makes_ask_for_the_metadata(server, answer):
    server.plan["blob"] = [answer]
    registry = make(server)
    assert fetch(registry) == fetch(registry) == DATA
    assert server.kinds() == ["blob", *["metadata", "blob"] * 2]


def test_another_artifact_than_asked_for_is_not_read(server):
    server.plan["blob"] = [with_(headers={"ETag": f'"{"0" * 64}"'}, drip=(1, 3600.0))]
    with pytest.raises(ArtifactError, match="sends another artifact"):
        fetch(make(server))


def test_one_that_is_too_large_is_not_read(server):
    server.plan["blob"] = [with_(drip=(1, 3600.0))]
    with pytest.raises(ArtifactError, match=f"{len(DATA)} bytes, more than the limit of 1000"):
        fetch(make(server), max_bytes=1000)


def test_connections_stay_open_between_fetches(server):
    registry = make(server)

    async def several():
        for _ in range(3):
            await registry.fetch(A, max_bytes=LIMIT)
        await asyncio.gather(*(registry.fetch(A, max_bytes=LIMIT) for _ in range(3)))

    asyncio.run(several())
    assert server.connections <= 3


def test_every_loop_has_its_own_connections_and_closes_them(server):
    registry = make(server)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert fetch(registry) == fetch(registry) == DATA
        gc.collect()
    assert server.connections == 2
    assert not registry._access.pools._pools


def test_a_connection_that_was_closed_meanwhile_is_made_anew(server):
    registry = make(server)

    async def twice():
        await registry.fetch(A, max_bytes=LIMIT)
        for writer in list(server._writers):
            server._loop.call_soon_threadsafe(writer.transport.abort)
        return await registry.fetch(A, max_bytes=LIMIT)

    assert asyncio.run(twice()) == DATA


def test_publish(server):
    registry = make(server, TOKEN)
    assert asyncio.run(registry.publish(sample(1))) == Artifact.open(sample(1)).artifact_id
    assert fetch(registry, Artifact.open(sample(1)).artifact_id) == sample(1)
    (request,) = (request for request in server.requests if request.kind == "publish")
    assert request.headers["authorization"] == f"Bearer {TOKEN}"


def test_what_loading_would_refuse_is_published_all_the_same(server, monkeypatch):
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    wanted = Artifact.open(sample(1), policy="standard").artifact_id
    assert asyncio.run(make(server, TOKEN).publish(sample(1))) == wanted
    with pytest.raises(ArtifactError, match="policy strict"):
        Artifact.open(sample(1))


def test_what_is_no_artifact_is_not_sent(server):
    with pytest.raises(ArtifactError):
        asyncio.run(make(server).publish(DATA[:-1]))
    assert server.requests == []


def test_publish_again_when_the_registry_is_busy(server):
    server.plan["publish"] = [error(503), error(429, retry_after="0")]
    asyncio.run(make(server).publish(sample(1)))
    assert server.kinds() == ["publish"] * 3


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (413, ArtifactError, "answered 413: because"),
        (422, ArtifactError, "answered 422: because"),
        (403, RegistryUnavailableError, "ESPER_REGISTRY_TOKEN"),
        (307, RegistryUnavailableError, "use the address it leads to, https://there/x"),
    ],
)
def test_publish_refused(server, status, kind, message):
    server.plan["publish"] = [error(status, location="https://there/x")]
    with pytest.raises(kind, match=message):
        asyncio.run(make(server).publish(sample(1)))
    assert server.kinds() == ["publish"]


def test_published_under_another_name(server):
    server.plan["publish"] = [with_(body=json.dumps({"artifact_id": A}).encode())]
    with pytest.raises(RegistryUnavailableError, match="under another name"):
        asyncio.run(make(server).publish(sample(1)))


def test_list_and_describe(server):
    artifacts = [Artifact.open(sample(seed)) for seed in range(5)]
    for seed in range(5):
        server.add(sample(seed))
    registry = make(server)
    listed = asyncio.run(registry.list())
    assert [line.artifact_id for line in listed] == sorted(artifact.artifact_id for artifact in artifacts)
    assert server.kinds() == ["list"] * 3, "page by page"
    line = asyncio.run(registry.describe(A))
    assert line in listed
    assert (line.sha256, line.size) == (artifacts[0].sha256, artifacts[0].nbytes)
    assert asyncio.run(registry.list(prefix=A)) == [line]
    assert asyncio.run(registry.list(prefix="a b&c")) == []


def test_pages_that_lead_in_a_circle(server):
    page = with_(body=json.dumps({"items": [], "next_cursor": "x"}).encode())
    server.plan["list"] = [page, page]
    with pytest.raises(RegistryUnavailableError, match="in a circle"):
        asyncio.run(make(server).list())


@pytest.mark.parametrize("artifact_id", ["", "../../etc/passwd", "a\0b", "test-kernel-123"])
def test_ids_that_are_none_reach_no_server(server, artifact_id):
    with pytest.raises(KernelNotFoundError, match="not an artifact id"):
        fetch(make(server), artifact_id)
    assert server.requests == []


def test_unknown_id(server):
    with pytest.raises(KernelNotFoundError, match="no such artifact"):
        fetch(make(server), Artifact.open(sample(9)).artifact_id)


# -- tokens


def test_the_token_comes_from_the_argument_the_url_or_the_environment(server, monkeypatch):
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", "environment")
    with_token = server.url.replace("//", "//:in%2Durl@")
    for registry in (HttpRegistry(with_token, "argument"), HttpRegistry(with_token), HttpRegistry(server.url)):
        fetch(registry)
        assert registry.url == server.url
    sent = [request.headers["authorization"] for request in server.requests if request.kind == "blob"]
    assert sent == ["Bearer argument", "Bearer in-url", "Bearer environment"]
    monkeypatch.delenv("ESPER_REGISTRY_TOKEN")
    fetch(HttpRegistry(server.url))
    assert "authorization" not in server.requests[-1].headers


def test_the_token_is_not_in_a_pickle_and_not_shown(server, monkeypatch):
    registry = HttpRegistry(server.url, TOKEN, times=HttpTimes(silence_s=7))
    stored = pickle.dumps(registry)
    assert TOKEN.encode() not in stored
    assert TOKEN not in repr(registry) + registry.url
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", "mine")
    other = pickle.loads(stored)
    assert (other.url, other._times) == (registry.url, registry._times)
    fetch(other)
    assert server.requests[-1].headers["authorization"] == "Bearer mine"
    assert copy.deepcopy(registry) is registry


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_gets_no_token(server, status):
    with running_server() as elsewhere:
        elsewhere.add(DATA)
        there = f"{elsewhere.url}/api/v1/kernels/{A}/blob?sig=s"
        # Once where the bytes are asked for at once, and once where the metadata leads.
        server.plan["blob"] = [with_(status=status, body=b"x", headers={"Location": there})] * 2
        assert fetch(make(server, TOKEN)) == DATA
    (there,) = elsewhere.requests
    assert "authorization" not in there.headers
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in server.requests)


def test_a_redirect_that_stays_keeps_the_token_one_that_returns_does_not(server):
    def to(url):
        return with_(status=307, body=b"", headers={"Location": url})

    path = f"/api/v1/kernels/{A}/blob"
    with running_server() as elsewhere:
        server.plan["blob"] = [to(path + "?again"), to(path + "?again"), to(elsewhere.url + path)]
        elsewhere.contents = {A: DATA}
        elsewhere.plan["blob"] = [to(server.url + path)]
        assert fetch(make(server, TOKEN)) == DATA
    sent = ["authorization" in request.headers for request in server.requests if request.kind == "blob"]
    assert sent == [True, True, True, False]


def test_a_reference_outside_gets_no_token(split):
    server = split
    with running_server() as store:
        store.add(DATA)
        server.metadata_changes["kernel_binary_ref"] = (
            f"{store.url}/bucket/api/v1/kernels/{A}/blob?X-Amz-Signature=s3cret"
        )
        store.contents[f"bucket/api/v1/kernels/{A}"] = DATA
        store._answer = lambda request: store._blob(DATA, request)
        assert fetch(make(server, TOKEN)) == DATA
        (there,) = store.requests
        assert "authorization" not in there.headers
        store.plan["blob"] = [error(500)]
        with pytest.raises(RegistryUnavailableError, match=r"the blob store behind .* answered 500") as caught:
            fetch(make(server, TOKEN))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/x", "http://[::1"])
def test_redirects_lead_to_http_only(server, location):
    server.plan["blob"] = [with_(status=302, headers={"Location": location})] * 2
    with pytest.raises(RegistryUnavailableError, match="leads to") as caught:
        fetch(make(server))
    assert not caught.value.retryable


def test_redirects_end(split):
    server = split
    server.plan["metadata"] = [with_(status=302, headers={"Location": f"/api/v1/kernels/{A}"})] * 20
    with pytest.raises(RegistryUnavailableError, match="redirects more than 5 times"):
        fetch(make(server))


def test_an_expired_url_is_asked_for_again_once(split):
    server = split
    server.plan["blob"] = [error(403)]
    assert fetch(make(server, TOKEN)) == DATA
    assert server.kinds() == ["way", *["metadata", "blob"] * 2]
    server.plan["blob"] = [error(403), error(403)]
    with pytest.raises(RegistryUnavailableError, match=r"the blob store behind .* answered 403") as caught:
        fetch(make(server, TOKEN))
    assert not caught.value.retryable
    assert all("authorization" not in request.headers for request in server.requests if request.kind == "blob")


# -- refusals


@pytest.mark.parametrize("kind", ["metadata", "blob"])
@pytest.mark.parametrize(
    ("status", "retryable", "message"),
    [
        (401, False, "it wants a token; set ESPER_REGISTRY_TOKEN"),
        (403, False, "it wants a token"),
        (418, False, "answered 418: because"),
        (429, True, "answered 429"),
        (500, True, "answered 500: because"),
        (503, True, "answered 503"),
    ],
)
def test_refusals(server, kind, status, retryable, message):
    server.elsewhere = kind == "metadata"
    server.plan[kind] = [error(status, retry_after="7")]
    with pytest.raises(RegistryUnavailableError, match=message) as caught:
        fetch(make(server))
    assert caught.value.retryable is retryable
    assert caught.value.retry_after_s == (7 if retryable else None)


def test_a_token_that_is_refused_is_not_shown(server):
    server.plan["blob"] = [error(401)]
    with pytest.raises(RegistryUnavailableError, match="the token is not accepted") as caught:
        fetch(make(server, TOKEN))
    assert TOKEN not in str(caught.value)


def test_nobody_listens(server):
    port, server_url = server.port, server.url
    del port
    registry = HttpRegistry(server_url)
    server.stop()
    with pytest.raises(RegistryUnavailableError, match="cannot talk to") as caught:
        fetch(registry)
    assert caught.value.retryable
    server.__init__()  # the fixture stops it again
    server.start()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>log in</html>", "is no registry of Esper's"),
        (b"[" * 50_000, "is no registry of Esper's"),
        (b"[]", "cannot read"),
        (b"{}", "it has no 'sha256'"),
        (b" " * (2 << 20), "is no registry of Esper's"),
    ],
)
def test_something_else_answers(server, body, message):
    # A page for whatever is asked.
    server.plan["metadata"] = server.plan["blob"] = [with_(body=body, headers={})] * 2
    with pytest.raises(RegistryUnavailableError, match=message) as caught:
        fetch(make(server))
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"sha256": "0" * 64}, ArtifactError, "describes another artifact"),
        ({"artifact_id": Artifact.open(sample(3)).artifact_id}, ArtifactError, "describes another artifact"),
        ({"sha256": "x"}, RegistryUnavailableError, "not a SHA-256"),
        ({"size": -1}, RegistryUnavailableError, "not a number of bytes"),
        ({"size": 1.5}, RegistryUnavailableError, "not a number of bytes"),
        ({"kernel_binary_ref": None}, RegistryUnavailableError, "kernel_binary_ref"),
        ({"size": LIMIT + 1}, ArtifactError, "more than the limit"),
        ({"size": 1 << 60}, ArtifactError, "more than the limit"),
    ],
)
def test_metadata_that_does_not_hold(split, changes, kind, message):
    server = split
    server.metadata_changes.update(changes)
    with pytest.raises(kind, match=message):
        fetch(make(server))
    assert "blob" not in server.kinds()
