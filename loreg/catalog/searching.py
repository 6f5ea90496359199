"""Looking for versions by words: every word, anywhere in the name, the note or a target.

A version has a *document*: these texts, a line each, with ASCII letters in lower case. What is found are the
documents that contain each word of the query, and that is the whole definition, on every kind of database. An index
only narrows down where to look: on SQLite by FTS5, on PostgreSQL by a ``tsvector`` with GIN. Both hold the *grams* of
a document, all that stands in three consecutive characters of it, as words and their beginnings would lose ``sql`` in
``mysql``. A word of one or two characters has no gram; then documents are read in the order of what is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import DDL, ColumnElement, Integer, bindparam, event, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import GenericFunction

from loreg.catalog.models import TEXT, Document

FEW = 1000
"""Rows that are fetched and sorted at once. Where more fit, the first of a listing are met soon on a walk of it."""

_LONGEST = 20_000
"""Characters of a document; what goes beyond is the end of a note. A ``tsvector`` has at most 1 MiB."""

_LOWER = str.maketrans({letter: letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"})


def document(name: str, note: str | None, targets: Iterable[str]) -> str:
    """What a version is looked for in."""
    return "\n".join([name, *sorted(set(targets)), note or ""]).translate(_LOWER)[:_LONGEST]


def words(query: str) -> list[str]:
    """What each document that is found contains. A NUL, which not every database can hold, ends a word."""
    return query.replace("\0", " ").translate(_LOWER).split()


def grams(word: str) -> list[str]:
    return sorted({word[start : start + 3] for start in range(len(word) - 2)})


class _Place(GenericFunction[int]):
    """Where a word begins in a text, 0 where it does not."""

    inherit_cache = True
    name = "instr"


@compiles(_Place, "postgresql")
def _strpos(element: _Place, compiler: Any, **options: Any) -> str:
    return f"strpos{compiler.process(element.clause_expr, **options)}"


def contains(parameter: str) -> ColumnElement[bool]:
    """That a ``Document`` has the word of that parameter."""
    return _Place(Document.text, bindparam(parameter, type_=TEXT), type_=Integer) > 0


def candidates(s: Session, each: Iterable[str], limit: int) -> Sequence[int] | None:
    """The versions, at most ``limit``, whose documents have all grams of the words; None if there is no gram."""
    wanted = sorted({gram for word in each for gram in grams(word)})
    if not wanted:
        return None
    if s.connection().dialect.name == "sqlite":
        found = "SELECT rowid FROM search WHERE search MATCH :grams LIMIT :limit"
        expression = " AND ".join('"' + gram.replace('"', '""') + '"' for gram in wanted)
    else:
        found = "SELECT version_id FROM documents WHERE grams @@ CAST(:grams AS tsquery) LIMIT :limit"
        quoted = (gram.replace("\\", "\\\\").replace("'", "''") for gram in wanted)
        expression = " & ".join(f"'{gram}'" for gram in quoted)
    return s.scalars(text(found), {"grams": expression, "limit": limit}).all()


def walk(s: Session) -> None:
    """Have what is listed next met in the order of names, to the end of the transaction.

    PostgreSQL takes conditions that no index answers to leave next to nothing, and then reads all versions: 600 ms
    where the walk takes 30 for 50 of 100,000.
    """
    if s.connection().dialect.name == "postgresql":
        s.execute(text(_NO_OTHER_WAY))


_NO_OTHER_WAY = "SELECT " + ", ".join(
    f"set_config('enable_{way}', 'off', true)" for way in ("sort", "material", "hashjoin", "mergejoin")
)
_SQLITE = (
    "CREATE VIRTUAL TABLE search USING fts5("
    "text, content='documents', content_rowid='version_id', tokenize='trigram', detail='none')",
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
    # What is pushed goes into the index at once: a list of what is pending would be read by every search.
    "CREATE INDEX ix_documents_grams ON documents USING gin (grams) WITH (fastupdate = off)",
)
for _dialect, _statements in (("sqlite", _SQLITE), ("postgresql", _POSTGRES)):
    for _statement in _statements:
        _made: Any = DDL(_statement)  # type: ignore[no-untyped-call]
        event.listen(Document.__table__, "after_create", _made.execute_if(dialect=_dialect))
