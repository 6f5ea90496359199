"""Directories that are served: immutable, named by a digest, there as a whole or not at all, within a limit of bytes.

Beside each lies a record of what is in it, ``<name>.record``, so that whoever finds one knows what its files have to
be without asking the store. A directory that is in use is locked, shared, by whoever uses it: none of those is
deleted, nor one that was handed out within the last hour, as its user may be about to open it. For an engine that was
told a path, which locks nothing and may be on another machine, there is a file beside the directory,
``<name>.<key>.hold``, until it has let go. That is written while the directory is locked: whoever deletes has seen
it, or came first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loreg.checkpoint import FileStamp
from loreg.digest import Digest, Hasher, fingerprint
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError
from loreg.serving.beside import Hold, Holder, Record, holder_of
from loreg.staging import is_open_at, staged, sync_one, sync_tree

Files = Iterator[tuple[str, Iterable[bytes | memoryview]]]
Check = Callable[[Digest, Path], Digest]
SPARED = 3600.0
"""Seconds since it was handed out in which a directory stays, whatever the limit."""
_NOTED = 60.0
"""Seconds within which a use is not noted again, where so many are spared anyway."""


class Directories:
    """Below ``root``, at most about ``limit`` bytes: those whose last use is longest ago leave.

    ``check(digest, path)`` says what a file's digest is; it may remember that of a file that nobody has changed.
    """

    def __init__(
        self,
        root: Path,
        limit: int | None = None,
        spared: float = SPARED,
        check: Check | None = None,
    ) -> None:
        self.root = root
        self.limit = limit
        self.spared = spared
        self.evicted = 0
        self._check = check or _hashed
        self._noted: dict[str, float] = {}
        self._added, self._swept = 0, False

    def path(self, name: str) -> Path:
        """Where the directory of that name is, if there is one."""
        return self.root / name

    def find(self, name: str) -> Record | None:
        """The record of a directory that is there, each file of it looked at. None if there is none.

        Raises BadInput if a file is not what the record says: it stays as it is, for whoever wants to look.
        """
        try:
            record = Record.parse(self._record(name).read_bytes())
        except (OSError, LoregError):  # none, or one that says nothing: the store knows what it has to say
            return None
        if name.partition("-")[0] != record.version.hex:  # another's, that came here with its directory
            return None
        self.note(name)  # first: from here on nobody deletes it
        if not self.path(name).is_dir():
            return None
        self._require(name, record, self._check)
        return record

    def make(
        self, name: str, files: Callable[[], Files], describe: Callable[[Mapping[str, tuple[Digest, int]]], Record]
    ) -> Record:
        """The directory of that name with ``files``; one that is there has to have them.

        ``describe`` makes the record of what was written. Raises CheckFailed for what the disk says, BadInput if what
        is there is something else; and what ``files`` raises. Nothing is there then.
        """
        path = self.path(name)
        if not path.is_dir():
            try:
                with staged(path, Digest.of(name.encode()), wait=True) as folder:
                    record = describe(dict(_written(folder, files())))
                    sync_tree(folder)
                self._keep(name, record)
                return record
            except Conflict:
                # Another was faster: a directory of this name can only be the same one, and whole.
                if not path.is_dir():
                    raise
        if (known := self.find(name)) is not None:
            return known
        prints = {file: fingerprint(chunks) for file, chunks in files()}
        record = describe({file: (found.digest, found.size) for file, found in prints.items()})
        self._require(name, record, _hashed)
        self._keep(name, record)
        return record

    def note(self, name: str) -> None:
        """That a directory is used now: if it is there when this returns, none deletes it for ``spared`` seconds."""
        now = time.time()
        if now - self._noted.get(name, 0.0) >= self._pause:
            with suppress(OSError, LoregError), self.pinned(name):  # by who deletes it, or before
                os.utime(self._record(name))
                self._noted[name] = now

    @contextmanager
    def pinned(self, name: str) -> Iterator[Path]:
        """A directory that is there, and stays as long as the block does. Raises Conflict if it is gone, CheckFailed
        if it cannot be locked."""
        path = self.path(name)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Conflict(f"{path} was deleted just now: resolve it again.") from error
        except OSError as error:  # not to be tried again: descriptors do not come back by that
            raise CheckFailed(f"{path} cannot be opened to be locked: {error.strerror}.") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
            except OSError as error:
                raise CheckFailed(f"{path} cannot be locked: {error.strerror}.") from error
            if not is_open_at(path, lock):  # it was deleted between the two
                raise Conflict(f"{path} was deleted just now: resolve it again.")
            yield path
        finally:
            os.close(lock)

    def hold(self, name: str, holder: Holder) -> bool:
        """That a directory stays until it is released, also if this process or machine ends; whether that is new.

        Raises Conflict if it is gone, CheckFailed for what the disk says: then it is not held by this.
        """
        file = self._hold(name, holder)
        with self.pinned(name):
            if file.exists():
                return False
            self._write(file, holder.dump(), durable=True)
        return True

    def release(self, name: str, holder: Holder) -> None:
        """That a directory is held for this one no more. It counts as used until now. Raises CheckFailed."""
        file = self._hold(name, holder)
        self.note(name)  # first: requests may be under way
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise CheckFailed(f"{file} cannot be removed: {error.strerror}.") from error

    def holds(self) -> list[Hold]:
        """All, also of directories that somebody has deleted, by their names and since when. Raises CheckFailed."""
        found = []
        try:
            for file in self._holding():
                with suppress(FileNotFoundError):  # it was released just now
                    found.append(Hold(file, holder_of(file), file.stat().st_mtime))
        except OSError as error:
            raise CheckFailed(f"{self.root} cannot be read: {error.strerror}.") from error
        return sorted(found, key=lambda each: (each.directory, each.since, each.file))

    def look(self) -> tuple[int, int, int]:
        """How many there are, their bytes, and how many somebody has pinned or holds."""
        found, held = list(self._all()), self._held()
        with self._alone():
            used = sum(name in held or self._is_pinned(name) for name, _, _ in found)
        return len(found), sum(size for _, _, size in found), used

    def sweep(self, but: str | None = None) -> int:
        """Delete the least recently used, but for one, as long as all are more than ``limit``; the bytes that are
        left."""
        self._swept, self._added = True, 0
        for gone in self.root.glob(".*.gone"):  # of who was killed while it deleted
            shutil.rmtree(gone, ignore_errors=True)
        found = sorted(self._all(), key=lambda each: each[1])
        left = sum(size for _, _, size in found)
        if self.limit is None or left <= self.limit:
            return left
        try:
            held = self._held()
        except OSError:
            return left
        now = time.time()
        for name, used, size in found:
            if left <= self.limit:
                break
            if (
                name != but
                and name not in held
                and now - used >= self.spared + self._pause
                and self._delete(name, used)
            ):
                left -= size
        return left

    def _require(self, name: str, record: Record, check: Check) -> None:
        """Raises BadInput unless each file is what the record says."""
        for file, (digest, size) in record.files.items():
            path = self.path(name) / file
            if not _is_file_of(path, size) or check(digest, path) != digest:
                raise BadInput(
                    f"{path} is damaged: expected {size} bytes with digest {digest}; remove {self.path(name)}, and "
                    "it is made again."
                )

    def _keep(self, name: str, record: Record) -> None:
        self._write(self._record(name), record.dump())
        self._noted[name] = time.time()
        self._added += record.nbytes
        if self.limit is not None and (not self._swept or self._added > self.limit // 64):
            self.sweep(but=name)

    def _write(self, file: Path, data: bytes, durable: bool = False) -> None:
        """There as a whole or not at all. Raises CheckFailed, and nothing is there then."""
        partial = self.root / f".{file.stem}.{os.urandom(8).hex()}{file.suffix}"
        try:
            with partial.open("wb") as out:
                out.write(data)
                if durable:
                    out.flush()
                    os.fsync(out.fileno())
            partial.replace(file)
            if durable:
                sync_one(self.root)
        except OSError as error:
            with suppress(OSError):
                if durable:  # not known to be on the disk
                    file.unlink(missing_ok=True)
            raise CheckFailed(
                f"{file} cannot be written: {error.strerror}; free some space, or check the disk."
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _record(self, name: str) -> Path:
        return self.root / f"{name}.record"

    def _hold(self, name: str, holder: Holder) -> Path:
        return self.root / f"{name}.{holder.key}.hold"

    def _holding(self) -> list[Path]:
        """What says that a directory is held. Raises OSError: not to know is not that there is none."""
        try:
            with os.scandir(self.root) as found:
                return [Path(each) for each in found if each.name.endswith(".hold") and each.name[0] != "."]
        except FileNotFoundError:
            return []

    def _held(self) -> set[str]:
        """The names of directories that are held. Raises OSError."""
        return {file.name.split(".")[0] for file in self._holding()}

    def _all(self) -> Iterator[tuple[str, float, int]]:
        """Name, last use and bytes of each that has a record."""
        with suppress(OSError):
            for file in self.root.glob("*.record"):
                with suppress(OSError, LoregError):
                    if not file.name.startswith("."):
                        used = file.stat().st_mtime
                        yield file.name.removesuffix(".record"), used, Record.parse(file.read_bytes()).nbytes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time, of all processes: who looks whether a directory is locked, locks it for a moment."""
        with ExitStack() as stack:
            with suppress(OSError):  # there is none yet, or nothing can be locked there
                lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_pinned(self, name: str) -> bool:
        try:
            lock = os.open(self.path(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    @property
    def _pause(self) -> float:
        """Seconds by which a use may be later than it was noted."""
        return min(_NOTED, self.spared)

    def _delete(self, name: str, used: float) -> bool:
        """Unless it is in use, or was used since ``used``."""
        path, gone = self.path(name), self.root / f".{name}.{os.urandom(8).hex()}.gone"
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._record(name).unlink(missing_ok=True)
            return True
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._record(name).stat().st_mtime != used or name in self._held():
                return False
            path.rename(gone)
            self._record(name).unlink(missing_ok=True)
            shutil.rmtree(gone, ignore_errors=True)
        except OSError:
            return False
        finally:
            os.close(lock)
        self.evicted += 1
        return True


def _written(folder: Path, files: Files) -> Iterator[tuple[str, tuple[Digest, int]]]:
    for name, chunks in files:
        hasher = Hasher(Hasher.ALL)
        size = 0
        with (folder / name).open("wb") as file:
            for chunk in chunks:
                hasher.update(chunk)
                size += file.write(chunk)
            os.fchmod(file.fileno(), 0o444)
        yield name, (hasher.digest(), size)


def stamps(folder: Path, record: Record) -> tuple[FileStamp, ...]:
    """What ``stat`` says of the files, by which a change would be seen. Raises NotFound if one is gone."""
    return tuple(FileStamp.of(folder / name) for name in record.files)


def _is_file_of(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _hashed(_: Digest, path: Path) -> Digest:
    hasher = Hasher(Hasher.ALL)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.digest()
