"""Commands to Redis and back, on one event loop."""

from __future__ import annotations

import os
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

__all__ = ["AsyncRedisLink"]


class AsyncRedisLink:
    """What :class:`~esper.oona.redis_link.RedisLink` is, for asyncio.

    Raises:
        EsperError: the Python package ``redis`` is not installed.
        BusURLError: a file that the URL names cannot be read.
    """

    def __init__(self, address: BusAddress, timeout_s: float) -> None:
        check_installed()
        check_tls_files(address)
        self._address = address
        self._timeout_s = timeout_s
        self._client: Any = None
        self._others: list[Any] = []
        self._pid = os.getpid()

    @property
    def split(self) -> bool:
        """Whether a command can touch only one stream."""
        return self._address.kind == "cluster"

    async def run(self, step: Command | Batch) -> Any:
        """See :class:`~esper.oona.redis_link.RedisLink`."""
        import redis.exceptions as known

        try:
            if self._client is None:
                self._client = self._make()
            if not isinstance(step, Batch):
                return step.read(await self._client.execute_command(*step.wire(), **step.options))
            async with self._client.pipeline(transaction=step.whole and not self.split) as pipeline:
                for command in step.commands:
                    pipeline.execute_command(*command.wire(), **command.options)
                answers = await pipeline.execute(raise_on_error=False)
        except (known.RedisError, known.RedisClusterException, OSError) as error:
            raise translate(error, self._address, about(step)) from None
        return read_batch(step, answers, self._address)

    async def close(self) -> None:
        """Disconnect."""
        clients = [self._client, *self._others]
        self._client, self._others = None, []
        if os.getpid() == self._pid:
            for each in clients:
                if each is not None:
                    # redis 5.0.0 calls it close().
                    await (each.aclose if hasattr(each, "aclose") else each.close)()

    def after_fork(self) -> None:
        """Leave the parent's connections to the parent."""
        self._client, self._others = None, []
        self._pid = os.getpid()

    def _make(self) -> Any:
        import redis.asyncio
        from redis.asyncio.cluster import ClusterNode, RedisCluster
        from redis.asyncio.retry import Retry
        from redis.asyncio.sentinel import Sentinel
        from redis.backoff import NoBackoff

        address = self._address
        options = connection_options(address, self._timeout_s, Retry(NoBackoff(), 0))
        if address.kind == "cluster":
            options["retry"] = Retry(NoBackoff(), 1)
            return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in address.hosts], **options)
        if address.kind == "sentinel":
            asking = sentinel_options(address, self._timeout_s, Retry(NoBackoff(), 0))
            sentinel = Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            self._others = list(sentinel.sentinels)
            return read_in_one_piece(sentinel.master_for(address.service))
        return read_in_one_piece(redis.asyncio.Redis(**options))
