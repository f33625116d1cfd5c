"""HTTP/1.1 as the client reads it: what it takes, what it refuses, and what it does with a connection afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.artifacts import Artifact
from esper.artifacts.http_pool import Address, Pools, Timeouts
from esper.artifacts.http_registry import HttpRegistry
from esper.contracts.errors import KernelNotFoundError, RegistryUnavailableError
from tests.artifacts.http_server import running_server
from tests.artifacts.samples import sample

#: What is heard when everything is as it should be.
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[int]:
    """The port of a server that drops what is left of its connections in the end."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            await serve(reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)


async def talk(
    *answers: bytes, method: str = "GET", body: bytes = b"", silence_s: float = 5.0, end: bool = True
) -> list[tuple[int, dict[str, str], bytes, int]]:
    """Ask a server once for each of ``answers``: status, headers, body, and the number of the connection."""
    connections = 0
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while left:
            head = await reader.readuntil(b"\r\n\r\n")
            length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
            await reader.readexactly(int(length[0].partition(b":")[2]) if length else 0)
            answer = left.pop(0)
            writer.write(answer)
            await writer.drain()
            if end and b"Content-Length" not in answer and b"chunked" not in answer:
                break
        if end:
            writer.close()

    pools = Pools(Timeouts(5.0, silence_s))
    found = []
    async with serving(serve) as port, contextlib.aclosing(pools):
        where = Address("http", "127.0.0.1", port, "/x?y=z")
        for _ in answers:
            response = await pools.request(method, where, {"Host": where.authority}, body)
            async with contextlib.aclosing(response):
                content = b"".join([part async for part in response.parts])
            found.append((response.status, dict(response.headers), content, connections))
    return found


def hear(*answers: bytes, **options: object) -> list[tuple[int, dict[str, str], bytes, int]]:
    return asyncio.run(talk(*answers, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "status", "content"),
    [
        (OK, 200, b"ok"),
        (b"HTTP/1.1 204 \r\n\r\n", 204, b""),
        (b"HTTP/1.1 304\r\nContent-Length: 7\r\n\r\n", 304, b""),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK, 200, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n00A;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\n",
            200,
            b"ok0123456789",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\ncontent-length:\t 2 \t\r\nX-Empty:\r\n\r\nok", 200, b"ok"),
    ],
)
def test_answers(answer, status, content):
    assert hear(answer)[0][:1] + hear(answer)[0][2:3] == (status, content)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nA: b\r\n continued\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA b: c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok!\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2" + b" " * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(answer):
    # What begins without an end is followed by the end of the connection.
    with pytest.raises(ConnectionError):
        asyncio.run(asyncio.wait_for(talk(answer), 20))


@given(st.binary(max_size=300))
def test_any_bytes_end_in_an_answer_or_an_error(garbage):
    for answer in (
        garbage,
        b"HTTP/1.1 200 OK\r\n" + garbage,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + garbage,
    ):
        try:
            asyncio.run(asyncio.wait_for(_once(answer), 20))
        except ConnectionError:
            continue


async def _once(answer: bytes) -> None:
    """Whatever is sent, the connection ends after it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    pools = Pools(Timeouts(5.0, 5.0))
    async with serving(serve) as port, contextlib.aclosing(pools):
        response = await pools.request("GET", Address("http", "127.0.0.1", port, "/"), {})
        async with contextlib.aclosing(response):
            async for _ in response.parts:
                pass


def test_connections_are_used_again_only_where_nothing_is_left_over():
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    assert [found[3] for found in hear(OK, OK, chunked, OK)] == [1, 1, 1, 1]
    assert [found[3] for found in hear(closing, OK)] == [1, 2]
    # An answer nobody asked for must not be taken for the next one.
    found = hear(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", OK)
    assert [(answer[2], answer[3]) for answer in found] == [(b"ok", 1), (b"ok", 2)]


def test_silence_in_the_middle_ends():
    with pytest.raises(TimeoutError, match=r"silent for 0.1 s"):
        hear(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", silence_s=0.1, end=False)


def test_a_large_body_is_sent_and_one_that_is_refused_early_is_not():
    big = bytes(5 << 20)
    assert hear(OK, method="POST", body=big)[0][0] == 200

    async def refused() -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.2)
            writer.close()

        pools = Pools(Timeouts(5.0, 5.0))
        async with serving(serve) as port, contextlib.aclosing(pools):
            where = Address("http", "127.0.0.1", port, "/")
            response = await pools.request("POST", where, {"Host": "x"}, bytes(50 << 20))
            await response.aclose()
        return response.status

    assert asyncio.run(refused()) == 413


def test_a_sender_that_is_too_fast_has_to_wait():
    async def flooded() -> int:
        sent = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(bytes(1 << 20))
                await asyncio.wait_for(writer.drain(), 0.5)
                sent += 1 << 20

        pools = Pools(Timeouts(5.0, 5.0))
        async with serving(serve) as port, contextlib.aclosing(pools):
            response = await pools.request("GET", Address("http", "127.0.0.1", port, "/"), {})
            await asyncio.sleep(1.0)  # read nothing
            await response.aclose()
        return sent

    assert asyncio.run(flooded()) < 64 << 20, "the system's buffers, and not all of it in memory"


# -- proxies and TLS


def test_a_proxy_is_used_where_the_environment_names_one(monkeypatch):
    data = sample()
    with running_server() as server:
        artifact_id = server.add(data)
        answer = server._answer
        server._answer = lambda request: answer(
            type(request)(
                request.method,
                request.target.removeprefix("http://registry.invalid"),
                request.headers,
                request.body,
                request.connection,
            )
        )
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        registry = HttpRegistry("http://registry.invalid", "token")
        assert asyncio.run(registry.fetch(artifact_id)) == data
        assert all(request.target.startswith("http://registry.invalid/") for request in server.requests)
        # This machine itself is never asked for through a proxy.
        server.requests.clear()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        server._answer = answer
        assert asyncio.run(HttpRegistry(server.url).fetch(artifact_id)) == data


@pytest.mark.parametrize(
    ("proxy", "why"),
    [
        ("http://u:PROXY/SECRET@127.0.0.1:1", "a password that is percent-encoded"),
        ("http://u:SECRET@127.0.0.1:99999", "a port below 65536"),
        ("ftp://u:SECRET@127.0.0.1:1", "http://host:port, https:// or socks5://"),
        ("socks5://u:SECRET@127.0.0.1:1", "socksio"),
    ],
)
def test_of_a_proxy_that_cannot_be_used_nothing_is_shown(monkeypatch, proxy, why):
    monkeypatch.setitem(sys.modules, "socksio", None)  # not installed
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    registry = HttpRegistry("http://registry.invalid", "token")
    with pytest.raises(RegistryUnavailableError) as caught:
        asyncio.run(registry.fetch(Artifact.open(sample()).artifact_id))
    said = str(caught.value)
    assert "the proxy that the environment names cannot be used (http_proxy, https_proxy, all_proxy)" in said
    assert why in said
    assert "SECRET" not in said and "PROXY" not in said
    assert not caught.value.retryable


def _certificate(folder, name: str) -> tuple[str, str]:
    """A certificate for ``name`` that vouches for itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.mark.parametrize(
    ("name", "trusted", "message"),
    [
        ("127.0.0.1", True, "no such artifact"),
        ("127.0.0.1", False, "certificate verify failed"),
        ("other.host", True, "certificate verify failed"),
    ],
)
def test_tls(tmp_path, monkeypatch, name, trusted, message):
    cert, key = _certificate(tmp_path, name)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def over_tls() -> object:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        async with serving(serve, ssl=context) as port:
            registry = HttpRegistry(f"https://127.0.0.1:{port}")
            async with contextlib.aclosing(registry):
                return await registry.describe(Artifact.open(sample()).artifact_id)

    with pytest.raises((KernelNotFoundError, RegistryUnavailableError), match=message):
        asyncio.run(over_tls())
