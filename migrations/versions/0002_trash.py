"""A trash: versions that were removed, until they are restored or collected."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_REMOVED = "(SELECT id FROM versions WHERE removed_at IS NOT NULL)"


def upgrade() -> None:
    op.add_column("versions", sa.Column("removed_at", sa.BigInteger().with_variant(sa.Integer(), "sqlite")))


def downgrade() -> None:
    # What is in the trash leaves with it, as a collector would have it: else it would be back as if it had never been
    # removed. Keys are not followed while a catalog migrates.
    op.execute(f"UPDATE tag_history SET version_id = NULL WHERE version_id IN {_REMOVED}")
    op.execute(f"DELETE FROM targets WHERE version_id IN {_REMOVED}")
    op.execute("DELETE FROM versions WHERE removed_at IS NOT NULL")
    op.drop_column("versions", "removed_at")
