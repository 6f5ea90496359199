"""Which catalog this is and which store is its own, and the records of the ledger that are not in it yet."""

from __future__ import annotations

import os

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_HEX = "0123456789abcdef"
_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _hex(table: str, column: str, digits: int) -> sa.CheckConstraint:
    condition = f"length({column}) = {digits} AND ltrim({column}, '{_HEX}') = ''"
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{column}"))


def upgrade() -> None:
    op.create_table(
        "registry",
        sa.Column("id", _INT64, nullable=False, autoincrement=True),
        sa.Column("catalog", sa.Text(), nullable=False),
        sa.Column("store", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registry")),
        sa.CheckConstraint("id = 1", name=op.f("ck_registry_id")),
        _hex("registry", "catalog", 32),
        _hex("registry", "store", 32),
        sqlite_strict=True,
    )
    op.create_table(
        "ledger",
        sa.Column("seq", _INT64, nullable=False, autoincrement=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_ledger")),
        sa.CheckConstraint(
            "digest = 'blake3:' || substr(digest, 8, 64) AND length(digest) = 71 "
            f"AND ltrim(substr(digest, 8), '{_HEX}') = ''",
            name=op.f("ck_ledger_digest"),
        ),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_ledger_seq")),
        sqlite_strict=True,
    )
    # The rows that are there already become records when something is written next: the first record says everything.
    op.execute(f"INSERT INTO registry (id, catalog) VALUES (1, '{os.urandom(16).hex()}')")


def downgrade() -> None:
    op.drop_table("ledger")
    op.drop_table("registry")
