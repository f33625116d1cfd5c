"""URLs of a bus: what they mean, what is refused, and that nothing of a password is ever shown."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from esper.contracts.bus import BusError, BusURLError
from esper.oona import AsyncOonaClient, OonaClient
from esper.oona.urls import mask, parse


def test_redis() -> None:
    found = parse("redis://us%40er:p%2Fa%3As%23s@example.org:7000/3")
    assert (found.kind, found.hosts, found.db, found.tls) == ("single", (("example.org", 7000),), 3, False)
    assert (found.username, found.password) == ("us@er", "p/a:s#s")
    assert found.shown == "redis://***@example.org:7000/3"
    assert parse("redis://h").hosts == (("h", 6379),)
    assert parse("redis://:pw@h/").password == "pw"
    assert parse("redis://h?db=2&password=pw&username=u").db == 2
    assert parse("redis://[::1]:7000").hosts == (("::1", 7000),)
    assert parse("redis://[fe80::1]").hosts == (("fe80::1", 6379),)


def test_tls() -> None:
    found = parse("rediss://h/1?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false&ssl_cert_reqs=none")
    assert found.tls
    assert found.tls_options == {"ssl_ca_certs": "/etc/ca.pem", "ssl_check_hostname": False, "ssl_cert_reqs": "none"}
    assert found.shown == "rediss://h/1"


def test_socket() -> None:
    found = parse("unix:///run/redis.sock?db=4&password=p%26w")
    assert (found.kind, found.path, found.db, found.password) == ("unix", "/run/redis.sock", 4, "p&w")
    assert found.shown == "unix:///run/redis.sock"
    assert parse("unix://u:pw@/run/redis.sock").username == "u"


def test_sentinel() -> None:
    found = parse("redis+sentinel://u:pw@a:1,b,[::1]:3/main/2?sentinel_password=other")
    assert found.hosts == (("a", 1), ("b", 26379), ("::1", 3))
    assert (found.kind, found.service, found.db) == ("sentinel", "main", 2)
    assert (found.password, found.sentinel_password) == ("pw", "other")
    assert found.shown == "redis+sentinel://***@a:1,b,[::1]:3/main/2"
    assert parse("rediss+sentinel://a/main").tls


def test_cluster() -> None:
    found = parse("rediss+cluster://a:1,b:2")
    assert (found.kind, found.hosts, found.tls) == ("cluster", (("a", 1), ("b", 2)), True)


def test_memory() -> None:
    assert parse("memory://").path == ""
    assert parse("memory://name").path == "name"
    assert parse("memory://name").shown == "memory://name"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:6379", "no scheme; known: redis://"),
        ("http://h", "the scheme 'http'"),
        ("", "no scheme"),
        (None, "is a NoneType"),
        ("redis://", "host or port that is none"),
        ("redis://h:x", "host or port that is none"),
        ("redis://h:0", "a port in 1 to 65535"),
        ("redis://h:70000", "a port in 1 to 65535"),
        ("redis://h/x", "the database is a number"),
        ("redis://h/-1", "the database is a number"),
        ("redis://h/1?db=2", "names two databases"),
        ("redis://a,b", "several go with redis+sentinel or redis+cluster"),
        ("redis://::1", "host or port that is none"),
        ("redis://[::1", "host or port that is none"),
        ("redis://h?tls=yes", "options that are unknown here: 'tls'"),
        ("redis://h?ssl_ca_certs=x", "unknown here: 'ssl_ca_certs'"),
        ("redis://h?nonsense", "not name=value"),
        ("rediss://h?ssl_cert_reqs=maybe", "need one of none, optional, required"),
        ("rediss://h?ssl_check_hostname=maybe", "need true or false"),
        ("redis://h#x", "has a #"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "names no socket"),
        ("redis+sentinel://a:1", "names no service"),
        ("redis+cluster://a/1", "a cluster has only database 0"),
        ("memory://u:p@x", "no user"),
        ("memory://x?a=b", "unknown here"),
    ],
)
def test_what_is_no_url_of_a_bus(url, text: str) -> None:
    with pytest.raises(BusURLError) as caught:
        parse(url)
    assert text in str(caught.value)


@pytest.mark.parametrize("option", ["ssl_cert_reqs", "ssl_check_hostname", "nonsense"])
def test_what_an_option_says_is_not_shown(option: str) -> None:
    with pytest.raises(BusURLError, match=option) as caught:
        parse(f"rediss://h?{option}=SECRETX")
    assert "SECRETX" not in str(caught.value)


@pytest.mark.parametrize("client", [OonaClient, AsyncOonaClient])
@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_is_not_there_is_no_outage(option: str, client: type, tmp_path: Path) -> None:
    began = time.monotonic()
    for path, why in ((tmp_path / "nope", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(BusURLError, match=f"the file of {option} cannot be read: '{path}': {why}"):
            client(f"rediss://:pw@127.0.0.1:1?{option}={path}")
    assert time.monotonic() - began < 5


SECRET = "s3cr3t"


@given(
    scheme=st.sampled_from(["redis", "rediss", "unix", "redis+sentinel", "redis+cluster", "http"]),
    before=st.text("ab:/@?#&=%,[]", max_size=4),
    after=st.text("ab:/@?#&=%,[]", max_size=4),
    rest=st.sampled_from(["@h:1/0", "@h", "@h/service/1", "@/run/x.sock", "", ":1", "@"]),
    query=st.sampled_from(["", "?db=1", "?password=pw&x=y"]),
)
def test_no_error_and_no_name_shows_a_password_however_badly_it_is_written(scheme, before, after, rest, query) -> None:
    # A password of any sort behind a colon, with whatever needs escaping left unescaped.
    # What stands behind the last @ is where the bus is, and is shown.
    assume("@" in rest or "@" not in before)
    _shows_nothing(f"{scheme}://:{before}{SECRET}{after}{rest}{query}")


@given(before=st.text("ab:/@?#&=%", max_size=4), after=st.text("ab:/@?#&=%", max_size=4))
def test_nor_one_in_an_option(before, after) -> None:
    for start in ("unix:///run/x.sock?password=", "redis://h?password=", "redis+sentinel://h/s?sentinel_password="):
        _shows_nothing(f"{start}{before}{SECRET}{after}")


def _shows_nothing(url: str) -> None:
    try:
        found = parse(url)
    except BusURLError as error:
        assert SECRET not in str(error)
    else:
        # What was taken for a host, a path or a service has to be shown: it is where the bus is.
        if found.password and SECRET in found.password:
            assert SECRET not in found.shown
            assert SECRET not in repr(found)
            assert SECRET not in found.scrub(f"because {found.password} is wrong")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://u:p@h:1/0", "redis://***@h:1/0"),
        ("redis://u:p/q@h", "redis://***@h"),
        ("redis://:p", "redis://***"),
        ("redis://u:p?q@h", "redis://***"),
        ("redis://u:p#q@h", "redis://***"),
        ("unix:///s?password=p", "unix:///s?***"),
        ("unix:///s?password=p@q", "unix://***"),
        ("p", "***"),
    ],
)
def test_mask(url: str, shown: str) -> None:
    assert mask(url) == shown


def test_the_environment_says_where_the_bus_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://u:SECRET@h:1/2")
    client = OonaClient(connect=False)
    assert client.url == "redis://***@h:1/2"
    assert repr(client) == "OonaClient('redis://***@h:1/2')"
    assert repr(AsyncOonaClient()) == "AsyncOonaClient('redis://***@h:1/2')"
    monkeypatch.setenv("REDIS_URL", "SECRET@h")
    with pytest.raises(BusURLError, match=r"no scheme.*\(from REDIS_URL\)") as caught:
        OonaClient()
    assert "SECRET" not in str(caught.value)
    monkeypatch.setenv("REDIS_URL", " ")
    assert OonaClient().url == "memory://"


def test_redis_py_is_wanted_only_for_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setenv("REDIS_URL", "redis://h")
    with pytest.raises(Exception, match="pip install redis") as caught:
        OonaClient()
    assert not isinstance(caught.value, BusError)
    assert OonaClient("memory://").health_check().ok
