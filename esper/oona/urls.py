"""URLs of a bus: what they may say, and how they are shown.

    redis://[user:password@]host[:port][/db]              one Redis
    rediss://...                                          the same over TLS
    unix:///path/to.sock[?db=1&username=u&password=p]     one Redis on this machine
    redis+sentinel://host:port[,host:port...]/service[/db]    the primary that the sentinels name
    redis+cluster://host:port[,host:port...]              a cluster
    memory://[name]                                       in this process, no server

``rediss+sentinel`` and ``rediss+cluster`` speak TLS. User and password are percent-encoded where they hold one of
``/ ? # @ : [ ]``. They are shown nowhere: the ``repr`` of a :class:`BusAddress` leaves them out, and errors about
a URL name its parts rather than quote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote

from esper.contracts.errors import BusURLError

__all__ = ["BusAddress", "mask", "parse"]

_SCHEMES: Final = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "memory": ("memory", False),
}
_PORTS: Final = {"single": 6379, "cluster": 6379, "sentinel": 26379}
#: Options behind the question mark, and for which kinds.
_CREDENTIALS: Final = frozenset({"username", "password"})
_SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password"})
_TLS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})
_CERT_REQS: Final = ("none", "optional", "required")
#: A name or address, in brackets where it has colons, and a port.
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:@]+)(:[0-9]{1,5})?")
_ENCODE: Final = "a user or password with one of / ? # @ : in it must be percent-encoded"


@dataclass(frozen=True, slots=True)
class BusAddress:
    """A URL taken apart.

    Attributes:
        kind: ``single``, ``unix``, ``sentinel``, ``cluster`` or ``memory``.
        shown: The URL for messages: no user, no password, no options.
        hosts: Names and ports: of the server, of the sentinels, or of some nodes of the cluster.
        path: Of the socket, for ``unix``; name of the bus, for ``memory``.
        db: Number of the database.
        service: What the sentinels call the primary.
        tls: Whether to speak TLS, and ``tls_options`` with which files and checks, as redis-py names them.
    """

    kind: str
    shown: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    service: str = ""
    tls: bool = False
    tls_options: Mapping[str, str | bool] = field(default_factory=dict)
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)

    def scrub(self, text: str) -> str:
        """``text`` without the passwords, wherever it got them from."""
        for secret in (self.password, self.sentinel_password):
            if secret:
                text = text.replace(secret, "***")
        return text


def mask(url: str) -> str:
    """``url`` for messages: everything up to the last ``@`` and behind a ``?`` replaced by ``***``.

    Meant for URLs that may be wrong, too: where it cannot be told what is a password, nothing is shown but the scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "***"
    head, question, options = rest.partition("?")
    if "@" in options or "#" in rest:
        # An unescaped ? or # in a password, or an @ in an option.
        return f"{scheme}://***"
    _, at, where = head.rpartition("@")
    authority = where.partition("/")[0]
    if authority and scheme != "memory" and not all(_HOST.fullmatch(each) for each in authority.split(",")):
        # A password whose host was forgotten looks like a port.
        return f"{scheme}://***"
    return f"{scheme}://{'***@' if at else ''}{where}{'?***' if question else ''}"


def parse(url: str) -> BusAddress:
    """Take a URL apart.

    Raises:
        BusURLError: it is none, or says something that its kind has no use for.
    """
    if not isinstance(url, str):
        raise BusURLError(f"the bus's URL is a {type(url).__name__}; need text such as redis://localhost:6379/0")
    scheme, separator, rest = url.strip().partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        shown = f"the scheme {scheme!r:.40}" if separator else "no scheme"
        raise BusURLError(f"the bus's URL has {shown}; known: {', '.join(f'{each}://' for each in _SCHEMES)}")
    kind, tls = _SCHEMES[scheme.lower()]
    shown = mask(url.strip())
    if "#" in rest:
        raise BusURLError(f"the bus's URL {shown} has a #; {_ENCODE}")
    location, _, query = rest.partition("?")
    login, at, place = location.rpartition("@")
    username, _, password = login.partition(":")
    if at and kind == "memory":
        raise BusURLError(f"{shown}: a bus in memory has no user and no password")
    if "/" in login or "@" in query:
        raise BusURLError(f"{shown} is ambiguous: {_ENCODE}")
    address, slash, path = place.partition("/")
    hosts: tuple[tuple[str, int], ...] = ()
    found = service = ""
    if kind in ("unix", "memory"):
        if kind == "unix" and (address or not path):
            raise BusURLError(f"{shown} names no socket; need unix:///path/to.sock (three slashes)")
        found, path = unquote(slash + path) if kind == "unix" else unquote(place.strip("/")), ""
    else:
        hosts = tuple(_host(each, _PORTS[kind], shown) for each in address.split(","))
        if kind == "single" and len(hosts) > 1:
            raise BusURLError(f"{shown} names {len(hosts)} servers; several go with redis+sentinel or redis+cluster")
        if kind == "sentinel":
            service, _, path = path.partition("/")
            service = unquote(service)
            if not service:
                raise BusURLError(f"{shown} names no service; need redis+sentinel://host:port/service")
    # Not before: in a URL that is wrong up to here, a piece of a password might pass for the name of an option.
    options = _options(query, kind, tls, shown)
    path = path.rstrip("/")
    if path and options.get("db", path) != path:
        # Clients of Redis differ in which one they take.
        raise BusURLError(f"{shown} names two databases, before the ? and behind it")
    db = _database(path or options.get("db", ""), shown)
    if kind == "cluster" and db:
        raise BusURLError(f"{shown} asks for database {db}; a cluster has only database 0")
    return BusAddress(
        kind=kind,
        shown=shown.partition("?")[0],
        hosts=hosts,
        path=found,
        db=db,
        service=service,
        tls=tls,
        tls_options={name: _tls_value(name, value, shown) for name, value in options.items() if name in _TLS},
        username=unquote(username) or options.get("username") or None,
        password=unquote(password) or options.get("password") or None,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
    )


def _options(query: str, kind: str, tls: bool, shown: str) -> dict[str, str]:
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=32))
    except ValueError:
        raise BusURLError(f"{shown}: what follows the ? is not name=value&name=value; {_ENCODE}") from None
    known = _CREDENTIALS | {"db"} if kind != "memory" else frozenset()
    known |= _SENTINEL if kind == "sentinel" else frozenset()
    known |= _TLS if tls else frozenset()
    if unknown := sorted(options.keys() - known):
        # Behind a password with an unescaped & stands a piece of it.
        named = "" if "password" in query else ": " + ", ".join(f"{name!r:.40}" for name in unknown[:8])
        raise BusURLError(f"{shown} has options that are unknown here{named}; known: {', '.join(sorted(known))}")
    return options


def _host(text: str, port: int, shown: str) -> tuple[str, int]:
    """A host and its port; an IPv6 address stands in brackets."""
    if text.startswith("["):
        name, bracket, after = text[1:].partition("]")
        good = bool(bracket) and (not after or after.startswith(":"))
        digits = after[1:]
    else:
        name, _, digits = text.partition(":")
        good = ":" not in digits
    # Nothing of it is quoted: with a bad password in front, this may be a piece of it.
    if not good or not name or (digits and not (digits.isdecimal() and 0 < int(digits[:6]) < 65536)):
        raise BusURLError(f"{shown} has a host or port that is none; need host:port, a port in 1 to 65535; {_ENCODE}")
    return unquote(name), int(digits) if digits else port


def _database(text: str, shown: str) -> int:
    if not text:
        return 0
    if not text.isdecimal() or len(text) > 6:
        raise BusURLError(f"{shown}: the database is a number, 0 or more")
    return int(text)


def _tls_value(name: str, value: str, shown: str) -> str | bool:
    if name == "ssl_check_hostname":
        if value.lower() not in ("true", "false"):
            raise BusURLError(f"{shown}: ssl_check_hostname has another value; need true or false")
        return value.lower() == "true"
    if name == "ssl_cert_reqs" and value not in _CERT_REQS:
        raise BusURLError(f"{shown}: ssl_cert_reqs has another value; need one of {', '.join(_CERT_REQS)}")
    return value
