"""Running the service as a process."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn

from esper.services.urza.app import create_app
from esper.services.urza.connections import Bounds, bounded_protocol, most_connections
from esper.services.urza.quick import QuickWay
from esper.services.urza.service import Service
from esper.services.urza.settings import Settings

__all__ = ["serve"]

#: How long requests under way may take to end when the process is told to stop.
_GRACE_S: Final = 20


def serve(settings: Settings, host: str, port: int, *, access_log: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Prints ``urza: listening on URL`` on standard output when it is ready, and on the very first start the token of the
    administrator on standard error.

    Raises:
        DatabaseError: if the database cannot be used.
        OSError: if the address cannot be listened on.
    """
    _set_up_logging(access_log)
    # First of all: a process that cannot listen shall not be the one that made the first token.
    with _listen(host, port) as listening:
        service = Service(settings)
        with service.database.failing():
            token = service.tokens.ensure_admin()
        if token is not None:
            print(
                f"urza: first start: token 'admin' with all roles, shown this once: {token}",
                file=sys.stderr,
                flush=True,
            )
        config = uvicorn.Config(
            QuickWay(create_app(service), service),
            http=bounded_protocol(Bounds(most_connections(), settings.request_s, settings.upload_idle_s)),
            # There are none here, and they would take a connection out of its bounds.
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            lifespan="on",
        )
        server = _Server(config)
        # uvicorn stops gracefully and then raises the signal again; asked to stop and stopped is no failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _nothing)
        server.run([listening])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"urza: listening on http://{shown}:{port}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off, which would hold answers back for 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


def _nothing(_: int, __: FrameType | None) -> None:
    """In the place of the default handler, which would end the process."""


def _set_up_logging(access_log: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, level in (("esper.urza", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("esper.urza.access").setLevel(logging.INFO if access_log else logging.WARNING)
