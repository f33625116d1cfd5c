"""The service as a process: what only a real one can show."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest

from esper.services.urza.scratch import incoming, storing, sweep
from tests.services.urza.api import artifact
from tests.services.urza.server import running_urza, wait_until


@pytest.fixture(scope="module")
def urza(tmp_path_factory):
    with running_urza(tmp_path_factory.mktemp("urza"), args=["--access-log", "--write-rate", "0"]) as running:
        yield running


@pytest.fixture
def client(urza):
    headers = {"Authorization": f"Bearer {urza.admin_token}"}
    with httpx.Client(base_url=urza.url, headers=headers, timeout=60) as client:
        yield client


def upload(client, data, **options):
    headers = {"X-Esper-SHA256": hashlib.sha256(data).hexdigest()}
    return client.post("/api/v1/kernels", content=data, headers=headers, **options)


def upload_head(urza, data):
    return (
        f"POST /api/v1/kernels HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {urza.admin_token}\r\n"
        f"X-Esper-SHA256: {hashlib.sha256(data).hexdigest()}\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode()


def raw_connection(urza):
    host, port = urza.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(urza, text):
    """The whole answer to a request written by hand."""
    with raw_connection(urza) as connection:
        for piece in text if isinstance(text, list) else [text]:
            connection.sendall(piece)
            time.sleep(0.02)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def left_behind(urza):
    return sorted(path.name for path in (urza.folder / "urza" / "blobs").rglob("*") if path.is_file())


def test_an_upload_that_breaks_off_leaves_nothing(urza, client):
    data = artifact(100)
    before = left_behind(urza)
    scratch = urza.folder / "urza" / "blobs" / "tmp"
    with raw_connection(urza) as connection:
        connection.sendall(upload_head(urza, data) + data[:1000])
        wait_until(lambda: scratch.exists() and any(scratch.iterdir()))
    wait_until(lambda: not any(scratch.iterdir()))
    assert left_behind(urza) == before
    # And the same upload, made again, is as good as new.
    assert upload(client, data).status_code == 201


def test_the_same_bytes_at_once_are_one(urza, client):
    data = artifact(101)
    before = left_behind(urza)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: upload(client, data), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert len({answer.text for answer in answers}) == 1
    assert left_behind(urza) == sorted([*before, hashlib.sha256(data).hexdigest()])


def test_both_ways_of_answering_give_the_same(urza, client):
    artifact_id = upload(client, artifact(102)).json()["artifact_id"]
    auth = f"Authorization: Bearer {urza.admin_token}\r\n"
    path = f"/api/v1/kernels/{artifact_id}"
    etag = client.get(path).headers["etag"]

    def get(extra="", *, line=f"GET {path} HTTP/1.1", cut=None):
        text = f"{line}\r\nHost: x\r\n{auth}{extra}\r\n".encode()
        text_last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        # The last request makes the server close, and shows that the connection is in good order.
        answer = ask(urza, [text[:cut], text[cut:], text_last] if cut else [text, text_last])
        first, _, rest = answer.partition(b'{"status":"ok"}')
        assert rest == b"" and first != answer
        head, _, body = first.partition(b"\r\n\r\n")
        status, *lines = head.lower().split(b"\r\n")
        lines = sorted(line for line in lines if not line.startswith(b"date:"))
        return status, lines, body[: body.find(b"HTTP/1.1")]

    quick = get()
    assert quick[0] == b"http/1.1 200 ok"
    assert get("X-Forwarded-For: 10.0.0.1\r\nUser-Agent: some/1.0\r\n") == quick
    assert get("Content-Length: 0\r\n") == quick
    assert get(cut=30) == quick
    # With a query: the long way.
    assert get(line=f"GET {path}?x=1 HTTP/1.1") == quick
    unchanged = get(f"If-None-Match: {etag}\r\n")
    assert unchanged[0] == b"http/1.1 304 not modified"
    assert unchanged == get(f"If-None-Match: {etag}\r\n", line=f"GET {path}?x=1 HTTP/1.1")
    # Two requests in one packet are answered in order.
    both = ask(
        urza,
        f"GET {path} HTTP/1.1\r\nHost: x\r\n{auth}\r\n".encode() * 2 + b"GET /health HTTP/1.1\r\n"
        b"Host: x\r\nConnection: close\r\n\r\n",
    )
    assert both.count(b'{"artifact_id":') == 2 and both.endswith(b'{"status":"ok"}')


def test_both_ways_of_sending_a_blob_give_the_same(urza, client):
    data = artifact(110)
    path = f"/api/v1/kernels/{upload(client, data).json()['artifact_id']}/blob"

    def get(query="", **headers):
        answer = client.get(path + query, headers={name.replace("_", "-"): value for name, value in headers.items()})
        named = {name: value for name, value in answer.headers.items() if name != "date"}
        return answer.status_code, named, answer.content

    quick = get()
    assert quick[0] == 200 and quick[2] == data
    assert get("?x=1") == quick, "with a query: the long way"
    etag = quick[1]["etag"]
    assert etag == f'"{hashlib.sha256(data).hexdigest()}"'
    assert get(range="bytes=10-19")[::2] == (206, data[10:20])
    assert get(range="bytes=10-19", if_range='"other"') == get(range="bytes=10-19", if_range='"other"', query="?x=1")
    assert get(if_none_match=etag)[::2] == (304, b"")
    # What is wrong with a file is said by the long way.
    (blob,) = urza.folder.rglob(etag.strip('"'))
    for damaged in (data[:-1], data + b"x"):
        blob.write_bytes(damaged)
        answer = get()
        assert answer[0] == 500 and b"blob_damaged" in answer[2]
        assert answer == get("?x=1")
    blob.unlink()
    assert get()[0] == 500
    assert upload(client, data).status_code == 200
    assert get() == quick


@pytest.mark.parametrize("suffix", ["", "/blob"])
def test_the_quick_way_asks_for_the_token_too(urza, client, suffix):
    artifact_id = upload(client, artifact(103)).json()["artifact_id"]
    path = f"/api/v1/kernels/{artifact_id}{suffix}"
    assert client.get(path).status_code == 200
    for header, status in [({}, 401), ({"Authorization": "Bearer wrong"}, 401)]:
        assert httpx.get(urza.url + path, headers=header).status_code == status
    # A body where none belongs is not taken for the next request.
    text = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {urza.admin_token}\r\n".encode()
    answer = ask(urza, text + b"Content-Length: 4\r\nConnection: close\r\n\r\nGET ")
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1
    # Two tokens: neither way picks the one that suits it.
    twice = text + b"Authorization: Bearer wrong\r\nConnection: close\r\n\r\n"
    other = f"GET {path}?x=1 HTTP/1.1".encode() + twice.partition(b"HTTP/1.1")[2]
    assert ask(urza, twice).split(b" ", 2)[1] == ask(urza, other).split(b" ", 2)[1]


def test_a_change_of_status_is_seen_at_once(client):
    artifact_id = upload(client, artifact(104)).json()["artifact_id"]
    path = f"/api/v1/kernels/{artifact_id}"
    for status in ("VALIDATED", "DEPRECATED") * 5:
        assert client.get(path).status_code == 200
        assert client.post(f"{path}/status", json={"status": status}).status_code == 200
        assert client.get(path).json()["status"] == status


def test_a_second_server_on_the_same_data(urza, client, tmp_path):
    data = urza.folder / "urza"
    where = ["--database", f"sqlite:///{data / 'urza.db'}", "--blobs", str(data / "blobs")]
    artifact_id = upload(client, artifact(105)).json()["artifact_id"]
    path = f"/api/v1/kernels/{artifact_id}"
    with running_urza(tmp_path, args=where) as second:
        assert second.admin_token == "", "there are tokens already"
        headers = {"Authorization": f"Bearer {urza.admin_token}"}
        with httpx.Client(base_url=second.url, headers=headers, timeout=60) as other:
            assert other.get(path).json() == client.get(path).json()
            assert other.post(f"{path}/status", json={"status": "VALIDATED"}).status_code == 200
            wait_until(lambda: client.get(path).json()["status"] == "VALIDATED")
            # Both take in the same bytes at once; both answer, and it is one kernel.
            new = artifact(106)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda each: upload(each, new), [client, other] * 2))
            assert sorted(answer.status_code for answer in answers) == [200] * 3 + [201]
            assert other.get(answers[0].json()["kernel_binary_ref"]).content == new
        environment = {**os.environ, "ESPER_URZA_DATABASE": where[1]}
        run = [sys.executable, "-m", "esper.cli.main", "urza", "token"]
        made = subprocess.run([*run, "add", "guest", "--role", "read"], env=environment, capture_output=True, text=True)
        guest = {"Authorization": f"Bearer {made.stdout.strip()}"}
        for server in (urza, second):
            wait_until(lambda server=server: httpx.get(server.url + path, headers=guest).status_code == 200)
        subprocess.run([*run, "revoke", "guest"], env=environment, check=True, capture_output=True)
        for server in (urza, second):
            wait_until(lambda server=server: httpx.get(server.url + path, headers=guest).status_code == 401)


def test_no_secret_is_logged(urza, client):
    secret = "urza_secret-in-the-wrong-place"
    client.get("/api/v1/kernels", params={"cursor": secret})
    httpx.get(f"{urza.url}/api/v1/kernels", headers={"Authorization": f"Bearer {secret}"})
    host = urza.url.removeprefix("http://")
    httpx.get(f"http://user:{secret}@{host}/api/v1/kernels")
    client.get("/health")
    wait_until(lambda: "GET /health 200" in urza.log)
    assert "GET /api/v1/kernels 401" in urza.log and "GET /api/v1/kernels 422" in urza.log
    assert secret not in urza.log
    # The first start shows the administrator's token; nothing else does.
    assert urza.log.count(urza.admin_token) == 1


def test_nobody_writes_lines_into_the_log(urza, client):
    begin = len(urza.log)
    forged = "2026-01-01 00:00:00,000 INFO esper.urza: removed everything"
    quoted = forged.replace(" ", "%20") + "%1b%5b2J%c2%9b%e2%80%ae"
    assert httpx.get(f"{urza.url}/api/v1/x%0a{quoted}").status_code == 404
    assert httpx.post(f"{urza.url}/api/v1/x%0d%0a{quoted}").status_code == 401
    answer = ask(urza, b"GET /api/v1/\x1b[2J\xc2\x9b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4")
    client.get("/health")
    wait_until(lambda: "GET /health 200" in urza.log[begin:])
    log = urza.log[begin:]
    assert f"GET /api/v1/x%0a{quoted} 404" in log and f"POST /api/v1/x%0d%0a{quoted} 401" in log
    assert "removed everything" not in log and log.replace("\n", "").isprintable()


def test_killed_and_started_again(tmp_path):
    data, other = artifact(107), artifact(108)
    folder = tmp_path / "urza" / "blobs" / "sha256"
    scratch = tmp_path / "urza" / "blobs" / "tmp"
    with running_urza(tmp_path) as urza:
        headers = {"Authorization": f"Bearer {urza.admin_token}"}
        with httpx.Client(base_url=urza.url, headers=headers, timeout=60) as client:
            kept = upload(client, data).json()
            # An upload under way when the process is killed.
            with raw_connection(urza) as connection:
                connection.sendall(upload_head(urza, other) + other[:500])
                wait_until(lambda: any(scratch.iterdir()))
                assert urza.kill() != 0
        assert any(scratch.iterdir()), "nobody was there to remove it"
        # A blob that was stored and not recorded, as its mark says; and blobs that are nobody's business: one that was
        # recorded before its mark was removed, and one without a mark, perhaps another database's.
        marked, foreign = (folder / (digit * 2) / (digit * 64) for digit in "01")
        for blob in (marked, foreign):
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(b"x")
        for sha256 in ("0" * 64, kept["sha256"]):
            (scratch / f"storing-{sha256}-0123").write_bytes(b"")
        url = urza.url
        urza.restart()
        assert urza.url == url
        wait_until(lambda: not any(scratch.iterdir()))
        assert not marked.exists() and foreign.exists()
        assert httpx.get(url + kept["kernel_binary_ref"], headers=headers).content == data
        # Asked to stop, it lets what is under way end.
        with raw_connection(urza) as connection:
            connection.sendall(upload_head(urza, other) + other[:500])
            wait_until(lambda: any(scratch.iterdir()))
            urza.process.terminate()
            time.sleep(0.3)
            connection.sendall(other[500:])
            received = b""
            while piece := connection.recv(65536):
                received += piece
        assert received.startswith(b"HTTP/1.1 201")
        assert urza.stop() == 0


def test_what_is_too_large_is_refused_before_it_is_sent(urza):
    head = upload_head(urza, b"").replace(b"Content-Length: 0", b"Content-Length: 999999999999")
    with raw_connection(urza) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_port_in_use_is_one_line(urza, tmp_path):
    port = urza.url.rpartition(":")[2]
    run = [sys.executable, "-m", "esper.cli.main", "urza", "serve", "--port", port, "--data", str(tmp_path)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"esper urza: cannot listen on 127.0.0.1:{port}")
    assert "Traceback" not in ended.stderr


def test_only_files_that_nobody_uses_are_swept(tmp_path):
    dropped = []
    with incoming(tmp_path) as upload, storing(tmp_path, "a" * 64):
        upload.write(b"abc")
        (tmp_path / "upload-dead").write_bytes(b"x")
        (tmp_path / f"storing-{'b' * 64}-dead").write_bytes(b"")
        (tmp_path / "something-else").write_bytes(b"x")
        assert sweep(tmp_path, dropped.append) == 2
        assert upload.path.exists() and dropped == ["b" * 64]
        assert (upload.size, upload.sha256) == (3, hashlib.sha256(b"abc").hexdigest())
    # Not settled: the mark stays for the next start.
    assert sweep(tmp_path, dropped.append) == 1
    with storing(tmp_path, "c" * 64) as settle:
        settle()
    assert dropped == ["b" * 64, "a" * 64]
    assert [path.name for path in tmp_path.iterdir()] == ["something-else"]
