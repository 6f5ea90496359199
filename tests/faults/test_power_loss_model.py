"""The model of a disk that loses its power keeps what was synced, and lets go of what was not, in every way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from power_loss import MODELS, Disk, Image, Step, parse, sectors

TOP = Path("/top")
NEW = Step("o", "/top/a", inode=1)
FOLDER = Step("d", "/top/d", inode=2)
SYNC_TOP, SYNC_A, SYNC_D = Step("s", "/top", inode=9), Step("s", "/top/a", inode=1), Step("s", "/top/d", inode=2)
BOTH = pytest.mark.parametrize("model", MODELS)


def write(data: bytes, offset: int = 0, inode: int = 1) -> Step:
    return Step("w", second=data, inode=inode, offset=offset)


def images(model: str, *steps: Step, count: int = 400) -> list[Image]:
    disk = Disk(TOP)
    for step in steps:
        disk.do(step)
    return list(_images(model, disk, count))


def _images(model: str, disk: Disk, count: int) -> Iterator[Image]:
    for seed in range(count):
        chance = random.Random(seed)
        yield MODELS[model](disk, chance, chance.random(), chance.random()).image()


@BOTH
def test_what_was_synced_is_there(model: str) -> None:
    steps = (NEW, write(b"one"), SYNC_A, SYNC_TOP)
    assert all(image == {"a": b"one"} for image in images(model, *steps))
    # Until the next sync what was there stays there, whatever is done.
    later = images(model, *steps, Step("u", "/top/a"))
    assert {image.get("a") for image in later} == {b"one", None}


def test_a_name_is_as_safe_as_its_directory() -> None:
    assert {"a" in image for image in images("posix", NEW, write(b"one"), SYNC_A)} == {True, False}
    # Any sync takes the names along that were given before it.
    assert all("a" in image for image in images("ordered", NEW, write(b"one"), SYNC_A))


@BOTH
def test_bytes_that_were_not_synced_may_be_missing(model: str) -> None:
    found = {image["a"] for image in images(model, NEW, write(b"x" * 1024), SYNC_TOP)}
    assert {b"", b"x" * 1024} <= found
    # A size without its bytes: zeros, or what was there before.
    assert any(data and set(data) <= {0, 0xA5} for data in found) == (model == "posix")


@BOTH
def test_a_write_over_old_bytes_is_torn_at_sectors(model: str) -> None:
    old, new = b"a" * 1536, b"b" * 1536
    found = {image["a"] for image in images(model, NEW, write(old), SYNC_A, SYNC_TOP, write(new)) if image["a"]}
    torn = {tuple(data[at : at + 512] for at in (0, 512, 1024)) for data in found if len(data) == 1536}
    assert len(torn) == 8  # each sector by itself
    assert all(part in (b"a" * 512, b"b" * 512) for parts in torn for part in parts)


@BOTH
def test_writes_are_reordered(model: str) -> None:
    steps = (NEW, write(b"a" * 8192), SYNC_A, SYNC_TOP, write(b"b" * 4096), write(b"c" * 4096, 4096))
    found = {(image["a"][:1], image["a"][4096:4097]) for image in images(model, *steps) if image["a"]}
    assert {(b"a", b"c"), (b"b", b"a")} <= found


def test_a_rename_without_a_sync() -> None:
    steps = (NEW, write(b"one"), SYNC_A, SYNC_TOP, Step("r", "/top/b", b"/top/a"))
    assert {tuple(sorted(image)) for image in images("posix", *steps)} == {("a",), ("b",), ("a", "b"), ()}
    assert {image.get("b", b"one") for image in images("posix", *steps)} == {b"one"}
    assert all(image == {"b": b"one"} for image in images("posix", *steps, SYNC_TOP))
    assert {tuple(image) for image in images("ordered", *steps)} == {("a",), ("b",)}  # ext4 does both at once


def test_a_directory_that_is_lost_takes_along_what_is_in_it() -> None:
    steps = (FOLDER, Step("o", "/top/d/f", inode=3), write(b"one", inode=3), Step("s", inode=3), SYNC_D)
    assert {tuple(sorted(image)) for image in images("posix", *steps)} == {(), ("d", "d/f")}
    assert all(image["d/f"] == b"one" for image in images("posix", *steps, SYNC_TOP))


def test_two_names_of_a_file_have_its_bytes() -> None:
    steps = (NEW, write(b"x" * 2048), Step("l", "/top/b", b"/top/a"), SYNC_TOP)
    assert all(image["a"] == image["b"] for image in images("posix", *steps))


def test_names_in_order_are_those_of_one_instant() -> None:
    steps = [Step("o", f"/top/{name}", inode=number) for number, name in enumerate("abcd", 10)]
    found = {"".join(sorted(image)) for image in images("ordered", *steps)}
    assert found == {"", "a", "ab", "abc", "abcd"}
    assert len({"".join(sorted(image)) for image in images("posix", *steps)}) == 16


@BOTH
def test_a_truncation_may_come_late(model: str) -> None:
    steps = (NEW, write(b"x" * 100), SYNC_A, SYNC_TOP, Step("t", inode=1, offset=10))
    assert {len(image["a"] or b"") for image in images(model, *steps)} == {100, 10}
    assert all(image["a"] == b"x" * 10 for image in images(model, *steps, SYNC_A))


def test_sectors() -> None:
    assert list(sectors(500, b"x" * 30, 512)) == [(500, b"x" * 12), (512, b"x" * 18)]
    assert list(sectors(512, b"x" * 512, 512)) == [(512, b"x" * 512)]


def test_what_was_there_before_is_safe() -> None:
    disk = Disk(TOP, [("/top/d", 2, None), ("/top/d/f", 3, b"old")])
    disk.do(write(b"new", inode=3))
    assert disk.now() == {"d": None, "d/f": b"new"}
    assert {image["d/f"] for image in _images("posix", disk, 100)} == {b"old", b"new"}


def test_a_record_that_does_not_say_all_is_refused() -> None:
    with pytest.raises(ValueError, match="sendfile changed a file"):
        parse(b"?\0\0\0" + b"\x08\0\0\0" + bytes(24) + b"sendfile")
