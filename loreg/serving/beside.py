"""What lies beside a directory that is served: the record of what is in it, and who holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput, LoregError
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.manifest import check_file_name

_RECORD = "loreg-served-1"
_HOLD = "loreg-hold-1"


@dataclass(frozen=True, slots=True)
class Record:
    """What a directory has to be: each file's digest and size; and what the version says of itself."""

    version: Digest
    base: Digest
    max_rank: int
    files: Mapping[str, tuple[Digest, int]]

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files.values())

    def dump(self) -> bytes:
        files = {name: {"digest": str(digest), "size": size} for name, (digest, size) in self.files.items()}
        document = {
            "format": _RECORD, "version": str(self.version), "base": str(self.base), "max_rank": self.max_rank,
            "files": files,
        }  # fmt: skip
        return _seal(document)

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises BadInput."""
        with Fields(_unseal(data, "record"), "record") as f:
            f.choice("format", _RECORD)
            files = dict[str, tuple[Digest, int]]()
            for name, entry in f.mapping("files"):
                with entry as each:
                    files[check_file_name(name, "record")] = each.digest("digest"), each.natural("size")
            return cls(f.digest("version"), f.digest("base"), f.natural("max_rank"), files)


@dataclass(frozen=True, slots=True)
class Holder:
    """An engine that was told of a directory: which, where it serves, and under which name it has it."""

    engine: str
    url: str
    name: str

    @property
    def key(self) -> str:
        """By which its files are told from those of others."""
        return Digest.of(canonical_json.dumps([self.engine, self.url, self.name])).short

    def dump(self) -> bytes:
        return _seal({"format": _HOLD, "engine": self.engine, "url": self.url, "name": self.name})

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """Raises BadInput."""
        with Fields(_unseal(data, "hold"), "hold") as f:
            f.choice("format", _HOLD)
            return cls(f.text("engine"), f.text("url"), f.text("name"))


@dataclass(frozen=True, slots=True)
class Hold:
    """That a directory stays for an engine. ``file``: what says so; without it, it is not held. ``holder``: None if
    nobody can read there who it is. ``since``: seconds of the epoch."""

    file: Path
    holder: Holder | None
    since: float

    @property
    def directory(self) -> str:
        """Its name."""
        return self.file.name.split(".")[0]

    @property
    def path(self) -> Path:
        """Of the directory."""
        return self.file.parent / self.directory

    @property
    def key(self) -> str:
        """The holder's, also of a file that nobody can read."""
        return self.file.name.split(".")[1]


def holder_of(file: Path) -> Holder | None:
    """Who it says holds a directory; None if nobody can read that. Raises FileNotFoundError."""
    try:
        return Holder.parse(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, LoregError):
        return None


def _seal(document: dict[str, Any]) -> bytes:
    """Two lines, of which the first is the digest of the second."""
    line = canonical_json.dumps(document)
    return f"{Digest.of(line)}\n".encode() + line


def _unseal(data: bytes, what: str) -> object:
    """Raises BadInput."""
    seal, _, line = data.partition(b"\n")
    if seal.decode("ascii", "replace") != str(Digest.of(line)):
        raise BadInput(f"the {what} of a served directory does not have the digest that it says.")
    return canonical_json.loads_canonical(line, what=what)
