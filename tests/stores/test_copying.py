"""A registry is the same in another place, whatever stops the copy on its way; nothing there is written over."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tampering
import tiny
from backends import PLACES, Place
from sqlalchemy import select

import loreg
from loreg.catalog.copying import tables
from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, LoregError, NotFound, UsageError
from loreg.registry import copying
from loreg.store import LocalStore, Store, new_generation, open_store


def rows(registry: loreg.Registry) -> dict[str, list[Any]]:
    with registry.database.read() as session:
        return {table.name: sorted(map(tuple, session.execute(select(table))), key=repr) for table in tables()}


def blobs(store: Store) -> dict[str, bytes]:
    return {key.name: store.read(key) for key in store.keys()}  # noqa: SIM118 - not a dict


def copy(source: loreg.Registry | Place, target: Place, **options: Any) -> copying.Copied:
    home = source.home
    store = getattr(source, "store", None) or home
    catalog = getattr(source, "catalog", None) or str(home / "catalog.db")
    return loreg.copy_store(
        store,
        target.store or target.home,
        source_catalog=catalog,
        target_catalog=target.catalog or str(target.home / "catalog.db"),
        **options,
    )


@pytest.fixture
def full(pushed: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """With versions, tags and their history, a note, and something in the trash."""
    for seed in (3, 4):
        folder = tiny.write_adapter(tmp_path / f"sql{seed}", tiny.adapter(seed=seed))
        pushed.push(folder, base="base", name="sql", tags=["prod"], note=f"seed {seed}")
    pushed.tag("sql:v1", "old")
    pushed.remove("humor")
    return pushed


@pytest.fixture(params=["sqlite-files", "sqlite-s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where to copy to."""
    return PLACES[request.param](tmp_path / "there")


def same(source: loreg.Registry, place: Place) -> None:
    """The copy has all of it, is whole, and can be worked with as what it was copied from."""
    with place.open() as there:
        assert rows(there) == rows(source)
        assert blobs(there.storage.store) == blobs(source.storage.store)
        found = there.fsck()
        assert found.ok and not found.problems
        assert [str(there.resolve(f"sql:{tag}")) for tag in ("v1", "old", "prod", "latest")] == [
            str(source.resolve(f"sql:{tag}")) for tag in ("v1", "old", "prod", "latest")
        ]
        for query in ("sql", "seed", "q_proj"):
            assert [str(row.digest) for row in there.list_versions(query=query, all_versions=True)] == [
                str(row.digest) for row in source.list_versions(query=query, all_versions=True)
            ]
        assert there.collect(grace=timedelta(days=1)).copies == ()


@pytest.mark.parametrize("place", list(PLACES), indirect=True)
def test_copied_and_worked_with(full: loreg.Registry, place: Place, tmp_path: Path) -> None:
    seen: list[int] = []
    found = copy(full, place, advance=seen.append)
    stored = blobs(full.storage.store)
    assert (found.copies, found.there) == (len(stored), 0)
    assert found.nbytes == sum(map(len, stored.values())) == sum(seen)
    assert found.rows == sum(map(len, rows(full).values()))
    same(full, place)
    with place.open() as there:
        assert (
            there.push(tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9)), base="base", name="sql").number
            == 4
        )
        assert there.restore("humor:v1").number == 1
        there.remove("sql:v2", tags_to="sql:v1")
        there.collect(grace=timedelta())
        assert there.fsck().ok
    assert full.fsck().ok and full.resolve("sql").number == 3


@pytest.mark.parametrize("place", list(PLACES), indirect=True)
def test_there_and_back(full: loreg.Registry, place: Place, tmp_path: Path) -> None:
    copy(full, place)
    copy(place, Place(tmp_path / "back"))
    same(full, Place(tmp_path / "back"))


def test_again_copies_nothing(full: loreg.Registry, place: Place) -> None:
    first = copy(full, place)
    assert copy(full, place) == copying.Copied(0, first.copies, 0, 0)
    same(full, place)


CALLS = ("put", "keys", "owner", "claim", "write_record", "size")


def test_stopped_before_any_call_and_run_again(
    full: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _empty_catalog: bytes
) -> None:
    """Until it has come through there is no registry with a part of it, and a collection takes nothing of it."""
    stopped, done = 0, False
    while not done:
        place, left, stopped = Place(tmp_path / f"there{stopped}"), stopped, stopped + 1
        place.home.mkdir()
        (place.home / "catalog.db").write_bytes(_empty_catalog)

        def counted(original: Callable[..., Any], place: Place = place) -> Callable[..., Any]:
            def call(self: LocalStore, *arguments: Any, **options: Any) -> Any:
                nonlocal left
                if str(place.home) in repr(self):
                    left -= 1
                    if left < 0:
                        raise KeyboardInterrupt
                return original(self, *arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
            try:
                copy(full, place)
                done = True
            except KeyboardInterrupt:
                pass
        with place.open() as there:
            assert sum(map(len, rows(there).values())) in (0, sum(map(len, rows(full).values())))
        again = copy(full, place)
        assert again.copies + again.there == len(blobs(full.storage.store))
        with place.open() as there:
            assert rows(there) == rows(full) and blobs(there.storage.store) == blobs(full.storage.store)
    assert stopped >= 20
    same(full, place)


def test_killed_and_run_again(full: loreg.Registry, tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "large", tiny.adapter(seed=5))
    version = full.push(folder, base="base", name="sql")
    assert version.created
    place = Place(tmp_path / "there")
    command = [sys.executable, "-m", "loreg.cli", "store", "copy", str(full.home), str(place.home), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(place.home.glob("blobs/*/*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(found.stdout)
    assert document["copies"] + document["there"] == len(blobs(full.storage.store))
    same(full, place)


def test_a_collection_in_the_middle_takes_nothing(
    full: loreg.Registry, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is copied already, and what no row stands for yet."""
    collected: list[Any] = []

    def collect(*arguments: Any) -> Any:
        found = copied(*arguments)
        with place.open() as there:
            collected.append(there.collect(grace=timedelta()).copies)
        return found

    copied = copying._copy_blobs
    monkeypatch.setattr(copying, "_copy_blobs", collect)
    copy(full, place)
    assert collected == [()]
    same(full, place)


def test_what_is_pushed_meanwhile_is_left_out(
    full: loreg.Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copied = rows(full), copying._copy_blobs
    folder = tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9))

    def push(*arguments: Any) -> Any:
        with loreg.open(full.home) as beside:
            beside.push(folder, base="base", name="sql")
        return copied(*arguments)

    monkeypatch.setattr(copying, "_copy_blobs", push)
    copy(full, place)
    with place.open() as there:
        assert rows(there) == before and there.fsck().ok and there.resolve("sql").number == 3
    monkeypatch.undo()
    with pytest.raises(Conflict, match="expected an empty one"):
        copy(full, place)
    with place.open() as there:
        assert rows(there) == before


def test_what_is_collected_meanwhile_is_said(
    full: loreg.Registry, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copying._copy_blobs

    def collect(*arguments: Any) -> Any:
        with loreg.open(full.home) as beside:
            assert beside.collect(grace=timedelta()).copies
        return copied(*arguments)

    monkeypatch.setattr(copying, "_copy_blobs", collect)
    with pytest.raises(Conflict, match="collected from the source"):
        copy(full, place)
    monkeypatch.undo()
    copy(full, place)
    same(full, place)


def test_damage_is_not_copied(full: loreg.Registry, place: Place) -> None:
    store = full.storage.store
    key = full.storage.key(full.find("sql").digest)
    data = store.read(key)
    tampering.overwrite(store, key, data[:-1] + b"?")
    with pytest.raises(BadInput, match=f"{key.digest}.*loreg fsck"):
        copy(full, place)
    with place.open() as there:
        assert not any(rows(there).values())
        assert key not in list(there.storage.store.keys())
    tampering.remove(store, key)
    with pytest.raises(Conflict, match=str(key.digest)):
        copy(full, place)
    store.put(key.digest, key.generation, [data])
    copy(full, place)
    same(full, place)


def test_a_copy_of_another_size_is_put_aside(full: loreg.Registry, place: Place) -> None:
    copy(full, place)
    key = full.storage.key(full.find("sql").digest)
    with place.open() as there:
        tampering.overwrite(there.storage.store, key, b"cut")
    assert copy(full, place).copies == 1
    same(full, place)


def test_a_registry_that_is_in_use_is_not_written_into(full: loreg.Registry, place: Place, tiny_base: Path) -> None:
    with place.open() as there:
        there.add_base(tiny_base, "other")
        before = rows(there), blobs(there.storage.store)
    with pytest.raises(Conflict, match="expected an empty one"):
        copy(full, place)
    with place.open() as there:
        assert (rows(there), blobs(there.storage.store)) == before


def test_a_store_alone(full: loreg.Registry, place: Place, tmp_path: Path, tiny_base: Path) -> None:
    """It becomes the same store in another place, and the catalog goes on with it."""
    target = place.store or str(place.home)
    loreg.copy_store(full.home, target, catalog=False)
    again = loreg.copy_store(full.home, target, catalog=False)
    assert again.copies == 0 and again.there == len(blobs(full.storage.store))
    with loreg.open(full.home, store=target) as moved:
        assert moved.fsck().ok
        assert (
            moved.push(tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9)), base="base", name="sql").number
            == 4
        )
    other = open_store(target)
    source = full.storage.store
    assert other.owner() == source.owner()
    records = {seq: source.read_record(seq) for seq in source.records()}
    assert records and {seq: other.read_record(seq) for seq in records} == records
    with loreg.open(tmp_path / "stranger") as stranger:
        stranger.add_base(tiny_base, "base")
    with pytest.raises(Conflict, match="another registry's store"):
        loreg.copy_store(tmp_path / "stranger", target, catalog=False)


def test_the_copy_is_a_registry_of_its_own(full: loreg.Registry, place: Place) -> None:
    copy(full, place)
    with (
        pytest.raises(Conflict, match="another"),
        loreg.open(full.home, store=place.store or str(place.home)) as crossed,
    ):
        crossed.tag("sql:v1", "new")


REFUSED: dict[str, tuple[dict[str, Any], type[LoregError], str]] = {
    "a store without a catalog": ({"source": "file:///tmp/x"}, UsageError, "--catalog-from"),
    "to a store without a catalog": ({"target": "file:///tmp/x"}, UsageError, "--catalog-to"),
    "no registry": ({"source": "/nowhere/at/all"}, NotFound, "not the home of a registry"),
    "no catalog": ({"source_catalog": "/nowhere/catalog.db"}, NotFound, "nowhere"),
    "no catalog by its URL": ({"source_catalog": "sqlite:////nowhere/catalog.db"}, NotFound, "nowhere"),
    "no store": ({"source": "gopher://x"}, UsageError, "gopher"),
    "a mistyped source": ({"source": "s3:/bucket/x"}, UsageError, "looks like a URL and is none"),
    "a mistyped target": ({"target": "s3:/bucket/x"}, UsageError, "looks like a URL and is none"),
    "a mistyped catalog": ({"source_catalog": "postgresql:/h/x"}, UsageError, "looks like a URL and is none"),
    "to a mistyped catalog": ({"target_catalog": "postgresql:/h/x"}, UsageError, "looks like a URL and is none"),
    "a home of nobody": ({"source": "~nobody-at-all/x"}, UsageError, "~nobody-at-all"),
}


@pytest.mark.parametrize(("options", "family", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    full: loreg.Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    family: type[LoregError],
    said: str,
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(family, match=said):
        loreg.copy_store(**{"source": full.home, "target": tmp_path / "there", **options})
    assert not Path("/nowhere").exists()
    assert not (tmp_path / "there").exists() and not list((tmp_path / "work").iterdir())


def test_into_itself(full: loreg.Registry) -> None:
    with pytest.raises(UsageError, match="one store"):
        loreg.copy_store(full.home, full.home)


def test_a_catalog_of_another_store(full: loreg.Registry, tmp_path: Path) -> None:
    shutil.copytree(full.home / "blobs", tmp_path / "elsewhere" / "blobs")
    with pytest.raises(Conflict, match="another store"):
        loreg.copy_store(tmp_path / "elsewhere", tmp_path / "there", source_catalog=str(full.home / "catalog.db"))
    assert not (tmp_path / "there").exists()


def test_to_a_store_whose_catalog_is_elsewhere(full: loreg.Registry, tmp_path: Path, tiny_base: Path) -> None:
    """No catalog is made beside it, which nobody could open."""
    with loreg.open(tmp_path / "there", catalog=str(tmp_path / "its.db")) as there:
        there.add_base(tiny_base, "base")
        before = tiny.files_in(there.home)
    with pytest.raises(Conflict, match=r"there is another registry's store.*--catalog-to"):
        loreg.copy_store(full.home, tmp_path / "there")
    assert tiny.files_in(tmp_path / "there") == before


def test_from_a_registry_whose_catalog_is_elsewhere(
    full: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.close()
    (full.home / "catalog.db").rename(tmp_path / "its.db")
    monkeypatch.setenv("LOREG_CATALOG", str(tmp_path / "its.db"))
    with pytest.raises(NotFound, match="LOREG_CATALOG, say where with --catalog-from"):
        loreg.copy_store(full.home, tmp_path / "there")
    loreg.copy_store(full.home, tmp_path / "there", source_catalog=str(tmp_path / "its.db"))


def test_orphans_are_copied_and_collected_there(full: loreg.Registry, tmp_path: Path) -> None:
    place, data = Place(tmp_path / "there"), b"of a push that died"
    full.storage.store.put(Digest.of(data), new_generation(), [data])
    copy(full, place)
    with place.open() as there:
        assert blobs(there.storage.store) == blobs(full.storage.store)
        assert len(there.collect().copies) == 1
    assert copy(full, place).copies == 1


def test_the_command(full: loreg.Registry, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loreg.cli", "store", "copy", str(full.home), str(tmp_path / "there")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"copied {len(blobs(full.storage.store))} blobs" in found.stdout
    again = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert again == {"copies": 0, "bytes": 0, "there": len(blobs(full.storage.store)), "rows": 0}
    refused = subprocess.run([*command[:-1], "s3://bucket/x"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--catalog-to" in refused.stderr
    same(full, Place(tmp_path / "there"))
