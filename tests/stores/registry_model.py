"""What a registry is, if it is right: dicts. The state machine compares the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from contents import Content

from loreg.digest import Digest

LATEST = "latest"


@dataclass
class Kept:
    """One version. ``note``: of the push that made it."""

    content: Content
    note: str | None
    removed: bool = False


@dataclass
class Named:
    """``moves``: of each tag, the version numbers that it pointed at, None where it went away."""

    versions: dict[int, Kept] = field(default_factory=dict)
    last: int = 0
    tags: dict[str, int] = field(default_factory=dict)
    moves: dict[str, list[int | None]] = field(default_factory=dict)

    def live(self) -> dict[int, Kept]:
        return {number: kept for number, kept in sorted(self.versions.items()) if not kept.removed}

    def move(self, tag: str, number: int) -> None:
        self.tags[tag] = number
        self.moves.setdefault(tag, []).append(number)

    def follow(self) -> None:
        newest = max(self.live(), default=None)
        if newest is None:
            if self.tags.pop(LATEST, None) is not None:
                self.moves[LATEST].append(None)
        elif self.tags.get(LATEST) != newest:
            self.move(LATEST, newest)


@dataclass
class Model:
    """``rows``: the blobs that the catalog vouches for. ``bad``: those of them whose copy is ``corrupt`` or
    ``missing``. ``orphans``: how many copies there are that no row knows."""

    names: dict[str, Named] = field(default_factory=dict)
    rows: set[Digest] = field(default_factory=set)
    bad: dict[Digest, str] = field(default_factory=dict)
    orphans: Counter[Digest] = field(default_factory=Counter)

    def versions(self, removed: bool = False) -> dict[tuple[str, int], Kept]:
        return {
            (name, number): kept
            for name, named in self.names.items()
            for number, kept in named.versions.items()
            if kept.removed == removed
        }

    def needed(self) -> set[Digest]:
        found: set[Digest] = set()
        for kept in (self.versions() | self.versions(removed=True)).values():
            found.update(kept.content.data)
        return found

    def copies(self) -> Counter[Digest]:
        return Counter({digest for digest in self.rows if self.bad.get(digest) != "missing"}) + self.orphans

    def absent(self, content: Content) -> list[Digest]:
        """What a push that looks now has to write; a copy with other bytes of the right size it takes for whole."""
        return [d for d in content.data if d not in self.rows or self.bad.get(d) == "missing"]

    def push(
        self, name: str, content: Content, tags: Iterable[str], note: str | None, written: Iterable[Digest]
    ) -> tuple[int, bool]:
        for digest in written:
            if digest in self.rows and self.bad.get(digest) != "missing":
                self.orphans[digest] += 1  # another push was faster, and its copy is not the one any more
            self.bad.pop(digest, None)
        self.rows.update(content.data)
        named = self.names.setdefault(name, Named())
        number = next((n for n, kept in named.versions.items() if kept.content.digest == content.digest), 0)
        created, back = not number, bool(number) and named.versions[number].removed
        if created:
            number = named.last = named.last + 1
            named.versions[number] = Kept(content, note)
        named.versions[number].removed = False
        if created or back:
            named.follow()
        for tag in dict.fromkeys(tags):
            if tag != LATEST or not (created or back):
                named.move(tag, number)
        return number, created

    def remove(self, name: str, number: int, tags_to: int | None) -> bool:
        """Whether it may be."""
        named = self.names[name]
        pointing = [tag for tag, at in named.tags.items() if at == number and tag != LATEST]
        if pointing and tags_to is None:
            return False
        for tag in pointing:
            assert tags_to is not None
            named.move(tag, tags_to)
        named.versions[number].removed = True
        named.follow()
        return True

    def restore(self, name: str, number: int) -> None:
        self.names[name].versions[number].removed = False
        self.names[name].follow()

    def collectable(self, everything: bool) -> bool:
        """Whether every manifest that stays is whole."""
        stay = self.versions() if everything else self.versions() | self.versions(removed=True)
        return not any(kept.content.digest in self.bad for kept in stay.values())

    def collect(self, everything: bool, pinned: Iterable[Digest] = ()) -> Counter[Digest]:
        """The copies that go, those among them that are not there any more too."""
        if everything:
            for named in self.names.values():
                gone = [number for number, kept in named.versions.items() if kept.removed]
                for number in gone:
                    del named.versions[number]
                for tag, moves in named.moves.items():
                    named.moves[tag] = [None if number in gone else number for number in moves]
        gone_rows = self.rows - self.needed() - set(pinned)
        found = Counter(gone_rows)
        for digest in gone_rows:
            self.rows.remove(digest)
            self.bad.pop(digest, None)
        spare = {digest for digest in self.rows if self.bad.get(digest) == "missing"}
        for digest in [digest for digest in self.orphans if digest not in pinned and digest not in spare]:
            found[digest] += self.orphans.pop(digest)
        return +found
