"""Blobs in S3: a real server of the protocol on loopback."""

from __future__ import annotations

import hashlib
import logging
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("obstore")
pytest.importorskip("moto")

import obstore
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from esper.cli.main import main
from esper.services.urza.blobs_s3 import S3Blobs
from esper.services.urza.errors import ApiError
from tests.services.urza.api import artifact, error, running_api

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "AWS_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def s3():
    """The address of a server that has a bucket called ``bucket``."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/bucket").raise_for_status()
    yield url
    server.stop()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def api(tmp_path, s3, request):
    presign = getattr(request, "param", True)
    with running_api(
        tmp_path, blobs=f"s3://bucket/{tmp_path.name}/kernels", s3_endpoint=s3, presign=presign, presign_s=600
    ) as running:
        yield running


def objects(s3, prefix):
    store = S3Store("bucket", endpoint=s3, client_options={"allow_http": True})
    return [found["path"] for page in obstore.list(store, prefix) for found in page]


def test_a_kernel_is_fetched_from_a_presigned_address_without_our_token(api, s3, tmp_path):
    data = artifact()
    uploaded = api.upload(data).json()
    sha256 = uploaded["sha256"]
    assert objects(s3, tmp_path.name) == [f"{tmp_path.name}/kernels/sha256/{sha256[:2]}/{sha256}"]
    found = api("GET", f"/api/v1/kernels/{uploaded['artifact_id']}").json()
    address = found["kernel_binary_ref"]
    assert address.startswith(s3) and "X-Amz-Signature=" in address and "X-Amz-Expires=600" in address
    assert httpx.get(address).content == data
    assert httpx.get(address, headers={"Range": "bytes=0-9"}).content == data[:10]

    redirect = api("GET", uploaded["kernel_binary_ref"], follow_redirects=False)
    assert redirect.status_code == 307 and redirect.headers["cache-control"] == "no-store"
    assert httpx.get(redirect.headers["location"]).content == data
    assert api.upload(data).status_code == 200
    assert list((tmp_path / "urza" / "tmp").iterdir()) == []


@pytest.mark.parametrize("api", [False], indirect=True)
def test_without_presigning_the_bytes_are_passed_on(api):
    data = artifact()
    uploaded = api.upload(data).json()
    found = api("GET", f"/api/v1/kernels/{uploaded['artifact_id']}").json()
    assert found["kernel_binary_ref"] == uploaded["kernel_binary_ref"]
    whole = api("GET", found["kernel_binary_ref"])
    assert (whole.status_code, whole.content) == (200, data)
    part = api("GET", found["kernel_binary_ref"], headers={"Range": "bytes=-7"})
    assert (part.status_code, part.content) == (206, data[-7:])


def test_a_presigned_address_is_made_anew_before_it_is_too_old(api):
    artifact_id = api.uploaded()
    path = f"/api/v1/kernels/{artifact_id}"
    first = api("GET", path)
    assert api("GET", path).json() == first.json(), "kept while it is good"
    card = api.service.cards.get(artifact_id)
    object.__setattr__(card, "expires", 0.0)
    assert api.service.cards.get(artifact_id) is None
    assert httpx.get(api("GET", path).json()["kernel_binary_ref"]).content == artifact()


def test_what_is_refused_leaves_nothing_in_the_bucket(api, s3, tmp_path):
    assert api.upload(artifact()[:-1]).status_code == 422
    assert api.upload(artifact(), sha256="0" * 64).status_code == 422
    assert objects(s3, tmp_path.name) == []


def test_the_store_itself(s3, tmp_path):
    store = S3Blobs(f"s3://bucket/{tmp_path.name}", endpoint=s3)
    assert store.shown == f"s3://bucket/{tmp_path.name}"
    store.check()
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    sha256 = hashlib.sha256(b"abc").hexdigest()
    assert store.size(sha256) is None
    store.put(sha256, source, 3)
    assert (store.size(sha256), store.read(sha256, 1, 2), store.read(sha256, 0, 0)) == (3, b"bc", b"")
    with pytest.raises(ApiError, match="kept 3 bytes of 4"):
        store.put(sha256, source, 4)
    store.delete(sha256)
    store.delete(sha256)
    assert store.size(sha256) is None
    with pytest.raises(ApiError, match="not in the bucket"):
        store.read(sha256, 0, 1)


def test_a_store_that_does_not_answer(tmp_path, monkeypatch):
    # Nothing listens there, and the retries are those of a client that waits for something to.
    monkeypatch.setattr("esper.services.urza.blobs_s3.RETRY_S", 1)
    with running_api(tmp_path, blobs="s3://bucket/x", s3_endpoint="http://127.0.0.1:9", presign=True) as api:
        answer = api.upload(artifact())
        assert (answer.status_code, error(answer)) == (503, "unavailable")
        assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in answer.text
        assert api("GET", "/ready").status_code == 503
        assert api("GET", "/api/v1/kernels").json()["items"] == []


def test_what_is_no_bucket():
    for url in ("s3://", "s3:///x", "s3://user:secret@bucket", "s3://bucket?x=secret"):
        with pytest.raises(ValueError, match="AWS_") as caught:
            S3Blobs(url)
        assert "secret" not in str(caught.value)
    assert urlsplit(S3Blobs("s3://bucket").shown).path == ""


@pytest.mark.parametrize(
    ("url", "endpoint", "variables", "message"),
    [
        ("s3://bucket", "127.0.0.1:9000", {}, "--s3-endpoint is no address of a service: give http://HOST:PORT"),
        ("s3://bucket", "nonsense", {}, "--s3-endpoint is no address"),
        ("s3://bucket", "http://", {}, "--s3-endpoint is no address"),
        ("s3://bucket", "http://exa mple", {}, "--s3-endpoint is no address"),
        ("s3://bucket", "http://h:port", {}, "--s3-endpoint is no address"),
        ("s3://bucket", "http://u:SECRET@h", {}, "--s3-endpoint is no address"),
        ("s3://bucket", "ftp://h", {}, "--s3-endpoint is no address"),
        ("s3://bucket", None, {"AWS_ENDPOINT_URL": "nonsense"}, "AWS_ENDPOINT_URL is no address"),
        ("s3://buc ket/x", None, {}, r"'s3://buc ket/x' is no place in S3: a bucket's name has 3 to 63 of"),
        ("s3://Bucket", None, {}, "is no place in S3"),
        ("s3://b", None, {}, "is no place in S3"),
        ("s3://bucket/a\x1bb", None, {}, "is no place in S3"),
        ("s3://bucket", None, {"AWS_ACCESS_KEY_ID": "SECRET\n"}, "AWS_ACCESS_KEY_ID has a blank, a line's end"),
        ("s3://bucket", None, {"AWS_SECRET_ACCESS_KEY": "SECRET two"}, "AWS_SECRET_ACCESS_KEY has a blank"),
        ("s3://bucket", None, {"AWS_REGION": " "}, "AWS_REGION has a blank"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(monkeypatch, url, endpoint, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as refused:
        S3Blobs(url, endpoint=endpoint)
    assert "SECRET" not in str(refused.value).replace("AWS_SECRET_ACCESS_KEY", "")


def test_the_command_line_refuses_it_in_one_line(tmp_path, capsys):
    where = ["--data", str(tmp_path), "--port", "0", "--blobs", "s3://bucket"]
    assert main(["urza", "serve", *where, "--s3-endpoint", "127.0.0.1:9000"]) == 1
    err = capsys.readouterr().err
    assert err == "esper urza: --s3-endpoint is no address of a service: give http://HOST:PORT or https://HOST\n"


def test_a_panic_in_the_library_is_a_503(api, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    for name in ("put", "list", "head"):
        monkeypatch.setattr(obstore, name, panic)
    answer = api.upload(artifact())
    assert (answer.status_code, error(answer)) == (503, "unavailable")
    ready = api("GET", "/ready")
    assert (ready.status_code, error(ready)) == (503, "unavailable")
    assert ready.json()["error"]["message"] == "cannot list the bucket: the S3 client failed (PanicException)"
    # Anything else that is no Exception goes through.
    monkeypatch.setattr(obstore, "head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        api.service.blobs.size("0" * 64)


def test_a_bucket_that_is_missing_is_said(tmp_path, s3, logged):
    with running_api(tmp_path, blobs="s3://nobucket/x", s3_endpoint=s3) as api:
        for _ in range(3):
            assert api("GET", "/ready").status_code == 503
            answer = api.upload(artifact())
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "cannot store the blob: there is no such bucket"
    # Once for each kind of failure, however often it happens.
    (listing,) = [line for line in logged if "list the bucket" in line]
    (storing,) = [line for line in logged if "store the blob" in line]
    assert listing.startswith("s3://nobucket/x: cannot list the bucket: GenericError: ") and "404 Not Found" in listing
    assert "FileNotFoundError" in storing
    assert len(logged) == 2 and not any("Signature" in line or "list-type" in line for line in logged)


def test_the_endpoint_may_come_from_the_environment(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    S3Blobs(f"s3://bucket/{tmp_path.name}").check()
    # What the command line says is preferred.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3Blobs(f"s3://bucket/{tmp_path.name}", endpoint=s3).check()


@pytest.fixture
def logged(monkeypatch):
    """The messages of Urza's log."""
    lines = []
    monkeypatch.setattr(logging.getLogger("esper.urza"), "warning", lambda text, *args: lines.append(text % args))
    return lines
