"""Search: a document for each version and an index of its grams; texts in the order of their bytes on PostgreSQL."""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_LOWER = str.maketrans({letter: letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"})
_LONGEST = 20_000
_TEXTS = {
    "blobs": ("digest", "generation", "sha256", "state"),
    "leases": ("id", "owner"),
    "intents": ("lease_id", "digest"),
    "edges": ("source", "blob"),
    "bases": (
        "name",
        "manifest",
        "weights_root",
        "structure_root",
        "content_set",
        "hub_repo",
        "hub_commit",
        "hub_files",
        "path",
    ),
    "adapters": ("name",),
    "versions": ("digest", "base_root", "base_name", "note"),
    "targets": ("target",),
    "tags": ("name",),
    "tag_history": ("name",),
    "file_hashes": ("leaves",),
    "registry": ("catalog", "store"),
    "ledger": ("digest", "body"),
}
_SQLITE = (
    "CREATE VIRTUAL TABLE search USING fts5("
    "text, content='documents', content_rowid='version_id', tokenize='trigram', detail='none')",
    "INSERT INTO search (search) VALUES ('rebuild')",
    "CREATE TRIGGER documents_insert AFTER INSERT ON documents BEGIN "
    "INSERT INTO search (rowid, text) VALUES (new.version_id, new.text); END",
    "CREATE TRIGGER documents_delete AFTER DELETE ON documents BEGIN "
    "INSERT INTO search (search, rowid, text) VALUES ('delete', old.version_id, old.text); END",
    "CREATE TRIGGER documents_update AFTER UPDATE ON documents BEGIN "
    "INSERT INTO search (search, rowid, text) VALUES ('delete', old.version_id, old.text); "
    "INSERT INTO search (rowid, text) VALUES (new.version_id, new.text); END",
)
_POSTGRES = (
    "CREATE FUNCTION loreg_grams(document text) RETURNS tsvector LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE RETURN ("
    "SELECT array_to_tsvector(coalesce(array_agg(gram), '{}'::text[])) FROM ("
    "SELECT one || lead(one, 1) OVER along || lead(one, 2) OVER along AS gram "
    "FROM unnest(string_to_array(document, NULL)) WITH ORDINALITY AS each (one, place) "
    "WINDOW along AS (ORDER BY place)) AS found WHERE gram IS NOT NULL)",
    "ALTER TABLE documents ADD COLUMN grams tsvector GENERATED ALWAYS AS (loreg_grams(text)) STORED",
    "CREATE INDEX ix_documents_grams ON documents USING gin (grams) WITH (fastupdate = off)",
)


def upgrade() -> None:
    if _on_postgresql():
        _collate('"C"')  # prefixes of digests are ranges, and names are listed as SQLite lists them
    op.create_table(
        "documents",
        sa.Column("version_id", _INT64, nullable=False, autoincrement=False),
        sa.Column("text", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_documents")),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name=op.f("fk_documents_version_id"), ondelete="CASCADE"
        ),
        sqlite_strict=True,
    )
    _fill()
    for statement in _POSTGRES if _on_postgresql() else _SQLITE:
        op.execute(statement)
    op.create_index(op.f("ix_versions_base_name"), "versions", ["base_name"])
    removed = sa.text("removed_at IS NOT NULL")
    op.create_index(
        op.f("ix_versions_removed_at"), "versions", ["removed_at"], sqlite_where=removed, postgresql_where=removed
    )


def _fill() -> None:
    connection = op.get_bind()
    targets = defaultdict(list)
    for version_id, target in connection.execute(sa.text("SELECT version_id, target FROM targets")):
        targets[version_id].append(target)
    versions = sa.text("SELECT v.id, a.name, v.note FROM versions v JOIN adapters a ON a.id = v.adapter_id")
    documents = [
        {
            "version_id": version_id,
            "text": "\n".join([name, *sorted(targets[version_id]), note or ""]).translate(_LOWER)[:_LONGEST],
        }
        for version_id, name, note in connection.execute(versions)
    ]
    if documents:
        connection.execute(sa.text("INSERT INTO documents (version_id, text) VALUES (:version_id, :text)"), documents)


def downgrade() -> None:
    op.drop_index(op.f("ix_versions_removed_at"), "versions")
    op.drop_index(op.f("ix_versions_base_name"), "versions")
    if _on_postgresql():
        op.drop_table("documents")
        op.execute("DROP FUNCTION loreg_grams(text)")
        _collate('pg_catalog."default"')
    else:
        op.execute("DROP TABLE search")
        op.drop_table("documents")  # with its triggers


def _on_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _collate(collation: str) -> None:
    for table, columns in _TEXTS.items():
        op.execute(
            f"ALTER TABLE {table} " + ", ".join(f"ALTER {name} TYPE text COLLATE {collation}" for name in columns)
        )
