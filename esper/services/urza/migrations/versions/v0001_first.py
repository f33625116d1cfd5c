"""The first version of the schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _serial() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "tokens",
        sa.Column("id", _serial(), nullable=False),
        sa.Column("name", _key(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("roles", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.UniqueConstraint("name", name="uq_tokens_name"),
        sa.UniqueConstraint("sha256", name="uq_tokens_sha256"),
    )
    changes = op.create_table(
        "changes",
        sa.Column("topic", sa.String(16), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("topic", name="pk_changes"),
    )
    op.bulk_insert(changes, [{"topic": "kernels", "number": 0}, {"topic": "tokens", "number": 0}])
    op.create_table(
        "blueprints",
        sa.Column("blueprint_id", _key(64), nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("blueprint_id", name="pk_blueprints"),
    )
    op.create_index("ix_blueprints_status", "blueprints", ["status"])
    op.create_table(
        "jobs",
        sa.Column("job_id", _key(32), nullable=False),
        sa.Column("blueprint_id", _key(64), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("lease", sa.String(32)),
        sa.Column("lease_until", sa.Double()),
        sa.Column("artifact_id", _key(96)),
        sa.Column("log", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["blueprint_id"], ["blueprints.blueprint_id"], name="fk_jobs_blueprint_id"),
    )
    op.create_index("ix_jobs_status_job_id", "jobs", ["status", "job_id"])
    op.create_index("ix_jobs_request_sha256", "jobs", ["request_sha256"])
    op.create_table(
        "kernels",
        sa.Column("artifact_id", _key(96), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(24), nullable=False),
        sa.Column("blueprint_hash", sa.String(64), nullable=False),
        sa.Column("family", sa.String(32), nullable=False),
        sa.Column("d_in", sa.BigInteger(), nullable=False),
        sa.Column("d_out", sa.BigInteger(), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("target", sa.String(32), nullable=False),
        sa.Column("info", sa.Text(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("latency_us", sa.Double()),
        sa.Column("memory_bytes", sa.BigInteger()),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", name="pk_kernels"),
        sa.UniqueConstraint("sha256", name="uq_kernels_sha256"),
    )
    op.create_index("ix_kernels_status", "kernels", ["status"])
    op.create_index("ix_kernels_blueprint_hash", "kernels", ["blueprint_hash"])
    op.create_index("ix_kernels_d_in_d_out", "kernels", ["d_in", "d_out"])
    op.create_table(
        "kernel_tags",
        sa.Column("artifact_id", _key(96), nullable=False),
        sa.Column("tag", _key(64), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", "tag", name="pk_kernel_tags"),
        sa.ForeignKeyConstraint(["artifact_id"], ["kernels.artifact_id"], name="fk_kernel_tags_artifact_id"),
    )
    op.create_index("ix_kernel_tags_tag", "kernel_tags", ["tag"])
    op.create_table(
        "kernel_architectures",
        sa.Column("artifact_id", _key(96), nullable=False),
        sa.Column("architecture", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", "architecture", name="pk_kernel_architectures"),
        sa.ForeignKeyConstraint(["artifact_id"], ["kernels.artifact_id"], name="fk_kernel_architectures_artifact_id"),
    )
    op.create_table(
        "history",
        sa.Column("id", _serial(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", _key(96), nullable=False),
        sa.Column("before", sa.String(24)),
        sa.Column("after", sa.String(24), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("by", sa.String(128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
    )
    op.create_index("ix_history_kind_subject", "history", ["kind", "subject"])


def downgrade() -> None:
    """Remove everything."""
    for name in (
        "history",
        "kernel_architectures",
        "kernel_tags",
        "kernels",
        "jobs",
        "blueprints",
        "changes",
        "tokens",
    ):
        op.drop_table(name)
