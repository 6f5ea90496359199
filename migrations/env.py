"""Run migrations over the connection that ``loreg.catalog.database`` hands in, inside its transaction.

No engine and no URL here: the caller holds the write lock, has made a backup, and commits or rolls
back the whole upgrade as one.
"""

from __future__ import annotations

from alembic import context

from loreg.catalog.models import Model

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Model.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
