"""The tables. Column types are named once; the database itself checks digests, names and states.

Every expression here is understood by SQLite and PostgreSQL alike. The migrations spell the same schema
out; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, MetaData, Text, UniqueConstraint, text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from loreg.digest import Digest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEX = "0123456789abcdef"
_ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORD = _ALNUM + "._-"

INT64 = BigInteger().with_variant(Integer(), "sqlite")
"""64 bits everywhere. STRICT tables know no BIGINT, and SQLite's INTEGER has 64 bits anyway."""


TEXT = Text().with_variant(Text(collation="C"), "postgresql")
"""In the order of its bytes everywhere, whatever the database's own collation: prefixes of digests are ranges."""


class DigestText(TypeDecorator[Digest]):
    """A digest as ``blake3:<64 hex>``: legible in any tool that opens the catalog."""

    impl = TEXT
    cache_ok = True

    def process_bind_param(self, value: Digest | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Digest | None:
        return None if value is None else Digest.parse(value)


def microseconds(instant: datetime) -> int:
    """Whole microseconds since 1970 in UTC."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


def instant(microseconds: int) -> datetime:
    """The inverse of :func:`microseconds`, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


class UtcMicroseconds(TypeDecorator[datetime]):
    """An instant as whole microseconds since 1970 in UTC: exact, ordered, and free of time zones."""

    impl = INT64
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else microseconds(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else instant(value)


class Unsigned64(TypeDecorator[int]):
    """0 … 2⁶⁴-1 in a signed column, as two's complement: some file systems number inodes above 2⁶³."""

    impl = INT64
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else (value + 2**63) % 2**64 - 2**63

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value % 2**64


def digest_check(column: str) -> str:
    """SQL that is true of ``blake3:<64 lower-case hex>`` alone; the first term also catches a NUL."""
    return (
        f"{column} = 'blake3:' || substr({column}, 8, 64) AND length({column}) = 71 "
        f"AND ltrim(substr({column}, 8), '{_HEX}') = ''"
    )


def hex_check(column: str, digits: int) -> str:
    """SQL that is true of exactly ``digits`` lower-case hex digits."""
    return f"length({column}) = {digits} AND ltrim({column}, '{_HEX}') = ''"


def word_check(column: str) -> str:
    """SQL for ``[a-z0-9][a-z0-9._-]{0,127}``."""
    return (
        f"length({column}) BETWEEN 1 AND 128 AND ltrim({column}, '{_WORD}') = '' "
        f"AND ltrim(substr({column}, 1, 1), '{_ALNUM}') = ''"
    )


def name_check(column: str) -> str:
    """SQL for a word, or ``owner/name`` of two words. ``head`` is ``owner/``, or empty."""
    head = f"rtrim({column}, '{_WORD}')"
    return (
        f"length({column}) - length({head}) BETWEEN 1 AND 128 AND length({head}) <= 129 "
        f"AND ltrim({head}, '{_WORD}') IN ('', '/') "
        f"AND ltrim(substr({column}, 1, 1), '{_ALNUM}') = '' "
        f"AND ltrim(substr({column}, length({head}) + 1, 1), '{_ALNUM}') = ''"
    )


def _check(column: str, condition: str) -> CheckConstraint:
    return CheckConstraint(condition, name=column)


def _digests(*columns: str) -> tuple[CheckConstraint, ...]:
    return tuple(_check(column, digest_check(column)) for column in columns)


def _positive(*columns: str) -> tuple[CheckConstraint, ...]:
    return tuple(_check(column, f"{column} >= 0") for column in columns)


_REMOVED = text("removed_at IS NOT NULL")
_STRICT: dict[str, Any] = {"sqlite_strict": True}


class Model(DeclarativeBase):
    """The root of the tables."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        Digest: DigestText(),
        datetime: UtcMicroseconds(),
        int: INT64,
        str: TEXT,
    }


class Blob(Model):
    """A blob that the catalog vouches for: which copy of it, and whether a collector has marked it."""

    __tablename__ = "blobs"
    __table_args__ = (
        *_digests("digest"),
        _check("generation", hex_check("generation", 16)),
        _check("sha256", hex_check("sha256", 64)),
        *_positive("size"),
        _check("state", "state IN ('live', 'deleting')"),
        _STRICT,
    )
    digest: Mapped[Digest] = mapped_column(primary_key=True)
    generation: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int]
    state: Mapped[str]
    created_at: Mapped[datetime]


class Lease(Model):
    """A push under way. While its row stands and has not expired, its intents are pinned."""

    __tablename__ = "leases"
    __table_args__ = (_check("id", hex_check("id", 32)), _STRICT)
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class Intent(Model):
    """A digest that a push is about to look for or write: no collector may take it. No foreign key to
    ``blobs``, because it is there before the blob is."""

    __tablename__ = "intents"
    __table_args__ = (*_digests("digest"), _STRICT)
    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.id", ondelete="CASCADE"), primary_key=True)
    digest: Mapped[Digest] = mapped_column(primary_key=True, index=True)


class Edge(Model):
    """The manifest ``source`` needs ``blob``. A manifest is a blob itself."""

    __tablename__ = "edges"
    __table_args__ = (*_digests("source"), _STRICT)
    source: Mapped[Digest] = mapped_column(primary_key=True)
    blob: Mapped[Digest] = mapped_column(ForeignKey("blobs.digest"), primary_key=True, index=True)


class BaseRow(Model):
    """A base model, known by its bytes: ``weights_root`` and the weaker roots."""

    __tablename__ = "bases"
    __table_args__ = (
        UniqueConstraint("name"),
        _check("name", name_check("name")),
        *_digests("weights_root", "structure_root", "content_set"),
        *_positive("tensors", "bytes"),
        _STRICT,
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    manifest: Mapped[Digest] = mapped_column(ForeignKey("blobs.digest"), index=True)
    weights_root: Mapped[Digest] = mapped_column(index=True)
    structure_root: Mapped[Digest]
    content_set: Mapped[Digest]
    hub_repo: Mapped[str | None]
    hub_commit: Mapped[str | None]
    hub_files: Mapped[str | None]
    path: Mapped[str | None]
    tensors: Mapped[int]
    bytes: Mapped[int]
    created_at: Mapped[datetime]


class Adapter(Model):
    """A name, and the last number given under it: a number is never given twice, also after a removal."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("name"),
        _check("name", name_check("name")),
        *_positive("last_number"),
        _STRICT,
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    last_number: Mapped[int]
    created_at: Mapped[datetime]


class Version(Model):
    """One content under one name. The columns beside ``digest`` repeat its manifest, for searching.

    ``removed_at``: when it was put into the trash, null for those that the catalog shows. From there it can be taken
    back, until a collector removes the row. The row pins the content either way.
    """

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("adapter_id", "digest"),
        _check("number", "number >= 1"),
        *_digests("base_root"),
        *_positive("rank", "modules", "bytes"),
        Index(None, "removed_at", sqlite_where=_REMOVED, postgresql_where=_REMOVED),
        _STRICT,
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"))
    number: Mapped[int]
    digest: Mapped[Digest] = mapped_column(ForeignKey("blobs.digest"), index=True)
    base_root: Mapped[Digest] = mapped_column(index=True)
    base_name: Mapped[str] = mapped_column(index=True)
    rank: Mapped[int] = mapped_column(index=True)
    modules: Mapped[int]
    bytes: Mapped[int]
    note: Mapped[str | None]
    created_at: Mapped[datetime]
    removed_at: Mapped[datetime | None]


class Target(Model):
    """A module kind that a version adapts, such as ``q_proj``."""

    __tablename__ = "targets"
    __table_args__ = (_STRICT,)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True, index=True)


class Document(Model):
    """What a version is looked for in; see ``searching.py``, which also keeps an index of it."""

    __tablename__ = "documents"
    __table_args__ = (_STRICT,)
    version_id: Mapped[int] = mapped_column(
        ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    text: Mapped[str]


class Tag(Model):
    """Where a tag points now; ``seq`` counts its moves, and is what a move is conditional on."""

    __tablename__ = "tags"
    __table_args__ = (_check("name", word_check("name")), _check("seq", "seq >= 1"), _STRICT)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"), index=True)
    seq: Mapped[int]


class TagMove(Model):
    """One move of a tag; ``version_id`` is null once that version has been removed."""

    __tablename__ = "tag_history"
    __table_args__ = (_check("name", word_check("name")), _check("seq", "seq >= 1"), _STRICT)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int | None] = mapped_column(ForeignKey("versions.id", ondelete="SET NULL"), index=True)
    moved_at: Mapped[datetime]


class FileHash(Model):
    """A cache: the content digests of the tensors of one safetensors file, by what ``stat`` says of it."""

    __tablename__ = "file_hashes"
    __table_args__ = (_STRICT,)
    device: Mapped[int] = mapped_column(Unsigned64, primary_key=True, autoincrement=False)
    inode: Mapped[int] = mapped_column(Unsigned64, primary_key=True, autoincrement=False)
    size: Mapped[int] = mapped_column(primary_key=True)
    mtime_ns: Mapped[int] = mapped_column(primary_key=True)
    ctime_ns: Mapped[int] = mapped_column(primary_key=True)
    leaves: Mapped[str]
    seen_at: Mapped[datetime]


class RegistryRow(Model):
    """The one row that says which catalog this is, and which store is its own, once it has one: drawn at random."""

    __tablename__ = "registry"
    __table_args__ = (
        _check("id", "id = 1"),
        _check("catalog", hex_check("catalog", 32)),
        _check("store", hex_check("store", 32)),
        _STRICT,
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    catalog: Mapped[str]
    store: Mapped[str | None]


class RecordRow(Model):
    """A record of the ledger: what is not in the store yet, and the last one."""

    __tablename__ = "ledger"
    __table_args__ = (*_digests("digest"), _check("seq", "seq >= 1"), _STRICT)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[Digest]
    body: Mapped[str]
