"""Oona, the message bus: Redis Streams, or the same in this process.

Beside the artifacts: above the contracts, below everything that publishes or consumes.
"""

from esper.oona.async_client import AsyncFollower, AsyncOonaClient
from esper.oona.client import Follower, OonaClient
from esper.oona.entries import DeadLetter
from esper.oona.settings import DEFAULT_RETENTION, MEMORY_RETENTION, BusSettings, Retention

__all__ = [
    "DEFAULT_RETENTION",
    "MEMORY_RETENTION",
    "AsyncFollower",
    "AsyncOonaClient",
    "BusSettings",
    "DeadLetter",
    "Follower",
    "OonaClient",
    "Retention",
]
