"""Names, versions, tags, bases and chains of bases: the registry as its users see it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

import loreg
from loreg.adapters.draft import RawTensor
from loreg.adapters.folding import tensor_of
from loreg.errors import BadInput, BaseMismatch, CheckFailed, Conflict, NotFound, UsageError

MODEL = tiny.model()
NORM = tiny.NORM
Q = {tiny.Q: tiny.adapter(seed=11)[tiny.Q]}
V = {tiny.V: tiny.adapter(seed=12)[tiny.V]}


def blobs(registry: loreg.Registry) -> set[object]:
    return set(registry.storage.store.keys())


# Versions


def test_the_same_content_is_the_same_version(pushed: loreg.Registry, tmp_path: Path) -> None:
    first, before = pushed.resolve("sql"), blobs(pushed)
    again = pushed.push(tmp_path / "sql", base="base", name="sql", tags=["again"])
    assert (again.number, again.digest, again.created) == (1, first.digest, False)
    assert pushed.tags("sql") == {"latest": 1, "again": 1}
    copy = shutil.copytree(tmp_path / "sql", tmp_path / "elsewhere")
    other = pushed.push(copy, base=tmp_path / "base", name="other")
    assert (other.number, other.digest, other.created) == (1, first.digest, True)
    assert blobs(pushed) == before  # three pushes, one set of blobs


def test_other_content_is_another_version(pushed: loreg.Registry, tmp_path: Path) -> None:
    folder = tmp_path / "sql"
    first = pushed.resolve("sql")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    second = pushed.push(folder, base="base", name="sql", note="other licence")
    assert (second.number, second.created) == (2, True)
    assert second.manifest.provenance.license == "apache-2.0"
    factors = [version.manifest.blob("factors") for version in (first, second)]
    assert factors[0] == factors[1]  # which is stored once
    tiny.write_adapter(folder, tiny.adapter(seed=3))
    third = pushed.push(folder, base="base", name="sql")
    assert third.number == 3 and third.manifest.blob("factors") != factors[0]
    versions, moves = pushed.log("sql")
    assert [(row.number, row.note) for row in versions] == [(1, None), (2, "other licence"), (3, None)]
    assert [(move.name, move.number) for move in moves] == [("latest", 1), ("latest", 2), ("latest", 3)]


def test_what_a_version_can_be_called(pushed: loreg.Registry, tmp_path: Path) -> None:
    first = pushed.resolve("sql")
    tiny.write_adapter(tmp_path / "sql", tiny.adapter(seed=3))
    second = pushed.push(tmp_path / "sql", base="base", name="sql", tags=["prod"])
    digest = first.digest.hex
    for text in ("sql:v1", f"sql@blake3:{digest}", f"sql@blake3:{digest[:8]}", f"blake3:{digest[:12]}"):
        assert pushed.resolve(text).digest == first.digest, text
    for text in ("sql", "sql:v2", "sql:prod", "sql:latest", str(second), str(second.digest)):
        assert pushed.resolve(text).digest == second.digest, text
    assert pushed.tag("sql:v1", "prod").number == 1
    assert pushed.resolve("sql:prod").digest == first.digest
    assert pushed.tags("sql") == {"latest": 2, "prod": 1}
    for text, error in (
        ("sql:none", NotFound),
        ("sql:v3", NotFound),
        ("SQL", UsageError),
        ("sql@sha256:00", UsageError),
    ):
        with pytest.raises(error):
            pushed.resolve(text)
    with pytest.raises(UsageError, match="means version number 7"):
        pushed.tag("sql", "v7")
    factors = first.manifest.blob("factors")
    assert factors is not None
    with pytest.raises(NotFound, match="is a blob, not a version"):
        pushed.resolve(str(factors.digest))


def test_everything_survives_a_new_process(pushed: loreg.Registry, tmp_path: Path) -> None:
    result = pushed.merge("sql + humor", tmp_path / "one")
    pushed.close()
    with loreg.open(pushed.home) as again:
        assert again.merge("humor + sql", tmp_path / "two").weights_root == result.weights_root
        assert tiny.files_in(again.export("sql", tmp_path / "files")) == tiny.files_in(tmp_path / "sql")


def test_load_gives_the_factors_and_the_scale(pushed: loreg.Registry) -> None:
    for name, factors, rslora in (("sql", tiny.adapter(), False), ("humor", tiny.adapter(seed=2, rank=3), True)):
        deltas = pushed.load(name)
        assert set(deltas) == set(factors)
        for path, delta in deltas.items():
            assert np.array_equal(delta.left.numpy(), factors[path].B.values)
            assert np.array_equal(delta.right.numpy(), factors[path].A.values)
            assert delta.scale == tiny.scale(factors[path], use_rslora=rslora)


def test_a_push_that_is_refused_stores_nothing(pushed: loreg.Registry, tmp_path: Path) -> None:
    before = blobs(pushed), pushed.list_versions(all_versions=True), len(pushed.list_bases())
    with pytest.raises(BadInput, match="does not fit its base"):
        pushed.push(tmp_path / "sql", base=tiny.write_model(tmp_path / "small", tiny.model(rows=4)))
    assert (blobs(pushed), pushed.list_versions(all_versions=True), len(pushed.list_bases())) == before


def test_factors_of_several_chunks_are_read_whole(tmp_path: Path) -> None:
    data = np.arange(3 << 20, dtype="<f4")  # 12 MiB; files are read in pieces through one buffer
    (tmp_path / "raw").write_bytes(data.tobytes())
    tensor = tensor_of(RawTensor("A", "F32", data.shape, tmp_path / "raw"))
    assert np.array_equal(tensor.numpy(), data)


# Bases


def test_a_base_given_as_a_path_is_registered_once_it_is_accepted(
    registry: loreg.Registry, tmp_path: Path, tiny_base: Path, tiny_adapter: Path
) -> None:
    registry.push(tiny_adapter, base=tiny_base, name="sql")
    (row,) = registry.list_bases()
    assert (row.name, row.path) == ("base", str(tiny_base))
    other = tiny.write_model(tmp_path / "elsewhere/base", MODEL | {NORM: MODEL[NORM].flipped(0)})
    registry.merge("sql", tmp_path / "out", base=str(other))
    assert [row.path for row in registry.list_bases()] == [str(tiny_base), str(other)]
    assert {row.name.rpartition("-")[0] for row in registry.list_bases()} == {"", "base"}  # a name of its own


def test_a_base_that_moved_is_found_by_its_new_path(pushed: loreg.Registry, tmp_path: Path) -> None:
    expected = pushed.merge("sql", tmp_path / "expected").weights_root
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(NotFound, match=r"The files of base 'base' are gone \(it was at .*\): give --base PATH"):
        pushed.merge("sql", tmp_path / "out")
    assert pushed.merge("sql", tmp_path / "given", base=tmp_path / "moved").weights_root == expected
    assert pushed.merge("sql", tmp_path / "known").weights_root == expected  # one of the same weights is there


def test_a_name_stands_for_one_base(pushed: loreg.Registry, tmp_path: Path) -> None:
    same = tiny.write_model(tmp_path / "same", MODEL, shards=[list(MODEL)[::-1]])
    assert pushed.add_base(same, "base").path == same
    other = tiny.write_model(tmp_path / "other", MODEL | {NORM: MODEL[NORM].flipped(0)})
    with pytest.raises(Conflict, match="base 'base' is there with other weights"):
        pushed.add_base(other, "base")
    assert pushed.show_base("base").path == same
    with pytest.raises(NotFound, match="No base is called 'bas': there are base"):
        pushed.show_base("bas")


# Unmerging


def test_unmerge_gives_the_base_back_also_from_a_path(pushed: loreg.Registry, tmp_path: Path) -> None:
    merged = pushed.merge("sql", tmp_path / "merged").out
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(NotFound, match="are gone"):
        pushed.unmerge(merged, tmp_path / "back")
    back = pushed.unmerge(merged, tmp_path / "back", base=tmp_path / "moved")
    assert (back.matches_base, back.method) == (True, "base")
    assert tiny.files_in(tmp_path / "back") == tiny.files_in(tmp_path / "moved")


def test_unmerge_refuses_a_model_that_was_changed_since(pushed: loreg.Registry, tmp_path: Path) -> None:
    path = pushed.merge("sql", tmp_path / "merged").out / "model.safetensors"
    good = tiny.contents(path)
    for name in (f"{tiny.Q}.weight", NORM, "model.positions"):
        path.write_bytes(tiny.container((good | {name: good[name].flipped(0)}).items()))
        with pytest.raises(BadInput, match=f"'{name}'.*It was changed after the merge, and unmerging"):
            pushed.unmerge(tmp_path / "merged", tmp_path / "back")
    path.write_bytes(tiny.container([*good.items(), ("extra", good[NORM])]))
    with pytest.raises(BadInput, match="'extra' is missing from loreg"):
        pushed.unmerge(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    path.write_bytes(tiny.container(reversed(good.items())))  # the same tensors, laid out otherwise
    assert pushed.unmerge(tmp_path / "merged", tmp_path / "back").matches_base


def test_unmerge_refuses_another_base(pushed: loreg.Registry, tmp_path: Path) -> None:
    merged = pushed.merge("sql", tmp_path / "merged").out
    other = tiny.write_model(tmp_path / "other", MODEL | {NORM: MODEL[NORM].flipped(0)})
    with pytest.raises(BaseMismatch, match=r"was made from base blake3:.*: give that base"):
        pushed.unmerge(merged, tmp_path / "back", base=other)
    tiny.write_model(tmp_path / "base", MODEL | {NORM: MODEL[NORM].flipped(0)})
    with pytest.raises(BaseMismatch, match="are not base 'base' any more"):
        pushed.unmerge(merged, tmp_path / "back")
    with pytest.raises(BadInput, match=r"has no loreg\.json"):
        pushed.unmerge(tmp_path / "base", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_unmerge_checks_what_it_wrote(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = pushed.merge("sql", tmp_path / "merged").out
    real = os.copy_file_range

    def flipping(source: int, target: int, count: int, *offsets: int) -> int:
        done = real(source, target, count, *offsets)
        os.pwrite(target, bytes([os.pread(target, 1, done - 1)[0] ^ 1]), done - 1)
        return done

    monkeypatch.setattr(os, "copy_file_range", flipping)
    with pytest.raises(CheckFailed, match="What was written is not the base"):
        pushed.unmerge(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


# Bases that are merges


@pytest.fixture
def chain(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """``one`` for the base, ``two`` for base + one, ``three`` for that + two; both merges are there."""
    tiny.write_model(tmp_path / "base", MODEL)
    registry.push(tiny.write_adapter(tmp_path / "one", tiny.adapter(seed=21)), base=tmp_path / "base")
    registry.merge("one", tmp_path / "m1")
    registry.push(tiny.write_adapter(tmp_path / "two", tiny.adapter(seed=22)), base=tmp_path / "m1")
    registry.merge("two", tmp_path / "m2", dtype="float32")
    registry.push(tiny.write_adapter(tmp_path / "three", tiny.adapter(seed=23)), base=tmp_path / "m2")
    return registry


@pytest.mark.parametrize("gone", [["m1"], ["m2"], ["m1", "m2"]])
def test_a_base_that_was_merged_is_made_again(chain: loreg.Registry, tmp_path: Path, gone: list[str]) -> None:
    expected = {name: tiny.files_in(chain.merge(name, tmp_path / f"direct {name}").out) for name in ("two", "three")}
    for name in gone:
        shutil.rmtree(tmp_path / name)
    for name, files in expected.items():
        out = chain.merge(name, tmp_path / f"again {name}", verify="exact").out
        assert tiny.files_in(out) == files
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_chain_needs_its_first_base(chain: loreg.Registry, tmp_path: Path) -> None:
    for name in ("m1", "m2", "base"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(NotFound, match="The files of base 'base' are gone"):
        chain.merge("three", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_chain_goes_through_the_base_that_was_merged_into(registry: loreg.Registry, tmp_path: Path) -> None:
    # Not through the one that the adapter was trained on: they differ where it adapts nothing, or by an override.
    registry.push(tiny.write_adapter(tmp_path / "one", V), base=tiny.write_model(tmp_path / "base", MODEL))
    near = tiny.write_model(tmp_path / "near", MODEL | {NORM: MODEL[NORM].flipped(0)})
    far = tiny.write_model(tmp_path / "far", tiny.model(seed=5))
    for number, (other, allow) in enumerate(((near, False), (far, True))):
        merged = registry.merge("one", tmp_path / f"m{number}", base=other, allow_base_mismatch=allow).out
        registry.push(tiny.write_adapter(tmp_path / f"two{number}", Q), base=merged)
        expected = registry.merge(f"two{number}", tmp_path / f"direct{number}").weights_root
        shutil.rmtree(merged)
        assert registry.merge(f"two{number}", tmp_path / f"again{number}").weights_root == expected


def test_a_chain_through_a_mere_conversion(registry: loreg.Registry, tmp_path: Path) -> None:
    registry.push(tiny.write_adapter(tmp_path / "one", V), base=tiny.write_model(tmp_path / "base", MODEL))
    wide = registry.merge("0*one", tmp_path / "wide", dtype="float32").out
    registry.push(tiny.write_adapter(tmp_path / "two", Q), base=wide)
    expected = registry.merge("two", tmp_path / "direct").weights_root
    shutil.rmtree(wide)
    assert registry.merge("two", tmp_path / "again").weights_root == expected


def test_a_chain_whose_adapter_is_gone_is_refused(chain: loreg.Registry, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "m1")
    blob = chain.resolve("one").manifest.blob("factors")
    assert blob is not None
    chain.storage.path(blob.digest).unlink()
    with loreg.open(chain.home) as again, pytest.raises(NotFound, match="is not in the store"):
        again.merge("two", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unmerging_a_chain_goes_back_one_step(chain: loreg.Registry, tmp_path: Path) -> None:
    merged = chain.merge("two", tmp_path / "again").out
    chain.unmerge(merged, tmp_path / "back")
    assert tiny.files_in(tmp_path / "back") == tiny.files_in(tmp_path / "m1")  # which still says what it is
    assert chain.verify(tmp_path / "back").ok
    chain.unmerge(tmp_path / "back", tmp_path / "further")
    assert tiny.files_in(tmp_path / "further") == tiny.files_in(tmp_path / "base")
