"""The ledger in the store: it says what the catalog says, and the catalog is made again from it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import loreg
from loreg.catalog import queries
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed, Conflict, NotFound, UsageError
from loreg.format import ledger
from loreg.registry import auditing

AT_ONCE = timedelta()


def names(registry: loreg.Registry) -> dict[Any, Any]:
    """All that people gave names to."""
    with registry.database.read() as session:
        return queries.every_fact(session)


def said(registry: loreg.Registry) -> dict[Any, Any]:
    """The same as the store has it."""
    found, problems, damaged = auditing.read_ledger(registry.storage.store)
    assert not problems and not damaged
    return {key: auditing._as_far_as_known(found.facts, key) for key in found.facts}


def records(registry: loreg.Registry) -> list[Path]:
    return sorted((registry.home / "ledger").iterdir())


def lose(home: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (home / f"catalog.db{suffix}").unlink(missing_ok=True)


@pytest.fixture
def lived_in(pushed: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """Versions with notes, tags that moved, one in the trash, one that was collected, one that came back."""
    for seed in (5, 6, 7):
        folder = tiny.write_adapter(tmp_path / f"more-{seed}", tiny.adapter(seed=seed))
        pushed.push(folder, base="base", name="sql", tags=["prod"] if seed == 6 else [], note=f"note, «{seed}»")
    pushed.tag("sql:v1", "old")
    pushed.remove("sql:v4")
    pushed.remove("humor:v1")
    pushed.collect(grace=AT_ONCE)
    pushed.push(tmp_path / "humor", base="base", name="team/humor", note="back, under another name")
    pushed.remove("sql:v2")
    pushed.restore("sql:v2")
    pushed.remove("sql:v3", tags_to="sql:v1")
    second = tiny.write_model(tmp_path / "second", tiny.model(seed=3))
    pushed.add_base(second, "second")
    pushed.add_base(shutil.copytree(second, tmp_path / "moved"), "second")
    return pushed


def test_the_ledger_says_what_the_catalog_says(lived_in: loreg.Registry) -> None:
    assert said(lived_in) == names(lived_in)
    assert lived_in.fsck().ok
    with lived_in.database.read() as session:
        assert len(queries.kept_records(session)) <= 2  # what is in the store is kept here no longer


def test_the_catalog_is_made_again(lived_in: loreg.Registry, tmp_path: Path) -> None:
    before, tags = names(lived_in), lived_in.tags("sql")
    shown = [(row.name, row.number, row.note, row.targets, row.created_at) for row in lived_in.list_versions()]
    trash, log = lived_in.trash(), lived_in.log("sql")
    lived_in.export("sql:v2", tmp_path / "was")
    lived_in.close()
    lose(lived_in.home)
    found = loreg.rebuild_catalog(lived_in.home)
    assert found.ok and not found.lost_found and (found.versions, found.bases, found.tags) == (4, 2, 4)
    with loreg.open(lived_in.home) as again:
        assert names(again) == before == said(again)
        assert again.tags("sql") == tags
        assert [(r.name, r.number, r.note, r.targets, r.created_at) for r in again.list_versions()] == shown
        assert [(row.name, row.number, row.removed_at) for row in again.trash()] == [
            (row.name, row.number, row.removed_at) for row in trash
        ]
        assert again.log("sql")[1] == log[1]
        assert again.fsck().ok
        assert again.collect(grace=AT_ONCE).versions and again.fsck().ok
        again.export("sql:v2", tmp_path / "is")
        version = again.push(tiny.write_adapter(tmp_path / "next", tiny.adapter(seed=99)), base="base", name="sql")
        assert version.number == 5 and again.fsck().ok  # a number is never given twice, that of the trash included
    for path in (tmp_path / "was").iterdir():
        assert (tmp_path / "is" / path.name).read_bytes() == path.read_bytes()


def test_it_goes_on_from_there_and_is_made_again_once_more(lived_in: loreg.Registry, tmp_path: Path) -> None:
    lived_in.close()
    for seed in (20, 21):
        lose(lived_in.home)
        assert loreg.rebuild_catalog(lived_in.home).ok
        with loreg.open(lived_in.home) as again:
            folder = tiny.write_adapter(tmp_path / f"then-{seed}", tiny.adapter(seed=seed))
            again.push(folder, base="base", name="sql", note=str(seed))
            assert names(again) == said(again) and again.fsck().ok
            numbers = [row.number for row in again.log("sql")[0]]
    assert numbers == [1, 2, 5, 6]


def test_only_an_empty_catalog_is_filled(pushed: loreg.Registry) -> None:
    with pytest.raises(Conflict, match="is not empty"):
        loreg.rebuild_catalog(pushed.home)
    assert pushed.fsck().ok


def test_a_new_catalog_does_not_take_another_ones_store(pushed: loreg.Registry) -> None:
    pushed.close()
    lose(pushed.home)
    for _ in range(2):
        with pytest.raises(Conflict, match=r"belongs to another catalog.*rebuild-catalog"):
            loreg.open(pushed.home)
    found = loreg.rebuild_catalog(pushed.home)
    assert found.ok and found.versions == 2


def test_an_older_copy_of_the_catalog_does_not_write(pushed: loreg.Registry, tmp_path: Path) -> None:
    """It would give a number twice, and take for garbage what was pushed since."""
    home = pushed.home
    pushed.close()
    shutil.copy(home / "catalog.db", tmp_path / "backup.db")
    with loreg.open(home) as registry:
        registry.push(tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9)), base="base", name="sql")
        digest = registry.resolve("sql").digest
    lose(home)
    shutil.copy(tmp_path / "backup.db", home / "catalog.db")
    with loreg.open(home) as old:
        assert old.resolve("sql").number == 1
        for act in (
            lambda: old.push(tiny.write_adapter(tmp_path / "x", tiny.adapter(seed=10)), base="base", name="sql"),
            lambda: old.tag("sql:v1", "prod"),
            lambda: old.remove("sql:v1"),
            lambda: old.collect(grace=AT_ONCE),
        ):
            before = names(old)
            with pytest.raises(Conflict, match="an older copy"):
                act()
            assert names(old) == before
        assert not old.fsck().ok
    lose(home)
    assert loreg.rebuild_catalog(home).ok
    with loreg.open(home) as again:
        assert again.resolve("sql:v2").digest == digest


def test_an_older_copy_does_not_write_to_a_ledger_that_was_shortened_since(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loreg.registry import collecting

    monkeypatch.setattr(collecting, "LONG", 1)
    home = pushed.home
    pushed.close()
    shutil.copy(home / "catalog.db", tmp_path / "backup.db")
    with loreg.open(home) as registry:
        for seed in (9, 10):
            registry.push(tiny.write_adapter(tmp_path / str(seed), tiny.adapter(seed=seed)), base="base", name="sql")
        registry.collect()
    lose(home)
    shutil.copy(tmp_path / "backup.db", home / "catalog.db")
    with loreg.open(home) as old:
        for act in (lambda: old.tag("sql:v1", "prod"), lambda: old.collect(grace=AT_ONCE)):
            with pytest.raises(Conflict, match="an older copy"):
                act()
    lose(home)
    found = loreg.rebuild_catalog(home)
    assert found.ok and found.versions == 4


def test_an_older_copy_that_is_put_under_a_registry_in_use(pushed: loreg.Registry, tmp_path: Path) -> None:
    """As a database server's administrator can."""
    with sqlite3.connect(tmp_path / "backup.db") as backup, sqlite3.connect(pushed.home / "catalog.db") as catalog:
        catalog.backup(backup)
        pushed.tag("sql:v1", "prod")
        backup.backup(catalog)
    before = set(pushed.storage.store.keys()), names(pushed)
    for act in (lambda: pushed.tag("sql:v1", "new"), lambda: pushed.collect(grace=AT_ONCE)):
        with pytest.raises(Conflict, match="an older copy"):
            act()
    assert (set(pushed.storage.store.keys()), names(pushed)) == before


def test_a_disk_that_is_unmounted_under_a_registry_in_use(pushed: loreg.Registry, tmp_path: Path) -> None:
    """What stands there then is an empty directory."""
    third = tiny.write_adapter(tmp_path / "third", tiny.adapter(seed=9))
    mounted = {name: pushed.home / name for name in ("blobs", "ledger", "store.json", "tmp")}
    for name, path in mounted.items():
        path.rename(tmp_path / name)
    before = names(pushed)
    with pytest.raises(Conflict, match="found an empty one"):
        pushed.push(third, base="base", name="sql")
    with pytest.raises(Conflict, match="found an empty one"):
        pushed.tag("sql:v1", "prod")
    assert names(pushed) == before and not any(path.exists() for path in mounted.values())
    for name, path in mounted.items():
        (tmp_path / name).rename(path)
    assert pushed.push(third, base="base", name="sql").number == 2 and pushed.fsck().ok


def test_there_is_no_store_to_make_a_catalog_from(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for home in ("model", "nowhere"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(NotFound, match=r"There is no store at .*expected blobs"):
            loreg.rebuild_catalog(tmp_path / home)
        assert sorted(tmp_path.rglob("*")) == before


def test_one_catalog_with_two_stores(pushed: loreg.Registry, tmp_path: Path) -> None:
    """A disk that is not mounted looks like a new and empty store."""
    pushed.close()
    (tmp_path / "elsewhere").mkdir()
    with loreg.open(pushed.home, store=f"file://{tmp_path}/elsewhere") as wrong:
        with pytest.raises(Conflict, match=r"belongs to another store.*found an empty one"):
            wrong.tag("sql:v1", "prod")
        with pytest.raises(Conflict, match="belongs to another store"):
            wrong.collect()
        assert not wrong.fsck().ok
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with loreg.open(tmp_path / "other") as other:
        base = tiny.write_model(tmp_path / "other-base", tiny.model(seed=5))
        other.add_base(base, "base")
    with (
        loreg.open(pushed.home, store=f"file://{tmp_path}/other") as wrong,
        pytest.raises(Conflict, match="belongs to another catalog"),
    ):
        wrong.tag("sql:v1", "prod")
    with loreg.open(pushed.home) as right:
        assert right.fsck().ok


# What is damaged


@pytest.mark.parametrize("number", [0, 1, -1])
@pytest.mark.parametrize("how", ["missing", "flipped", "empty", "swapped"])
def test_a_damaged_record_is_found_and_the_ledger_begun_anew(lived_in: loreg.Registry, how: str, number: int) -> None:
    path, other = records(lived_in)[number], records(lived_in)[2]
    data = path.read_bytes()
    path.chmod(0o644)
    if how == "missing":
        path.unlink()
    else:
        damaged = {
            "flipped": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
            "empty": b"",
            "swapped": other.read_bytes(),
        }
        path.write_bytes(damaged[how])
    before = names(lived_in)
    found = lived_in.fsck()
    if how == "missing" and number == -1:
        assert found.ok  # the catalog has that one still, and writes it
        lived_in.tag("sql:v1", "again")
        assert lived_in.fsck().ok
        return
    assert not found.ok and {problem.kind for problem in found.problems} <= {"ledger", "name"}
    mended = lived_in.fsck(repair=True)
    assert mended.ok and lived_in.fsck().ok and names(lived_in) == before == said(lived_in)
    if how != "missing":
        (aside,) = (lived_in.home / "quarantine").iterdir()
        assert aside.name.startswith(f"ledger-{path.name}.")


CHANGES = {
    "note": "UPDATE versions SET note = 'another' WHERE note IS NOT NULL",
    "number": "UPDATE versions SET number = number + 100 WHERE number = 1",
    "made": "UPDATE versions SET created_at = created_at + 1",
    "removed": "UPDATE versions SET removed_at = removed_at + 1",
    "restored": "UPDATE versions SET removed_at = NULL",
    "name": "UPDATE adapters SET name = 'sqk' WHERE name = 'sql'",
    "last number": "UPDATE adapters SET last_number = last_number + 1",
    "name's time": "UPDATE adapters SET created_at = 1",
    "tag": "UPDATE tags SET name = 'prof' WHERE name = 'prod'",
    "tag's move": "UPDATE tag_history SET name = 'prof' WHERE name = 'prod'",
    "tag's version": "UPDATE tag_history SET version_id = (SELECT min(id) FROM versions) WHERE name = 'prod'",
    "moved at": "UPDATE tag_history SET moved_at = moved_at + 1 WHERE name = 'prod'",
    "base's name": "UPDATE bases SET name = 'bass' WHERE name = 'base'",
    "base's path": "UPDATE bases SET path = '/elsewhere'",
    "base's time": "UPDATE bases SET created_at = 1",
    "version gone": "DELETE FROM versions WHERE removed_at IS NOT NULL",
    "name of a version": "UPDATE versions SET adapter_id = (SELECT id FROM adapters WHERE name = 'team/humor') "
    "WHERE number = 2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_catalog_says_of_names_is_checked_and_mended(lived_in: loreg.Registry, change: str) -> None:
    before = names(lived_in)
    with closing(sqlite3.connect(lived_in.home / "catalog.db")) as raw, raw:
        raw.execute("PRAGMA foreign_keys = ON")
        assert raw.execute(CHANGES[change]).rowcount > 0
    found = lived_in.fsck()
    assert not found.ok, change
    lived_in.fsck(repair=True)
    assert lived_in.fsck().ok
    assert names(lived_in) == before


def test_what_a_tag_points_to_is_checked(lived_in: loreg.Registry) -> None:
    """The row of the tag itself, which the history speaks of too."""
    with closing(sqlite3.connect(lived_in.home / "catalog.db")) as raw, raw:
        raw.execute(
            "UPDATE tags SET version_id = (SELECT max(id) FROM versions WHERE number = 2) WHERE name = 'prod'"
        )
    assert not lived_in.fsck().ok
    assert lived_in.fsck(repair=True).ok and lived_in.fsck().ok
    assert lived_in.tags("sql")["prod"] == 1


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format":"loreg-store/1"}', None])
def test_a_damaged_store_json_is_written_anew(lived_in: loreg.Registry, content: bytes | None) -> None:
    path = lived_in.home / "store.json"
    data = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    lived_in.close()
    with loreg.open(lived_in.home) as again:
        with pytest.raises((BadInput, Conflict)):
            again.tag("sql:v1", "x")
        assert not again.fsck().ok
        assert again.fsck(repair=True).ok and again.fsck().ok
        again.tag("sql:v1", "x")
    assert path.read_bytes() == data


def test_what_has_no_name_is_found(lived_in: loreg.Registry, tmp_path: Path) -> None:
    """All records are lost."""
    before = {row.digest for row in lived_in.list_versions(all_versions=True)} | {r.digest for r in lived_in.trash()}
    lived_in.close()
    lose(lived_in.home)
    shutil.rmtree(lived_in.home / "ledger")
    found = loreg.rebuild_catalog(lived_in.home)
    with loreg.open(lived_in.home) as again:
        assert {row.digest for row in again.list_versions(all_versions=True)} == before
        assert len(found.lost_found) == len(before) + 2  # the bases
        assert all(name.startswith("lost-found/") for name in found.lost_found)
        assert again.fsck().ok
        assert again.collect(grace=AT_ONCE).copies == ()


def test_what_a_dead_push_left_is_lost_and_found(pushed: loreg.Registry, tmp_path: Path) -> None:
    def dies(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    folder = tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "add_version", dies)
        with pytest.raises(KeyboardInterrupt):
            pushed.push(folder, base="base", name="new")
    pushed.close()
    lose(pushed.home)
    found = loreg.rebuild_catalog(pushed.home)
    assert found.ok and found.versions == 3 and len(found.lost_found) == 1
    with loreg.open(pushed.home) as again:
        assert said(again) == names(again) and again.fsck().ok
        assert again.push(folder, base="base", name="new").digest == again.resolve(found.lost_found[0]).digest


def test_what_is_missing_is_told(lived_in: loreg.Registry) -> None:
    """A manifest: that version cannot be there. Other blobs: it is there, and every check says what it lacks."""
    gone = lived_in.resolve("team/humor").digest
    blob = lived_in.resolve("sql:v2").manifest.blob("factors")
    assert blob is not None
    for digest in (gone, blob.digest):
        lived_in.storage.path(digest).unlink()
    lived_in.close()
    lose(lived_in.home)
    found = loreg.rebuild_catalog(lived_in.home)
    assert not found.ok
    assert {(p.kind, p.what, p.touches) for p in found.problems} == {
        ("missing", str(gone), ("team/humor:v1",)),
        ("missing", str(blob.digest), ("sql:v2",)),
    }
    with loreg.open(lived_in.home) as again:
        assert {row.name for row in again.list_versions()} == {"sql"}
        assert [p.touches for p in again.fsck().problems] == [("sql:v2",)]


def test_what_cannot_be_read_is_kept_and_told(lived_in: loreg.Registry) -> None:
    blob = lived_in.resolve("sql:v2").manifest.blob("factors")
    assert blob is not None
    path = lived_in.storage.path(blob.digest)
    path.rename(aside := path.with_suffix(".aside"))
    path.mkdir()
    lived_in.close()
    lose(lived_in.home)
    (problem,) = loreg.rebuild_catalog(lived_in.home).problems
    assert (problem.kind, problem.touches) == ("unreadable", ("sql:v2",))
    path.rmdir()
    aside.rename(path)  # the disk is well again
    with loreg.open(lived_in.home) as again:
        assert again.collect().copies == () and again.fsck().ok


# Under way


def test_a_record_that_could_not_be_written_is_written_next(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = type(pushed.storage.store)

    def full(*_: object) -> None:
        raise CheckFailed("could not write: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_record", full)
        with pytest.raises(CheckFailed, match="The catalog has what was asked for, the ledger not yet"):
            pushed.tag("sql:v1", "prod")
    assert pushed.tags("sql")["prod"] == 1 and pushed.fsck().ok
    home = pushed.home
    pushed.close()
    with loreg.open(home) as again:
        assert said(again) != names(again)  # the store lacks it so far
        again.tag("sql:v1", "next")
        assert said(again) == names(again)


def test_a_transaction_that_fails_leaves_no_record(pushed: loreg.Registry) -> None:
    before = [path.name for path in records(pushed)]
    with pytest.raises(Conflict):
        pushed.tag("sql:v1", "prod")
        pushed.remove("sql:v1")
    pushed.collect(dry_run=True, grace=AT_ONCE)
    assert [path.name for path in records(pushed)][: len(before)] == before
    assert said(pushed) == names(pushed)


def test_two_processes_that_commit_at_once(pushed: loreg.Registry) -> None:
    with loreg.open(pushed.home) as other:
        for number in range(10):
            (pushed, other)[number % 2].tag("sql:v1", f"t{number}")
        assert said(pushed) == names(pushed) == names(other)
        assert pushed.fsck().ok


def test_a_catalog_from_before_the_ledger_is_written_down_whole(
    lived_in: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(lived_in)
    with closing(sqlite3.connect(lived_in.home / "catalog.db")) as raw, raw:
        raw.execute("DELETE FROM ledger")
        raw.execute("UPDATE registry SET store = NULL")
    lived_in.close()
    shutil.rmtree(lived_in.home / "ledger")
    (lived_in.home / "store.json").unlink()
    monkeypatch.setattr(ledger, "PART", 4)
    with loreg.open(lived_in.home) as old:
        assert old.fsck().ok and not (old.home / "ledger").exists()
        old.tag("sql:v1", "prod2")
        assert len(records(old)) > 3
        assert said(old) == names(old) == {**before, ("tag", "sql", "prod2", 1): said(old)["tag", "sql", "prod2", 1]}


def test_a_snapshot_of_which_a_part_is_missing_does_not_count(
    lived_in: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PART", 4)
    before = names(lived_in)
    with lived_in.storage.writing() as session:
        queries.begin_anew(session)
    assert said(lived_in) == before
    first = min(
        int(path.name) for path in records(lived_in) if ledger.unsealed(path.read_bytes(), int(path.name)).parts > 1
    )
    (lived_in.home / "ledger" / f"{first + 1:016d}").unlink()
    found, problems, _ = auditing.read_ledger(lived_in.storage.store)
    assert {key: auditing._as_far_as_known(found.facts, key) for key in found.facts} == before
    assert [problem.what for problem in problems] == [f"record {first + 1}"]


def test_the_ledger_is_begun_anew_when_it_is_long(lived_in: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from loreg.registry import collecting

    before = names(lived_in)
    monkeypatch.setattr(collecting, "LONG", 5)
    assert len(records(lived_in)) > 10
    lived_in.collect()
    assert len(records(lived_in)) <= 2 and said(lived_in) == names(lived_in) == before and lived_in.fsck().ok


def test_command_line(lived_in: loreg.Registry, tmp_path: Path) -> None:
    lived_in.close()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LOREG_HOME": str(lived_in.home)}
        return subprocess.run(
            [sys.executable, "-c", "from loreg.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            env=env,
        )

    assert run("fsck", "--rebuild-catalog").returncode == 6
    lose(lived_in.home)
    said = run("ls")
    assert said.returncode == 6 and "--rebuild-catalog" in said.stderr
    assert run("fsck", "--rebuild-catalog", "--repair").returncode == 2
    done = run("fsck", "--rebuild-catalog", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["versions"] == 4 and found["ok"] and found["problems"] == []
    assert found["blobs"] == len(list(lived_in.home.glob("blobs/*/*")))
    assert run("fsck").returncode == 0
    assert run("ls").returncode == 0


# The records themselves


@pytest.fixture(params=["facts", "seq", "previous", "format", "extra", "name", "tag", "number", "note"])
def wrong(request: pytest.FixtureRequest) -> Iterator[bytes]:
    good: dict[str, Any] = json.loads(
        ledger.LedgerRecord(
            1,
            None,
            5,
            {("version", "sql", 1): {"at": 1, "manifest": "blake3:" + "0" * 64, "note": None, "removed": None}},
        ).dump()
    )
    match request.param:
        case "facts":
            good["facts"] = {}
        case "seq":
            good["seq"] = 0
        case "previous":
            good["previous"] = "blake3:" + "0" * 64
        case "format":
            good["format"] = "loreg-ledger/2"
        case "extra":
            good["facts"][0]["more"] = 1
        case "name":
            good["facts"][0]["fact"][1] = "SQL"
        case "tag":
            good["facts"][0]["fact"] = ["tag", "sql", "v1", 1]
        case "number":
            good["facts"][0]["fact"][2] = 0
        case "note":
            good["facts"][0]["is"]["note"] = 5
    from loreg.format import canonical_json

    yield canonical_json.dumps(good)


def test_a_record_is_read_strictly(wrong: bytes) -> None:
    with pytest.raises(BadInput):
        ledger.unsealed(ledger.sealed(wrong), 1)


def test_a_note_that_cannot_be_written_down_is_refused(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    with pytest.raises((UsageError, BadInput)):
        pushed.push(tiny_adapter, base="base", name="odd", note="\ud800")
    assert pushed.fsck().ok


# Laws

_NAMES = st.sampled_from(["sql", "humor", "team/a", "x" * 128])
_AT = st.integers(0, 2**53 - 1)
_TEXT = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)
_MANIFEST = st.integers(0, 3).map(lambda digit: f"blake3:{digit:064x}")
_FACT = st.one_of(
    st.tuples(st.tuples(st.just("name"), _NAMES), st.fixed_dictionaries({"at": _AT, "last": _AT})),
    st.tuples(
        st.tuples(st.just("version"), _NAMES, st.integers(1, 12)),
        st.fixed_dictionaries({"at": _AT, "manifest": _MANIFEST, "note": _TEXT, "removed": st.none() | _AT}),
    ),
    st.tuples(
        st.tuples(st.just("tag"), _NAMES, st.sampled_from(["prod", "latest"]), st.integers(1, 12)),
        st.fixed_dictionaries({"at": _AT, "number": st.none() | st.integers(1, 12)}),
    ),
)


@settings(deadline=None)
@given(st.lists(st.lists(_FACT | st.tuples(_FACT.map(lambda fact: fact[0]), st.none()), min_size=1), min_size=1))
def test_replaying_is_updating_a_dictionary(transactions: list[list[tuple[ledger.Key, Any]]]) -> None:
    """Through bytes, from the start or from a snapshot of any moment, and whatever came before it is lost."""
    state: dict[ledger.Key, Any] = {}
    stored: dict[int, bytes] = {}
    previous, head = None, 0
    for transaction in transactions:
        facts = dict(transaction)
        state = {key: value for key, value in {**state, **facts}.items() if value is not None}
        record = ledger.LedgerRecord(head := head + 1, previous, 0, facts)
        stored[head], previous = ledger.sealed(record.dump()), Digest.of(record.dump())
        assert _replayed(stored) == (state, ())
    for record in ledger.snapshot(state, head + 1, previous, 0):
        stored[record.seq] = ledger.sealed(record.dump())
    assert _replayed(stored) == (state, ())
    assert _replayed({seq: data for seq, data in stored.items() if seq > head}) == (state, ())


def _replayed(stored: dict[int, bytes]) -> tuple[dict[ledger.Key, Any], tuple[int, ...]]:
    found = ledger.replay({seq: ledger.unsealed(data, seq) for seq, data in stored.items()})
    return found.facts, found.gaps
