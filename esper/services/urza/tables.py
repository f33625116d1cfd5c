"""The database's tables. The migrations make them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text

__all__ = [
    "blueprints",
    "changes",
    "history",
    "jobs",
    "kernel_architectures",
    "kernel_tags",
    "kernels",
    "metadata",
    "tokens",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _key(length: int) -> String:
    # Ids are compared and paged through byte by byte, whatever language the server sorts in.
    return String(length).with_variant(String(length, collation="C"), "postgresql")


#: SQLite counts up by itself only where the key is a plain INTEGER.
_Serial = BigInteger().with_variant(Integer(), "sqlite")

tokens = Table(
    "tokens",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("name", _key(64), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("roles", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
)

#: A number for each topic that grows with every change: how a process finds out what another one changed.
changes = Table(
    "changes",
    metadata,
    Column("topic", String(16), primary_key=True),
    Column("number", BigInteger, nullable=False),
)

blueprints = Table(
    "blueprints",
    metadata,
    Column("blueprint_id", _key(64), primary_key=True),
    Column("status", String(24), nullable=False, index=True),
    Column("document", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", String(64), nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    # Begins with the time, so that the order of ids is the order of arrival.
    Column("job_id", _key(32), primary_key=True),
    Column("blueprint_id", _key(64), ForeignKey("blueprints.blueprint_id"), nullable=False),
    # SHA-256 of blueprint and request: the same request is one job.
    Column("request_sha256", String(64), nullable=False),
    Column("request", Text, nullable=False),
    Column("status", String(24), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker", String(128)),
    Column("lease", String(32)),
    Column("lease_until", Double),
    Column("artifact_id", _key(96)),
    Column("log", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", String(64), nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(None, "status", "job_id"),
    Index(None, "request_sha256"),
)

kernels = Table(
    "kernels",
    metadata,
    Column("artifact_id", _key(96), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("status", String(24), nullable=False, index=True),
    Column("blueprint_hash", String(64), nullable=False, index=True),
    Column("family", String(32), nullable=False),
    Column("d_in", BigInteger, nullable=False),
    Column("d_out", BigInteger, nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("target", String(32), nullable=False),
    Column("info", Text, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("latency_us", Double),
    Column("memory_bytes", BigInteger),
    Column("metrics", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", String(64), nullable=False),
    Index(None, "d_in", "d_out"),
)

kernel_tags = Table(
    "kernel_tags",
    metadata,
    Column("artifact_id", _key(96), ForeignKey("kernels.artifact_id"), primary_key=True),
    Column("tag", _key(64), primary_key=True),
    Index(None, "tag"),
)

kernel_architectures = Table(
    "kernel_architectures",
    metadata,
    Column("artifact_id", _key(96), ForeignKey("kernels.artifact_id"), primary_key=True),
    Column("architecture", String(16), primary_key=True),
)

history = Table(
    "history",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("subject", _key(96), nullable=False),
    Column("before", String(24)),
    Column("after", String(24), nullable=False),
    Column("at", Double, nullable=False),
    Column("by", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "kind", "subject"),
)
