"""fsck finds every damage and names what it touches; a repair mends what can be mended and throws nothing away."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from backends import ON_FILES, PLACES, Place
from sqlalchemy import text

import loreg
from loreg.catalog import queries
from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput, Conflict, NotFound
from loreg.registry import storage
from loreg.registry.checking import Checked
from loreg.registry.recording import Recorder
from loreg.store import BlobKey, LocalStore, new_generation


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _paths(registry: loreg.Registry) -> dict[BlobKey, Path]:
    store = registry.storage.store
    return {key: path for key in store.keys() if (path := store.path(key)) is not None}  # noqa: SIM118 - not a dict


def _one(checked: Checked) -> Any:
    (problem,) = checked.problems
    return problem


def _sql(registry: loreg.Registry, statement: str) -> None:
    with registry.database.write() as session:
        session.execute(text(statement))


@pytest.fixture(params=ON_FILES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return PLACES[request.param](tmp_path)


@pytest.fixture
def registry(place: Place) -> Iterator[loreg.Registry]:
    with place.open() as opened:
        yield opened


@pytest.fixture
def copy(pushed: loreg.Registry, tmp_path: Path) -> Path:
    """The home of a registry that has all of it."""
    return Path(shutil.copytree(pushed.home, tmp_path / "copy"))


def test_all_is_well(pushed: loreg.Registry) -> None:
    seen: list[int] = []
    found = pushed.fsck(advance=seen.append)
    assert (found.ok, found.problems, found.orphans) == (True, (), 0)
    assert found.blobs == len(_paths(pushed))
    assert sum(seen) == sum(path.stat().st_size for path in _paths(pushed).values())


@pytest.mark.parametrize("place", ON_FILES[:1], indirect=True)  # no catalog is looked at
def test_every_byte_of_every_blob_counts(pushed: loreg.Registry) -> None:
    for key, path in _paths(pushed).items():
        data = path.read_bytes()
        places = {0, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}
        for place, bit in ((place, bit) for place in places if place < len(data) for bit in (0, 7)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            _write(path, bytes(flipped))
            problem = _one(pushed.fsck())
            assert (problem.kind, problem.what) == ("corrupt", str(key.digest)) and problem.touches
        for other in (b"", data[:-1], data + b"\0", data * 2):
            _write(path, other)
            assert _one(pushed.fsck()).kind == "corrupt"
        path.unlink()
        assert _one(pushed.fsck()).kind == "missing"
        path.mkdir()
        assert _one(pushed.fsck(repair=True)).kind == "unreadable" and path.is_dir()  # it may be readable tomorrow
        path.rmdir()
        path.write_bytes(data)
    assert pushed.fsck().ok


def test_what_is_touched_is_named(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    pushed.push(tiny_adapter, base="base", name="other")
    version = pushed.resolve("sql")
    for digest, touches in (
        (version.digest, ("other:v1", "sql:v1")),
        (version.manifest.blobs[0].digest, ("other:v1", "sql:v1")),
        (pushed.list_bases()[0].manifest, ("base base",)),
    ):
        path = pushed.storage.path(digest)
        data = path.read_bytes()
        _write(path, data[::-1])
        assert _one(pushed.fsck()).touches == touches
        _write(path, data)


def test_repaired_from_another_registry(pushed: loreg.Registry, copy: Path) -> None:
    before = {key.digest: path.read_bytes() for key, path in _paths(pushed).items()}
    for number, path in enumerate(_paths(pushed).values()):
        if number % 2:
            path.unlink()
        else:
            _write(path, b"damaged " + path.read_bytes())
    assert len(pushed.fsck().problems) == len(before)
    found = pushed.fsck(repair=True, sources=[copy])
    assert found.ok and len(found.problems) == len(before)
    assert all("the copy in" in str(problem.repaired) for problem in found.problems)
    assert pushed.fsck() == Checked(len(before), 0, ())
    assert {key.digest: path.read_bytes() for key, path in _paths(pushed).items()} == before
    aside = list((pushed.home / "quarantine").iterdir())
    assert len(aside) == -(-len(before) // 2) and all(path.read_bytes()[:8] == b"damaged " for path in aside)


def test_repaired_from_another_copy(pushed: loreg.Registry) -> None:
    digest = pushed.resolve("sql").manifest.blobs[0].digest
    path = pushed.storage.path(digest)
    data, generation = path.read_bytes(), new_generation()
    pushed.storage.store.put(digest, generation, [data])
    assert pushed.fsck().orphans == 1
    path.unlink()
    found = pushed.fsck(repair=True)
    assert found.ok and _one(found).repaired == "mended by another copy"
    assert pushed.storage.key(digest).generation != generation and pushed.storage.read(digest) == data


def test_a_copy_is_kept_while_the_one_that_is_needed_is_lost(pushed: loreg.Registry) -> None:
    digest = pushed.resolve("sql").manifest.blobs[0].digest
    path, store = pushed.storage.path(digest), pushed.storage.store
    spare = BlobKey(digest, new_generation())
    store.put(digest, spare.generation, [path.read_bytes()])
    path.unlink()
    assert pushed.collect().copies == () and store.size(spare) is not None
    assert pushed.fsck(repair=True).ok
    assert pushed.collect().copies == (spare,) and pushed.fsck() == Checked(len(_paths(pushed)), 0, ())


def test_a_collection_beside_a_repair(
    pushed: loreg.Registry, place: Place, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has listed the copy that the repair reads, or it comes between any two steps of it."""
    digest = pushed.resolve("sql").manifest.blobs[0].digest
    data, store = pushed.storage.path(digest).read_bytes(), pushed.storage.store
    spare = BlobKey(digest, new_generation())
    store.put(digest, spare.generation, [data])
    for step in ("put", "quarantine"):
        _write(pushed.storage.path(digest), data[::-1])
        with monkeypatch.context() as patch, place.open() as other:
            whole = getattr(LocalStore, step)

            def act(
                self: LocalStore, *values: Any, whole: Any = whole, other: loreg.Registry = other, spare: Any = spare
            ) -> Any:
                if self is store:
                    patch.undo()
                    self.delete(spare)  # what a collection does last that marked it before
                    other.collect()
                    found = whole(self, *values)
                    other.collect()
                    return found
                return whole(self, *values)

            patch.setattr(LocalStore, step, act)
            found = pushed.fsck(repair=True, sources=[copy])
        assert found.ok and found.problems
        assert pushed.storage.read(digest) == data and pushed.fsck().ok


def test_a_repair_beside_a_push(pushed: loreg.Registry, place: Place, copy: Path, tiny_adapter: Path) -> None:
    """The push has found the damaged copy, of the right size."""
    digest = pushed.resolve("sql").manifest.blobs[0].digest
    path = pushed.storage.path(digest)
    _write(path, path.read_bytes()[::-1])
    ensure = storage.Storage._ensure

    def ensure_and_repair(self: storage.Storage, blob: storage.PendingBlob, row: Any) -> str | None:
        found = ensure(self, blob, row)
        if blob.digest == digest:
            with place.open() as other:
                assert other.fsck(repair=True, sources=[copy]).ok
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Storage, "_ensure", ensure_and_repair)
        pushed.push(tiny_adapter, base="base", name="again")
    pushed.collect()
    assert pushed.fsck().ok and pushed.storage.read(digest)


def test_no_repair_with_a_store_that_is_another_catalogs(
    pushed: loreg.Registry, place: Place, tmp_path: Path
) -> None:
    """The rows would speak of its copies, and the right ones be garbage."""
    with loreg.open(tmp_path / "other") as other:
        other.add_base(tiny.write_model(tmp_path / "other-base", tiny.model(seed=5)), "base")
        for digest in {blob.digest for blob in pushed.resolve("sql").manifest.blobs}:
            other.storage.store.put(digest, new_generation(), [pushed.storage.read(digest)])
        before = _everything(pushed), set(other.storage.store.keys())
        (tmp_path / "empty").mkdir()
        for wrong in (tmp_path / "other", tmp_path / "empty"):
            with replace(place, store=f"file://{wrong}").open() as mistaken:
                found = mistaken.fsck(repair=True, sources=[pushed.home])
                assert not found.ok and not any(problem.repaired for problem in found.problems)
                assert "Nothing else was repaired" in found.problems[0].found
        assert (_everything(pushed), set(other.storage.store.keys())) == before
        assert list((tmp_path / "empty").iterdir()) == []
    assert pushed.fsck().ok and pushed.collect().copies == ()


def test_a_disk_that_is_unmounted_in_the_middle_of_a_repair(
    pushed: loreg.Registry, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blobs are missing then, and good copies would be written into the empty directory below."""
    check, mounted = Recorder.check, [pushed.home / name for name in ("blobs", "ledger", "store.json", "tmp")]

    def checked(self: Recorder) -> bytes | None:
        said = check(self)
        for path in mounted:
            if path.exists():
                path.rename(tmp_path / path.name)
        return said

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "check", checked)
        with pytest.raises(Conflict, match="found an empty one"):
            pushed.fsck(repair=True, sources=[copy])
    for path in mounted:
        shutil.rmtree(path, ignore_errors=True)
        (tmp_path / path.name).rename(path)
    assert pushed.fsck().ok


def _everything(registry: loreg.Registry) -> list[Any]:
    with registry.database.read() as session:
        rows = [(row.digest, row.generation, row.state) for row in queries.every_blob(session)]
        return [rows, sorted(registry.storage.store.keys()), queries.every_fact(session)]


def test_what_cannot_be_repaired_is_kept_and_said(pushed: loreg.Registry, copy: Path) -> None:
    digest = pushed.resolve("sql").manifest.blobs[0].digest
    path = pushed.storage.path(digest)
    for damaged in (copy / path.relative_to(pushed.home), path):
        _write(damaged, b"nothing good")
    found = pushed.fsck(repair=True, sources=[copy])
    assert not found.ok and _one(found).repaired is None and "bytes are kept in" in _one(found).found
    assert (pushed.home / "quarantine" / path.name).read_bytes() == b"nothing good"
    again = pushed.fsck(repair=True)
    assert not again.ok and _one(again).kind == "missing" and _one(again).touches == ("sql:v1",)


CONTRADICTIONS = {
    "edges missing": ("DELETE FROM edges WHERE blob IN (SELECT blob FROM edges LIMIT 1)", "edges", True),
    "edges too many": (
        "INSERT INTO edges SELECT digest, (SELECT manifest FROM bases) FROM versions LIMIT 1",
        "edges",
        True,
    ),
    "sha256": (
        f"UPDATE blobs SET sha256 = '{'0' * 64}' WHERE digest = (SELECT min(digest) FROM blobs)",
        "row",
        True,
    ),
    "size": ("UPDATE blobs SET size = size + 1 WHERE digest = (SELECT min(digest) FROM blobs)", "row", True),
    "rank": ("UPDATE versions SET rank = 77 WHERE id = 1", "columns", True),
    "modules": ("UPDATE versions SET modules = 77 WHERE id = 1", "columns", True),
    "bytes": ("UPDATE versions SET bytes = 77 WHERE id = 1", "columns", True),
    "base": ("UPDATE versions SET base_name = 'other' WHERE id = 1", "columns", True),
    "root": ("UPDATE versions SET base_root = digest WHERE id = 1", "columns", True),
    "targets": ("UPDATE targets SET target = 'x' WHERE version_id = 1 AND target = 'q_proj'", "columns", True),
    "search": ("UPDATE documents SET text = 'other' WHERE version_id = 1", "columns", True),
    "no search": ("DELETE FROM documents WHERE version_id = 1", "columns", True),
    "base's tensors": ("UPDATE bases SET tensors = 77", "columns", True),
    "base's structure": ("UPDATE bases SET structure_root = content_set", "columns", True),
    "marked": ("UPDATE blobs SET state = 'deleting' WHERE digest = (SELECT max(blob) FROM edges)", "state", True),
    "tag's moves": ("UPDATE tags SET seq = 9 WHERE adapter_id = 1", "catalog", True),
    "tag elsewhere": ("UPDATE tags SET version_id = 2 WHERE adapter_id = 1", "catalog", True),
    "tag lost": ("DELETE FROM tags WHERE adapter_id = 1", "catalog", True),
    "move lost": ("INSERT INTO tag_history VALUES (1, 'old', 2, 1, 0)", "catalog", True),
    "tag in the trash": ("UPDATE versions SET removed_at = 1 WHERE id = 1", "catalog", True),
    "number": ("UPDATE adapters SET last_number = 0 WHERE id = 1", "catalog", True),
}


@pytest.mark.parametrize(("statement", "kind", "mends"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_is_found(pushed: loreg.Registry, statement: str, kind: str, mends: bool) -> None:
    _sql(pushed, statement)
    assert {problem.kind for problem in pushed.fsck().problems} - {"name"} == {kind}
    found = pushed.fsck(repair=True)
    assert found.ok == mends
    assert pushed.fsck().ok == mends
    assert not (pushed.home / "quarantine").exists()  # every copy is good


def _read(registry: loreg.Registry) -> Any:
    return registry.storage.read(registry.find("sql").digest)


def _path(registry: loreg.Registry) -> Any:
    return registry.storage.path(registry.find("sql").digest)


@pytest.mark.parametrize("read", [_read, _path])
def test_damage_that_is_read_is_put_aside_and_a_push_heals_it(
    pushed: loreg.Registry, tiny_adapter: Path, read: Callable[[loreg.Registry], Any]
) -> None:
    path = pushed.storage.path(pushed.find("sql").digest)
    data = path.read_bytes()
    _write(path, data[:-1] + b"?")
    with pytest.raises(BadInput, match=r"is corrupt.*are kept in .*quarantine.*sql:v1 needs it"):
        read(pushed)
    assert not path.exists() and (pushed.home / "quarantine" / path.name).read_bytes() == data[:-1] + b"?"
    with pytest.raises(NotFound):
        read(pushed)
    again = pushed.push(tiny_adapter, base="base", name="sql")
    assert (again.number, again.created) == (1, False)
    assert pushed.fsck().ok and read(pushed)


def test_a_source_that_is_none_is_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not the home of a registry"):
        pushed.fsck(repair=True, sources=[tmp_path / "nowhere"])


def test_what_nobody_knows_is_counted(pushed: loreg.Registry) -> None:
    pushed.storage.store.put(Digest.of(b"x"), new_generation(), [b"x"])
    found = pushed.fsck()
    assert found.ok and found.orphans == 1
    pushed.collect()
    assert pushed.fsck().orphans == 0


def test_a_manifest_that_is_none(pushed: loreg.Registry) -> None:
    """Its bytes are those of its digest, and no manifest."""
    data, version = b"{}", pushed.resolve("sql")
    found = fingerprint([data])
    pushed.storage.store.put(found.digest, (generation := new_generation()), [data])
    _sql(pushed, f"INSERT INTO blobs VALUES ('{found.digest}', '{generation}', '{found.sha256}', 2, 'live', 0)")
    _sql(pushed, f"UPDATE versions SET digest = '{found.digest}' WHERE digest = '{version.digest}'")
    manifest, name = sorted(pushed.fsck().problems, key=lambda problem: problem.kind)
    assert manifest.kind == "manifest" and manifest.touches == ("sql:v1",) and name.what == "sql:v1"
    assert pushed.fsck(repair=True).ok  # the ledger knows which one it was
    assert pushed.resolve("sql").digest == version.digest and pushed.fsck().ok


def test_another_version_is_not_touched(pushed: loreg.Registry, tmp_path: Path) -> None:
    pushed.push(tiny.write_adapter(tmp_path / "third", tiny.adapter(seed=9)), base="base", name="third")
    pushed.storage.path(pushed.find("third").digest).unlink()
    assert _one(pushed.fsck()).touches == ("third:v1",)
