"""Exporters beside a watcher: for ``esper monitor``, and for a training process that exports what itself tells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError
from esper.watch.bus_source import BusSource
from esper.watch.watcher import Watcher

if TYPE_CHECKING:
    from esper.oona import OonaClient

__all__ = ["Exporters", "exporting"]

_LOCAL: Final = "127.0.0.1"


class Exporters:
    """Prometheus and TensorBoard, where they are asked for; a context manager.

    Args:
        watcher: Whose state is exported.
        prometheus: ``[HOST:]PORT`` to serve metrics at; without a host only this machine sees them, and port 0 is any
            free one. None serves none.
        tensorboard: Folder for event files. None writes none.

    Attributes:
        url: Where metrics are served, or None.

    Raises:
        EsperError: an address that is none or is taken, a folder that cannot be made, a package that is not installed.
    """

    def __init__(
        self, watcher: Watcher, *, prometheus: str | None = None, tensorboard: Path | str | None = None
    ) -> None:
        self.url: str | None = None
        with contextlib.ExitStack() as stack:
            if prometheus is not None:
                host, port = _address(prometheus)
                try:
                    from esper.watch.prometheus import PrometheusExporter, serve
                except ImportError:
                    raise EsperError(
                        "metrics need the package prometheus_client; in Esper's folder: pip install '.[monitor]'"
                    ) from None
                served = serve(PrometheusExporter(watcher.looking, watcher.now), host, port)
                stack.callback(served.close)
                self.url = served.url
            if tensorboard is not None:
                from esper.watch.tensorboard import TensorBoardExporter

                watcher.listen(stack.enter_context(TensorBoardExporter(Path(tensorboard))).update)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End, with the last state taken in."""
        self._stack.close()

    def __enter__(self) -> Exporters:
        """The exporters themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.close()


@contextlib.contextmanager
def exporting(
    bus: OonaClient, *, prometheus: str | None = None, tensorboard: Path | str | None = None
) -> Iterator[Exporters]:
    """Export what is told on a bus from now on, while the block runs, from threads of their own.

    For a training process: give the same bus to ``esper.wrap(bus=...)``. ``OonaClient("memory://")`` needs no server.

    Args:
        bus: What to listen to.
        prometheus: See :class:`Exporters`.
        tensorboard: See :class:`Exporters`.

    Raises:
        EsperError: see :class:`Exporters`.
    """
    watcher = Watcher(BusSource(bus, since_s=None))
    with Exporters(watcher, prometheus=prometheus, tensorboard=tensorboard) as exporters:
        watcher.start()
        try:
            yield exporters
        finally:
            watcher.stop()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise EsperError(f"the address for metrics is {text!r}; need a port from 0 to 65535, or HOST:PORT")
    return host.strip("[]") or _LOCAL, int(port)
