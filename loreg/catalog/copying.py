"""The rows of one catalog in another, whatever databases they are in: by the models alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from sqlalchemy import Row, Table, func, insert, select, text
from sqlalchemy.orm import Session

from loreg.catalog.models import Blob, FileHash, Intent, Lease, Model, RecordRow, RegistryRow
from loreg.digest import Digest
from loreg.errors import Conflict

# What a catalog has of its own: which it is and what it has told its store, what is under way, what it saw on a disk.
_OWN = {model.__tablename__ for model in (RegistryRow, RecordRow, Lease, Intent, FileHash)}
_BATCH = 500


def copy_rows(source: Session, target: Session) -> int:
    """Insert what ``target`` lacks of ``source``, into one transaction; returns how many rows that were.

    Raises Conflict if it has rows that ``source`` has not, or has otherwise: it is no part of the same copy.
    """
    count = 0
    for table in tables():
        missing = missing_rows(source, target, table)
        while rows := list(islice(missing, _BATCH)):
            target.execute(insert(table), [dict(row._mapping) for row in rows])
            count += len(rows)
        _go_on_counting(target, table)
    return count


def require_part(source: Session, target: Session) -> None:
    """Raises Conflict as :func:`copy_rows` would, and inserts nothing."""
    for table in tables():
        for _ in missing_rows(source, target, table):
            pass


def missing_rows(source: Session, target: Session, table: Table) -> Iterator[Row[Any]]:
    """The rows of ``source`` that ``target`` lacks. Raises Conflict, at the end, for what it has otherwise."""
    there = {_key(table, row): row for row in target.execute(select(table))}
    for row in source.execute(select(table).execution_options(yield_per=_BATCH)):
        known = there.pop(_key(table, row), None)
        if known is None:
            yield row
        elif tuple(known) != tuple(row):
            raise _not_a_part(table, 1)
    if there:
        raise _not_a_part(table, len(there))


def copies_needed(s: Session) -> dict[tuple[Digest, str], int]:
    """Digest and generation of every live copy, and its size."""
    live = select(Blob.digest, Blob.generation, Blob.size).where(Blob.state == "live")
    return {(digest, generation): size for digest, generation, size in s.execute(live)}


def tables() -> list[Table]:
    """Those that are copied, each after the ones it refers to."""
    return [table for table in Model.metadata.sorted_tables if table.name not in _OWN]


def _key(table: Table, row: Row[Any]) -> tuple[Any, ...]:
    return tuple(row._mapping[column] for column in table.primary_key)


def _not_a_part(table: Table, count: int) -> Conflict:
    return Conflict(
        f"the catalog to copy to has rows in {table.name} that the one to copy from has not, or has otherwise, "
        f"{count} in all: expected an empty one, or what an earlier copy of the same has left; choose another."
    )


def _go_on_counting(s: Session, table: Table) -> None:
    """PostgreSQL counts numbers that it gives itself, not those that it is given."""
    if s.get_bind().dialect.name == "postgresql" and table.autoincrement_column is not None:
        column = table.autoincrement_column
        last = s.scalar(select(func.max(column)))
        name = s.scalar(
            text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": table.name, "column": column.name}
        )
        if last is not None and name is not None:
            s.execute(text("SELECT setval(CAST(:name AS regclass), :last)"), {"name": name, "last": last})
