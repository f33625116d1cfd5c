"""Commands to Redis and back, blocking, from any thread and across ``fork``."""

from __future__ import annotations

import os
import threading
from typing import Any

from esper.oona.commands import Batch, Command
from esper.oona.failures import translate
from esper.oona.redis_options import (
    about,
    check_installed,
    check_tls_files,
    connection_options,
    read_batch,
    read_in_one_piece,
    sentinel_options,
)
from esper.oona.urls import BusAddress

__all__ = ["RedisLink"]


class RedisLink:
    """Connections to one Redis, to the primary behind sentinels, or to a cluster.

    Raises:
        EsperError: the Python package ``redis`` is not installed.
        BusURLError: a file that the URL names cannot be read.
    """

    def __init__(self, address: BusAddress, timeout_s: float) -> None:
        check_installed()
        check_tls_files(address)
        self._address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._client: Any = None
        self._others: list[Any] = []
        self._pid = os.getpid()

    @property
    def split(self) -> bool:
        """Whether a command can touch only one stream."""
        return self._address.kind == "cluster"

    def run(self, step: Command | Batch) -> Any:
        """Carry out ``step``.

        Raises:
            BusError: as :func:`esper.oona.failures.translate` says.
        """
        import redis.exceptions as known

        try:
            client = self._connected()
            if not isinstance(step, Batch):
                return step.read(client.execute_command(*step.wire(), **step.options))
            with client.pipeline(transaction=step.whole and not self.split) as pipeline:
                for command in step.commands:
                    pipeline.execute_command(*command.wire(), **command.options)
                answers = pipeline.execute(raise_on_error=False)
        except (known.RedisError, known.RedisClusterException, OSError) as error:
            # Without its cause: what redis-py says of a pipeline holds the messages.
            raise translate(error, self._address, about(step)) from None
        return read_batch(step, answers, self._address)

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            clients = [self._client, *self._others]
            self._client, self._others = None, []
        if os.getpid() == self._pid:
            for each in clients:
                if each is not None:
                    each.close()

    def after_fork(self) -> None:
        """Leave the parent's connections to the parent."""
        self._lock = threading.Lock()
        self._client, self._others = None, []
        self._pid = os.getpid()

    def _connected(self) -> Any:
        client = self._client
        if client is None:
            with self._lock:
                if self._client is None:
                    self._client = self._make()
                client = self._client
        return client

    def _make(self) -> Any:
        import redis
        from redis.backoff import NoBackoff
        from redis.cluster import ClusterNode, RedisCluster
        from redis.retry import Retry
        from redis.sentinel import Sentinel

        address = self._address
        options = connection_options(address, self._timeout_s, Retry(NoBackoff(), 0))
        if address.kind == "cluster":
            # One: after a node moved or died, look for it once.
            options["retry"] = Retry(NoBackoff(), 1)
            return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in address.hosts], **options)
        if address.kind == "sentinel":
            asking = sentinel_options(address, self._timeout_s, Retry(NoBackoff(), 0))
            sentinel = Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            self._others = list(sentinel.sentinels)
            return read_in_one_piece(sentinel.master_for(address.service))
        return read_in_one_piece(redis.Redis(**options))
