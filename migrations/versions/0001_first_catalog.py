"""The first catalog: blobs, leases, intents, edges, bases, adapters, versions, tags, and the hash cache.

The conditions are spelled out here and not imported: a released migration never changes, the models do.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_HEX = "0123456789abcdef"
_ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORD = _ALNUM + "._-"
_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _integer(name: str, nullable: bool = False) -> sa.Column:
    return sa.Column(name, _INT64, nullable=nullable, autoincrement=name == "id")


def _text(name: str, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _check(table: str, column: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{column}"))


def _digest(table: str, column: str) -> sa.CheckConstraint:
    return _check(
        table,
        column,
        f"{column} = 'blake3:' || substr({column}, 8, 64) AND length({column}) = 71 "
        f"AND ltrim(substr({column}, 8), '{_HEX}') = ''",
    )


def _hex(table: str, column: str, digits: int) -> sa.CheckConstraint:
    return _check(table, column, f"length({column}) = {digits} AND ltrim({column}, '{_HEX}') = ''")


def _word(table: str, column: str) -> sa.CheckConstraint:
    return _check(
        table,
        column,
        f"length({column}) BETWEEN 1 AND 128 AND ltrim({column}, '{_WORD}') = '' "
        f"AND ltrim(substr({column}, 1, 1), '{_ALNUM}') = ''",
    )


def _name(table: str, column: str) -> sa.CheckConstraint:
    head = f"rtrim({column}, '{_WORD}')"
    return _check(
        table,
        column,
        f"length({column}) - length({head}) BETWEEN 1 AND 128 AND length({head}) <= 129 "
        f"AND ltrim({head}, '{_WORD}') IN ('', '/') "
        f"AND ltrim(substr({column}, 1, 1), '{_ALNUM}') = '' "
        f"AND ltrim(substr({column}, length({head}) + 1, 1), '{_ALNUM}') = ''",
    )


def _primary(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=op.f(f"pk_{table}"))


def _unique(table: str, *columns: str) -> sa.UniqueConstraint:
    return sa.UniqueConstraint(*columns, name=op.f(f"uq_{table}_{'_'.join(columns)}"))


def _foreign(table: str, column: str, target: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=op.f(f"fk_{table}_{column}"), ondelete=ondelete)


def _index(table: str, column: str) -> None:
    op.create_index(op.f(f"ix_{table}_{column}"), table, [column])


def upgrade() -> None:
    _blobs_and_pins()
    _bases()
    _versions()
    _tags()
    _hash_cache()


def _blobs_and_pins() -> None:
    op.create_table(
        "blobs",
        _text("digest"),
        _text("generation"),
        _text("sha256"),
        _integer("size"),
        _text("state"),
        _integer("created_at"),
        _primary("blobs", "digest"),
        _digest("blobs", "digest"),
        _hex("blobs", "generation", 16),
        _hex("blobs", "sha256", 64),
        _check("blobs", "size", "size >= 0"),
        _check("blobs", "state", "state IN ('live', 'deleting')"),
        sqlite_strict=True,
    )
    op.create_table(
        "leases",
        _text("id"),
        _text("owner"),
        _integer("created_at"),
        _integer("expires_at"),
        _primary("leases", "id"),
        _hex("leases", "id", 32),
        sqlite_strict=True,
    )
    op.create_table(
        "intents",
        _text("lease_id"),
        _text("digest"),
        _primary("intents", "lease_id", "digest"),
        _digest("intents", "digest"),
        _foreign("intents", "lease_id", "leases.id", ondelete="CASCADE"),
        sqlite_strict=True,
    )
    _index("intents", "digest")
    op.create_table(
        "edges",
        _text("source"),
        _text("blob"),
        _primary("edges", "source", "blob"),
        _digest("edges", "source"),
        _foreign("edges", "blob", "blobs.digest"),
        sqlite_strict=True,
    )
    _index("edges", "blob")


def _bases() -> None:
    op.create_table(
        "bases",
        _integer("id"),
        _text("name"),
        _text("manifest"),
        _text("weights_root"),
        _text("structure_root"),
        _text("content_set"),
        _text("hub_repo", nullable=True),
        _text("hub_commit", nullable=True),
        _text("hub_files", nullable=True),
        _text("path", nullable=True),
        _integer("tensors"),
        _integer("bytes"),
        _integer("created_at"),
        _primary("bases", "id"),
        _unique("bases", "name"),
        _name("bases", "name"),
        _digest("bases", "weights_root"),
        _digest("bases", "structure_root"),
        _digest("bases", "content_set"),
        _check("bases", "tensors", "tensors >= 0"),
        _check("bases", "bytes", "bytes >= 0"),
        _foreign("bases", "manifest", "blobs.digest"),
        sqlite_strict=True,
    )
    _index("bases", "manifest")
    _index("bases", "weights_root")


def _versions() -> None:
    op.create_table(
        "adapters",
        _integer("id"),
        _text("name"),
        _integer("last_number"),
        _integer("created_at"),
        _primary("adapters", "id"),
        _unique("adapters", "name"),
        _name("adapters", "name"),
        _check("adapters", "last_number", "last_number >= 0"),
        sqlite_strict=True,
    )
    op.create_table(
        "versions",
        _integer("id"),
        _integer("adapter_id"),
        _integer("number"),
        _text("digest"),
        _text("base_root"),
        _text("base_name"),
        _integer("rank"),
        _integer("modules"),
        _integer("bytes"),
        _text("note", nullable=True),
        _integer("created_at"),
        _primary("versions", "id"),
        _unique("versions", "adapter_id", "number"),
        _unique("versions", "adapter_id", "digest"),
        _check("versions", "number", "number >= 1"),
        _digest("versions", "base_root"),
        _check("versions", "rank", "rank >= 0"),
        _check("versions", "modules", "modules >= 0"),
        _check("versions", "bytes", "bytes >= 0"),
        _foreign("versions", "adapter_id", "adapters.id"),
        _foreign("versions", "digest", "blobs.digest"),
        sqlite_strict=True,
    )
    _index("versions", "base_root")
    _index("versions", "digest")
    _index("versions", "rank")
    op.create_table(
        "targets",
        _integer("version_id"),
        _text("target"),
        _primary("targets", "version_id", "target"),
        _foreign("targets", "version_id", "versions.id", ondelete="CASCADE"),
        sqlite_strict=True,
    )
    _index("targets", "target")


def _tags() -> None:
    op.create_table(
        "tags",
        _integer("adapter_id"),
        _text("name"),
        _integer("version_id"),
        _integer("seq"),
        _primary("tags", "adapter_id", "name"),
        _word("tags", "name"),
        _check("tags", "seq", "seq >= 1"),
        _foreign("tags", "adapter_id", "adapters.id"),
        _foreign("tags", "version_id", "versions.id"),
        sqlite_strict=True,
    )
    _index("tags", "version_id")
    op.create_table(
        "tag_history",
        _integer("adapter_id"),
        _text("name"),
        _integer("seq"),
        _integer("version_id", nullable=True),
        _integer("moved_at"),
        _primary("tag_history", "adapter_id", "name", "seq"),
        _word("tag_history", "name"),
        _check("tag_history", "seq", "seq >= 1"),
        _foreign("tag_history", "adapter_id", "adapters.id"),
        _foreign("tag_history", "version_id", "versions.id", ondelete="SET NULL"),
        sqlite_strict=True,
    )
    _index("tag_history", "version_id")


def _hash_cache() -> None:
    op.create_table(
        "file_hashes",
        _integer("device"),
        _integer("inode"),
        _integer("size"),
        _integer("mtime_ns"),
        _integer("ctime_ns"),
        _text("leaves"),
        _integer("seen_at"),
        _primary("file_hashes", "device", "inode", "size", "mtime_ns", "ctime_ns"),
        sqlite_strict=True,
    )


def downgrade() -> None:
    for table in (
        "file_hashes",
        "tag_history",
        "tags",
        "targets",
        "versions",
        "adapters",
        "bases",
        "edges",
        "intents",
        "leases",
        "blobs",
    ):
        op.drop_table(table)
