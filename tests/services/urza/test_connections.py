"""What anybody can do to the server without a token: hold connections, send endless heads, take no answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httptools")

from uvicorn.config import Config
from uvicorn.server import ServerState

from esper.services.urza.connections import HEAD_BYTES, Bounds, bounded_protocol, most_connections
from tests.services.urza.server import running_urza

#: The time limits of the server below.
LIMIT_S = 1.0
HALF_BODY = b"POST /api/v1/jobs/claim HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n%s\r\n{"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def urza(tmp_path_factory):
    """A server with short limits, and so few files that it takes no more than 32 connections."""
    limits = {"request_s": LIMIT_S, "upload_idle_s": LIMIT_S}
    with running_urza(tmp_path_factory.mktemp("urza"), settings=limits, files=64, args=["--write-rate", "0"]) as urza:
        yield urza


@pytest.fixture
def connect(urza):
    """Makes connections, which are closed in the end."""
    host, port = urza.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:

        def made(*, buffer=None):
            connection = stack.enter_context(socket.socket())
            connection.settimeout(30)
            if buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.connect((host, int(port)))
            return connection

        yield made


def end_of(connection):
    """All that still comes; until the other side closes, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def memory_of(urza):
    with open(f"/proc/{urza.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_well(urza):
    return httpx.get(f"{urza.url}/health", timeout=30).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-", b"\r\n\r\n"])
def test_a_head_that_does_not_arrive_ends_the_connection(connect, sent):
    connection = connect()
    began = time.monotonic()
    connection.sendall(sent)
    assert end_of(connection) == b""
    assert LIMIT_S * 0.9 < time.monotonic() - began < LIMIT_S + 5


def test_dripping_gives_no_more_time(connect):
    for first in (b"", HEALTH, HEALTH[:-2] + b"Content-Length: 1000\r\n\r\n"):
        connection = connect()
        connection.sendall(first)
        if first:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < began + 20:
                connection.sendall(b"X" if first else b"\r\n")
                time.sleep(0.1)
        assert time.monotonic() - began < LIMIT_S + 5


def test_a_body_that_does_not_arrive_is_a_408(urza, connect):
    connection = connect()
    began = time.monotonic()
    connection.sendall(HALF_BODY % f"Authorization: Bearer {urza.admin_token}\r\n".encode())
    answer = end_of(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer and b"connection: close" in answer
    assert LIMIT_S * 0.9 < time.monotonic() - began < LIMIT_S + 5


@pytest.mark.parametrize("token", [b"", b"Authorization: Bearer wrong\r\n"])
def test_nobody_waits_for_the_body_of_a_stranger(connect, token):
    connection = connect()
    began = time.monotonic()
    connection.sendall(HALF_BODY % token)
    assert connection.recv(65536).startswith(b"HTTP/1.1 401")
    assert time.monotonic() - began < LIMIT_S
    assert b"HTTP/1.1" not in end_of(connection)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", HALF_BODY % b"", HEALTH])
def test_strangers_shut_nobody_out(urza, connect, sent):
    """More connections than the server takes, and than it has files for, all at once; and a client among them."""
    with httpx.Client(base_url=urza.url, timeout=30) as client:
        for _ in range(140):
            connect().sendall(sent)
        assert client.get("/health").status_code == 200
    assert is_well(urza)


def test_where_all_connections_are_busy_another_is_a_503(urza, connect):
    half = HALF_BODY % f"Authorization: Bearer {urza.admin_token}\r\n".encode()
    busy = [connect() for _ in range(32)]
    for connection in busy:
        connection.sendall(half)
    time.sleep(0.3)
    answer = end_of(connect())
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1\r\n" in answer
    assert answer.endswith(b'{"error":{"code":"too_many_connections","message":"all connections are in use"}}')
    for connection in busy:
        assert end_of(connection).startswith(b"HTTP/1.1 408")
    assert is_well(urza)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * (1 << 20),
        b"GET /health HTTP/1.1\r\nX: " + b"x" * (1 << 20),
        b"GET /health HTTP/1.1\r\n" + b"X-Some: header\r\n" * (1 << 16),
        b"\r\n" * (1 << 19),
    ],
    ids=["url", "header", "headers", "nothing"],
)
def test_a_large_head_is_a_431(connect, head):
    connection = connect()
    with contextlib.suppress(ConnectionError):
        connection.sendall(head[: HEAD_BYTES + 1])
    answer = end_of(connection)
    assert answer.startswith(b"HTTP/1.1 431") and b'"code":"head_too_large"' in answer


def test_a_head_just_small_enough_is_none(connect):
    connection = connect()
    head = HEALTH[:-2] + b"Connection: close\r\nX: "
    connection.sendall(head + b"x" * (HEAD_BYTES - len(head) - 4) + b"\r\n\r\n")
    assert end_of(connection).startswith(b"HTTP/1.1 200")
    # Many in a row are each judged by themselves, and so is what follows a body.
    connection = connect()
    body = HEALTH[:-2] + b"Content-Length: 50000\r\n\r\n" + b"x" * 50_000
    for _ in range(4):
        connection.sendall((HEALTH[:-2] + b"X: " + b"x" * 40_000 + b"\r\n\r\n") + body)
        time.sleep(0.05)
    connection.sendall(HEALTH[:-2] + b"Connection: close\r\n\r\n")
    assert end_of(connection).count(b"HTTP/1.1 200") == 9


@pytest.mark.parametrize("where", ["head", "trailer"])
def test_endless_headers_fill_no_memory(urza, connect, where):
    start = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    if where == "trailer":
        start += b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    before = memory_of(urza)
    for _ in range(4):
        connection = connect()
        with contextlib.suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(512):
                connection.sendall(b"X: " + b"x" * 65_000 + b"\r\n")
    assert memory_of(urza) - before < 16 << 20
    assert is_well(urza)


def test_who_takes_no_answer_is_given_up(urza, connect):
    ask = f"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {urza.admin_token}\r\n\r\n"
    connection = connect(buffer=2048)
    connection.sendall(ask.encode() * 400)
    time.sleep(3 * LIMIT_S + 1)
    assert 0 < end_of(connection).count(b"HTTP/1.1 200") < 400
    # One that takes it slowly has it.
    connection = connect(buffer=2048)
    connection.sendall(ask.encode() * 39 + ask.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode())
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
        time.sleep(0.004)
    assert received.count(b"HTTP/1.1 200") == 40
    assert is_well(urza)


class Untaken:
    """A transport whose client takes nothing."""

    def __init__(self):
        self.closing = self.aborted = False
        self.waiting = 0

    def get_extra_info(self, *_):
        return None

    def get_write_buffer_size(self):
        return self.waiting

    def write(self, data):
        self.waiting += len(data)

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    def abort(self):
        self.closing = self.aborted = True


async def answer(_, __, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(
    "sent", [HEALTH[:-2] + b"Connection: close\r\n\r\n", b"nonsense\r\n\r\n", b"\r\n" * HEAD_BYTES]
)
def test_a_connection_that_is_closed_ends_even_if_nobody_takes_the_rest(sent):
    async def run():
        bounds = Bounds(8, 30.0, 0.1)
        state, transport = ServerState(), Untaken()
        protocol = bounded_protocol(bounds)(config=Config(answer, ws="none"), server_state=state, app_state={})
        protocol.connection_made(transport)
        protocol.data_received(sent)
        await asyncio.sleep(0.05)
        assert transport.closing and not transport.aborted and transport.waiting
        await asyncio.sleep(0.3)
        assert transport.aborted
        protocol.connection_lost(None)
        assert not bounds.idle and not state.connections

    asyncio.run(run())


def test_the_bound_follows_the_limit_on_files(monkeypatch):
    import resource

    for files, bound in [(128, 64), (1024, 512), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == bound
