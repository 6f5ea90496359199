"""A disk that loses its power: what was done to it, in order, and what it may hold then.

Two models. ``posix`` promises no more than the standard does: what ``fsync`` was called for, a file's bytes or a
directory's names, is there; of all else each sector of each write, each name and each size may be there or not, one
without the other, whatever the order in which they were made. ``ordered`` is what ext4 does by default: names and
sizes go to the disk in the order in which they were made, any ``fsync`` takes all before it along, and no size goes
without its bytes; bytes written over others come and go by sectors all the same.

What a call did is in the record of shim.c. The bits of a mode are not in the model: loreg reads a file either way.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_ENTRY = struct.Struct("=IIIIQQ")
Image = dict[str, bytes | None]
"""By path relative to the top: the bytes of a file, None for a directory."""


@dataclass(frozen=True)
class Step:
    """``kind``: o (a new file), d (a new directory), w(rite), t(runcate to ``offset``), s(ync), r(ename from
    ``second`` to ``path``), l(ink, the same), u(nlink or rmdir), m (``path`` is what the program said)."""

    kind: str
    path: str = ""
    second: bytes = b""
    inode: int = 0
    offset: int = 0


def parse(record: bytes) -> list[Step]:
    """Raises ValueError for a call of which the record does not say what it did."""
    steps, at = [], 0
    while at < len(record):
        kind, path, data, _, inode, offset = _ENTRY.unpack_from(record, at)
        at += _ENTRY.size
        name, second = record[at : at + path].decode(), record[at + path : at + path + data]
        at += path + data
        if chr(kind) == "?":
            raise ValueError(f"{name} changed a file, and the record does not say how")
        steps.append(Step(chr(kind), name, second, inode, offset))
    return steps


@dataclass(eq=False)
class File:
    """``synced``: the bytes that are safe. ``since``: what was done after that: when, where, and the bytes, or None
    for a new size."""

    synced: bytes = b""
    since: list[tuple[int, int, bytes | None]] = field(default_factory=list)

    @property
    def now(self) -> bytes:
        return bytes(_done(bytearray(self.synced), ((offset, data) for _, offset, data in self.since)))


@dataclass(eq=False)
class Folder:
    """``since``: when, the name, and what it stands for from then on."""

    synced: dict[str, Node] = field(default_factory=dict)
    since: list[tuple[int, str, Node | None]] = field(default_factory=list)
    now: dict[str, Node] = field(default_factory=dict)

    def put(self, when: int, name: str, node: Node | None) -> None:
        self.since.append((when, name, node))
        if node is None:
            del self.now[name]
        else:
            self.now[name] = node


Node = File | Folder


class Disk:
    """Everything below ``top``, which itself is safe; as is what is there already."""

    def __init__(self, top: Path, there: Iterable[tuple[str, int, bytes | None]] = ()) -> None:
        """``there``: paths, inodes and bytes (None for a directory), a directory before what is in it."""
        self.top, self.root = PurePosixPath(top), Folder()
        self.clock = self.flushed = 0
        self._inodes: dict[int, Node] = {}
        for path, inode, data in there:
            node: Node = Folder() if data is None else File(data)
            folder, name = self._place(path)
            folder.synced[name] = folder.now[name] = self._inodes[inode] = node

    def do(self, step: Step) -> None:
        self.clock += 1
        match step.kind:
            case "o" | "d":
                folder, name = self._place(step.path)
                node: Node = File() if step.kind == "o" else Folder()
                self._inodes[step.inode] = node
                folder.put(self.clock, name, node)
            case "w" | "t":
                file = self._inodes[step.inode]
                assert isinstance(file, File)
                file.since.append((self.clock, step.offset, step.second if step.kind == "w" else None))
            case "s":
                self._sync(step.inode)
            case "r" | "l":
                source, old = self._place(step.second.decode())
                folder, name = self._place(step.path)
                folder.put(self.clock, name, source.now[old])
                if step.kind == "r":
                    source.put(self.clock, old, None)
            case "u":
                folder, name = self._place(step.path)
                folder.put(self.clock, name, None)

    def now(self) -> Image:
        """What a disk holds that does not lose its power."""
        return dict(_now(self.root, ""))

    def _sync(self, inode: int) -> None:
        node = self._inodes.get(inode, self.root)  # the only one that was not made here is the top itself
        self.flushed = self.clock
        if isinstance(node, File):
            node.synced = node.now
        else:
            node.synced = dict(node.now)
        node.since.clear()

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = PurePosixPath(path).relative_to(self.top).parts
        folder: Node = self.root
        for parent in parents:
            assert isinstance(folder, Folder)
            folder = folder.now[parent]
        assert isinstance(folder, Folder)
        return folder, name


def _now(folder: Folder, path: str) -> Iterator[tuple[str, bytes | None]]:
    for name, node in folder.now.items():
        yield path + name, node.now if isinstance(node, File) else None
        if isinstance(node, Folder):
            yield from _now(node, f"{path}{name}/")


def _done(data: bytearray, writes: Iterable[tuple[int, bytes | None]]) -> bytearray:
    for offset, written in writes:
        if written is None:
            del data[offset:]
            data.extend(bytes(offset - len(data)))
        else:
            data.extend(bytes(max(0, offset - len(data))))
            data[offset : offset + len(written)] = written
    return data


def sectors(offset: int, data: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    """A write, cut where the disk can be done with one part and not with the other."""
    at = 0
    while at < len(data):
        end = min(len(data), at + size - (offset + at) % size)
        yield offset + at, data[at:end]
        at = end


class Posix:
    """One choice of all that a disk may hold by the standard. ``names``, ``data``: the chance of each to be there."""

    def __init__(self, disk: Disk, chance: random.Random, names: float, data: float) -> None:
        self._disk, self._chance, self._names, self._data = disk, chance, names, data
        self._sector = chance.choice([512, 4096])
        self._files: dict[File, bytes] = {}  # a file with two names has the same bytes under both

    def image(self) -> Image:
        return dict(self._folder(self._disk.root, ""))

    def _folder(self, folder: Folder, path: str) -> Iterator[tuple[str, bytes | None]]:
        for name, node in sorted(self._entries(folder).items()):
            if isinstance(node, File):
                if node not in self._files:
                    self._files[node] = self._file(node)
                yield path + name, self._files[node]
            else:
                yield path + name, None
                yield from self._folder(node, f"{path}{name}/")

    def _entries(self, folder: Folder) -> dict[str, Node]:
        # Each name stands for what it stood for at some time since: later moves of it may be there, and those before
        # them then are of no account.
        found = dict(folder.synced)
        for _, name, node in folder.since:
            if self._chance.random() < self._names:
                if node is None:
                    found.pop(name, None)
                else:
                    found[name] = node
        return found

    def _file(self, file: File) -> bytes:
        chance, there = self._chance, []
        for _, offset, data in file.since:
            parts = [(offset, None)] if data is None else sectors(offset, data, self._sector)
            there += [part for part in parts if chance.random() < self._data]
        found = bytes(_done(bytearray(file.synced), there))
        # The size is written by itself: the bytes may come without it, or it without the bytes, which then are zeros,
        # or what some other file has left there.
        full = len(file.now)
        size = chance.choice([len(found), len(found), full, len(file.synced)]) if file.since else len(found)
        filler = b"\0" if chance.random() < 0.5 else b"\xa5"
        return found[:size] + filler * (size - len(found))


class Ordered(Posix):
    """One choice of what ext4 may leave. ``names`` is of no account: all names are as they were at one instant."""

    def __init__(self, disk: Disk, chance: random.Random, names: float, data: float) -> None:
        super().__init__(disk, chance, names, data)
        self._until = chance.randint(disk.flushed, disk.clock)

    def _entries(self, folder: Folder) -> dict[str, Node]:
        found = dict(folder.synced)
        for when, name, node in folder.since:
            if when > self._until:
                break
            if node is None:
                found.pop(name, None)
            else:
                found[name] = node
        return found

    def _file(self, file: File) -> bytes:
        reached = [(offset, data) for when, offset, data in file.since if when <= self._until]
        # Room is found for bytes when they are written back, which may be long after the name has been.
        whole = round(len(reached) * self._chance.random() ** (1 - self._data)) if self._data else 0
        found = _done(bytearray(file.synced), reached[:whole])
        for _, offset, data in file.since[whole:]:
            for at, part in sectors(offset, data or b"", self._sector):
                if at + len(part) <= len(found) and self._chance.random() < self._data:
                    found[at : at + len(part)] = part
        return bytes(found)


MODELS = {"posix": Posix, "ordered": Ordered}
