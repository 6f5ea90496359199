"""``ls QUERY`` finds what contains every word, alike on every kind of catalog; its index is what documents say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import ON_FILES, PLACES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session
from test_catalog import NOW, push

from loreg.catalog import Database, queries, searching
from loreg.catalog.models import Version

PIECES = st.sampled_from(
    ["sql", "SQL", "my", "q_proj", "é", "É", "İ", "ß", "'", '"', "\\", "%", "_", "-", "*", "&", "🦙", "a", "b"]
)
WORD = st.lists(PIECES, min_size=1, max_size=4).map("".join)
NOTE = st.none() | st.lists(WORD, max_size=4).map(" ".join)
TARGETS = st.lists(WORD, max_size=3)
QUERY = st.lists(WORD, min_size=1, max_size=2).map(" ".join)
NAMES = ("mysql", "sql-eu", "team/chat", "b")


@pytest.fixture(scope="module", params=ON_FILES)
def db(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    place = PLACES[request.param](tmp_path_factory.mktemp("looking"))
    with place.database() as opened:
        yield opened


class _Undo(Exception):
    pass


def lower(said: str) -> str:
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in said)


def texts(row: queries.VersionRow) -> tuple[str, ...]:
    return (row.name, row.note or "", *row.targets)


def found_by(rows: list[queries.VersionRow], query: str) -> list[str]:
    """The definition, without an index, a document or a database."""
    return sorted(
        row.name
        for row in rows
        if all(
            any(lower(word) in lower(each) for each in (row.name, row.note or "", *row.targets))
            for word in query.split()
        )
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NOTE, TARGETS), min_size=4, max_size=4), st.lists(QUERY, min_size=1, max_size=6))
def test_what_is_found_contains_every_word(db: Database, said: list, asked: list[str]) -> None:
    with pytest.raises(_Undo), db.write() as s:
        rows = [
            push(s, name, name.encode(), note=note, targets=targets)[0]
            for name, (note, targets) in zip(NAMES, said, strict=True)
        ]
        for query in (*asked, "sql", "sq", "my sql", "team/"):
            assert [row.name for row in queries.list_versions(s, query=query)] == found_by(rows, query), query
        raise _Undo


def grams_hold(s: Session) -> bool:
    """Whether the index has what the documents have: no candidate is missing for any gram of any of them."""
    for ident, said in s.execute(text("SELECT version_id, text FROM documents")).all():
        for word in said.split():
            found = searching.candidates(s, [word], 1000)
            if found is not None and ident not in found:
                return False
    return True


def test_the_index_follows_removal_restoring_repair_and_collection(db: Database) -> None:
    def listed(s: Session, query: str) -> list[int]:
        return [row.number for row in queries.list_versions(s, query=query, all_versions=True)]

    with pytest.raises(_Undo), db.write() as s:
        one, two = (
            push(s, "sql", data, note=f"of {data.decode()}", targets=["q_proj"])[0] for data in (b"one", b"two")
        )
        assert listed(s, "sql") == [1, 2] and listed(s, "of one") == [1] and listed(s, "Q_PR") == [1, 2]
        queries.remove_version(s, two, "latest", None, NOW)
        assert listed(s, "sql") == [1] and listed(s, "two") == []
        queries.restore_version(s, "sql", 2, "latest", NOW)
        assert listed(s, "two") == [2]
        columns = {"base_root": one.base_root, "base_name": "gpt2", "rank": 8, "modules": 1, "bytes": 1}
        queries.describe(s, (Version, two.id), {**columns, "targets": ("lm_head",)})
        assert listed(s, "q_proj") == [1] and listed(s, "lm_head two") == [2]
        assert queries.described(s, two.digest)[Version, two.id]["search"] and grams_hold(s)
        queries.remove_version(s, two, "latest", None, NOW)
        assert [row.id for row in queries.purge_versions(s, NOW)] == [two.id]
        assert s.execute(text("SELECT version_id FROM documents")).scalars().all() == [one.id]
        assert searching.candidates(s, ["lm_head"], 10) == [] and grams_hold(s)
        s.execute(text("UPDATE documents SET text = 'other'"))
        assert not queries.described(s, one.digest)[Version, one.id]["search"]
        assert searching.candidates(s, ["other"], 10) == [one.id] and searching.candidates(s, ["sql"], 10) == []
        raise _Undo


def test_many_and_few(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more fit than are fetched at once, the order of names is walked along: the same is found."""
    with pytest.raises(_Undo), db.write() as s:
        for number in range(12):
            push(
                s, f"sql{number:02}", b"%d" % number, rank=8 + number % 2, note="chat " * (number % 4),
                targets=["q", "k"] if number % 3 else ["q"], base_name=f"base{number % 2}",
            )  # fmt: skip
        conditions = (
            {}, {"rank": 8}, {"rank": 9, "target": "k"}, {"target": "q"}, {"base": "base1"}, {"query": "chat"},
            {"query": "chat", "rank": 9, "target": "k", "base": "base1"}, {"query": "nothing"}, {"base": "none"},
        )  # fmt: skip
        asked = [{**each, "limit": limit, "all_versions": every}
                 for each in conditions for limit in (None, 3) for every in (False, True)]  # fmt: skip
        few = [queries.list_versions(s, **each) for each in asked]
        for limit in (0, 3):
            monkeypatch.setattr("loreg.catalog.versions.FEW", limit or 1)
            assert [queries.list_versions(s, **each) for each in asked] == few
        assert [row.name for row in queries.list_versions(s, rank=9, target="k")] == [
            "sql01",
            "sql05",
            "sql07",
            "sql11",
        ]
        raise _Undo


def test_a_long_note_is_looked_for_in_its_beginning(db: Database) -> None:
    with pytest.raises(_Undo), db.write() as s:
        note = " ".join(f"{number:x}" for number in range(2**18)) + " unheard"
        push(s, "sql", b"long", note="early " + note)
        assert len(queries.list_versions(s, query="early")) == 1 and queries.list_versions(s, query="unheard") == []
        raise _Undo


def test_a_query_of_nothing_and_of_what_a_database_cannot_hold(db: Database) -> None:
    with pytest.raises(_Undo), db.write() as s:
        push(s, "sql", b"one")
        for query in ("", "  ", "\0", "s\0q"):
            assert [row.name for row in queries.list_versions(s, query=query)] == ["sql"], repr(query)
        raise _Undo
