"""What alembic runs: the migrations, on the connection and in the transaction that it was handed."""

from __future__ import annotations

from alembic import context

from esper.services.urza.tables import metadata

# The caller holds the lock and the transaction; without a connection there is nothing to do.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
