"""A store as files below one directory, all of them written through ``tmp/``.

``blobs/<aa>/<64 hex>.<generation>``, ``ledger/<16 digits>``, ``store.json``; in ``quarantine/`` what was put aside.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, NotFound, UsageError
from loreg.store.base import BlobKey, Unfinished, as_bytes, new_generation

_TOO_MANY = {errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RECORD = re.compile(r"\d{16}")
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOTSUP, errno.EXDEV, errno.ELOOP}


class LocalStore:
    """A :class:`~loreg.store.base.Store` in a directory of a POSIX file system with hard links.

    The directory is made by the first :meth:`put`; reading from one that is not there finds nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root).absolute()
        self._durable: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    def __str__(self) -> str:
        return str(self._root)

    def put(self, digest: Digest, generation: str, chunks: Iterable[bytes | memoryview]) -> None:
        key = BlobKey(digest, generation)
        if not self._write(f"blob {digest}", self.path(key), f"{key.name}.{new_generation()}", digest, chunks):
            raise Conflict(
                f"blob {key.digest} is already in the store under generation {key.generation}: "
                "every write draws a generation of its own; try again."
            )

    def size(self, key: BlobKey) -> int | None:
        with _typed(f"look for blob {key.digest}", self._root):
            try:
                status = self.path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                self._be_no_file()
                return None
        return status.st_size if S_ISREG(status.st_mode) else None

    def open(self, key: BlobKey) -> BinaryIO:
        with _typed(f"read blob {key.digest}", self._root):
            try:
                return _open_regular(self.path(key))
            except (FileNotFoundError, NotADirectoryError) as error:
                self._be_no_file()
                raise NotFound(
                    f"blob {key.digest} is not in the store {self._root} (generation {key.generation}): "
                    "restore the store from a backup, or push its adapter again."
                ) from error

    def path(self, key: BlobKey) -> Path:
        return self._root / key.location

    def read(self, key: BlobKey, verify: bool = True) -> bytes:
        with self.open(key) as file, _typed(f"read blob {key.digest}", self._root):
            data = file.read()
        if verify and (found := Digest.of(data)) != key.digest:
            raise BadInput(
                f"blob {key.digest} in the store {self._root} is corrupt: its {len(data)} bytes hash to "
                f"{found}; restore it from a backup, or push its adapter again."
            )
        return data

    def keys(self) -> Iterator[BlobKey]:
        with _typed("list the blobs", self._root):
            self._be_no_file()
            for directory in _entries(self._root / "blobs"):
                for name in _entries(self._root / "blobs" / directory):
                    # What is not named as a blob, in its own directory, is not ours: not listed,
                    # hence never deleted.
                    try:
                        key = BlobKey.parse(name)
                    except BadInput:
                        continue
                    if key.digest.hex[:2] == directory:
                        yield key

    def delete(self, key: BlobKey) -> None:
        # No sync of the directory: a delete that a power loss undoes leaves an orphan, which the next
        # collection finds again. A directory of that name is no copy, and would stop every collection.
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        with _typed(f"delete blob {key.digest}", self._root), suppress(*absent):
            self.path(key).unlink()

    def quarantine(self, key: BlobKey) -> str:
        # A generation is drawn once, so nothing is there already.
        return self._put_aside(self.path(key), f"blob {key.digest}", key.name)

    def unfinished(self) -> Iterator[Unfinished]:
        with _typed("list what was not written to its end", self._root):
            for name in _entries(self._root / "tmp"):
                try:
                    key = BlobKey.parse(name.rpartition(".")[0])
                    size = (self._root / "tmp" / name).lstat().st_size
                except (BadInput, FileNotFoundError):  # not ours, or just finished
                    continue
                yield Unfinished(key.digest, name, size)

    def discard(self, write: Unfinished) -> None:
        with _typed("remove what was not written to its end", self._root):
            (self._root / "tmp" / write.name).unlink(missing_ok=True)

    def check_writable(self) -> None:
        with _typed("write", self._root):
            if self._root.exists() and not os.access(self._root, os.W_OK):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self._root))

    def owner(self) -> bytes | None:
        return self._small(self._root / "store.json")

    def claim(self, owner: bytes) -> bytes:
        return self._write_small(self._root / "store.json", owner)

    def disown(self) -> None:
        with _typed("remove store.json", self._root):
            (self._root / "store.json").unlink(missing_ok=True)

    def records(self, beyond: int = 0) -> Iterator[int]:
        with _typed("list the ledger", self._root):
            found = (int(name) for name in _entries(self._root / "ledger") if _RECORD.fullmatch(name))
            yield from (seq for seq in found if seq > beyond)

    def read_record(self, seq: int) -> bytes | None:
        return self._small(self._record(seq))

    def write_record(self, seq: int, data: bytes) -> None:
        if self._write_small(self._record(seq), data) != data:
            raise Conflict(
                f"the store {self._root} has another record {seq} of its ledger: the catalog is an older copy of the "
                "one that wrote it; restore the newest, or make it again with `loreg fsck --rebuild-catalog`."
            )

    def delete_record(self, seq: int) -> None:
        with _typed(f"delete record {seq}", self._root):
            self._record(seq).unlink(missing_ok=True)

    def quarantine_record(self, seq: int) -> str:
        return self._put_aside(self._record(seq), f"record {seq}", f"ledger-{seq:016d}.{new_generation()}")

    def _record(self, seq: int) -> Path:
        return self._root / "ledger" / f"{seq:016d}"

    def _small(self, path: Path) -> bytes | None:
        with _typed(f"read {path.name}", self._root):
            self._be_no_file()
            with suppress(FileNotFoundError, NotADirectoryError), _open_regular(path) as file:
                return file.read()
        return None

    def _write_small(self, path: Path, data: bytes) -> bytes:
        """What the file has now: ``data``, or what was there before. Durable either way."""
        digest = Digest.of(data)
        while (there := self._small(path)) is None:
            name = f"{digest.hex}.{new_generation()}.{new_generation()}"
            with suppress(Conflict):  # no push pins it, so a collection may take it for one that never ended
                if self._write(path.name, path, name, digest, [data]):
                    return data
        with _typed(f"write {path.name}", self._root):
            _sync_directory(path.parent)  # whoever wrote it may not have come to that yet
        return there

    def _write(self, what: str, final: Path, name: str, digest: Digest, chunks: Iterable[bytes | memoryview]) -> bool:
        """Write and sync a temporary file of that name, and give it its final one. False if that is there already."""
        doing = f"write {what}"
        partial = self._root / "tmp" / name
        with _typed(doing, self._root):
            self._make_root()
            for directory in (partial.parent, *reversed([up for up in final.parents if self._root in up.parents])):
                self._make_directory(directory)
        try:
            self._fill(doing, partial, digest, chunks)
            with _typed(doing, self._root):
                return _publish(partial, final)
        finally:
            # Left behind only by a crash, or by a disk that refuses even this; never seen under a key.
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _put_aside(self, path: Path, what: str, name: str) -> str:
        aside = self._root / "quarantine"
        with _typed(f"put {what} aside", self._root):
            self._make_directory(aside)
            try:
                path.rename(aside / name)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFound(f"{what} is not in the store {self._root}: nothing to put aside.") from error
            _sync_directory(aside)
            _sync_directory(path.parent)
        return str(aside / name)

    def _fill(self, doing: str, partial: Path, digest: Digest, chunks: Iterable[bytes | memoryview]) -> None:
        """Write and sync the temporary file. Raises BadInput if the bytes have another digest."""
        hasher = Hasher()
        with _typed(doing, self._root):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for chunk in chunks:  # what it raises is the caller's, not a failure of this disk
                data = as_bytes(chunk)
                hasher.update(data)
                with _typed(doing, self._root):
                    while data:
                        data = data[os.write(descriptor, data) :]
            if (found := hasher.digest()) != digest:
                raise BadInput(
                    f"the bytes given for blob {digest} are not its bytes: they hash to {found}; the source changed "
                    "while it was read, or was corrupt: try again."
                )
            with _typed(doing, self._root):
                os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
        finally:
            with _typed(doing, self._root):
                os.close(descriptor)

    def _be_no_file(self) -> None:
        """Else every blob would be said to be missing, and people would look for a backup."""
        if self._root.exists() and not self._root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._root))

    def _make_root(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                path.mkdir()
            _sync_directory(path.parent)

    def _make_directory(self, path: Path) -> None:
        """There, and its entry in its parent on disk.

        Synced once by every process, also where another made it: that one may not have come to its own
        sync yet, and a blob in a directory that is lost is lost.
        """
        try:
            path.mkdir()
        except FileExistsError:
            if path in self._durable:
                return
        _sync_directory(path.parent)
        self._durable.add(path)


def _open_regular(path: Path) -> BinaryIO:
    # Opening a pipe would wait for ever for somebody to write, and reading a device may never end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _publish(partial: Path, final: Path) -> bool:
    """Give the synced file its name, and make the name durable. False if something has it; raises Conflict if the
    file is gone."""
    try:
        # link, not rename: rename would silently replace a file that is there already.
        os.link(partial, final)
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise Conflict(
            f"{partial.name} was removed before it was written to its end: a push that stands still for longer than "
            "its lease is taken for dead; push again."
        ) from error
    try:
        _sync_directory(final.parent)
    except BaseException:
        with suppress(OSError):
            final.unlink()
        raise
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def _typed(doing: str, root: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a sentence of the family that is at fault."""
    try:
        yield
    except OSError as error:
        family: type[LoregError]
        if error.errno in _FULL:
            family, advice = CheckFailed, "free some space, or move the store with LOREG_STORE"
        elif error.errno in _TOO_MANY:
            family, advice = (
                CheckFailed,
                "raise the limit of open files, as with `ulimit -n 4096`, or do less at once",
            )
        elif error.errno in _UNUSABLE:
            family, advice = UsageError, "choose a writable directory with LOREG_STORE or LOREG_HOME"
        else:
            family, advice = BadInput, "check the disk, and restore a backup if need be"
        where = f" at {error.filename}" if error.filename else ""
        raise family(f"could not {doing} in the store {root}: {error.strerror or error}{where}; {advice}.") from error
