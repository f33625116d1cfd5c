"""Statistics of activations: per feature, per seed's chunk, and the health that follows from them."""

from esper.ops.stats import cpu, cuda, reference, triton  # each adds its functions to the schema's ops
from esper.ops.stats.activation import activate_with_stats
from esper.ops.stats.schema import (
    ACTIVATIONS,
    CHUNK_FIELDS,
    FEATURE_FIELDS,
    HEALTH_FIELDS,
    ChunkField,
    Field,
    HealthField,
    act_stats,
    channel_stats,
    chunk_bounds,
    observe,
    seed_health,
    stats_merge,
)

__all__ = [
    "ACTIVATIONS",
    "CHUNK_FIELDS",
    "FEATURE_FIELDS",
    "HEALTH_FIELDS",
    "ChunkField",
    "Field",
    "HealthField",
    "act_stats",
    "activate_with_stats",
    "channel_stats",
    "chunk_bounds",
    "cpu",
    "cuda",
    "observe",
    "reference",
    "seed_health",
    "stats_merge",
    "triton",
]
